//! `convert`: makes ONNX of the model.

use super::Context;
use crate::convert;
use crate::failure::Failure;

/// Converts.
///
/// # Errors
/// Where the file is no model, or one that no engine runs.
pub fn run(context: &Context) -> Result<(), Failure> {
    let trial = convert::Trial {
        threads: context.threads,
        engine: context.inputs.engine,
    };
    convert::to_onnx(
        &context.inputs.source.uri,
        &context.source("model"),
        &context.converted(),
        Some(&trial).filter(|_| !context.inputs.no_gate),
    )
}
