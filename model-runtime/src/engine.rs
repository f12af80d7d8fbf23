//! Engines: what runs a model. One trait, two implementations, and the same answers from both.
//!
//! Architecture invariant: this module is synchronous and knows neither tokio nor HTTP.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_package::manifest::{Datatype, TensorSpec};

use crate::onnx::OnnxError;

mod device;
pub mod independence;
mod onnxruntime;
pub mod probe;
mod telemetry;
pub mod tensor;
mod tract;

pub use device::{Device, DeviceError};
pub use onnxruntime::{LIBRARY_VARIABLE, default_library};
pub use telemetry::disable_telemetry;
pub use tensor::{Data, Tensor};

/// A loaded model. Calls from several threads are safe; an engine may run them one after another.
pub trait Engine: Send + Sync {
    /// Which engine this is.
    fn kind(&self) -> EngineKind;

    /// The inputs, in the order that [`run`](Self::run) takes them.
    fn inputs(&self) -> &[TensorSpec];

    /// The outputs, in the order that [`run`](Self::run) gives them.
    fn outputs(&self) -> &[TensorSpec];

    /// Runs the model on inputs that fit their specs; callers use [`run`](Self::run), which checks that they do.
    ///
    /// # Errors
    /// [`EngineError::Run`] with the engine's own words.
    fn infer(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError>;

    /// As [`infer`](Self::infer), but given up where it takes longer than `limit`, which is looked at between two nodes of the graph and
    /// does not count what the engine prepares once for new shapes. An engine that cannot be broken off goes on to the end.
    ///
    /// # Errors
    /// As [`infer`](Self::infer), and [`EngineError::Late`].
    fn infer_within(&self, inputs: &[Tensor], limit: Duration) -> Result<Vec<Tensor>, EngineError> {
        let _ = limit;
        self.infer(inputs)
    }

    /// Runs the model on one tensor for each input.
    ///
    /// # Errors
    /// [`EngineError::Input`] where the inputs do not fit the model, [`EngineError::Run`] where the engine fails, and
    /// [`EngineError::Panicked`] where it panics; the engine can be used again after each.
    fn run(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        check(self.inputs(), inputs)?;
        contained(|| self.infer(inputs))
    }

    /// As [`run`](Self::run), but given up as [`infer_within`](Self::infer_within) is.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`EngineError::Late`].
    fn run_within(&self, inputs: &[Tensor], limit: Duration) -> Result<Vec<Tensor>, EngineError> {
        check(self.inputs(), inputs)?;
        contained(|| self.infer_within(inputs, limit))
    }
}

/// What `call` gives; its panic becomes an error.
fn contained<T>(call: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(&*panic))))
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Threads that one inference may use, 1 or more.
    pub threads: usize,
    /// Whether `DequantizeLinear` over initialisers is folded into floats at load (weight-only quantisation). tract folds them always,
    /// since it runs them wrongly otherwise.
    pub fold_dequantize: bool,
    /// ONNX Runtime's shared library; by default what [`LIBRARY_VARIABLE`] names. The first one that loads is used by the whole process.
    pub library: Option<PathBuf>,
    /// What the model is computed on; tract knows the processor alone.
    pub device: Device,
    /// Most bytes of a GPU's memory that ONNX Runtime keeps for the model's weights and tensors; what its libraries take comes on top.
    pub device_bytes_max: Option<usize>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            threads: 1,
            fold_dequantize: true,
            library: None,
            device: Device::Cpu,
            device_bytes_max: None,
        }
    }
}

