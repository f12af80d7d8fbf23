//! `compress`: applies the recipe, or finds it by a search.

use plimsoll_package::recipe::{SourceLocation, Technique};
use plimsoll_package::report::front::Front;
use plimsoll_package::report::{Skipped, TechniqueReport};
use plimsoll_package::units::display_size;
use plimsoll_runtime::onnx::{self, ModelProto};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::Context;
use super::fetch::{TEACHER, calibrates_on_evaluation, distillation_file};
use crate::calibration::Calibration;
use crate::compress::Setting;
use crate::compress::untouched::untouched;
use crate::evaluate::dataset::{Dataset, Part, SPLIT_SEED};
use crate::failure::{Failure, FailureReason, failure};
use crate::progress::Console;
use crate::{compress, convert, search};

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
    /// What a search tried, where the recipe is one that it found.
    #[serde(default)]
    pub front: Option<Front>,
}

/// Compresses, by the recipe or by the one that a search finds.
///
/// # Errors
/// Where a technique does not work on the model.
pub fn run(context: &Context) -> Result<(), Failure> {
    let materials = Materials::read(context)?;
    if let Some(search) = &context.inputs.optimize.search {
        return search::run(context, search, materials);
    }
    let (model, record) = materials.compress(context, &context.inputs.optimize.recipe, &context.console)?;
    convert::write(&model, &context.compressed())?;
    context.write(RECORD, &record)
}

/// What recipes are applied to, and with.
pub(crate) struct Materials {
    /// The converted model.
    pub(crate) original: ModelProto,
    /// The calibration data, where they are named.
    pub(crate) calibration: Option<Calibration>,
    teacher: Option<ModelProto>,
}

impl Materials {
    /// # Errors
    /// Where the model or the data cannot be read.
    pub(crate) fn read(context: &Context) -> Result<Self, Failure> {
        let original = convert::read(&context.inputs.source.uri, &context.converted())?;
        let calibration = match context.inputs.optimize.calibration {
            Some(_) => Some(samples(context, "calibration", "calibration", &original)?),
            None => None,
        };
        let teacher = context.inputs.teacher.as_ref();
        Ok(Self {
            calibration,
            teacher: teacher.map(|teacher| teacher_model(context, teacher)).transpose()?,
            original,
        })
    }

    /// What `recipe` makes of the original.
    ///
    /// # Errors
    /// Where a technique does not work on the model.
    pub(crate) fn compress(&self, context: &Context, recipe: &[Technique], console: &Console) -> Result<(ModelProto, Compressed), Failure> {
        let mut model = self.original.clone();
        let mut record = Compressed::default();
        for (index, entry) in recipe.iter().enumerate() {
            let mut setting = Setting {
                calibration: self.calibration.as_ref(),
                original: &self.original,
                threads: context.threads,
                engine: context.inputs.engine,
                console,
            };
            let training;
            if let Some(distill) = &entry.distill {
                setting.original = self.teacher.as_ref().unwrap_or(&self.original);
                if distill.data.is_some() {
                    training = samples(context, "training", &distillation_file(index), &self.original)?;
                    setting.calibration = Some(&training);
                }
            }
            let change = compress::technique(entry)?.apply(&mut model, &setting)?;
            let size_after = model.encoded_len() as u64;
            let name = match entry {
                Technique { prune: Some(_), .. } => "pruned",
                Technique { distill: Some(_), .. } => "trained",
                _ => "quantised",
            };
            console.info(&format!(
                "{name} {} weights, now {}",
                change.changed.len(),
                display_size(size_after)
            ));
            record.steps.push(TechniqueReport {
                technique: entry.clone(),
                buys: entry.buys().to_owned(),
                changed: change.changed,
                size_after,
            });
            record.skipped.extend(change.skipped);
            record.fold_dequantize |= change.fold_dequantize;
        }
        if !recipe.is_empty() {
            let untouched = untouched(&self.original, &model, &record.steps, &record.skipped);
            record.skipped.extend(untouched);
        }
        Ok((model, record))
    }
}

/// The samples that were fetched as `name`, to calibrate `model` on.
fn samples(context: &Context, what: &str, name: &str, model: &ModelProto) -> Result<Calibration, Failure> {
    Ok(Calibration::new(dataset(context, what, name, model)?, context.threads))
}

/// The samples that were fetched as `name`, for `model`; the user knows them as the `what` data.
///
/// # Errors
/// Where they do not fit the model.
pub(super) fn dataset(context: &Context, what: &str, name: &str, model: &ModelProto) -> Result<Dataset, Failure> {
    let unfit = |why: String| {
        failure(
            FailureReason::InvalidDataset,
            format!("the {what} data do not fit the model: {why}"),
        )
    };
    let (inputs, _) = onnx::signature(model).map_err(|error| unfit(error.to_string()))?;
    let bytes_max = context.inputs.max_fetch_size.value().unwrap_or(u64::MAX);
    let samples = Dataset::read(&context.source(name), &inputs, None, bytes_max);
    // One dataset for calibration and evaluation is split, so that nothing is judged on what a technique has seen.
    let samples = match name == "calibration" && calibrates_on_evaluation(context)? {
        true => samples.and_then(|samples| samples.split(Part::Calibration, SPLIT_SEED)),
        false => samples,
    };
    samples.map_err(unfit)
}

/// The teacher, which goes through the same conversion as the model.
fn teacher_model(context: &Context, teacher: &SourceLocation) -> Result<ModelProto, Failure> {
    let converted = context.work.join("converted").join("teacher.onnx");
    // It never serves: any engine will do.
    let trial = convert::Trial {
        threads: context.threads,
        engine: None,
    };
    convert::to_onnx(&teacher.uri, &context.source(TEACHER), &converted, Some(&trial))?;
    convert::read(&teacher.uri, &converted)
}
