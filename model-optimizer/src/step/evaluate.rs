//! `evaluate`: measures the model before and after, holds it against the budget, and lays out the package.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use plimsoll_package::digest::Digest;
use plimsoll_package::manifest::{File, MANIFEST_FILE, MODEL_FILE, Manifest, PROBE_FILE, Probe, REPORT_FILE, TensorSpec};
use plimsoll_package::recipe::Metric;
use plimsoll_package::report::{ClassChange, EngineReport, MetricChange, OutputFidelity, Report, Summary};
use plimsoll_runtime::engine::{Engine, Tensor};
use strum::IntoEnumIterator as _;

use super::chain::took_ms;
use super::compress::Compressed;
use super::fetch::Fetched;
use super::{Context, Step, write_json};
use crate::evaluate::dataset::Dataset;
use crate::evaluate::engines::{self, Pair};
use crate::evaluate::{budget, fidelity, metric};
use crate::failure::{Failure, FailureReason, chain, disk, failure};
use crate::{convert, graph};

/// Evaluates.
///
/// # Errors
/// Where the data do not fit the model, no engine runs the result, or it is outside of the budget.
pub fn run(context: &Context) -> Result<(), Failure> {
    let begun = std::time::Instant::now();
    let fetched: Fetched = context.read(super::fetch::RECORD)?;
    let compressed: Compressed = context.read(super::compress::RECORD)?;
    let candidates = engines::load(context, compressed.fold_dequantize)?;
    let first = &candidates.engines[0];
    let mut data = Data::of(context, first.after.inputs())?;
    let mut sample = one_sample(&data.samples, &*first.after);
    if !data.real && first.after.run(&sample).is_err() {
        // An open dimension that is no batch may have to be of a certain size; 1 is the likeliest.
        data.samples = Dataset::drawn(first.after.inputs(), Some(1)).unwrap_or(data.samples);
        sample = one_sample(&data.samples, &*first.after);
    }
    let (measured, probe) = engines::compare(&candidates, &sample, context)?;
    let engines: Vec<EngineReport> = measured
        .iter()
        .map(|measured| measured.report.clone())
        .chain(candidates.refused.iter().cloned())
        .collect();
    let fastest = measured
        .iter()
        .filter_map(|measured| Some((measured.pair?, measured.report.latency?)));
    let fastest = fastest.min_by(|a, b| a.1.after_us.total_cmp(&b.1.after_us));
    let (chosen, latency) = fastest.ok_or_else(|| {
        let words = engines
            .iter()
            .filter_map(|engine| Some(format!("{}: {}", engine.engine, engine.refused.as_ref()?)))
            .collect::<Vec<_>>()
            .join("; ");
        failure(
            FailureReason::UnsupportedOperator,
            format!("no engine runs the compressed model: {words}; leave out quantize, or use another scheme"),
        )
    })?;
    let judgement = judge(context, chosen, &data)?;

    let file_size = |path: &Path| fs::metadata(path).map(|metadata| metadata.len()).map_err(disk("read", path));
    let model = convert::read(&context.inputs.source.uri, &context.compressed())?;
    let summary = Summary {
        artifact: None,
        reused: false,
        source_digest: fetched.source.digest.clone(),
        evaluation_digest: fetched.evaluation.as_ref().map(|content| content.digest.clone()),
        size_before: fetched.source.size,
        size_after: file_size(&context.compressed())?,
        sparsity: model.graph.as_ref().map_or(0.0, graph::weight::sparsity),
        metric: judgement.metric,
        fidelity: judgement.outputs.iter().map(|output| output.cosine).reduce(f64::min),
        latency: Some(latency),
        engine: chosen.after.kind(),
        toolchain: env!("CARGO_PKG_VERSION").to_owned(),
    };
    budget::check(context.inputs.optimize.budget.as_ref(), &summary, &judgement.outputs)?;
    let mut step_ms: BTreeMap<String, f64> = Step::iter()
        .filter_map(|step| Some((step.to_string(), took_ms(&context.work, step)?)))
        .collect();
    step_ms.insert(Step::Evaluate.to_string(), begun.elapsed().as_secs_f64() * 1e3);
    let report = Report {
        schema_version: 1,
        summary,
        inputs: context.inputs.clone(),
        steps: compressed.steps,
        outputs: judgement.outputs,
        classes: judgement.classes,
        engines,
        skipped: compressed.skipped,
        step_ms,
    };
    write_package(context, &report, &probe, chosen, compressed.fold_dequantize)
}

/// The samples to judge on.
struct Data {
    samples: Dataset,
    /// Whether they come from a dataset, rather than from the signature.
    real: bool,
    metric: Metric,
}

