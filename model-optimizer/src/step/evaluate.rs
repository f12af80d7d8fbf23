//! `evaluate`: measures the model before and after, holds it against the budget, and lays out the package.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use plimsoll_package::digest::Digest;
use plimsoll_package::drift::{DRIFT_FILE, Source};
use plimsoll_package::manifest::{
    Engine as EngineKind, File, MANIFEST_FILE, MODEL_FILE, Manifest, PROBE_FILE, Probe, REPORT_FILE, REPORT_PAGE_FILE, TensorSpec,
};
use plimsoll_package::recipe::Metric;
use plimsoll_package::registry::layer_size;
use plimsoll_package::report::front::{Front, Sweep};
use plimsoll_package::report::layer::LayerChange;
use plimsoll_package::report::{EngineReport, Gate, Report, SampleSource, Samples, Spread, Summary, Verdict};
use plimsoll_runtime::onnx::{self, ModelProto};
use strum::IntoEnumIterator as _;

use super::chain::took_ms;
use super::compress::Compressed;
use super::fetch::{self, Fetched, calibrates_on_evaluation};
use super::{Context, Step, write_json};
use crate::evaluate::dataset::{DRAWN_SEED, Dataset, Part, SPLIT_SEED};
use crate::evaluate::engines::{self, Candidates};
use crate::evaluate::judgement::{self, Judgement};
use crate::evaluate::reference::{self, Recorder};
use crate::evaluate::{budget, layers};
use crate::failure::{Failure, FailureReason, chain, disk, failure};
use crate::graph::{self, serialize};
use crate::search::{front, sensitivity};
use crate::{convert, report, source};

/// Evaluates; without the gate the package is laid out unmeasured. The report is laid out even where the result is outside of its budget;
/// the model is not.
///
/// # Errors
/// Where the data do not fit the model, no engine runs the result, or it is outside of the budget.
pub fn run(context: &Context) -> Result<(), Failure> {
    let begun = Instant::now();
    let fetched: Fetched = context.read(fetch::RECORD)?;
    let compressed: Compressed = context.read(super::compress::RECORD)?;
    let model = convert::read(&context.inputs.source.uri, &context.compressed())?;
    if context.inputs.no_gate {
        return hand_out(context, fetched, compressed, &model, begun);
    }
    let mut data = Data::of(context, &signature(context, &model)?.0)?;
    let candidates = engines::load(context, compressed.fold_dequantize, &mut data.samples)?;
    let records = data.from != SampleSource::Signature && context.inputs.optimize.calibration.is_none();
    let measured = measure(context, &fetched, &context.compressed(), &model, &candidates, &data, records)?;
    let Measurement {
        summary,
        judgement,
        gate,
        engines,
        probe,
        recorder,
        ratio: _,
    } = measured;
    let exceeded = budget::exceeded(&gate, &summary).map(|failed| match &compressed.front {
        Some(front) => front::exhausted(front, failed, &gate),
        None => failed,
    });
    let report = Report {
        schema_version: 1,
        summary,
        inputs: context.inputs.clone(),
        gate,
        samples: Some(Samples {
            from: data.from,
            count: judgement.samples,
            seed: match data.from {
                SampleSource::Evaluation | SampleSource::Calibration => None,
                SampleSource::EvaluationPart => Some(SPLIT_SEED),
                SampleSource::Signature => Some(DRAWN_SEED),
            },
        }),
        steps: compressed.steps,
        outputs: judgement.outputs,
        classes: judgement.classes,
        engines,
        skipped: compressed.skipped,
        layers: layers_of(context, &model, true)?,
        sensitivity: sweep(context, &candidates, &data, &compressed.front),
        front: compressed.front,
        step_ms: step_ms(context, begun),
    };
    write_report(context, &report)?;
    if let Some(failed) = exceeded {
        return Err(failed);
    }
    write_json(&context.package().join(PROBE_FILE), &probe)?;
    let mut files = vec![REPORT_FILE, REPORT_PAGE_FILE, PROBE_FILE];
    if write_reference(context, &model, &candidates, &report.engines, &data, recorder)? {
        files.push(DRIFT_FILE);
    }
    write_package(context, &report, signature(context, &model)?, compressed.fold_dequantize, &files)
}

