//! Fusion of a convolution with the batch normalisation that follows it: in inference the latter is one factor and one addend a channel.

use std::collections::HashMap;

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, NodeProto, weights};

use super::{attribute, is_standard, reads, subgraphs_mut};
use crate::graph::{Names, float_tensor};

/// ONNX's default of `BatchNormalization.epsilon`.
const EPSILON: f32 = 1e-5;
/// The first version whose `BatchNormalization` is of inference unless it says otherwise.
const VERSION_MIN: i64 = 7;

/// Fuses every `Conv` or `ConvTranspose` whose output nothing but one `BatchNormalization` in inference form reads, where all parameters
/// are initialisers in single precision and the weight is the convolution's own.
///
/// With `factor = scale / sqrt(variance + epsilon)` the weight of each output channel is multiplied by its factor, and the bias becomes
/// `(bias - mean) * factor + shift` (Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2); computed in double
/// precision. A result that is not finite is not taken.
pub(super) fn fuse(graph: &mut GraphProto, version: i64) {
    if version < VERSION_MIN {
        return;
    }
    let mut names = Names::of(graph);
    fuse_within(graph, version, &mut names);
}

fn fuse_within(graph: &mut GraphProto, version: i64, names: &mut Names) {
    // A normalisation may follow another one.
    while fuse_once(graph, version, names) {}
    for body in graph.node.iter_mut().flat_map(subgraphs_mut) {
        fuse_within(body, version, names);
    }
}

/// A normalisation and the convolution before it, by their places, and the weight with its new values and bias.
struct Fusion {
    normalization: usize,
    convolution: usize,
    weight: usize,
    values: Vec<f32>,
    bias: Vec<f32>,
}

/// Fuses the normalisations that follow a convolution now; says whether there was any.
fn fuse_once(graph: &mut GraphProto, version: i64, names: &mut Names) -> bool {
    let fusions = fusions(graph, version);
    let found = !fusions.is_empty();
    for fusion in fusions {
        let tensor = &mut graph.initializer[fusion.weight];
        let dims: Vec<usize> = tensor.dims.iter().map(|&size| size as usize).collect();
        *tensor = float_tensor(tensor.name(), &dims, &fusion.values);
        let output = std::mem::take(&mut graph.node[fusion.normalization].output);
        let bias = names.fresh(&format!("{}_bias", output[0]));
        graph.initializer.push(float_tensor(&bias, &[fusion.bias.len()], &fusion.bias));
        let node = &mut graph.node[fusion.convolution];
        node.output = output;
        node.input.truncate(2);
        node.input.push(bias);
    }
    // What a fused normalisation made is the convolution's now.
    graph
        .node
        .retain(|node| !(is_standard(node) && node.op_type() == "BatchNormalization" && node.output.is_empty()));
    found
}

fn fusions(graph: &GraphProto, version: i64) -> Vec<Fusion> {
    let counts = reads(graph);
    let tensors = graph.initializer.iter().enumerate();
    let places: HashMap<&str, usize> = tensors.map(|(place, tensor)| (tensor.name(), place)).collect();
    let nodes = graph.node.iter().enumerate();
    let makers: HashMap<&str, usize> = nodes
        .clone()
        .flat_map(|(index, node)| node.output.iter().map(move |output| (output.as_str(), index)))
        .collect();
    let fusion = |(normalization, node): (usize, &NodeProto)| {
        let convolution = *makers.get(node.input[0].as_str())?;
        let produced = &graph.node[convolution];
        let alone = |name: &str| counts.get(name) == Some(&1);
        let weight = *places.get(produced.input.get(1)?.as_str())?;
        if !is_convolution(produced) || !alone(&node.input[0]) || !alone(&produced.input[1]) {
            return None;
        }
        let (values, bias) = fused(graph, produced, node, &places)?;
        Some(Fusion {
            normalization,
            convolution,
            weight,
            values,
            bias,
        })
    };
    nodes
        .filter(|(_, node)| is_normalization(node, version))
        .filter_map(fusion)
        .collect()
}

