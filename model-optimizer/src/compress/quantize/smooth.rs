//! SmoothQuant: the outliers of activations move into the weights, where each channel has a scale of its own.

use std::collections::{BTreeMap, HashMap};

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, ModelProto, NodeProto, TensorProto, weights};

use super::{Exclusion, unreadable};
use crate::calibration::{Calibration, Observed};
use crate::failure::Failure;
use crate::graph::weight::{self, Operator};
use crate::graph::{Names, float_tensor, is_standard, node, reads};

/// Magnitudes below this are taken for it, so that no factor is infinite.
const MAGNITUDE_MIN: f32 = 1e-5;

/// An activation with the products that read it.
#[derive(Default)]
struct Group {
    /// Index of the node, of the weight's initialiser, and whether its rows are the outputs.
    products: Vec<(usize, usize, bool)>,
}

/// Divides each channel `j` of the activations that matrix products read by `max|X_j|^alpha / max|W_j|^(1 - alpha)` and multiplies the
/// weights of that channel by it, which changes no result. The division is folded into a layer normalisation, multiplication or
/// product just before where nothing else reads its result, and is a `Mul` elsewhere.
///
/// `alpha` is a ratio, `0.0..=1.0`.
///
/// # Errors
/// Where the model does not run on the calibration data, or a weight cannot be read.
///
/// Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", equation 4.
pub(super) fn apply(model: &mut ModelProto, calibration: &Calibration, alpha: f64, exclusion: &Exclusion) -> Result<(), Failure> {
    let Some(graph) = &model.graph else { return Ok(()) };
    let groups = groups(graph, exclusion);
    let observed: Vec<Observed> = groups
        .keys()
        .map(|name| Observed {
            name: name.clone(),
            channel_axis: Some(-1),
        })
        .collect();
    let statistics = calibration.statistics(model, &observed)?;
    let Some(graph) = &mut model.graph else { return Ok(()) };
    let mut smoothing = Smoothing::of(graph);
    for ((activation, group), statistics) in groups.iter().zip(&statistics) {
        smoothing.group(graph, activation, group, &statistics.channels.largest, alpha)?;
    }
    smoothing.finish(graph);
    Ok(())
}

/// Products of which the weight has two axes and no other reader, by their activation.
fn groups(graph: &GraphProto, exclusion: &Exclusion) -> BTreeMap<String, Group> {
    let read_counts = reads(graph);
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for found in weight::find(graph) {
        let ([used], Some(1)) = (found.uses.as_slice(), read_counts.get(found.name.as_str())) else {
            continue;
        };
        let product = &graph.node[used.node];
        let rows = match used.operator {
            Operator::MatMul => false,
            Operator::Gemm { transposed } => transposed,
            _ => continue,
        };
        let transposed = crate::graph::attribute(product, "transA").is_some_and(|attribute| attribute.i() != 0);
        if graph.initializer[found.initializer].dims.len() == 2 && !transposed && !exclusion.contains(product) {
            let group = groups.entry(product.input[0].clone()).or_default();
            group.products.push((used.node, found.initializer, rows));
        }
    }
    groups
}

struct Smoothing {
    names: Names,
    read_counts: HashMap<String, usize>,
    /// The node that makes each value.
    producers: HashMap<String, usize>,
    initializers: HashMap<String, usize>,
    /// Divisions to put before the node of that index.
    divisions: HashMap<usize, NodeProto>,
}

impl Smoothing {
    fn of(graph: &GraphProto) -> Self {
        let producers = graph.node.iter().enumerate();
        let initializers = graph.initializer.iter().enumerate();
        Self {
            names: Names::of(graph),
            read_counts: reads(graph).into_iter().map(|(name, count)| (name.to_owned(), count)).collect(),
            producers: producers
                .flat_map(|(index, node)| node.output.iter().map(move |output| (output.clone(), index)))
                .collect(),
            initializers: initializers.map(|(index, tensor)| (tensor.name().to_owned(), index)).collect(),
            divisions: HashMap::new(),
        }
    }

