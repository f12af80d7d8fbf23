//! How fast matrix products are in each way of computing with 8-bit weights, shape by shape: a model of one product is run, so that memory
//! holds one product, however large the model is.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use plimsoll_package::recipe::Granularity;
use plimsoll_runtime::engine::{self, Engine, LoadOptions, Tensor};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{self, GraphProto, ModelProto, OperatorSetIdProto, TypeProto, ValueInfoProto, type_proto, weights};

use super::fastest::ADVANTAGE;
use super::int8::{Int8, Product, Products};
use crate::compress::{Setting, Technique as _};
use crate::convert;
use crate::evaluate::dataset::Dataset;
use crate::evaluate::latency;
use crate::failure::{Failure, chain, internal};
use crate::graph::shape::Shapes;
use crate::graph::weight::{self, Operator};
use crate::graph::{fixed_shape, float_tensor, integer, node, opset, value_info};

/// Most bytes of a weight that is measured: of a larger one, fewer outputs are.
const WEIGHT_BYTES_MAX: usize = 64 << 20;
/// Most multiplications of a product that is measured: of a larger one, fewer rows are.
const MULTIPLICATIONS_MAX: usize = 1 << 30;
/// Time within which shapes are measured, the heaviest first; what is left is computed in integers.
const TIME: Duration = Duration::from_secs(8);
/// Time spent on one shape.
const SHAPE_TIME: Duration = Duration::from_millis(60);

/// A matrix product as far as its speed depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    /// Rows of the activation.
    rows: usize,
    /// Features that are summed over.
    inputs: usize,
    outputs: usize,
    /// Whether the weight's rows are the outputs.
    transposed: bool,
}

/// The times of a product in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Times {
    /// In integers.
    dynamic: f64,
    /// In floats that were made of the weight at load.
    folded: f64,
    /// In floats that are made of the weight at every inference, or within the product.
    unfolded: f64,
}

impl Times {
    fn floats(&self, fold: bool) -> f64 {
        if fold { self.folded } else { self.unfolded }
    }

    /// Whether floats are faster beyond the machine's unrest.
    fn prefers_floats(&self, fold: bool) -> bool {
        self.dynamic > self.floats(fold) * ADVANTAGE
    }

    fn best(&self, fold: bool) -> f64 {
        if self.prefers_floats(fold) {
            self.floats(fold)
        } else {
            self.dynamic
        }
    }
}

/// The ways that measure best.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ways {
    /// The names of the nodes whose products are faster in floats.
    pub(super) in_floats: Vec<String>,
    /// Whether the floats are made at load.
    pub(super) fold: bool,
    /// What was measured, with the number of products of that shape.
    measured: Vec<(Times, usize)>,
}

impl Ways {
    /// Of the products of `model`, on the first engine that runs each way of one; where none does, all are computed in integers.
    ///
    /// # Errors
    /// Where the disk does not take a product.
    pub(super) fn measured(model: &ModelProto, granularity: Granularity, setting: &Setting) -> Result<Self, Failure> {
        let shapes = shapes(model, setting);
        let mut groups: HashMap<Shape, Vec<String>> = HashMap::new();
        for (name, shape) in shapes {
            groups.entry(shape).or_default().push(name);
        }
        let mut groups: Vec<(Shape, Vec<String>)> = groups.into_iter().collect();
        let weight = |(shape, nodes): &(Shape, Vec<String>)| shape.inputs * shape.outputs * nodes.len();
        groups.sort_by_key(|group| (std::cmp::Reverse(weight(group)), group.0.rows, group.0.inputs, group.0.outputs));
        let begun = Instant::now();
        let mut known: Vec<(Times, Vec<String>)> = Vec::new();
        for (shape, nodes) in groups {
            if begun.elapsed() > TIME {
                setting
                    .console
                    .info("the time for measuring matrix products is up; the lighter ones are computed in integers");
                break;
            }
            let Some(times) = shape.measure(granularity, setting)? else {
                continue;
            };
            let Times { dynamic, folded, unfolded } = times;
            setting.console.info(&format!(
                "{} products of {} by {} with {} rows: {dynamic:.0} us in integers, {folded:.0} us in floats, {unfolded:.0} us in floats that are not kept",
                nodes.len(),
                shape.inputs,
                shape.outputs,
                shape.rows
            ));
            known.push((times, nodes));
        }
        Ok(Self::of(known))
    }

    fn of(known: Vec<(Times, Vec<String>)>) -> Self {
        let total = |fold| {
            known
                .iter()
                .map(|(times, nodes)| times.best(fold) * nodes.len() as f64)
                .sum::<f64>()
        };
        let fold = total(true) <= total(false) * ADVANTAGE;
        let in_floats = known.iter().filter(|(times, _)| times.prefers_floats(fold));
        Self {
            in_floats: in_floats.flat_map(|(_, nodes)| nodes.clone()).collect(),
            fold,
            measured: known.into_iter().map(|(times, nodes)| (times, nodes.len())).collect(),
        }
    }

