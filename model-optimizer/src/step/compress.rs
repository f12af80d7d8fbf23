//! `compress`: applies the recipe.

use plimsoll_package::report::{Skipped, TechniqueReport};
use plimsoll_package::units::display_size;
use plimsoll_runtime::onnx::{self, ModelProto};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::Context;
use super::fetch::calibrates_on_evaluation;
use crate::calibration::Calibration;
use crate::compress::Setting;
use crate::evaluate::dataset::{Dataset, Part, SPLIT_SEED};
use crate::failure::{Failure, FailureReason, failure};
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
    let original = model.clone();
    let calibration = calibration(context, &original)?;
    let setting = Setting {
        calibration: calibration.as_ref(),
        original: &original,
        threads: context.threads,
        console: &context.console,
    };
    let mut record = Compressed::default();
    for entry in &context.inputs.optimize.recipe {
        let change = compress::technique(entry)?.apply(&mut model, &setting)?;
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

/// The calibration data, where there are any.
fn calibration(context: &Context, model: &ModelProto) -> Result<Option<Calibration>, Failure> {
    if context.inputs.optimize.calibration.is_none() {
        return Ok(None);
    }
    let unfit = |why: String| {
        failure(
            FailureReason::InvalidDataset,
            format!("the calibration data do not fit the model: {why}"),
        )
    };
    let (inputs, _) = onnx::signature(model).map_err(|error| unfit(error.to_string()))?;
    let bytes_max = context.inputs.max_fetch_size.value().unwrap_or(u64::MAX);
    let samples = Dataset::read(&context.source("calibration"), &inputs, None, bytes_max);
    // One dataset for both is split, so that nothing is judged on what a technique has seen.
    let samples = match calibrates_on_evaluation(context)? {
        true => samples.and_then(|samples| samples.split(Part::Calibration, SPLIT_SEED)),
        false => samples,
    };
    let samples = samples.map_err(unfit)?;
    Ok(Some(Calibration::new(samples, context.threads)))
}
