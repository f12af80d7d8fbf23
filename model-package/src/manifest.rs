//! `manifest.json`: what a package is.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Name of the manifest's file in a package.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the report's file in a package.
pub const REPORT_FILE: &str = "report.json";
/// Name of the file in a package that shows the report to people.
pub const REPORT_PAGE_FILE: &str = "report.html";
/// Name of the model's file in a package.
pub const MODEL_FILE: &str = "model.onnx";
/// Name of the probe's file in a package.
pub const PROBE_FILE: &str = "probe.json";

/// What a package is: its model's signature, the engine that measured best, and the digest of every file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Version of this structure: 1.
    pub schema_version: u32,
    /// The model's inputs, in the graph's order.
    pub inputs: Vec<TensorSpec>,
    /// The model's outputs, in the graph's order.
    pub outputs: Vec<TensorSpec>,
    /// The engine that measured fastest when the package was made.
    pub engine: Engine,
    /// Whether `DequantizeLinear` over initialisers is folded into floats at load (weight-only quantisation).
    pub fold_dequantize: bool,
    /// Every file of the package but the manifest, by its path inside of it.
    pub files: BTreeMap<String, File>,
    /// Content digest of the source model.
    pub source_digest: Digest,
    /// Version of the optimiser.
    pub toolchain: String,
}

/// A file of a package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct File {
    /// Its content.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// Name, element type and shape of an input or output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TensorSpec {
    /// The tensor's name in the graph.
    pub name: String,
    /// Its element type.
    pub datatype: Datatype,
    /// Its dimensions; -1 where a dimension may vary, as in the Open Inference Protocol.
    pub shape: Vec<i64>,
}

/// Element types, by the names of the Open Inference Protocol ("Tensor Data Types").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, strum::Display, strum::EnumString, strum::EnumIter)]
#[serde(rename_all = "UPPERCASE")]
#[strum(serialize_all = "UPPERCASE")]
pub enum Datatype {
    /// Boolean, one byte.
    Bool,
    /// Unsigned 8-bit integer.
    Uint8,
    /// Unsigned 16-bit integer.
    Uint16,
    /// Unsigned 32-bit integer.
    Uint32,
    /// Unsigned 64-bit integer.
    Uint64,
    /// Signed 8-bit integer.
    Int8,
    /// Signed 16-bit integer.
    Int16,
    /// Signed 32-bit integer.
    Int32,
    /// Signed 64-bit integer.
    Int64,
    /// IEEE 754 half.
    Fp16,
    /// bfloat16.
    Bf16,
    /// IEEE 754 single.
    Fp32,
    /// IEEE 754 double.
    Fp64,
    /// Strings of bytes.
    Bytes,
}

/// An inference engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, strum::Display, strum::EnumString)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[strum(ascii_case_insensitive)]
pub enum Engine {
    /// tract, in pure Rust: runs everywhere.
    Tract,
    /// ONNX Runtime, loaded from its shared library.
    OnnxRuntime,
}

/// An input of the model and the outputs that the optimiser saw for it; a runtime is ready once it has reproduced them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// A tensor for every input.
    pub inputs: Vec<ProbeTensor>,
    /// A tensor for every output.
    pub outputs: Vec<ProbeTensor>,
    /// Largest difference from `outputs` that passes, relative to the largest absolute value of the output tensor.
    pub tolerance: f64,
}

/// A tensor of a probe, its values as JSON numbers in row-major order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProbeTensor {
    /// The tensor's name.
    pub name: String,
    /// Its element type.
    pub datatype: Datatype,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its values; booleans as 0 and 1.
    pub data: Vec<f64>,
}

/// A package that cannot be read or is not what its manifest says.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file does not parse.
    #[error("{path} is not valid", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The structure is newer than this program.
    #[error("the package has schema version {found}, this program reads version 1; use a newer version of it")]
    SchemaVersion {
        /// The version found.
        found: u32,
    },
    /// A path in the manifest leaves the package.
    #[error("the manifest names `{0}`, which is not a plain path inside of the package")]
    UnsafePath(String),
    /// A file is not the one that the manifest describes.
    #[error("{path} has digest {found}, its manifest says {expected}", path = path.display())]
    DigestMismatch {
        /// The file.
        path: PathBuf,
        /// The digest in the manifest.
        expected: Digest,
        /// The digest of the file.
        found: Digest,
    },
}

impl Manifest {
    /// Reads the manifest of the package in `dir` and checks its version and paths, not yet the files' contents.
    ///
    /// # Errors
    /// Where the file is missing, does not parse, is newer than this program, or names a path outside of the package.
    pub fn read(dir: &Path) -> Result<Self, PackageError> {
        let manifest: Self = read_json(&dir.join(MANIFEST_FILE))?;
        if manifest.schema_version != 1 {
            return Err(PackageError::SchemaVersion {
                found: manifest.schema_version,
            });
        }
        match manifest.files.keys().find(|path| !is_plain_path(path)) {
            Some(path) => Err(PackageError::UnsafePath(path.clone())),
            None => Ok(manifest),
        }
    }

    /// Checks the size and digest of every file of the package in `dir`.
    ///
    /// # Errors
    /// [`PackageError::DigestMismatch`] for the first file that differs.
    pub fn verify(&self, dir: &Path) -> Result<(), PackageError> {
        for (path, expected) in &self.files {
            let path = dir.join(path);
            let read = |source| PackageError::Read {
                path: path.clone(),
                source,
            };
            let found = Digest::of_reader(fs::File::open(&path).map_err(read)?).map_err(read)?;
            if found != expected.digest {
                return Err(PackageError::DigestMismatch {
                    path,
                    expected: expected.digest.clone(),
                    found,
                });
            }
        }
        Ok(())
    }
}

impl Probe {
    /// Reads the probe of the package in `dir`.
    ///
    /// # Errors
    /// Where the file is missing or does not parse.
    pub fn read(dir: &Path) -> Result<Self, PackageError> {
        read_json(&dir.join(PROBE_FILE))
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, PackageError> {
    let bytes = fs::read(path).map_err(|source| PackageError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|source| PackageError::Parse {
        path: path.to_owned(),
        source,
    })
}

fn is_plain_path(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|component| matches!(component, Component::Normal(_)))
}