    /// Whether, with all products in floats, these are better made at load.
    pub(super) fn folds_best(&self) -> bool {
        let total = |fold| {
            let times = self.measured.iter().map(|(times, count)| times.floats(fold) * *count as f64);
            times.sum::<f64>()
        };
        total(true) <= total(false) * ADVANTAGE
    }
}

/// The first calibration sample, or one drawn from the signature: the first that `fits`.
///
/// # Errors
/// In words, where there is none.
pub(super) fn sample(setting: &Setting, mut fits: impl FnMut(&[Tensor]) -> Result<(), String>) -> Result<Vec<Tensor>, String> {
    if let Some(calibration) = setting.calibration {
        return calibration.samples().first().map_err(|failed| failed.message);
    }
    let (inputs, _) = onnx::signature(setting.original).map_err(|error| error.to_string())?;
    let mut why = "an input is larger than memory".to_owned();
    for samples in Dataset::drawn_forms(&inputs) {
        let sample = samples.first().map_err(|failed| failed.message)?;
        match fits(&sample) {
            Ok(()) => return Ok(sample),
            Err(refusal) => why = refusal,
        }
    }
    Err(why)
}

/// The products of `model` that have a name and can be taken in integers, with their shapes on one sample.
fn shapes(model: &ModelProto, setting: &Setting) -> Vec<(String, Shape)> {
    let mut sized = model.clone();
    let Some(graph) = &mut sized.graph else { return vec![] };
    if let (Ok(sample), Ok((specs, _))) = (sample(setting, |_| Ok(())), onnx::signature(model)) {
        for (spec, tensor) in specs.iter().zip(&sample) {
            if let Some(input) = graph.input.iter_mut().find(|input| input.name() == spec.name) {
                resize(input, tensor.shape());
            }
        }
    }
    let inferred = Shapes::of(&sized);
    let Some(graph) = &model.graph else { return vec![] };
    let mut products: Vec<(usize, String, Option<usize>, Shape)> = Vec::new();
    for found in weight::find(graph) {
        let Ok(shape) = weights::shape(&graph.initializer[found.initializer]) else {
            continue;
        };
        for used in &found.uses {
            let node = &graph.node[used.node];
            let Some(product) = Product::of(node, used, &shape).filter(|_| !node.name().is_empty() && !shape.contains(&0)) else {
                continue;
            };
            let transposed = used.operator == (Operator::Gemm { transposed: true });
            let dims = inferred.get(&product.activation).and_then(|dims| dims.split_last());
            let rows = dims.and_then(|(_, rows)| rows.iter().map(|dim| dim.size()).product::<Option<usize>>());
            let shape = Shape {
                rows: 1,
                inputs: shape[usize::from(transposed)],
                outputs: shape[usize::from(!transposed)],
                transposed,
            };
            products.push((used.node, node.name().to_owned(), rows, shape));
        }
    }
    // Of one whose rows are not known, those of the product before it are taken.
    products.sort_by_key(|(place, ..)| *place);
    let mut last = products.iter().find_map(|(_, _, rows, _)| *rows).unwrap_or(1);
    let with_rows = |(_, name, rows, shape): (usize, String, Option<usize>, Shape)| {
        last = rows.unwrap_or(last).max(1);
        (name, Shape { rows: last, ..shape })
    };
    products.into_iter().map(with_rows).collect()
}

fn resize(input: &mut ValueInfoProto, sizes: &[usize]) {
    if let Some(TypeProto {
        value: Some(type_proto::Value::TensorType(kind)),
        ..
    }) = &mut input.r#type
    {
        kind.shape = Some(fixed_shape(sizes));
    }
}

impl Shape {
    /// How long it takes in each way, by turns; `None` where no engine runs all of them, or it is not worth quantising.
    fn measure(self, granularity: Granularity, setting: &Setting) -> Result<Option<Times>, Failure> {
        let folder = tempfile::tempdir().map_err(|error| internal("cannot make a folder for a product", &error))?;
        let (product, sample) = self.model();
        let ways = [
            (Products::Dynamic, true),
            (Products::WeightOnly, true),
            (Products::WeightOnly, false),
        ];
        let mut paths = Vec::with_capacity(ways.len());
        for (index, (products, fold)) in ways.into_iter().enumerate() {
            let technique = Int8 {
                products,
                fold,
                granularity,
                in_floats: vec![],
                exclude: vec![],
            };
            let mut quantized = product.clone();
            // What is too small is left alone in the model, too.
            if technique.apply(&mut quantized, setting).is_err() {
                return Ok(None);
            }
            let path = folder.path().join(format!("{index}.onnx"));
            convert::write(&quantized, &path)?;
            paths.push((path, fold));
        }
        drop(product);
        for kind in convert::engines_of(setting.engine).into_iter().rev() {
            let load = |(path, fold): &(std::path::PathBuf, bool)| {
                let options = LoadOptions {
                    threads: setting.threads,
                    fold_dequantize: *fold,
                    ..LoadOptions::default()
                };
                engine::load(kind, path, &options)
            };
            let engines = paths.iter().map(load).collect::<Result<Vec<Box<dyn Engine>>, _>>();
            let measured = engines.and_then(|engines| latency::by_turns(&engines, &sample, SHAPE_TIME));
            match measured.as_deref() {
                Ok(&[dynamic, folded, unfolded]) => {
                    return Ok(Some(Times { dynamic, folded, unfolded }));
                }
                Ok(_) => {}
                Err(error) => setting
                    .console
                    .info(&format!("{kind} does not tell which way of a product is faster: {}", chain(error))),
            }
        }
        Ok(None)
    }