/// Records what inputs and outputs look like on the calibration data, or else on the evaluation data, as the first engine that serves gives
/// them, whichever measured faster; `recorder` has seen that, where it is the one that was judged. Whether there is such data, and the model
/// runs on it: a package can be served without.
fn write_reference(
    context: &Context,
    model: &ModelProto,
    candidates: &Candidates,
    engines: &[EngineReport],
    data: &Data,
    recorder: Option<Recorder>,
) -> Result<bool, Failure> {
    if let Some(recorder) = recorder {
        return write_json(&context.package().join(DRIFT_FILE), &recorder.finish(Source::Evaluation)).map(|()| true);
    }
    let read = match data.from {
        SampleSource::Signature => return Ok(false),
        _ if context.inputs.optimize.calibration.is_some() => {
            super::compress::dataset(context, "calibration", "calibration", model).map(|samples| (samples, Source::Calibration))
        }
        _ => Ok((data.samples[0].clone(), Source::Evaluation)),
    };
    let serves = candidates.engines.iter().zip(engines).find(|(_, report)| report.refused.is_none());
    let Some((pair, _)) = serves else { return Ok(false) };
    let activity = context.console.activity("recording what is usual", "samples");
    let recorded = read.and_then(|(samples, from)| reference::record(&*pair.after, samples, from, &activity));
    drop(activity);
    match recorded {
        Ok(recorded) => write_json(&context.package().join(DRIFT_FILE), &recorded).map(|()| true),
        Err(failure) => {
            context
                .console
                .info(&format!("there will be nothing to tell drift by: {}", failure.message));
            Ok(false)
        }
    }
}

/// What was measured of a compressed model.
pub(crate) struct Measurement {
    pub(crate) summary: Summary,
    /// How the latency on the chosen engine relates to the original's.
    pub(crate) ratio: Option<Spread>,
    pub(crate) gate: Gate,
    pub(crate) engines: Vec<EngineReport>,
    judgement: Judgement,
    probe: Probe,
    recorder: Option<Recorder>,
}