    fn group(&mut self, graph: &mut GraphProto, activation: &str, group: &Group, largest: &[f32], alpha: f64) -> Result<(), Failure> {
        let mut weights = Vec::with_capacity(group.products.len());
        let mut of_weights = vec![0.0_f32; largest.len()];
        for (_, initializer, rows) in &group.products {
            let tensor = &graph.initializer[*initializer];
            let values = weights::floats(tensor).map_err(|error| unreadable(tensor.name(), &error.to_string()))?;
            let columns = tensor.dims[1].max(1) as usize;
            let inputs = if *rows { columns } else { values.len() / columns };
            if inputs != largest.len() {
                // It broadcasts, or the samples do not reach it.
                return Ok(());
            }
            for (index, value) in values.iter().enumerate() {
                let channel = channel(index, columns, *rows);
                of_weights[channel] = of_weights[channel].max(value.abs());
            }
            weights.push((*initializer, *rows, columns, values));
        }
        let factors: Vec<f32> = largest
            .iter()
            .zip(&of_weights)
            .map(|(activation, weight)| {
                let (activation, weight) = (f64::from(activation.max(MAGNITUDE_MIN)), f64::from(weight.max(MAGNITUDE_MIN)));
                ((activation.powf(alpha) / weight.powf(1.0 - alpha)) as f32).max(MAGNITUDE_MIN)
            })
            .collect();
        if factors.iter().any(|factor| !factor.is_finite()) {
            return Ok(());
        }
        for (initializer, rows, columns, mut values) in weights {
            for (index, value) in values.iter_mut().enumerate() {
                *value *= factors[channel(index, columns, rows)];
            }
            replace(&mut graph.initializer[initializer], &values);
        }
        let inverse: Vec<f32> = factors.iter().map(|factor| 1.0 / factor).collect();
        if !self.fold(graph, activation, group.products.len(), &inverse)? {
            self.divide(graph, activation, group, &inverse);
        }
        Ok(())
    }

    /// Multiplies what makes `activation` by `inverse`, where that is a layer normalisation, product, sum or multiplication with
    /// constants that nothing else reads.
    fn fold(&self, graph: &mut GraphProto, activation: &str, products: usize, inverse: &[f32]) -> Result<bool, Failure> {
        let mut value = activation.to_owned();
        let mut readers = products;
        let mut scaled = Vec::new();
        // A sum passes the factor on to both of its sides.
        loop {
            if self.read_counts.get(&value) != Some(&readers) {
                return Ok(false);
            }
            readers = 1;
            let Some(&producer) = self.producers.get(&value) else {
                return Ok(false);
            };
            let node = &graph.node[producer];
            let constant = |input: usize| self.constant(graph, node.input.get(input)?, inverse.len());
            let pairs = [(0, 1), (1, 0)];
            match node.op_type() {
                _ if !is_standard(node) => return Ok(false),
                "LayerNormalization" if node.output.len() == 1 => {
                    let bias = node.input.get(2).filter(|name| !name.is_empty());
                    match (constant(1), bias, constant(2)) {
                        (Some(weight), None, _) => scaled.push(weight),
                        (Some(weight), Some(_), Some(bias)) => scaled.extend([weight, bias]),
                        _ => return Ok(false),
                    }
                    break;
                }
                "Mul" => match pairs.iter().find_map(|(constant_input, _)| constant(*constant_input)) {
                    Some(factor) => {
                        scaled.push(factor);
                        break;
                    }
                    None => return Ok(false),
                },
                "MatMul" => match constant(1) {
                    Some(weight) => {
                        scaled.push(weight);
                        break;
                    }
                    None => return Ok(false),
                },
                "Add" => match pairs.iter().find_map(|(fixed, other)| Some((constant(*fixed)?, *other))) {
                    Some((term, other)) => {
                        scaled.push(term);
                        value.clone_from(&node.input[other]);
                    }
                    None => return Ok(false),
                },
                _ => return Ok(false),
            }
        }
        for initializer in scaled {
            let tensor = &mut graph.initializer[initializer];
            let mut values = weights::floats(tensor).map_err(|error| unreadable(tensor.name(), &error.to_string()))?;
            for (value, factor) in values.iter_mut().zip(inverse.iter().cycle()) {
                *value *= factor;
            }
            replace(tensor, &values);
        }
        Ok(true)
    }

    /// The initialiser `name`, where it has a value for each of `channels` along its last axis and one reader.
    fn constant(&self, graph: &GraphProto, name: &str, channels: usize) -> Option<usize> {
        let index = *self.initializers.get(name)?;
        let tensor = &graph.initializer[index];
        let fits = tensor.data_type() == DataType::Float as i32 && tensor.dims.last() == Some(&(channels as i64));
        (fits && self.read_counts.get(name) == Some(&1)).then_some(index)
    }

