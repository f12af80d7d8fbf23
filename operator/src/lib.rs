//! The control plane of Plimsoll: observe -> decide -> build -> apply.
//!
//! [`observe`] is the only reader of the cluster and [`apply`] its only writer; [`decide`] and [`build`] are pure.

pub mod apply;
pub mod backoff;
pub mod build;
pub mod controller;
pub mod decide;
pub mod health;
pub mod lease;
pub mod metrics;
pub mod observe;
pub mod settings;

#[cfg(test)]
mod apiserver;
#[cfg(test)]
mod permissions;