fn is_convolution(node: &NodeProto) -> bool {
    is_standard(node) && matches!(node.op_type(), "Conv" | "ConvTranspose")
}

/// Up to version 13 further outputs mean training, from 14 on an attribute does.
fn is_normalization(node: &NodeProto, version: i64) -> bool {
    let set = |name: &str, default: i64| attribute(node, name).map_or(default, AttributeProto::i) != 0;
    is_standard(node)
        && node.op_type() == "BatchNormalization"
        && node.input.len() == 5
        && node.output.iter().skip(1).all(String::is_empty)
        && (version < 14 || !set("training_mode", 0))
        && (version >= 9 || set("spatial", 1))
}

/// The weight and the bias of the convolution that does the work of both nodes.
fn fused(
    graph: &GraphProto,
    convolution: &NodeProto,
    normalization: &NodeProto,
    places: &HashMap<&str, usize>,
) -> Option<(Vec<f32>, Vec<f32>)> {
    let constant = |name: &String| {
        let tensor = &graph.initializer[*places.get(name.as_str())?];
        (tensor.data_type() == DataType::Float as i32).then_some(tensor)
    };
    let values = |name: &String| weights::floats(constant(name)?).ok();
    let weight = constant(&convolution.input[1])?;
    let shape = weights::shape(weight).ok()?;
    let groups = usize::try_from(attribute(convolution, "group").map_or(1, AttributeProto::i))
        .ok()
        .filter(|groups| *groups > 0)?;
    let transposed = convolution.op_type() == "ConvTranspose";
    let channels = match (transposed, &shape[..]) {
        (false, [channels, _, ..]) => *channels,
        (true, [inputs, of_group, ..]) if inputs.is_multiple_of(groups) => of_group * groups,
        _ => return None,
    };
    let [scale, shift, mean, variance] =
        [1, 2, 3, 4].map(|index| values(&normalization.input[index]).filter(|values| values.len() == channels));
    let (scale, shift, mean, variance) = (scale?, shift?, mean?, variance?);
    let bias = match convolution.input.get(2).filter(|name| !name.is_empty()) {
        Some(name) => values(name).filter(|bias| bias.len() == channels)?,
        None => vec![0.0; channels],
    };
    let epsilon = f64::from(attribute(normalization, "epsilon").and_then(|epsilon| epsilon.f).unwrap_or(EPSILON));
    let factors: Vec<f64> = scale
        .iter()
        .zip(&variance)
        .map(|(scale, variance)| f64::from(*scale) / (f64::from(*variance) + epsilon).sqrt())
        .collect();
    let bias: Vec<f32> = (0..channels)
        .map(|channel| ((f64::from(bias[channel]) - f64::from(mean[channel])) * factors[channel] + f64::from(shift[channel])) as f32)
        .collect();
    let mut weights = weights::floats(weight).ok()?;
    let kernel: usize = shape[2..].iter().product();
    for (block, values) in weights.chunks_exact_mut(kernel.max(1)).enumerate() {
        let channel = if transposed {
            // The weight is [inputs, outputs of a group, kernel]; an input belongs to one group.
            let (input, output) = (block / shape[1], block % shape[1]);
            input / (shape[0] / groups) * shape[1] + output
        } else {
            block / shape[1]
        };
        values
            .iter_mut()
            .for_each(|value| *value = (f64::from(*value) * factors[channel]) as f32);
    }
    let finite = weights.iter().chain(&bias).all(|value| value.is_finite());
    finite.then_some((weights, bias))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::{Builder, Value, assert_same};
    use crate::graph::simplify::simplify;
    use crate::graph::{integer, integers};
    use plimsoll_runtime::onnx::ModelProto;

    fn convolution(builder: &mut Builder, x: &Value, op_type: &str, groups: usize, biased: bool) -> Value {
        let shape = match op_type {
            "Conv" => [8, 4 / groups, 3, 3],
            _ => [4, 8 / groups, 3, 3],
        };
        let mut inputs = vec![x.name.clone(), builder.constant(&shape, 0.0)];
        if biased {
            inputs.push(builder.constant(&[8], 0.3));
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attributes = vec![integer("group", groups as i64), integers("pads", &[1, 1, 1, 1])];
        builder.push(op_type, &inputs, attributes, &[8, 6, 6])
    }

    fn operators(model: &ModelProto) -> Vec<&str> {
        model.graph.as_ref().unwrap().node.iter().map(NodeProto::op_type).collect()
    }

    #[test]
    fn a_normalisation_becomes_part_of_its_convolution() {
        for op_type in ["Conv", "ConvTranspose"] {
            for (groups, biased) in [(1, false), (1, true), (2, true), (4, false)] {
                let (mut builder, x) = Builder::new(7, &[4, 6, 6]);
                let value = convolution(&mut builder, &x, op_type, groups, biased);
                let value = builder.batch_norm(&value);
                let value = builder.unary("Relu", &value);
                let before = builder.finish(&value);
                let mut after = before.clone();
                simplify(&mut after).unwrap();
                assert_eq!(operators(&after), [op_type, "Relu"]);
                assert_eq!(after.graph.as_ref().unwrap().initializer.len(), 2);
                assert_same(&before, &after, 1e-5);
            }
        }
    }

    #[test]
    fn one_normalisation_after_another_goes_too() {
        let (mut builder, x) = Builder::new(11, &[4, 6, 6]);
        let value = convolution(&mut builder, &x, "Conv", 1, false);
        let value = builder.batch_norm(&value);
        let value = builder.batch_norm(&value);
        let before = builder.finish(&value);
        let mut after = before.clone();
        simplify(&mut after).unwrap();
        assert_eq!(operators(&after), ["Conv"]);
        assert_same(&before, &after, 1e-5);
    }

    #[test]
    fn what_others_read_is_not_fused() {
        let read_twice = {
            let (mut builder, x) = Builder::new(8, &[4, 6, 6]);
            let value = convolution(&mut builder, &x, "Conv", 1, true);
            let normal = builder.batch_norm(&value);
            let sum = builder.add(&normal, &value);
            builder.finish(&sum)
        };
        let shared_weight = {
            let (mut builder, x) = Builder::new(9, &[8, 6, 6]);
            let weight = builder.constant(&[8, 8, 1, 1], 0.0);
            let one = builder.push("Conv", &[&x.name, &weight], vec![], &[8, 6, 6]);
            let one = builder.batch_norm(&one);
            let two = builder.push("Conv", &[&one.name, &weight], vec![], &[8, 6, 6]);
            builder.finish(&two)
        };
        for before in [read_twice, shared_weight] {
            let mut after = before.clone();
            fuse(after.graph.as_mut().unwrap(), 17);
            assert_eq!(before, after);
        }
    }

    #[test]
    fn a_normalisation_in_training_or_without_a_finite_result_stays() {
        let build = |variance: f32, attributes: Vec<AttributeProto>| {
            let (mut builder, x) = Builder::new(10, &[4, 6, 6]);
            let value = convolution(&mut builder, &x, "Conv", 1, true);
            let constants = [1.0, 0.0, 0.0, variance].map(|value| builder.filled(8, value));
            let inputs: Vec<&str> = std::iter::once(&value.name).chain(&constants).map(String::as_str).collect();
            let value = builder.push("BatchNormalization", &inputs, attributes, &value.shape);
            let mut model = builder.finish(&value);
            fuse(model.graph.as_mut().unwrap(), 17);
            model.graph.unwrap().node.len()
        };
        assert_eq!(build(1.0, vec![]), 1);
        assert_eq!(build(1.0, vec![integer("training_mode", 1)]), 2);
        assert_eq!(build(-1.0, vec![]), 2, "a negative variance has no root");
    }
}