    fn divide(&mut self, graph: &mut GraphProto, activation: &str, group: &Group, inverse: &[f32]) {
        let factors = self.names.fresh(&format!("{activation}_smoothing"));
        let smoothed = self.names.fresh(&format!("{activation}_smoothed"));
        graph.initializer.push(float_tensor(&factors, &[inverse.len()], inverse));
        for (product, _, _) in &group.products {
            graph.node[*product].input[0].clone_from(&smoothed);
        }
        if let Some((first, _, _)) = group.products.iter().min() {
            self.divisions
                .insert(*first, node("Mul", &[activation, &factors], &smoothed, vec![]));
        }
    }

    fn finish(mut self, graph: &mut GraphProto) {
        for (index, node) in std::mem::take(&mut graph.node).into_iter().enumerate() {
            graph.node.extend(self.divisions.remove(&index));
            graph.node.push(node);
        }
    }
}

fn channel(index: usize, columns: usize, rows: bool) -> usize {
    if rows { index % columns } else { index / columns }
}

fn replace(tensor: &mut TensorProto, values: &[f32]) {
    let dims: Vec<usize> = tensor.dims.iter().map(|&size| size as usize).collect();
    *tensor = float_tensor(tensor.name(), &dims, values);
}

#[cfg(test)]
mod tests {
    use plimsoll_package::manifest::Engine as EngineKind;
    use plimsoll_runtime::engine::Tensor;

    use super::super::fixture::{model, numbers, operators, run, sqnr, value};
    use super::*;
    use crate::evaluate::dataset::Dataset;

    fn smoothed(original: &ModelProto, samples: &[Tensor]) -> ModelProto {
        let (specs, _) = plimsoll_runtime::onnx::signature(original).unwrap();
        let dataset = Dataset::of_tensors(samples.to_vec(), &specs, None).unwrap();
        let mut model = original.clone();
        let exclusion = Exclusion::of(&[], original.graph.as_ref().unwrap()).unwrap();
        apply(&mut model, &Calibration::new(dataset, 1), 0.5, &exclusion).unwrap();
        model
    }

    fn normalized(tail: NodeProto) -> ModelProto {
        let square = |name: &str, seed| float_tensor(name, &[16, 16], &numbers(256, seed));
        let vector = |name: &str, seed| float_tensor(name, &[16], &numbers(16, seed));
        model(
            vec![value("x", DataType::Float, &[16])],
            vec![
                node("LayerNormalization", &["x", "gamma", "beta"], "n", vec![]),
                node("MatMul", &["n", "a"], "p", vec![]),
                node("Add", &["bias", "p"], "h", vec![]),
                node("MatMul", &["h", "b"], "q", vec![]),
                tail,
            ],
            vec![
                square("a", 1),
                square("b", 2),
                vector("gamma", 3),
                vector("beta", 4),
                vector("bias", 5),
            ],
            vec![value("y", DataType::Float, &[16])],
        )
    }

    fn samples() -> Vec<Tensor> {
        vec![Tensor::new(vec![8, 16], numbers(128, 6)).unwrap()]
    }

    #[test]
    fn factors_vanish_in_a_normalisation_and_in_a_product_before() {
        let original = normalized(node("Neg", &["q"], "y", vec![]));
        let model = smoothed(&original, &samples());
        assert_eq!(operators(&model), operators(&original), "no node is added");
        assert_ne!(model, original);
        let run = |model| run(EngineKind::OnnxRuntime, model, true, &samples());
        assert!(sqnr(&run(&original), &run(&model)) > 100.0, "the results are the same");
    }

    #[test]
    fn where_something_else_reads_the_activation_it_is_divided_for_the_products() {
        let original = normalized(node("Add", &["q", "n"], "y", vec![]));
        let model = smoothed(&original, &samples());
        assert_eq!(operators(&model).iter().filter(|name| **name == "Mul").count(), 1);
        let run = |model| run(EngineKind::OnnxRuntime, model, true, &samples());
        assert!(sqnr(&run(&original), &run(&model)) > 100.0);
        // Both channels' maxima meet: |X_j| / s_j = |W_j|^(1/2) |X_j|^(1/2) for activations, and the same for weights.
        let graph = model.graph.as_ref().unwrap();
        let factors = graph.initializer.iter().find(|tensor| tensor.name() == "n_smoothing").unwrap();
        let weight = |model: &ModelProto| weights::floats(&model.graph.as_ref().unwrap().initializer[0]).unwrap();
        let (before, after) = (weight(&original), weight(&model));
        // The columns have factors of their own, for the product that follows.
        let grown = |row: usize| after[row * 16] / before[row * 16];
        let factors = weights::floats(factors).unwrap();
        assert!((factors[0] - factors[1]).abs() > 1e-3);
        assert!((grown(0) * factors[0] / (grown(1) * factors[1]) - 1.0).abs() < 1e-5);
    }
}
