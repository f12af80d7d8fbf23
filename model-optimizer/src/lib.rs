//! Makes a model smaller and faster, and measures what that cost.
//!
//! Five steps (fetch, convert, compress, evaluate, publish) share a folder: in a Job each is a process of its own
//! ([`step::chain`] lets one follow the other), on a laptop they run one after another ([`optimize`]).

#[cfg(test)]
extern crate self as plimsoll_optimizer;

pub mod calibration;
pub mod compress;
pub mod convert;
pub mod evaluate;
pub mod failure;
pub mod graph;
pub mod optimize;
pub mod progress;
pub mod recipe_file;
pub mod report;
pub mod search;
pub mod source;
pub mod step;
pub mod support;
