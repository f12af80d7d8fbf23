//! Techniques that make a model smaller, all behind one trait.

use plimsoll_package::recipe::{self, QuantizeScheme};
use plimsoll_package::report::Skipped;
use plimsoll_runtime::onnx::ModelProto;

use crate::failure::{Failure, FailureReason, failure};

pub mod prune;
pub mod quantize;

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

/// A technique with its parameters.
pub trait Technique {
    /// Changes the model.
    ///
    /// # Errors
    /// Where the model is not one that the technique works on; it is then not to be used further.
    fn apply(&self, model: &mut ModelProto) -> Result<Change, Failure>;
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
        recipe::Technique { prune: Some(prune), .. } => {
            let amount = prune
                .amount
                .value()
                .map_err(|error| failure(FailureReason::InvalidInputs, error.to_string()))?;
            Ok(Box::new(prune::Magnitude {
                amount,
                scope: prune.scope,
            }))
        }
        recipe::Technique {
            quantize: Some(quantize), ..
        } => match quantize.scheme {
            QuantizeScheme::Int8 | QuantizeScheme::Int8Dynamic => Ok(Box::new(quantize::Int8 { dynamic: true })),
            QuantizeScheme::Int8Weights => Ok(Box::new(quantize::Int8 { dynamic: false })),
            _ => Err(unsupported()),
        },
        _ => Err(unsupported()),
    }
}

fn skipped(name: &str, reason: impl Into<String>) -> Skipped {
    Skipped {
        name: name.to_owned(),
        reason: reason.into(),
    }
}
