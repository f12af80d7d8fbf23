//! The model before and after on every engine: which of them agree, and how fast they are.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use plimsoll_package::manifest::{Engine as EngineKind, Probe, TensorSpec};
use plimsoll_package::report::{EngineReport, MemoryChange};
use plimsoll_runtime::engine::{self, Engine, EngineError, LoadOptions, Tensor, probe};
use plimsoll_runtime::onnx::ModelProto;

use super::dataset::Dataset;
use super::{latency, memory};
use crate::convert;
use crate::failure::{Failure, FailureReason, chain, failure};
use crate::step::Context;

/// Least tolerance of a probe, relative to the largest output.
const TOLERANCE: f64 = 1e-3;
/// The same where activations are quantised: two engines that differ in the last bit of an activation may round it to neighbouring
/// integers.
const TOLERANCE_DYNAMIC: f64 = 1e-2;
/// Difference of two engines, relative to the largest output, beyond which they do not agree.
const DISAGREEMENT: f64 = 0.05;

/// An engine whose first inference takes longer than this and so many times another engine's will not serve: it is given up there.
const HOPELESS: Duration = Duration::from_millis(100);
const HOPELESS_RATIO: u32 = 10;

/// The model before and after on one engine.
pub struct Pair {
    /// Before compression.
    pub before: Arc<dyn Engine>,
    /// After compression.
    pub after: Box<dyn Engine>,
    /// What the compressed model gave for the first sample.
    first: Result<Vec<Tensor>, String>,
    memory: Option<MemoryChange>,
}

/// The engines that run the model before and after, and those that do not.
#[derive(Default)]
pub struct Candidates {
    /// Those that do.
    pub engines: Vec<Pair>,
    /// Those that do not, with the reason.
    pub refused: Vec<EngineReport>,
}

/// Loads the converted and the compressed model into every engine, one after another so that the memory of each shows, and runs each of them
/// once on the first sample. `data` become the first of them that the compressed model runs on.
///
/// # Errors
/// [`FailureReason::UnsupportedOperator`] where no engine loads both.
pub fn load(context: &Context, fold_dequantize: bool, data: &mut Vec<Dataset>) -> Result<Candidates, Failure> {
    let options = options(context, fold_dequantize);
    let mut candidates = Candidates::default();
    let mut patience = Patience::default();
    for kind in kinds() {
        let pair = load_pair(context, kind, &options, data, &mut patience)?;
        candidates.add(context, kind, pair);
    }
    candidates.or_refuse("runs the model both before and after compression")
}

/// Loads the converted model into every engine and runs it once on the first sample. `data` become the first of them that it runs on.
///
/// # Errors
/// [`FailureReason::UnsupportedOperator`] where no engine runs it.
pub fn load_original(context: &Context, data: &mut Vec<Dataset>) -> Result<Vec<Arc<dyn Engine>>, Failure> {
    let options = options(context, false);
    let (mut engines, mut refused) = (Vec::new(), Vec::new());
    for kind in kinds() {
        match engine::load(kind, &context.converted(), &options) {
            Ok(engine) => match run_first(&*engine, data, &mut Patience::default())? {
                Ok(_) => engines.push(Arc::from(engine)),
                Err(Unrun::Failed(why) | Unrun::Late(why)) => refused.push(refusal(kind, why)),
            },
            Err(error) => refused.push(refusal(kind, chain(&error))),
        }
    }
    match engines.is_empty() {
        true => Err(refused_by_all("runs the model", &refused)),
        false => Ok(engines),
    }
}

/// Loads the compressed model at `path` into every engine beside the `original`, which was loaded before, and runs it once on the first sample.
///
/// # Errors
/// [`FailureReason::UnsupportedOperator`] where no engine loads it.
pub fn load_beside(
    original: &[Arc<dyn Engine>],
    path: &Path,
    fold_dequantize: bool,
    data: &Dataset,
    context: &Context,
) -> Result<Candidates, Failure> {
    let options = options(context, fold_dequantize);
    let mut candidates = Candidates::default();
    let mut patience = Patience::default();
    for before in original {
        let sample = data.first()?;
        let loaded = engine::load(before.kind(), path, &options).map_err(|error| chain(&error));
        let pair = loaded.and_then(|after| match patience.run(&*after, &sample) {
            Err(EngineError::Late { limit, .. }) => Err(patience.late(limit)),
            first => Ok(Pair {
                before: before.clone(),
                first: first.map_err(|error| chain(&error)),
                after,
                memory: None,
            }),
        });
        candidates.add(context, before.kind(), pair);
    }
    candidates.or_refuse("runs the compressed model")
}

