//! 8-bit weights, each operator in the way that measures best on the engine that serves.

use std::time::Instant;

use plimsoll_package::recipe::Granularity;
use plimsoll_runtime::engine::{self, LoadOptions};
use plimsoll_runtime::onnx::ModelProto;
use prost::Message as _;

use super::int8::{Int8, Products};
use super::timing::{self, Ways};
use super::{faithful, raise};
use crate::compress::{Change, Setting, Technique};
use crate::convert;
use crate::evaluate::latency;
use crate::failure::{Failure, chain, internal};

/// How much faster another way must be to be taken in place of the first: less could be the machine's other work.
pub(super) const ADVANTAGE: f64 = 1.1;
/// Most bytes of a model that is run as a whole while it is compressed: an engine holds all of it at once, and more.
const WHOLE_BYTES_MAX: usize = 512 << 20;

/// Convolutions and tables are stored in 8 bits and computed in floats, which is never slower. Matrix products are computed as dynamic
/// quantisation does, or in floats of weights that are made at load or at every inference: whichever is fastest here for products of that shape.
/// Those whose outputs lose too much in integers stay in floats.
///
/// Where the model is larger than [`WHOLE_BYTES_MAX`], nobody can say what its outputs lose in integers without holding all of it in memory, so
/// that all products stay in floats.
#[derive(Debug, Clone)]
pub struct Fastest {
    /// What shares a scale.
    pub granularity: Granularity,
    /// Names of nodes that stay as they are.
    pub exclude: Vec<String>,
}

/// A way of quantising the whole model.
struct Candidate {
    name: &'static str,
    model: ModelProto,
    change: Change,
}

impl Technique for Fastest {
    fn apply(&self, model: &mut ModelProto, setting: &Setting) -> Result<Change, Failure> {
        self.apply_within(model, setting, WHOLE_BYTES_MAX)
    }
}

impl Fastest {
    /// A model of more than `whole_bytes_max` is not run as a whole.
    fn apply_within(&self, model: &mut ModelProto, setting: &Setting, whole_bytes_max: usize) -> Result<Change, Failure> {
        raise(model)?;
        let ways = Ways::measured(model, self.granularity, setting)?;
        let technique = |products, fold, in_floats: &[String]| Int8 {
            products,
            fold,
            granularity: self.granularity,
            in_floats: in_floats.to_vec(),
            exclude: self.exclude.clone(),
        };
        if model.encoded_len() > whole_bytes_max {
            setting.console.info(
                "matrix products are computed in floats of 8-bit weights: what they lose in integers only a run of the whole model would show, for which it is too large",
            );
            return technique(Products::WeightOnly, ways.folds_best(), &[]).apply(model, setting);
        }
        let mut mixed = technique(Products::Dynamic, ways.fold, &ways.in_floats);
        mixed.in_floats.extend(faithful::in_floats(&mixed, model, setting)?);
        let mut candidates: Vec<Candidate> = Vec::new();
        for (name, technique) in [
            ("each product in its own way", mixed),
            ("weight-only", technique(Products::WeightOnly, true, &[])),
            ("weight-only and unfolded", technique(Products::WeightOnly, false, &[])),
        ] {
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
    for kind in convert::engines_of(setting.engine).into_iter().rev() {
        let load = |index: usize| {
            let options = LoadOptions {
                threads: setting.threads,
                fold_dequantize: candidates[index].change.fold_dequantize,
                ..LoadOptions::default()
            };
            engine::load(kind, &paths[index], &options).map_err(|error| chain(&error))
        };
        // All are compared with the first by turns, so that what the machine did meanwhile fell on both; two are in memory at once.
        let measure = || -> Result<Vec<f64>, String> {
            let first = load(0)?;
            let sample = timing::sample(setting, |sample| first.run(sample).map(drop).map_err(|error| chain(&error)))?;
            let mut times = Vec::with_capacity(candidates.len());
            for index in 1..candidates.len() {
                let (pair, _) = latency::measure(&*first, &*load(index)?, &sample, Instant::now).map_err(|error| chain(&error))?;
                if times.is_empty() {
                    times.push(pair.before_us);
                }
                times.push(times[0] * pair.after_us / pair.before_us);
            }
            Ok(times)
        };
        match measure() {
            Ok(times) => return Ok(choose(candidates, &times, setting)),
            Err(why) => setting.console.info(&format!("{kind} does not tell which way is faster: {why}")),
        }
    }
    Ok(0)
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
        "the whole model is quantised {} ({})",
        candidates[taken].name,
        all.collect::<Vec<_>>().join(", ")
    ));
    taken
}

#[cfg(test)]
mod tests {
    use plimsoll_runtime::onnx::tensor_proto::DataType;

    use super::super::fixture::{model, named, numbers, operators, value};
    use super::*;
    use crate::graph::{float_tensor, node};
    use crate::progress::Console;

    fn product() -> ModelProto {
        model(
            vec![value("x", DataType::Float, &[256])],
            vec![named("product", node("MatMul", &["x", "w"], "y", vec![]))],
            vec![float_tensor("w", &[256, 256], &numbers(256 * 256, 1))],
            vec![value("y", DataType::Float, &[256])],
        )
    }

    #[test]
    fn what_is_too_large_to_be_run_is_quantised_product_by_product() {
        let original = product();
        let fastest = Fastest {
            granularity: Granularity::PerChannel,
            exclude: vec![],
        };
        let setting = Setting {
            calibration: None,
            original: &original,
            threads: 1,
            engine: None,
            console: &Console::silent(),
        };
        let size = original.encoded_len();
        let mut large = original.clone();
        let change = fastest.apply_within(&mut large, &setting, size - 1).unwrap();
        assert_eq!(change.changed, ["w"]);
        assert_eq!(
            operators(&large),
            ["DequantizeLinear", "MatMul"],
            "nobody knows what it loses in integers"
        );
    }
}
