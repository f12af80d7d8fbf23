//! The model before and after on every engine: which of them agree, and how fast they are.

use plimsoll_package::manifest::{Engine as EngineKind, Probe, TensorSpec};
use plimsoll_package::report::EngineReport;
use plimsoll_runtime::engine::{self, Engine, LoadOptions, Tensor, probe};

use super::latency;
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

/// The model before and after on one engine.
pub struct Pair {
    /// Before compression.
    pub before: Box<dyn Engine>,
    /// After compression.
    pub after: Box<dyn Engine>,
}

/// The engines that run the model before and after, and those that do not.
pub struct Candidates {
    /// Those that do.
    pub engines: Vec<Pair>,
    /// Those that do not, with the reason.
    pub refused: Vec<EngineReport>,
}

/// Loads the converted and the compressed model into every engine.
///
/// # Errors
/// [`FailureReason::UnsupportedOperator`] where no engine loads both.
pub fn load(context: &Context, fold_dequantize: bool) -> Result<Candidates, Failure> {
    let options = LoadOptions {
        threads: context.threads,
        fold_dequantize,
        ..LoadOptions::default()
    };
    let (before, after) = (context.converted(), context.compressed());
    let (options, before, after) = (&options, before.as_path(), after.as_path());
    // Loading optimises the graph; all at once, since none of them is measured yet.
    let loaded: Vec<_> = std::thread::scope(|scope| {
        let load_on = |kind, path| scope.spawn(move || engine::load(kind, path, options).map_err(|error| chain(&error)));
        let loading: Vec<_> = convert::engines()
            .into_iter()
            .map(|kind| (kind, load_on(kind, before), load_on(kind, after)))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().unwrap_or_else(|_| Err("the engine panicked".to_owned()));
        loading
            .into_iter()
            .map(|(kind, before, after)| (kind, join(before), join(after)))
            .collect()
    });
    let mut candidates = Candidates {
        engines: Vec::new(),
        refused: Vec::new(),
    };
    for (kind, before, after) in loaded {
        match (before, after) {
            (Ok(before), Ok(after)) => candidates.engines.push(Pair { before, after }),
            (before, after) => {
                let why = before.err().map(|why| format!("the original: {why}")).or(after.err());
                context
                    .console
                    .info(&format!("{kind} does not run the model: {}", why.as_deref().unwrap_or_default()));
                candidates.refused.push(EngineReport {
                    engine: kind,
                    latency: None,
                    refused: why,
                });
            }
        }
    }
    if candidates.engines.is_empty() {
        let words = candidates
            .refused
            .iter()
            .map(|report| format!("{}: {}", report.engine, report.refused.as_deref().unwrap_or_default()));
        let words = words.collect::<Vec<_>>().join("; ");
        return Err(failure(
            FailureReason::UnsupportedOperator,
            format!("no engine runs the model both before and after compression: {words}"),
        ));
    }
    Ok(candidates)
}

/// What was measured on an engine.
pub struct MeasuredEngine<'a> {
    /// For the report.
    pub report: EngineReport,
    /// Absent where it fails, or gives other outputs than the engine before it.
    pub pair: Option<&'a Pair>,
}

/// Runs the sample on every engine, measures those that agree with the reference (ONNX Runtime where it runs, since it is what models
/// are tested with), and records the reference's outputs as the probe.
///
/// # Errors
/// [`FailureReason::UnsupportedOperator`] where no engine gives outputs that a probe can check.
pub fn compare<'a>(candidates: &'a Candidates, sample: &[Tensor], context: &Context) -> Result<(Vec<MeasuredEngine<'a>>, Probe), Failure> {
    let dynamic = convert::read("the compressed model", &context.compressed())?;
    let dynamic = dynamic
        .graph
        .as_ref()
        .is_some_and(|graph| graph.node.iter().any(|node| node.op_type() == "DynamicQuantizeLinear"));
    let floor = if dynamic { TOLERANCE_DYNAMIC } else { TOLERANCE };
    let mut pairs: Vec<&Pair> = candidates.engines.iter().collect();
    pairs.sort_by_key(|pair| pair.after.kind() != EngineKind::OnnxRuntime);
    let mut probe: Option<Probe> = None;
    let mut measured = Vec::new();
    for pair in pairs {
        let kind = pair.after.kind();
        let refuse = |why: String| {
            context.console.info(&format!("{kind} is left out: {why}"));
            MeasuredEngine {
                report: EngineReport {
                    engine: kind,
                    latency: None,
                    refused: Some(why),
                },
                pair: None,
            }
        };
        let outputs = match pair.after.run(sample) {
            Ok(outputs) => outputs,
            Err(error) => {
                measured.push(refuse(chain(&error)));
                continue;
            }
        };
        match &mut probe {
            None => {
                probe = record(&*pair.after, sample, &outputs, floor);
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
            Ok(latency) => MeasuredEngine {
                report: EngineReport {
                    engine: kind,
                    latency: Some(latency),
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
        Err(probe::ProbeError::Differs { difference, .. }) if difference <= DISAGREEMENT => {
            // The check stops at the first output that differs, so what it lets pass is checked again.
            probe.tolerance = probe.tolerance.max(2.0 * difference).min(DISAGREEMENT);
            probe::check(engine, probe).map_err(|error| chain(&error))
        }
        Err(error) => Err(chain(&error)),
    }
}
