//! Techniques that make a model smaller, all behind one trait.

use plimsoll_package::manifest::Engine;
use plimsoll_package::recipe;
use plimsoll_package::report::Skipped;
use plimsoll_runtime::onnx::ModelProto;

use crate::calibration::Calibration;
use crate::failure::{Failure, FailureReason, failure};
use crate::progress::Console;

pub mod distill;
pub mod hessian;
pub mod prune;
pub mod quantize;
pub mod untouched;

/// What a technique did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Change {
    /// Names of the weights that it changed.
    pub changed: Vec<String>,
    /// What it left alone, and why.
    pub skipped: Vec<Skipped>,
    /// Whether an engine shall fold `DequantizeLinear` over initialisers into floats.
    pub fold_dequantize: bool,
}

/// What a technique may look at besides the model.
pub struct Setting<'a> {
    /// Samples that the model can be run on, for a distillation its training data; `None` where there are none.
    pub calibration: Option<&'a Calibration>,
    /// The model before any technique was applied; for a distillation the teacher, where one is named.
    pub original: &'a ModelProto,
    /// Threads to compute with, 1 or more.
    pub threads: usize,
    /// The engine that will serve, where that is settled.
    pub engine: Option<Engine>,
    /// Where progress is shown.
    pub console: &'a Console,
}

impl<'a> Setting<'a> {
    /// The calibration data, for a technique that cannot do without.
    ///
    /// # Errors
    /// [`FailureReason::InvalidInputs`] where there are none; `technique` is what the message says needs them.
    pub fn calibration(&self, technique: &str) -> Result<&'a Calibration, Failure> {
        self.calibration.ok_or_else(|| {
            let message = format!("{technique} needs samples: name them in optimize.calibration (on the command line --calibration)");
            failure(FailureReason::InvalidInputs, message)
        })
    }
}

/// A technique with its parameters.
pub trait Technique {
    /// Changes the model.
    ///
    /// # Errors
    /// Where the model is not one that the technique works on; it is then not to be used further.
    fn apply(&self, model: &mut ModelProto, setting: &Setting) -> Result<Change, Failure>;
}

/// The technique that an entry of a recipe names.
///
/// # Errors
/// [`FailureReason::Unsupported`] where this version does not have it.
pub fn technique(entry: &recipe::Technique) -> Result<Box<dyn Technique>, Failure> {
    let unsupported = || {
        failure(
            FailureReason::Unsupported,
            "optimize.recipe names a technique that this version does not have",
        )
    };
    match entry {
        recipe::Technique { prune: Some(prune), .. } => prune::technique(prune),
        recipe::Technique {
            quantize: Some(quantize), ..
        } => quantize::technique(quantize),
        recipe::Technique {
            distill: Some(distill), ..
        } => distill::technique(distill),
        _ => Err(unsupported()),
    }
}

fn skipped(name: &str, reason: impl Into<String>) -> Skipped {
    Skipped {
        name: name.to_owned(),
        reason: reason.into(),
    }
}
