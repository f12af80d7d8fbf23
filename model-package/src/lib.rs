//! The artifact of an optimised model: on disk, and as an OCI image.
//!
//! A package is a folder:
//!
//! ```text
//! manifest.json   what it is: inputs, outputs, engine, files with digests, provenance   [`manifest::Manifest`]
//! report.json     what the optimisation measured                                        [`report::Report`]
//! report.html     the same as a page for people
//! model.onnx      the model
//! probe.json      an input and the outputs expected for it, which readiness replays
//! drift.json      how the values of inputs and outputs were distributed on its data      [`drift::Reference`]
//! tokenizer.json, config.json, ...    what its inputs and outputs mean                  [`companion`]
//! ```
//!
//! In a registry the same folder is an image whose layers hold `/model/...`, so that a kubelet mounts it as an image volume.

pub mod companion;
pub mod digest;
pub mod drift;
pub mod key;
pub mod manifest;
pub mod recipe;
pub mod report;
pub mod units;

#[cfg(feature = "registry")]
pub mod registry;