/// The engines that may serve, ONNX Runtime first: it is what models are tested with.
fn kinds() -> Vec<EngineKind> {
    let mut kinds = convert::engines();
    kinds.sort_by_key(|kind| *kind != EngineKind::OnnxRuntime);
    kinds
}

fn options(context: &Context, fold_dequantize: bool) -> LoadOptions {
    LoadOptions {
        threads: context.threads,
        fold_dequantize,
        ..LoadOptions::default()
    }
}

impl Candidates {
    fn add(&mut self, context: &Context, kind: EngineKind, pair: Result<Pair, String>) {
        match pair {
            Ok(pair) => self.engines.push(pair),
            Err(why) => {
                context.console.info(&format!("{kind} does not run the model: {why}"));
                self.refused.push(refusal(kind, why));
            }
        }
    }

    fn or_refuse(self, what: &str) -> Result<Self, Failure> {
        match self.engines.is_empty() {
            true => Err(refused_by_all(what, &self.refused)),
            false => Ok(self),
        }
    }
}

/// No engine does `what`.
fn refused_by_all(what: &str, refused: &[EngineReport]) -> Failure {
    let words = refused
        .iter()
        .map(|report| format!("{}: {}", report.engine, report.refused.as_deref().unwrap_or_default()));
    let words = words.collect::<Vec<_>>().join("; ");
    failure(FailureReason::UnsupportedOperator, format!("no engine {what}: {words}"))
}

/// How long an engine's first inference may take, by those of the engines before it.
#[derive(Default)]
struct Patience {
    fastest: Option<Duration>,
}

impl Patience {
    fn run(&mut self, engine: &dyn Engine, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let begun = Instant::now();
        let outputs = match self.fastest {
            None => engine.run(inputs)?,
            Some(fastest) => engine.run_within(inputs, HOPELESS.max(fastest * HOPELESS_RATIO))?,
        };
        let took = begun.elapsed();
        self.fastest = Some(self.fastest.map_or(took, |fastest| fastest.min(took)));
        Ok(outputs)
    }

    fn late(&self, limit: Duration) -> String {
        let fastest = self.fastest.unwrap_or_default();
        format!(
            "its first inference was given up after {} ms; another engine's took {} ms",
            limit.as_millis(),
            fastest.as_millis().max(1)
        )
    }
}

fn load_pair(
    context: &Context,
    kind: EngineKind,
    options: &LoadOptions,
    data: &mut Vec<Dataset>,
    patience: &mut Patience,
) -> Result<Result<Pair, String>, Failure> {
    let empty = memory::held(&context.work);
    // The compressed model first: what loading frees may serve the second, so that no model looks smaller than it is but the original.
    let after = match engine::load(kind, &context.compressed(), options) {
        Ok(after) => after,
        Err(error) => return Ok(Err(chain(&error))),
    };
    let first = match run_first(&*after, data, patience)? {
        Err(Unrun::Late(why)) => return Ok(Err(why)),
        Err(Unrun::Failed(why)) => Err(why),
        Ok(outputs) => Ok(outputs),
    };
    let with_after = memory::held(&context.work);
    let before = match engine::load(kind, &context.converted(), options) {
        Ok(before) => before,
        Err(error) => return Ok(Err(format!("the original: {}", chain(&error)))),
    };
    // What it gives is compared later, on all samples; here it takes the memory of a run.
    drop(before.run(&data[0].first()?));
    let memory = memory::change(empty, with_after, memory::held(&context.work));
    Ok(Ok(Pair {
        before: Arc::from(before),
        after,
        first,
        memory,
    }))
}

/// Why an engine did not run a sample.
enum Unrun {
    Failed(String),
    /// It was given up.
    Late(String),
}

/// The outputs for the first sample of the first dataset that the model runs on; the others are dropped then.
fn run_first(engine: &dyn Engine, data: &mut Vec<Dataset>, patience: &mut Patience) -> Result<Result<Vec<Tensor>, Unrun>, Failure> {
    let mut refusal = "there is no sample".to_owned();
    for index in 0..data.len() {
        match patience.run(engine, &data[index].first()?) {
            Ok(outputs) => {
                data.drain(..index);
                data.truncate(1);
                return Ok(Ok(outputs));
            }
            Err(EngineError::Late { limit, .. }) => return Ok(Err(Unrun::Late(patience.late(limit)))),
            Err(error) if index == 0 => refusal = chain(&error),
            Err(_) => {}
        }
    }
    Ok(Err(Unrun::Failed(refusal)))
}