impl Data {
    fn of(context: &Context, inputs: &[TensorSpec]) -> Result<Self, Failure> {
        let optimize = &context.inputs.optimize;
        let invalid = |what: &str, why: String| {
            failure(
                FailureReason::InvalidDataset,
                format!("the {what} data do not fit the model: {why}"),
            )
        };
        let bytes_max = context.inputs.max_fetch_size.value().unwrap_or(u64::MAX);
        if let Some(evaluation) = &optimize.evaluation {
            let samples = Dataset::read(&context.source("evaluation"), inputs, evaluation.labels.as_deref(), bytes_max);
            let mut samples = samples.map_err(|why| invalid("evaluation", why))?;
            let needs_labels = optimize.budget.as_ref().is_some_and(|budget| budget.max_accuracy_drop.is_some());
            let metric = evaluation.metric.unwrap_or(if samples.labels.is_some() || needs_labels {
                Metric::Accuracy
            } else {
                Metric::Fidelity
            });
            if metric == Metric::Accuracy && samples.labels.is_none() {
                return Err(invalid(
                    "evaluation",
                    "they hold no labels (an array `y`); add them, or use the metric Fidelity".into(),
                ));
            }
            if metric == Metric::Fidelity {
                samples.labels = None;
            }
            return Ok(Self {
                samples,
                real: true,
                metric,
            });
        }
        if optimize.calibration.is_some() {
            let samples =
                Dataset::read(&context.source("calibration"), inputs, None, bytes_max).map_err(|why| invalid("calibration", why))?;
            return Ok(Self {
                samples: Dataset { labels: None, ..samples },
                real: true,
                metric: Metric::Fidelity,
            });
        }
        let samples = Dataset::drawn(inputs, None);
        let samples = samples.ok_or_else(|| invalid("drawn", "an input is larger than memory; name evaluation data".into()))?;
        Ok(Self {
            samples,
            real: false,
            metric: Metric::Fidelity,
        })
    }
}

/// One sample, or as many as a model of a fixed batch takes.
fn one_sample(samples: &Dataset, engine: &dyn Engine) -> Vec<Tensor> {
    let fixed = engine
        .inputs()
        .iter()
        .filter_map(|spec| spec.shape.first())
        .find_map(|&size| usize::try_from(size).ok());
    samples.batch(0..fixed.unwrap_or(1).min(samples.samples))
}

struct Judgement {
    metric: Option<MetricChange>,
    outputs: Vec<OutputFidelity>,
    classes: Vec<ClassChange>,
}

fn judge(context: &Context, chosen: &Pair, data: &Data) -> Result<Judgement, Failure> {
    let samples = &data.samples;
    let total = 2 * samples.samples as u64;
    let activity = context.console.activity("evaluating", "samples");
    let unfit = |error| {
        let reason = if data.real {
            FailureReason::InvalidDataset
        } else {
            FailureReason::Internal
        };
        failure(
            reason,
            format!(
                "the model does not run on the samples: {}; name fitting data in optimize.evaluation",
                chain(&error)
            ),
        )
    };
    let before = samples
        .run(&*chosen.before, |done| activity.report(done as u64, Some(total)))
        .map_err(unfit)?;
    let after = samples
        .run(&*chosen.after, |done| activity.report((samples.samples + done) as u64, Some(total)))
        .map_err(unfit)?;
    let specs = chosen.after.outputs().iter().zip(before.values.iter().zip(&after.values));
    let outputs = specs
        .filter(|(_, (before, _))| !before.is_empty())
        .map(|(spec, (before, after))| fidelity::compare(&spec.name, before, after))
        .collect();
    let mut judgement = Judgement {
        metric: None,
        outputs,
        classes: vec![],
    };
    if let (Metric::Accuracy, Some(labels)) = (data.metric, &samples.labels) {
        let invalid = |why| failure(FailureReason::InvalidDataset, format!("accuracy cannot be measured: {why}"));
        let (predicted_before, predicted_after) = (
            metric::predictions(&before).map_err(invalid)?,
            metric::predictions(&after).map_err(invalid)?,
        );
        let labels = &labels[..before.samples];
        judgement.metric = Some(MetricChange {
            name: Metric::Accuracy,
            before: metric::accuracy(&predicted_before, labels),
            after: metric::accuracy(&predicted_after, labels),
            samples: before.samples as u64,
        });
        judgement.classes = metric::by_class(&predicted_before, &predicted_after, labels);
    }
    Ok(judgement)
}

fn write_package(context: &Context, report: &Report, probe: &Probe, chosen: &Pair, fold_dequantize: bool) -> Result<(), Failure> {
    let package = context.package();
    fs::create_dir_all(&package).map_err(disk("make", &package))?;
    let model = package.join(MODEL_FILE);
    fs::copy(context.compressed(), &model).map_err(disk("write", &model))?;
    write_json(&package.join(REPORT_FILE), report)?;
    write_json(&package.join(PROBE_FILE), probe)?;
    let mut files = BTreeMap::new();
    for name in [MODEL_FILE, REPORT_FILE, PROBE_FILE] {
        let path = package.join(name);
        let file = fs::File::open(&path).map_err(disk("read", &path))?;
        let size = file.metadata().map_err(disk("read", &path))?.len();
        files.insert(
            name.to_owned(),
            File {
                digest: Digest::of_reader(file).map_err(disk("read", &path))?,
                size,
            },
        );
    }
    let manifest = Manifest {
        schema_version: 1,
        inputs: chosen.after.inputs().to_vec(),
        outputs: chosen.after.outputs().to_vec(),
        engine: chosen.after.kind(),
        fold_dequantize,
        files,
        source_digest: report.summary.source_digest.clone(),
        toolchain: report.summary.toolchain.clone(),
    };
    write_json(&package.join(MANIFEST_FILE), &manifest)
}
