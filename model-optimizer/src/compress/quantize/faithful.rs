//! Which matrix products can be taken in integers, by what their model's outputs lose.
//!
//! A product in integers rounds its activation to 256 steps between the least and the largest value that it has just then. Where a few
//! values are far larger than the others, as in the feed-forward layers of many transformers, the others share few of these steps.
//! These products stay in floats, of weights in 8 bits, so that the model is as small.

use std::collections::HashMap;

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_runtime::engine::{self, Engine, LoadOptions, Tensor};
use plimsoll_runtime::onnx::{self, ModelProto, TensorProto, weights};

use super::int8::{Int8, Product};
use crate::calibration::Calibration;
use crate::compress::{Setting, Technique as _};
use crate::convert;
use crate::evaluate::budget;
use crate::evaluate::dataset::Dataset;
use crate::evaluate::fidelity::Comparison;
use crate::failure::{Failure, internal};
use crate::graph::weight;

/// Samples on which outputs are compared.
const SAMPLES: usize = 16;
/// The seed by which they are chosen.
const SEED: u64 = 0x1278;

/// The names of the nodes of `model` whose products are not to be taken in integers, beside those that `technique` takes in floats anyway: the
/// fewest, those with the noisiest activations first, without which every output keeps what the default budget asks for. None where no
/// engine tells, and all where even that is too few.
pub(super) fn in_floats(technique: &Int8, model: &ModelProto, setting: &Setting) -> Result<Vec<String>, Failure> {
    let Some(trial) = Trial::new(technique, model, setting)? else {
        return Ok(vec![]);
    };
    if trial.passes(&[])? {
        return Ok(vec![]);
    }
    let noisiest = trial.noisiest()?;
    let (mut low, mut high) = (1, noisiest.len());
    while low < high {
        let middle = low + (high - low) / 2;
        if trial.passes(&noisiest[..middle])? {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    setting.console.info(&format!(
        "{high} of {} matrix products are computed in floats, since in integers the outputs lose too much",
        noisiest.len()
    ));
    Ok(noisiest[..high].to_vec())
}

/// A model, and what it gives for some samples on one engine.
struct Trial<'a> {
    technique: &'a Int8,
    model: &'a ModelProto,
    setting: &'a Setting<'a>,
    kind: EngineKind,
    samples: Dataset,
    before: Vec<Vec<Tensor>>,
    folder: tempfile::TempDir,
}

impl<'a> Trial<'a> {
    /// On the first engine that runs the model, ONNX Runtime where it is; `None` where there is no product in question or no engine runs it.
    fn new(technique: &'a Int8, model: &'a ModelProto, setting: &'a Setting<'a>) -> Result<Option<Self>, Failure> {
        if products(technique, model).is_empty() {
            return Ok(None);
        }
        let folder = tempfile::tempdir().map_err(|error| internal("cannot make a folder for candidates", &error))?;
        let path = folder.path().join("before.onnx");
        convert::write(model, &path)?;
        let options = LoadOptions {
            threads: setting.threads,
            ..LoadOptions::default()
        };
        for kind in convert::engines_of(setting.engine).into_iter().rev() {
            let Ok(engine) = engine::load(kind, &path, &options) else {
                continue;
            };
            for samples in samples(setting) {
                if let Some(before) = run(&*engine, &samples) {
                    return Ok(Some(Self {
                        technique,
                        model,
                        setting,
                        kind,
                        samples,
                        before,
                        folder,
                    }));
                }
            }
        }
        Ok(None)
    }

    /// Whether every output keeps what it has to if the products of the nodes `in_floats` are taken in floats. What does not run is for the
    /// gate to refuse.
    fn passes(&self, in_floats: &[String]) -> Result<bool, Failure> {
        let technique = Int8 {
            in_floats: [&self.technique.in_floats, in_floats].concat(),
            ..self.technique.clone()
        };
        let mut model = self.model.clone();
        let change = technique.apply(&mut model, self.setting)?;
        let path = self.folder.path().join("after.onnx");
        convert::write(&model, &path)?;
        let options = LoadOptions {
            threads: self.setting.threads,
            fold_dequantize: change.fold_dequantize,
            ..LoadOptions::default()
        };
        let after = engine::load(self.kind, &path, &options).ok();
        let Some(after) = after.and_then(|engine| Some((run(&*engine, &self.samples)?, engine))) else {
            return Ok(true);
        };
        let (after, engine) = after;
        let mut outputs: Vec<Comparison> = engine.outputs().iter().map(|spec| Comparison::new(&spec.name)).collect();
        for (before, after) in self.before.iter().zip(&after) {
            for (comparison, (before, after)) in outputs.iter_mut().zip(before.iter().zip(after)) {
                comparison.add(before, after);
            }
        }
        let outputs = outputs.into_iter().filter_map(Comparison::finish);
        Ok(outputs.into_iter().all(|output| budget::keeps_well(&output)))
    }

    /// The nodes of the products, the noisiest first: by the variance that rounding adds to its output, to that of the output itself.
    fn noisiest(&self) -> Result<Vec<String>, Failure> {
        let products = products(self.technique, self.model);
        let mut values: Vec<String> = products
            .iter()
            .flat_map(|product| [product.activation.clone(), product.output.clone()])
            .collect();
        values.sort_unstable();
        values.dedup();
        let mut power = vec![0.0_f64; values.len()];
        let mut range = vec![0.0_f64; values.len()];
        Calibration::new(self.samples.clone(), self.setting.threads).observe(self.model, &values, |tensors| {
            for (tensor, (power, range)) in tensors.iter().zip(power.iter_mut().zip(&mut range)) {
                let values = tensor.as_f32().unwrap_or_default();
                let (low, high) = values
                    .iter()
                    .fold((0.0_f32, 0.0_f32), |(low, high), value| (low.min(*value), high.max(*value)));
                *range = range.max(f64::from(high - low));
                *power += values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / values.len().max(1) as f64;
            }
            Ok(())
        })?;
        let place: HashMap<&str, usize> = values.iter().enumerate().map(|(place, name)| (name.as_str(), place)).collect();
        let mut noise: Vec<(f64, &Candidate)> = products
            .iter()
            .map(|product| {
                let step = range[place[product.activation.as_str()]] / 255.0;
                let signal = power[place[product.output.as_str()]].max(f64::MIN_POSITIVE);
                (step * step / 12.0 * product.gain / signal, product)
            })
            .collect();
        noise.sort_by(|one, other| other.0.total_cmp(&one.0));
        Ok(noise.into_iter().map(|(_, product)| product.node.clone()).collect())
    }
}

/// A product that may be taken in integers.
struct Candidate {
    node: String,
    activation: String,
    output: String,
    /// The mean over its outputs of the sum of the squared weights of one.
    gain: f64,
}

/// The products of nodes that have a name and are taken in integers.
fn products(technique: &Int8, model: &ModelProto) -> Vec<Candidate> {
    let Some(graph) = &model.graph else { return vec![] };
    let mut products = Vec::new();
    for found in weight::find(graph) {
        let tensor: &TensorProto = &graph.initializer[found.initializer];
        let Ok(shape) = weights::shape(tensor) else { continue };
        let mut gain = None;
        for used in &found.uses {
            let node = &graph.node[used.node];
            if node.name().is_empty() || technique.in_floats.iter().any(|name| name == node.name()) {
                continue;
            }
            let Some(product) = Product::of(node, used, &shape) else { continue };
            let gain = *gain.get_or_insert_with(|| {
                let squares = weights::floats(tensor).unwrap_or_default();
                let channels = shape[used.operator.channel_axis(shape.len())].max(1);
                squares.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / channels as f64
            });
            products.push(Candidate {
                node: node.name().to_owned(),
                activation: product.activation,
                output: product.output,
                gain,
            });
        }
    }
    products
}

/// The calibration data or, in the forms that a model may take them, samples drawn from the signature.
fn samples(setting: &Setting) -> Vec<Dataset> {
    if let Some(calibration) = setting.calibration {
        return vec![calibration.samples().clone().subset(SAMPLES, SEED)];
    }
    match onnx::signature(setting.original) {
        Ok((inputs, _)) => Dataset::drawn_forms(&inputs).collect(),
        Err(_) => vec![],
    }
}

/// What a model gives for each batch; `None` where it does not run.
fn run(engine: &dyn Engine, samples: &Dataset) -> Option<Vec<Vec<Tensor>>> {
    let run = |range| engine.run(&samples.batch(range).ok()?).ok();
    samples.batches().map(run).collect()
}

#[cfg(test)]
mod tests {
    use plimsoll_package::recipe::Granularity;
    use plimsoll_runtime::onnx::tensor_proto::DataType;

    use super::super::fixture::{model, named, numbers, value};
    use super::super::int8::Products;
    use super::*;
    use crate::graph::{float_tensor, node};
    use crate::progress::Console;

    #[test]
    fn the_product_whose_activation_has_outliers_is_named_and_no_other() {
        const N: usize = 256;
        let mut blind = numbers(N * N, 1);
        // The outliers add nothing to its output.
        blind[..N].fill(0.0);
        let original = model(
            vec![value("a", DataType::Float, &[N as i64]), value("b", DataType::Float, &[N as i64])],
            vec![
                named("rough", node("MatMul", &["a", "v"], "x", vec![])),
                named("even", node("MatMul", &["b", "w"], "y", vec![])),
            ],
            vec![float_tensor("v", &[N, N], &blind), float_tensor("w", &[N, N], &numbers(N * N, 2))],
            vec![value("x", DataType::Float, &[N as i64]), value("y", DataType::Float, &[N as i64])],
        );
        let mut outlying = numbers(32 * N, 3);
        outlying.iter_mut().step_by(N).for_each(|value| *value = 3000.0);
        let tensor = |values| Tensor::new(vec![32, N], values).unwrap();
        let (specs, _) = onnx::signature(&original).unwrap();
        let data = Dataset::of_tensors(vec![tensor(outlying), tensor(numbers(32 * N, 4))], &specs, None).unwrap();
        let calibration = Calibration::new(data, 1);
        let setting = Setting {
            calibration: Some(&calibration),
            original: &original,
            threads: 1,
            engine: None,
            console: &Console::silent(),
        };
        let technique = Int8 {
            products: Products::Dynamic,
            fold: true,
            granularity: Granularity::PerChannel,
            in_floats: vec![],
            exclude: vec![],
        };
        assert_eq!(in_floats(&technique, &original, &setting).unwrap(), ["rough"]);
    }
}
