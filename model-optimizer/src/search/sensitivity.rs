//! What each layer loses when it alone is quantised.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use plimsoll_package::manifest::MODEL_FILE;
use plimsoll_package::recipe::Quantize;
use plimsoll_package::report::OutputFidelity;
use plimsoll_package::report::front::{self, Sensitivity};
use plimsoll_runtime::engine::{self, Engine, EngineKind, LoadOptions, Tensor};
use plimsoll_runtime::onnx::ModelProto;
use prost::Message as _;

use super::SEED;
use super::exploration::Layer;
use crate::calibration::Calibration;
use crate::compress::{self, Setting};
use crate::evaluate::dataset::Dataset;
use crate::evaluate::fidelity::Comparison;
use crate::failure::{Failure, FailureReason, chain, disk, failure, internal};
use crate::graph::{serialize, weight};
use crate::progress::Console;
use crate::step::Context;
use crate::step::compress::Materials;
use crate::step::evaluate::Data;

/// Samples that show what a layer loses, chosen by the seed.
const SAMPLES: usize = 32;
/// The time that layers of a model whose recipe was given are looked at.
const TIME_MAX: Duration = Duration::from_secs(10);

/// What layers lose by the scheme of the recipe, the largest layers first, in a time that is bounded; without calibration data and without
/// quantisation nothing is measured.
pub(crate) fn of_recipe(context: &Context, data: &Data, original: &dyn Engine) -> front::Sweep {
    let none = |why: &str| front::Sweep {
        why: Some(why.to_owned()),
        ..front::Sweep::default()
    };
    let optimize = &context.inputs.optimize;
    let Some(quantize) = optimize.recipe.iter().find_map(|technique| technique.quantize.as_ref()) else {
        return none("the recipe quantises nothing");
    };
    if optimize.calibration.is_none() {
        return none("there are no calibration data (optimize.calibration, on the command line --calibration) to measure it on");
    }
    sweep(context, data, original, quantize).unwrap_or_else(|failure| none(&failure.message))
}

fn sweep(context: &Context, data: &Data, original: &dyn Engine, quantize: &Quantize) -> Result<front::Sweep, Failure> {
    let begun = Instant::now();
    let materials = Materials::read(context)?;
    let mut units = Unit::of(&materials.original);
    units.sort_by_key(|unit| Reverse(unit.bytes));
    let sweep = Sweep::new(context, &materials, data, original)?;
    let quantize = Quantize {
        exclude: vec![],
        ..quantize.clone()
    };
    let activity = context.console.activity("looking at each layer", "layers");
    let mut measured = Vec::new();
    let mut done = 0;
    for unit in &units {
        let expected = begun.elapsed() * (done as u32 + 1) / (done as u32).max(1);
        if done > 0 && expected > TIME_MAX {
            break;
        }
        activity.report(done as u64, Some(units.len() as u64));
        measured.extend(sweep.alone(&quantize, unit, &units, &materials, context)?);
        done += 1;
    }
    measured.sort_by(Layer::by_loss);
    let left = (units.len() - done) as u64;
    Ok(front::Sweep {
        layers: measured.into_iter().map(|layer| layer.sensitivity).collect(),
        left,
        why: (left > 0).then(|| format!("the {} s for it were up, and a search takes its own", TIME_MAX.as_secs())),
    })
}

/// The nodes that use one weight: they are quantised together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    /// Their names.
    pub(super) nodes: Vec<String>,
    operator: String,
    /// Size of the weight.
    bytes: usize,
}

impl Unit {
    /// Those of `model` whose nodes all have names, by which they can be told apart.
    pub(super) fn of(model: &ModelProto) -> Vec<Self> {
        let Some(graph) = &model.graph else { return vec![] };
        let mut units: Vec<Self> = Vec::new();
        for found in weight::find(graph) {
            let nodes: Vec<String> = found.uses.iter().map(|used| graph.node[used.node].name().to_owned()).collect();
            let known = units.iter().any(|unit| unit.nodes.iter().any(|node| nodes.contains(node)));
            if !known && nodes.iter().all(|name| !name.is_empty()) {
                let operator = graph.node[found.uses[0].node].op_type().to_owned();
                let elements = graph.initializer[found.initializer].dims.iter().product::<i64>();
                let bytes = 4 * usize::try_from(elements).unwrap_or_default();
                units.push(Self { nodes, operator, bytes });
            }
        }
        units
    }
}

