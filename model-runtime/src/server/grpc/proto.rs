//! The messages, generated from the files beside them: see the head of each.

#[allow(clippy::all, missing_docs, unreachable_pub)]
pub(in crate::server) mod health;
#[allow(clippy::all, missing_docs, unreachable_pub)]
pub(in crate::server) mod inference;
#[allow(clippy::all, missing_docs, unreachable_pub)]
pub(in crate::server) mod reflection;