    /// A model of that product alone, and what to run it on. What the numbers are does not matter for the time.
    fn model(self) -> (ModelProto, Vec<Tensor>) {
        let Self {
            rows, inputs, transposed, ..
        } = self;
        let outputs = self.outputs.min((WEIGHT_BYTES_MAX / 4 / inputs).max(1));
        let rows = rows.min((MULTIPLICATIONS_MAX / (inputs * outputs)).max(1));
        let numbers = |count: usize| (0..count).map(|index| (index % 251) as f32 / 125.0 - 1.0).collect::<Vec<f32>>();
        let dims = if transposed { [outputs, inputs] } else { [inputs, outputs] };
        let product = match transposed {
            true => node("Gemm", &["x", "w"], "y", vec![integer("transB", 1)]),
            false => node("MatMul", &["x", "w"], "y", vec![]),
        };
        let declared = |name: &str, features: usize| value_info(name, DataType::Float, Some(fixed_shape(&[rows, features])));
        let model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto {
                domain: None,
                version: Some(opset::QUANTIZED),
            }],
            graph: Some(GraphProto {
                name: Some("product".into()),
                input: vec![declared("x", inputs)],
                node: vec![product],
                initializer: vec![float_tensor("w", &dims, &numbers(inputs * outputs))],
                output: vec![declared("y", outputs)],
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        };
        let sample = Tensor::new(vec![rows, inputs], numbers(rows * inputs));
        (model, sample.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{model, named, numbers, value};
    use super::*;
    use crate::progress::Console;

    fn times(dynamic: f64, folded: f64, unfolded: f64) -> Times {
        Times { dynamic, folded, unfolded }
    }

    #[test]
    fn each_shape_is_computed_in_the_way_that_is_fastest_for_it() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
        let known = vec![
            (times(100.0, 200.0, 300.0), names(&["wide", "wider"])),
            (times(50.0, 20.0, 90.0), names(&["narrow"])),
            // Less than a tenth faster is the machine's unrest.
            (times(50.0, 46.0, 90.0), names(&["even"])),
        ];
        let ways = Ways::of(known);
        assert_eq!((ways.in_floats.clone(), ways.fold), (names(&["narrow"]), true));
        assert!(ways.folds_best());
        let unfolded = Ways::of(vec![
            (times(100.0, 90.0, 30.0), names(&["large"])),
            (times(10.0, 20.0, 20.0), names(&["small"])),
        ]);
        assert_eq!((unfolded.in_floats.clone(), unfolded.fold), (names(&["large"]), false));
        assert!(!unfolded.folds_best());
    }

    #[test]
    fn products_of_one_shape_are_measured_once_with_the_rows_of_a_sample() {
        let graph = model(
            vec![value("x", DataType::Float, &[5, 24])],
            vec![
                named("first", node("MatMul", &["x", "a"], "h", vec![])),
                named("second", node("MatMul", &["x", "b"], "i", vec![])),
                node("Add", &["h", "i"], "s", vec![]),
                named("last", node("MatMul", &["s", "c"], "y", vec![])),
            ],
            vec![
                float_tensor("a", &[24, 32], &numbers(768, 1)),
                float_tensor("b", &[24, 32], &numbers(768, 2)),
                float_tensor("c", &[32, 16], &numbers(512, 3)),
            ],
            vec![value("y", DataType::Float, &[5, 16])],
        );
        let console = Console::silent();
        let setting = Setting {
            calibration: None,
            original: &graph,
            threads: 1,
            engine: None,
            console: &console,
        };
        let known = shapes(&graph, &setting);
        let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["first", "second", "last"]);
        assert_eq!(known[0].1, known[1].1);
        assert_eq!((known[0].1.rows, known[0].1.inputs, known[0].1.outputs), (5, 24, 32));
        let ways = Ways::measured(&graph, Granularity::PerChannel, &setting).unwrap();
        let counts: Vec<usize> = ways.measured.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [2, 1]);
        assert!(ways.measured.iter().all(|(times, _)| times.dynamic > 0.0 && times.unfolded > 0.0));
    }

    #[test]
    fn what_is_measured_of_a_product_is_bounded() {
        let huge = Shape {
            rows: 100_000,
            inputs: 8192,
            outputs: 250_000,
            transposed: false,
        };
        let (model, sample) = huge.model();
        let weight = &model.graph.unwrap().initializer[0];
        assert!(weight.raw_data().len() <= WEIGHT_BYTES_MAX);
        assert_eq!(weight.dims[0], 8192);
        assert!(sample[0].shape()[0] * 8192 * weight.dims[1] as usize <= MULTIPLICATIONS_MAX);
    }
}