/// Runs the compressed `model`, which lies at `path`, beside the original on the engines that both are loaded into, and holds it against the budget.
/// With `records`, what it takes and gives on the samples is recorded as well, where the first engine that runs it is the one that it is judged on.
///
/// # Errors
/// Where no engine runs it, or the metric is not defined on what it gives.
pub(crate) fn measure(
    context: &Context,
    fetched: &Fetched,
    path: &Path,
    model: &ModelProto,
    candidates: &Candidates,
    data: &Data,
    records: bool,
) -> Result<Measurement, Failure> {
    let samples = &data.samples[0];
    let sample = samples.first()?;
    let (measured, probe) = engines::compare(candidates, model, &sample, context)?;
    let engines: Vec<EngineReport> = measured
        .iter()
        .map(|measured| measured.report.clone())
        .chain(candidates.refused.iter().cloned())
        .collect();
    let fastest = measured
        .iter()
        .filter_map(|measured| Some((measured, measured.pair?, measured.report.latency?)));
    let fastest = fastest.min_by(|a, b| a.2.after_us.total_cmp(&b.2.after_us));
    let (measured_chosen, chosen, latency) = fastest.ok_or_else(|| {
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
    let activity = context.console.activity("evaluating", "samples");
    let is_first = measured
        .iter()
        .find_map(|measured| measured.pair)
        .is_some_and(|first| std::ptr::eq(first, chosen));
    let mut recorder = (records && is_first && samples.samples() <= reference::SAMPLES_MAX).then(|| Recorder::of(&*chosen.after));
    let judgement = judgement::judge(chosen, samples, data.metric, recorder.as_mut(), &activity)?;
    drop(activity);

    let summary = Summary {
        metric: judgement.metric,
        fidelity: judgement.outputs.iter().map(|output| output.cosine).reduce(f64::min),
        latency: Some(latency),
        ..summary(context, fetched, path, model, chosen.after.kind())?
    };
    let standing = match engines::limits_latency(context) {
        true => engines::against_fastest(candidates, &measured, measured_chosen, &sample, Instant::now).map_err(|error| {
            let message = format!("the latency cannot be compared with the original's: {}", chain(&error));
            failure(FailureReason::UnsupportedOperator, message)
        })?,
        false => None,
    };
    let gate = budget::check(context.inputs.optimize.budget.as_ref(), &summary, &judgement, standing.as_ref())?;
    Ok(Measurement {
        summary,
        ratio: measured_chosen.report.latency_ratio,
        gate,
        judgement,
        engines,
        probe,
        recorder,
    })
}

/// The result in brief, without what only running it shows.
fn summary(context: &Context, fetched: &Fetched, path: &Path, model: &ModelProto, engine: EngineKind) -> Result<Summary, Failure> {
    let size = |path: &PathBuf| Ok(fs::metadata(path).map_err(disk("read", path))?.len());
    let layer = |path: &PathBuf| layer_size(path).map_err(disk("read", path));
    let layers = |paths: &[PathBuf]| paths.iter().map(layer).sum::<Result<u64, Failure>>();
    let model_file = context.source("model");
    let mut source = fetch::files(&model_file).map_err(disk("read", &context.work))?;
    let beside: Vec<PathBuf> = source::companions(&model_file)
        .iter()
        .map(|name| model_file.with_file_name(name))
        .collect();
    source.retain(|file| !beside.contains(file));
    let compressed = serialize::files(path);
    let sparsity = || model.graph.as_ref().map_or(0.0, graph::weight::sparsity);
    let (layers_before, (layers_after, sparsity)) = rayon::join(|| layers(&source), || rayon::join(|| layers(&compressed), sparsity));
    Ok(Summary {
        artifact: None,
        reused: false,
        source_digest: fetched.source.digest.clone(),
        evaluation_digest: fetched.evaluation.as_ref().map(|content| content.digest.clone()),
        size_before: fetched.source.size,
        size_after: compressed.iter().map(size).sum::<Result<_, _>>()?,
        size_layer_before: Some(layers_before?),
        size_layer_after: Some(layers_after?),
        sparsity,
        metric: None,
        fidelity: None,
        latency: None,
        engine,
        toolchain: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// Lays out the package without running the model: nothing is measured but sizes, no engine is tried, and there is no probe.
fn hand_out(context: &Context, fetched: Fetched, compressed: Compressed, model: &ModelProto, begun: Instant) -> Result<(), Failure> {
    let (inputs, outputs) = signature(context, model)?;
    let engines = convert::engines_of(context.inputs.engine);
    let engine = engines.last().copied().unwrap_or(EngineKind::Tract);
    let report = Report {
        schema_version: 1,
        summary: summary(context, &fetched, &context.compressed(), model, engine)?,
        inputs: context.inputs.clone(),
        gate: Gate {
            verdict: Verdict::NotGated,
            limits: vec![],
        },
        samples: None,
        steps: compressed.steps,
        outputs: vec![],
        classes: vec![],
        engines: vec![],
        skipped: compressed.skipped,
        layers: layers_of(context, model, false)?,
        sensitivity: None,
        front: None,
        step_ms: step_ms(context, begun),
    };
    write_report(context, &report)?;
    write_package(
        context,
        &report,
        (inputs, outputs),
        compressed.fold_dequantize,
        &[REPORT_FILE, REPORT_PAGE_FILE],
    )
}

pub(crate) type Signature = (Vec<TensorSpec>, Vec<TensorSpec>);

pub(crate) fn signature(context: &Context, model: &ModelProto) -> Result<Signature, Failure> {
    let uri = &context.inputs.source.uri;
    onnx::signature(model).map_err(|error| failure(FailureReason::Unsupported, format!("{uri} cannot be served: {error}")))
}

/// The wall time of each step, of this one since it has `begun`, in milliseconds.
fn step_ms(context: &Context, begun: Instant) -> BTreeMap<String, f64> {
    let mut step_ms: BTreeMap<String, f64> = Step::iter()
        .filter_map(|step| Some((step.to_string(), took_ms(&context.work, step)?)))
        .collect();
    step_ms.insert(Step::Evaluate.to_string(), begun.elapsed().as_secs_f64() * 1e3);
    step_ms
}

/// The samples to judge on.
pub(crate) struct Data {
    /// The first of them that the model runs on counts.
    pub(crate) samples: Vec<Dataset>,
    from: SampleSource,
    metric: Metric,
}

impl Data {
    pub(crate) fn of(context: &Context, inputs: &[TensorSpec]) -> Result<Self, Failure> {
        let optimize = &context.inputs.optimize;
        let invalid = |what: &str, why: String| {
            failure(
                FailureReason::InvalidDataset,
                format!("the {what} data do not fit the model: {why}"),
            )
        };
        let bytes_max = context.inputs.max_fetch_size.value().unwrap_or(u64::MAX);
        if let Some(evaluation) = &optimize.evaluation {
            let unfit = |why| invalid("evaluation", why);
            let mut samples =
                Dataset::read(&context.source("evaluation"), inputs, evaluation.labels.as_deref(), bytes_max).map_err(unfit)?;
            let mut from = SampleSource::Evaluation;
            if calibrates_on_evaluation(context)? {
                samples = samples.split(Part::Evaluation, SPLIT_SEED).map_err(unfit)?;
                from = SampleSource::EvaluationPart;
            }
            let needs_labels = optimize.budget.as_ref().is_some_and(|budget| budget.max_accuracy_drop.is_some());
            let metric = evaluation.metric.unwrap_or(if samples.labels().is_some() || needs_labels {
                Metric::Accuracy
            } else {
                Metric::Fidelity
            });
            if metric.needs_labels() && samples.labels().is_none() {
                return Err(unfit(
                    "they hold no labels (a field `y`); add them, or use the metric Fidelity".into(),
                ));
            }
            return Ok(Self {
                samples: vec![samples],
                from,
                metric,
            });
        }
        if optimize.calibration.is_some() {
            let samples =
                Dataset::read(&context.source("calibration"), inputs, None, bytes_max).map_err(|why| invalid("calibration", why))?;
            return Ok(Self {
                samples: vec![samples],
                from: SampleSource::Calibration,
                metric: Metric::Fidelity,
            });
        }
        let samples: Vec<Dataset> = Dataset::drawn_forms(inputs).collect();
        if samples.is_empty() {
            return Err(invalid("drawn", "an input is larger than memory; name evaluation data".into()));
        }
        Ok(Self {
            samples,
            from: SampleSource::Signature,
            metric: Metric::Fidelity,
        })
    }
}

/// What each layer loses alone; a search has said it.
fn sweep(context: &Context, candidates: &Candidates, data: &Data, front: &Option<Front>) -> Option<Sweep> {
    let original = &candidates.engines.first()?.before;
    front.is_none().then(|| sensitivity::of_recipe(context, data, &**original))
}

/// What became of each weight of the model before compression.
fn layers_of(context: &Context, model: &ModelProto, distributions: bool) -> Result<Vec<LayerChange>, Failure> {
    let original = convert::read(&context.inputs.source.uri, &context.converted())?;
    layers::changes(&original, model, distributions)
}

/// Writes the report, for programs and for people.
fn write_report(context: &Context, report: &Report) -> Result<(), Failure> {
    let package = context.package();
    write_json(&package.join(REPORT_FILE), report)?;
    let page = package.join(REPORT_PAGE_FILE);
    fs::write(&page, report::page(report)).map_err(disk("write", &page))
}

/// Puts the model and its companions beside the report, and the manifest of it and the package's other `files`.
fn write_package(
    context: &Context,
    report: &Report,
    (inputs, outputs): Signature,
    fold_dequantize: bool,
    files: &[&str],
) -> Result<(), Failure> {
    let package = context.package();
    let model = package.join(MODEL_FILE);
    let mut files: Vec<PathBuf> = files.iter().map(|name| package.join(name)).collect();
    for (from, to) in serialize::files(&context.compressed())
        .iter()
        .zip([model.clone(), serialize::external_file(&model)])
    {
        // The same file under another name, where the file system can.
        if fs::hard_link(from, &to).is_err() {
            fs::copy(from, &to).map_err(disk("write", &to))?;
        }
        files.push(to);
    }
    let source = context.source("model");
    for name in source::companions(&source) {
        let (from, to) = (source.with_file_name(name), package.join(name));
        crate::step::make_folder_of(&to)?;
        fs::copy(&from, &to).map_err(disk("write", &to))?;
        files.push(to);
    }
    let described = |path: &PathBuf| -> Result<(String, File), Failure> {
        let name = path.strip_prefix(&package).unwrap_or(path).to_string_lossy().into_owned();
        let file = fs::File::open(path).map_err(disk("read", path))?;
        let size = file.metadata().map_err(disk("read", path))?.len();
        let digest = Digest::of_reader(file).map_err(disk("read", path))?;
        Ok((name, File { digest, size }))
    };
    let manifest = Manifest {
        schema_version: 1,
        inputs,
        outputs,
        engine: report.summary.engine,
        fold_dequantize,
        files: files.iter().map(described).collect::<Result<_, _>>()?,
        source_digest: report.summary.source_digest.clone(),
        toolchain: report.summary.toolchain.clone(),
    };
    write_json(&package.join(MANIFEST_FILE), &manifest)
}
