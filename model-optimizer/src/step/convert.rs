//! `convert`: makes ONNX of the model.

use super::Context;
use crate::convert;
use crate::failure::Failure;

/// Converts.
///
/// # Errors
/// Where the file is no model, or one that no engine runs.
pub fn run(context: &Context) -> Result<(), Failure> {
    convert::to_onnx(
        &context.inputs.source.uri,
        &context.source("model"),
        &context.converted(),
        (!context.inputs.no_gate).then_some(context.threads),
    )
}
