//! The objects of a model, one file a kind: pure functions from decisions to what is applied.

pub mod deployment;
pub mod disruption_budget;
pub mod job;
pub mod metadata;
pub mod network_policy;
pub mod pull_secrets;
pub mod security;
pub mod service;

#[cfg(test)]
mod fields;
#[cfg(test)]
mod golden;
