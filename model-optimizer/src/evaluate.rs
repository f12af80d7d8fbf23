//! What compression cost: accuracy, fidelity, latency and size, before and after, on the engines that will serve.

pub mod budget;
pub mod dataset;
pub mod engines;
pub mod fidelity;
pub mod judgement;
pub mod latency;
pub mod layers;
mod memory;
pub mod metric;
pub mod reference;
