//! The inference server, and the engines that it and the optimiser share.
//!
//! [`engine`] runs a model with tract or ONNX Runtime; it is synchronous and knows neither tokio nor HTTP. [`onnx`] reads ONNX models,
//! [`observation`] says which values count towards a distribution.
//! With feature `server` (on by default) the rest is there: [`serve`](server::serve) loads a package, proves it by its probe, and
//! answers the Open Inference Protocol V2 over HTTP.

pub mod engine;
pub mod observation;
pub mod onnx;
#[cfg(feature = "server")]
pub mod server;