fn refusal(engine: EngineKind, why: String) -> EngineReport {
    EngineReport {
        engine,
        latency: None,
        latency_ratio: None,
        memory: None,
        refused: Some(why),
    }
}

/// What was measured on an engine.
pub struct MeasuredEngine<'a> {
    /// For the report.
    pub report: EngineReport,
    /// Absent where it fails, or gives other outputs than the engine before it.
    pub pair: Option<&'a Pair>,
}

/// Runs the sample on every engine, measures those that agree with the reference (the first engine that runs), and records the reference's outputs as the probe.
///
/// # Errors
/// [`FailureReason::UnsupportedOperator`] where no engine gives outputs that a probe can check.
pub fn compare<'a>(
    candidates: &'a Candidates,
    compressed: &ModelProto,
    sample: &[Tensor],
    context: &Context,
) -> Result<(Vec<MeasuredEngine<'a>>, Probe), Failure> {
    let dynamic = compressed
        .graph
        .as_ref()
        .is_some_and(|graph| graph.node.iter().any(|node| node.op_type() == "DynamicQuantizeLinear"));
    let floor = if dynamic { TOLERANCE_DYNAMIC } else { TOLERANCE };
    let mut probe: Option<Probe> = None;
    let mut measured = Vec::new();
    for pair in &candidates.engines {
        let kind = pair.after.kind();
        let refuse = |why: String| {
            context.console.info(&format!("{kind} is left out: {why}"));
            MeasuredEngine {
                report: refusal(kind, why),
                pair: None,
            }
        };
        let outputs = match &pair.first {
            Ok(outputs) => outputs,
            Err(why) => {
                measured.push(refuse(why.clone()));
                continue;
            }
        };
        match &mut probe {
            None => {
                probe = record(&*pair.after, sample, outputs, floor);
                if probe
                    .as_ref()
                    .is_some_and(|probe| probe.outputs.iter().flat_map(|output| &output.data).any(|value| !value.is_finite()))
                {
                    measured.push(refuse(
                        "an output holds NaN or infinity on the first sample, which no probe can check".into(),
                    ));
                    probe = None;
                    continue;
                }
            }
            Some(probe) => {
                if let Err(why) = agree(&*pair.after, probe) {
                    measured.push(refuse(why));
                    continue;
                }
            }
        }
        measured.push(match latency::measure(&*pair.before, &*pair.after, sample) {
            Ok((latency, ratio)) => MeasuredEngine {
                report: EngineReport {
                    engine: kind,
                    latency: Some(latency),
                    latency_ratio: Some(ratio),
                    memory: pair.memory,
                    refused: None,
                },
                pair: Some(pair),
            },
            Err(error) => refuse(chain(&error)),
        });
    }
    let probe = probe.ok_or_else(|| {
        let words = measured
            .iter()
            .filter_map(|measured| measured.report.refused.clone())
            .collect::<Vec<_>>()
            .join("; ");
        failure(
            FailureReason::UnsupportedOperator,
            format!("no engine runs the compressed model, or its outputs hold no numbers: {words}"),
        )
    })?;
    Ok((measured, probe))
}

fn record(engine: &dyn Engine, inputs: &[Tensor], outputs: &[Tensor], tolerance: f64) -> Option<Probe> {
    let record = |specs: &[TensorSpec], tensors: &[Tensor]| {
        specs
            .iter()
            .zip(tensors)
            .map(|(spec, tensor)| probe::record(spec, tensor))
            .collect::<Option<Vec<_>>>()
    };
    Some(Probe {
        inputs: record(engine.inputs(), inputs)?,
        outputs: record(engine.outputs(), outputs)?,
        tolerance,
    })
}

/// Widens the probe's tolerance to twice this engine's difference; refuses an engine that differs by more than can be rounding.
fn agree(engine: &dyn Engine, probe: &mut Probe) -> Result<(), String> {
    let exact = Probe {
        tolerance: 0.0,
        ..probe.clone()
    };
    match probe::check(engine, &exact) {
        Ok(()) => Ok(()),
        Err(probe::ProbeError::Differs { difference, .. }) => {
            // The check stops at the first output that differs, so what it lets pass is checked again.
            let wider = Probe {
                tolerance: probe.tolerance.max(2.0 * difference).min(DISAGREEMENT),
                ..exact
            };
            probe::check(engine, &wider).map_err(|error| chain(&error))?;
            *probe = wider;
            Ok(())
        }
        Err(error) => Err(chain(&error)),
    }
}
