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

/// Loads on each engine over which memory is measured, at most.
const MEMORY_LOADS: usize = 5;
/// Longest time that a load of both models takes for another one to follow.
const MEMORY_TIME: Duration = Duration::from_millis(40);

/// An engine whose first inferences take longer than this and so many times another engine's will not serve: it is given up there.
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
    memory: Vec<MemoryChange>,
}

/// The engines that run the model before and after, and those that do not.
#[derive(Default)]
pub struct Candidates {
    /// Those that do.
    pub engines: Vec<Pair>,
    /// Those that do not, with the reason.
    pub refused: Vec<EngineReport>,
    /// The original on engines that run it and not the compressed model.
    originals: Vec<Arc<dyn Engine>>,
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
    for kind in kinds(context) {
        let pair = load_pair(context, kind, &options, data, &mut patience)?;
        let is_refused = pair.is_err();
        candidates.add(context, kind, pair);
        // A limit on the latency is one against the original where that is fastest.
        if is_refused && limits_latency(context) {
            candidates
                .originals
                .extend(engine::load(kind, &context.converted(), &options).ok().map(Arc::from));
        }
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
    for kind in kinds(context) {
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
                memory: vec![],
            }),
        });
        if pair.is_err() {
            candidates.originals.push(before.clone());
        }
        candidates.add(context, before.kind(), pair);
    }
    candidates.or_refuse("runs the compressed model")
}

/// The engines that may serve, ONNX Runtime first: it is what models are tested with.
fn kinds(context: &Context) -> Vec<EngineKind> {
    let mut kinds = convert::engines_of(context.inputs.engine);
    kinds.sort_by_key(|kind| *kind != EngineKind::OnnxRuntime);
    kinds
}

/// Whether the budget bounds the latency.
pub(crate) fn limits_latency(context: &Context) -> bool {
    let budget = context.inputs.optimize.budget.as_ref();
    budget.is_some_and(|budget| budget.max_latency.is_some())
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
            Some(fastest) => latency::within(engine, inputs, HOPELESS.max(fastest * HOPELESS_RATIO))?,
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
    let begun = Instant::now();
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
    let mut memory: Vec<MemoryChange> = memory::change(empty, with_after, memory::held(&context.work)).into_iter().collect();
    // Further loads show how far the first one can be trusted, where they take next to no time.
    while memory.len() < MEMORY_LOADS && begun.elapsed() < MEMORY_TIME * memory.len() as u32 {
        let empty = memory::held(&context.work);
        let load = |path: &Path| {
            let engine = engine::load(kind, path, options).ok()?;
            drop(engine.run(&data[0].first().ok()?));
            Some((engine, memory::held(&context.work)))
        };
        let again = load(&context.compressed()).zip(load(&context.converted()));
        let change = again.and_then(|((_, with_after), (_, with_both))| memory::change(empty, with_after, with_both));
        match change {
            Some(change) => memory.push(change),
            None => break,
        }
    }
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
        memory_ratio: None,
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
        measured.push(match latency::measure(&*pair.before, &*pair.after, sample, Instant::now) {
            Ok((latency, ratio)) => {
                let (memory, memory_ratio) = memory::summary(&pair.memory).unzip();
                MeasuredEngine {
                    report: EngineReport {
                        engine: kind,
                        latency: Some(latency),
                        latency_ratio: Some(ratio),
                        memory,
                        memory_ratio,
                        refused: None,
                    },
                    pair: Some(pair),
                }
            }
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

/// Measures the compressed model as it was `chosen` against the original on the engine that runs that fastest.
///
/// # Errors
/// Whatever an engine fails with.
pub fn against_fastest(
    candidates: &Candidates,
    measured: &[MeasuredEngine],
    chosen: &MeasuredEngine,
    sample: &[Tensor],
    now: latency::Clock,
) -> Result<Option<latency::Standing>, EngineError> {
    let (Some(pair), Some(latency), Some(ratio)) = (chosen.pair, chosen.report.latency, chosen.report.latency_ratio) else {
        return Ok(None);
    };
    let limit = Duration::from_secs_f64(latency.before_us / 1e6)
        .saturating_mul(HOPELESS_RATIO)
        .max(HOPELESS);
    let of_pairs = measured
        .iter()
        .zip(&candidates.engines)
        .map(|(measured, pair)| match measured.report.latency {
            Some(latency) => (&pair.before, Some(latency.before_us)),
            None => (&pair.before, latency::alone(&*pair.before, sample, limit, now)),
        });
    let others = candidates
        .originals
        .iter()
        .map(|original| (original, latency::alone(&**original, sample, limit, now)));
    let fastest = of_pairs
        .chain(others)
        .filter_map(|(original, us)| Some((original, us?)))
        .min_by(|one, other| one.1.total_cmp(&other.1));
    Ok(Some(match fastest {
        Some((original, _)) if original.kind() != pair.before.kind() => {
            let (latency, ratio) = latency::measure(&**original, &*pair.after, sample, now)?;
            latency::Standing {
                engine: original.kind(),
                latency,
                ratio,
            }
        }
        _ => latency::Standing {
            engine: pair.before.kind(),
            latency,
            ratio,
        },
    }))
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

#[cfg(test)]
mod tests {
    use plimsoll_package::report::{LatencyChange, Spread};

    use super::super::latency::tests::{Slow, stepped};
    use super::*;

    #[test]
    fn a_model_is_held_against_the_original_on_the_engine_that_runs_it_fastest() {
        let pair = |kind, before_ms, after_ms| Pair {
            before: Arc::new(Slow::new(kind, before_ms)),
            after: Box::new(Slow::new(kind, after_ms)),
            first: Ok(vec![]),
            memory: vec![],
        };
        let report = |kind, latency: Option<(f64, f64)>| EngineReport {
            latency: latency.map(|(before_us, after_us)| LatencyChange { before_us, after_us }),
            latency_ratio: latency.map(|(before_us, after_us)| {
                let ratio = after_us / before_us;
                Spread {
                    median: ratio,
                    p10: ratio,
                    p90: ratio,
                }
            }),
            refused: latency.is_none().then(|| "it differs".to_owned()),
            ..refusal(kind, String::new())
        };
        let mut candidates = Candidates {
            engines: vec![pair(EngineKind::OnnxRuntime, 9, 6), pair(EngineKind::Tract, 3, 9)],
            ..Candidates::default()
        };
        let standing = |candidates: &Candidates, of_tract| {
            let measured = [
                report(EngineKind::OnnxRuntime, Some((9e3, 6e3))),
                report(EngineKind::Tract, of_tract),
            ];
            let measured: Vec<MeasuredEngine> = measured
                .into_iter()
                .zip(&candidates.engines)
                .map(|(report, pair)| MeasuredEngine { report, pair: Some(pair) })
                .collect();
            against_fastest(candidates, &measured, &measured[0], &[], stepped).unwrap().unwrap()
        };
        // Faster than the original on the same engine, and slower than it on the other one.
        for of_tract in [Some((3e3, 9e3)), None] {
            let standing = standing(&candidates, of_tract);
            assert_eq!(standing.engine, EngineKind::Tract);
            assert!(standing.ratio.p10 > 1.0, "{:?}", standing.ratio);
            assert!(standing.latency.before_us < standing.latency.after_us);
        }
        // An engine that does not run the compressed model at all may run the original.
        candidates.engines.truncate(1);
        assert_eq!(standing(&candidates, None).engine, EngineKind::OnnxRuntime);
        candidates.originals.push(Arc::new(Slow::new(EngineKind::Tract, 2)));
        assert_eq!(standing(&candidates, None).engine, EngineKind::Tract);
    }
}