/// Loads the ONNX model at `path` into the engine of that kind.
///
/// # Errors
/// [`EngineError::Library`] where ONNX Runtime's library is missing, [`EngineError::Model`] where the file is no model that can be
/// served, [`EngineError::Load`] where the engine refuses it.
pub fn load(kind: EngineKind, path: &Path, options: &LoadOptions) -> Result<Box<dyn Engine>, EngineError> {
    if options.device_bytes_max.is_some() && !options.device.is_gpu() {
        return Err(EngineError::Load {
            engine: kind,
            path: path.to_owned(),
            reason: format!("the memory of a GPU is bounded, and the device is {}", options.device),
        });
    }
    contained(|| {
        let engine: Box<dyn Engine> = match kind {
            EngineKind::Tract => Box::new(tract::Tract::load(path, options)?),
            EngineKind::OnnxRuntime => Box::new(onnxruntime::OnnxRuntime::load(path, options)?),
        };
        Ok(engine)
    })
}

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// ONNX Runtime's shared library cannot be used.
    #[error("ONNX Runtime's library cannot be used: {0}")]
    Library(String),
    /// The model's file cannot be read or served by any engine.
    #[error(transparent)]
    Model(#[from] OnnxError),
    /// The engine refuses the model.
    #[error("{engine} cannot load {path}: {reason}", path = path.display())]
    Load {
        /// The engine.
        engine: EngineKind,
        /// The model's file.
        path: PathBuf,
        /// The engine's words.
        reason: String,
    },
    /// The inputs do not fit the model: the caller's mistake.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The engine failed on inputs that fit the model.
    #[error("{engine} failed: {reason}")]
    Run {
        /// The engine.
        engine: EngineKind,
        /// Its words.
        reason: String,
    },
    /// The inference was given up.
    #[error("{engine} was not done after {} ms", limit.as_millis())]
    Late {
        /// The engine.
        engine: EngineKind,
        /// What it was given.
        limit: Duration,
    },
    /// The engine panicked; only this call is lost.
    #[error("the engine panicked: {0}")]
    Panicked(String),
}

/// Inputs that do not fit the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// Too many or too few tensors.
    #[error("the model takes {expected} inputs, {given} were given")]
    Count {
        /// How many the model takes.
        expected: usize,
        /// How many were given.
        given: usize,
    },
    /// A tensor of another element type.
    #[error("input `{name}` takes {expected}, {given} was given")]
    Datatype {
        /// The input.
        name: String,
        /// The type that it takes.
        expected: Datatype,
        /// The type that was given.
        given: Datatype,
    },
    /// A tensor of another shape.
    #[error("input `{name}` takes shape {expected:?} (-1 is any size), {given:?} was given")]
    Shape {
        /// The input.
        name: String,
        /// The shape that it takes.
        expected: Vec<i64>,
        /// The shape that was given.
        given: Vec<usize>,
    },
    /// A 64-bit integer that the device would cut off.
    #[error("input `{name}` holds {value}, and OpenVINO computes integers in 32 bits")]
    Integer {
        /// The input.
        name: String,
        /// The integer.
        value: i64,
    },
}

fn check(specs: &[TensorSpec], inputs: &[Tensor]) -> Result<(), InputError> {
    if specs.len() != inputs.len() {
        return Err(InputError::Count {
            expected: specs.len(),
            given: inputs.len(),
        });
    }
    specs
        .iter()
        .zip(inputs)
        .try_for_each(|(spec, input)| check_one(spec, input.datatype(), input.shape()))
}

/// Checks a tensor's element type and shape against the input that it is for.
///
/// # Errors
/// [`InputError::Datatype`] or [`InputError::Shape`].
pub fn check_one(spec: &TensorSpec, datatype: Datatype, shape: &[usize]) -> Result<(), InputError> {
    if datatype != spec.datatype {
        return Err(InputError::Datatype {
            name: spec.name.clone(),
            expected: spec.datatype,
            given: datatype,
        });
    }
    let fits = shape.len() == spec.shape.len()
        && shape
            .iter()
            .zip(&spec.shape)
            .all(|(&given, &expected)| expected < 0 || usize::try_from(expected) == Ok(given));
    if fits {
        Ok(())
    } else {
        Err(InputError::Shape {
            name: spec.name.clone(),
            expected: spec.shape.clone(),
            given: shape.to_vec(),
        })
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").to_owned()
}

#[cfg(test)]
mod tests;
