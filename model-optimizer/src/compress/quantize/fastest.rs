//! 8-bit weights in the way that measures best on the engine that serves.

use plimsoll_package::recipe::Granularity;
use plimsoll_runtime::engine::{self, Engine, LoadOptions, Tensor};
use plimsoll_runtime::onnx::{self, ModelProto};

use super::int8::{Int8, Products};
use super::{faithful, raise};
use crate::compress::{Change, Setting, Technique};
use crate::convert;
use crate::evaluate::dataset::Dataset;
use crate::evaluate::latency;
use crate::failure::{Failure, chain, internal};

/// How much faster another way must be to be taken in place of the first: less could be the machine's other work.
const ADVANTAGE: f64 = 1.1;

/// Convolutions and tables are stored in 8 bits and computed in floats, which is never slower. Matrix products are computed as dynamic
/// quantisation does (but for those whose outputs lose too much so), or in floats of weights that are made at load or at every inference:
/// whichever is fastest here.
#[derive(Debug, Clone)]
pub struct Fastest {
    /// What shares a scale.
    pub granularity: Granularity,
    /// Names of nodes that stay as they are.
    pub exclude: Vec<String>,
}

/// A model, its change, and how it is loaded.
struct Candidate {
    name: &'static str,
    model: ModelProto,
    change: Change,
}

impl Technique for Fastest {
    fn apply(&self, model: &mut ModelProto, setting: &Setting) -> Result<Change, Failure> {
        raise(model)?;
        let mut candidates: Vec<Candidate> = Vec::new();
        let ways = [
            ("dynamic", Products::Dynamic),
            ("weight-only", Products::WeightOnly { fold: true }),
            ("weight-only and unfolded", Products::WeightOnly { fold: false }),
        ];
        for (name, products) in ways {
            let mut technique = Int8 {
                products,
                granularity: self.granularity,
                in_floats: vec![],
                exclude: self.exclude.clone(),
            };
            if products == Products::Dynamic {
                technique.in_floats = faithful::in_floats(&technique, model, setting)?;
            }
            let mut model = model.clone();
            let change = technique.apply(&mut model, setting)?;
            // Without a matrix product, or with a convolution that is to be folded anyway, the ways are the same.
            let known = candidates
                .iter()
                .any(|known| known.model == model && known.change.fold_dequantize == change.fold_dequantize);
            if !known {
                candidates.push(Candidate { name, model, change });
            }
        }
        let taken = fastest(&candidates, setting)?;
        let Candidate {
            model: quantized, change, ..
        } = candidates.swap_remove(taken);
        *model = quantized;
        Ok(change)
    }
}

/// The index of the candidate that runs fastest on the first engine that runs them all; the first where there is none.
fn fastest(candidates: &[Candidate], setting: &Setting) -> Result<usize, Failure> {
    if candidates.len() == 1 {
        return Ok(0);
    }
    let folder = tempfile::tempdir().map_err(|error| internal("cannot make a folder for candidates", &error))?;
    let mut paths = Vec::with_capacity(candidates.len());
    for (index, candidate) in candidates.iter().enumerate() {
        let path = folder.path().join(format!("{index}.onnx"));
        convert::write(&candidate.model, &path)?;
        paths.push(path);
    }
    // ONNX Runtime first, where it is: on it the ways differ most.
    for kind in convert::engines().into_iter().rev() {
        let load = |(candidate, path): (&Candidate, &std::path::PathBuf)| {
            let options = LoadOptions {
                threads: setting.threads,
                fold_dequantize: candidate.change.fold_dequantize,
                ..LoadOptions::default()
            };
            engine::load(kind, path, &options)
        };
        let measured = candidates
            .iter()
            .zip(&paths)
            .map(load)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| chain(&error))
            .and_then(|engines| measure(&engines, setting));
        match measured {
            Ok(times) => return Ok(choose(candidates, &times, setting)),
            Err(why) => setting.console.info(&format!("{kind} does not tell which way is faster: {why}")),
        }
    }
    Ok(0)
}

/// The median time of an inference of each engine's model, in microseconds; all are compared to the first by turns.
fn measure(engines: &[Box<dyn Engine>], setting: &Setting) -> Result<Vec<f64>, String> {
    let sample = sample(&*engines[0], setting)?;
    let mut times = Vec::with_capacity(engines.len());
    for engine in &engines[1..] {
        let (pair, _) = latency::measure(&*engines[0], &**engine, &sample).map_err(|error| chain(&error))?;
        if times.is_empty() {
            times.push(pair.before_us);
        }
        // What the machine did meanwhile fell on both.
        times.push(times[0] * pair.after_us / pair.before_us);
    }
    Ok(times)
}

/// One calibration sample, or one drawn from the signature.
fn sample(engine: &dyn Engine, setting: &Setting) -> Result<Vec<Tensor>, String> {
    if let Some(calibration) = setting.calibration {
        return calibration.samples().first().map_err(|failed| failed.message);
    }
    let (inputs, _) = onnx::signature(setting.original).map_err(|error| error.to_string())?;
    let mut why = "an input is larger than memory".to_owned();
    for samples in Dataset::drawn_forms(&inputs) {
        let sample = samples.first().map_err(|failed| failed.message)?;
        match engine.run(&sample) {
            Ok(_) => return Ok(sample),
            Err(error) => why = chain(&error),
        }
    }
    Err(why)
}

fn choose(candidates: &[Candidate], times: &[f64], setting: &Setting) -> usize {
    let (best, least) = times
        .iter()
        .copied()
        .enumerate()
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap_or((0, 0.0));
    let taken = if times[0] > least * ADVANTAGE { best } else { 0 };
    let all = candidates
        .iter()
        .zip(times)
        .map(|(candidate, time)| format!("{} {time:.0} us", candidate.name));
    setting.console.info(&format!(
        "matrix products are quantised {} ({})",
        candidates[taken].name,
        all.collect::<Vec<_>>().join(", ")
    ));
    taken
}
