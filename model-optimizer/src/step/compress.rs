//! `compress`: applies the recipe.

use plimsoll_package::report::{Skipped, TechniqueReport};
use plimsoll_package::units::display_size;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::Context;
use crate::failure::Failure;
use crate::{compress, convert};

/// The record of this step.
pub const RECORD: &str = "compressed.json";

/// What was done.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Compressed {
    /// By each technique, in order.
    pub steps: Vec<TechniqueReport>,
    /// What was left alone.
    pub skipped: Vec<Skipped>,
    /// Whether an engine shall fold `DequantizeLinear` over initialisers into floats.
    pub fold_dequantize: bool,
}

/// Compresses.
///
/// # Errors
/// Where a technique does not work on the model.
pub fn run(context: &Context) -> Result<(), Failure> {
    let mut model = convert::read(&context.inputs.source.uri, &context.converted())?;
    let mut record = Compressed::default();
    for entry in &context.inputs.optimize.recipe {
        let change = compress::technique(entry)?.apply(&mut model)?;
        let size_after = model.encoded_len() as u64;
        let name = if entry.prune.is_some() { "pruned" } else { "quantised" };
        context.console.info(&format!(
            "{name} {} weights, now {}",
            change.changed.len(),
            display_size(size_after)
        ));
        record.steps.push(TechniqueReport {
            technique: entry.clone(),
            changed: change.changed,
            size_after,
        });
        record.skipped.extend(change.skipped);
        record.fold_dequantize |= change.fold_dequantize;
    }
    convert::write(&model, &context.compressed())?;
    context.write(RECORD, &record)
}