/// Quantises layers alone and compares with the original.
pub(super) struct Sweep {
    kind: EngineKind,
    samples: Dataset,
    /// What the original gave for each batch.
    before: Vec<Vec<Tensor>>,
    calibration: Option<Calibration>,
}

impl Sweep {
    pub(super) fn new(context: &Context, materials: &Materials, data: &Data, original: &dyn Engine) -> Result<Self, Failure> {
        let samples = data.samples[0].clone().subset(SAMPLES, SEED);
        let run = |range| {
            let inputs = samples.batch(range)?;
            original.run(&inputs).map_err(|error| {
                let message = format!("the model does not run on the samples: {}", chain(&error));
                failure(FailureReason::InvalidDataset, message)
            })
        };
        let before = samples.batches().map(run).collect::<Result<_, Failure>>()?;
        let calibration = materials.calibration.as_ref();
        Ok(Self {
            kind: original.kind(),
            before,
            samples,
            calibration: calibration.map(|data| Calibration::new(data.samples().clone().subset(SAMPLES, SEED), context.threads)),
        })
    }

    /// What `unit` loses when `quantize` is applied to none but it of `all`; `None` where the scheme leaves it alone.
    pub(super) fn alone(
        &self,
        quantize: &Quantize,
        unit: &Unit,
        all: &[Unit],
        materials: &Materials,
        context: &Context,
    ) -> Result<Option<Layer>, Failure> {
        let others = all.iter().filter(|other| *other != unit);
        let quantize = Quantize {
            exclude: others.flat_map(|other| other.nodes.clone()).collect(),
            ..quantize.clone()
        };
        let silent = Console::silent();
        let setting = Setting {
            calibration: self.calibration.as_ref(),
            original: &materials.original,
            threads: context.threads,
            engine: context.inputs.engine,
            console: &silent,
        };
        let mut model = materials.original.clone();
        let Ok(change) = compress::quantize::technique(&quantize)?.apply(&mut model, &setting) else {
            return Ok(None);
        };
        let folder = tempfile::tempdir_in(&context.work).map_err(|error| internal("cannot make a folder for a layer", &error))?;
        let path = folder.path().join(MODEL_FILE);
        // Of the other layers the weights stay in the file in which they are.
        serialize::write_referring(&model, &path).map_err(disk("write", &path))?;
        let saved = materials.original.encoded_len().saturating_sub(model.encoded_len()) as u64;
        drop(model);
        let options = LoadOptions {
            threads: context.threads,
            fold_dequantize: change.fold_dequantize,
            ..LoadOptions::default()
        };
        // One that does not run is the most sensitive of all.
        let worst = engine::load(self.kind, &path, &options)
            .ok()
            .and_then(|engine| self.worst(&*engine));
        Ok(Some(Layer {
            nodes: unit.nodes.clone(),
            sensitivity: Sensitivity {
                node: unit.nodes[0].clone(),
                operator: unit.operator.clone(),
                fidelity: worst.as_ref().map_or(0.0, |output| output.cosine),
                sqnr_db: worst.and_then(|output| output.sqnr_db),
                saved,
            },
        }))
    }

    /// The output that lost most.
    fn worst(&self, after: &dyn Engine) -> Option<OutputFidelity> {
        let mut outputs: Vec<Comparison> = after.outputs().iter().map(|spec| Comparison::new(&spec.name)).collect();
        for (range, before) in self.samples.batches().zip(&self.before) {
            let after = after.run(&self.samples.batch(range).ok()?).ok()?;
            for (comparison, (before, after)) in outputs.iter_mut().zip(before.iter().zip(&after)) {
                comparison.add(before, after);
            }
        }
        let outputs = outputs.into_iter().filter_map(Comparison::finish);
        outputs.min_by(|one, other| one.cosine.total_cmp(&other.cosine))
    }
}
