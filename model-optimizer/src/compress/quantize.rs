//! Quantisation to 8-bit integers, symmetric and per output channel.
//!
//! Weight-only: the weight is stored in `int8` and a `DequantizeLinear` gives the floats, which engines fold at load. Dynamic: the
//! activations are quantised as they come (`DynamicQuantizeLinear`) and the product is taken in integers (`MatMulInteger`).
//! Convolutions are always weight-only, since dynamic quantisation makes them slower.

use std::collections::HashMap;

use plimsoll_package::recipe::{Quantize, QuantizeScheme};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, weights};
use prost::Message as _;

use super::{Change, Setting, Technique, skipped};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::weight::{Operator, Weight};
use crate::graph::{Names, attribute, float_tensor, integer, node, opset, reads, simplify, tensor, weight};

/// Largest quantised weight of weight-only quantisation.
const WEIGHT_MAX: f32 = 127.0;
/// Largest quantised weight where the product is taken in integers. Processors without VNNI add two products of 8-bit numbers in 16
/// bits, which holds twice 255 times 64 but not twice 255 times 127: the result would depend on the processor that serves.
const PRODUCT_WEIGHT_MAX: f32 = 64.0;

/// The quantisation that `quantize` asks for.
///
/// # Errors
/// [`FailureReason::Unsupported`] where this version does not have it.
pub fn technique(quantize: &Quantize) -> Result<Box<dyn Technique>, Failure> {
    match quantize.scheme {
        QuantizeScheme::Int8 | QuantizeScheme::Int8Dynamic => Ok(Box::new(Int8 { dynamic: true })),
        QuantizeScheme::Int8Weights => Ok(Box::new(Int8 { dynamic: false })),
        scheme => Err(failure(
            FailureReason::Unsupported,
            format!("optimize.recipe: this version does not have the scheme {scheme}; use Int8, Int8Dynamic or Int8Weights"),
        )),
    }
}

/// 8-bit integers, in the way that suits each operator.
#[derive(Debug, Clone)]
pub struct Int8 {
    /// Whether matrix products are taken in integers; otherwise their weights alone are stored so.
    pub dynamic: bool,
}

/// A weight in 8-bit integers with the scale of each of its channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// In the order of the floats.
    pub values: Vec<i8>,
    /// One for each channel; positive.
    pub scales: Vec<f32>,
}

/// Quantises `values` of shape `shape`, each channel of `axis` by itself, to integers of at most `largest`: a value is its integer
/// times the channel's scale, within half a scale.
///
/// # Errors
/// Where a value is NaN or infinite.
///
/// Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2.1,
/// with the zero point at 0.
pub fn quantize_channels(values: &[f32], shape: &[usize], axis: usize, largest: f32) -> Result<Quantized, super::prune::NotFinite> {
    let inner: usize = shape[axis + 1..].iter().product();
    let channel = |index: usize| index / inner.max(1) % shape[axis];
    let mut scales = vec![0.0_f32; shape[axis]];
    for (index, value) in values.iter().enumerate() {
        if !value.is_finite() {
            return Err(super::prune::NotFinite);
        }
        let scale = &mut scales[channel(index)];
        *scale = scale.max(value.abs());
    }
    for scale in &mut scales {
        *scale /= largest;
        // A channel of zeros (or of numbers too small for a scale) stays zero under any scale.
        if *scale < f32::MIN_POSITIVE {
            *scale = 1.0;
        }
    }
    let quantized = values
        .iter()
        .enumerate()
        .map(|(index, value)| (value / scales[channel(index)]).round_ties_even().clamp(-largest, largest) as i8);
    Ok(Quantized {
        values: quantized.collect(),
        scales,
    })
}

/// What replaces one node.
struct Replacement {
    nodes: Vec<NodeProto>,
    /// For the node itself, which comes after `nodes`; `None` where they replace it.
    node: Option<NodeProto>,
}

impl Technique for Int8 {
    fn apply(&self, model: &mut ModelProto, _: &Setting) -> Result<Change, Failure> {
        opset::raise(model).map_err(|why| failure(FailureReason::Unsupported, format!("cannot quantise: {why}")))?;
        let Some(graph) = &mut model.graph else {
            return Ok(Change::default());
        };
        let mut change = Change::default();
        let mut rewriting = Rewriting {
            dynamic: self.dynamic,
            names: Names::of(graph),
            replaced: HashMap::new(),
            added: Vec::new(),
        };
        let read_counts: HashMap<String, usize> = reads(graph).into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        for found in weight::find(graph) {
            if found.uses.iter().any(|used| used.operator == Operator::Gather) && self.dynamic {
                change
                    .skipped
                    .push(skipped(&found.name, "a table of rows; quantised by the scheme Int8Weights alone"));
                continue;
            }
            if read_counts.get(&found.name) != Some(&found.uses.len()) {
                change.skipped.push(skipped(&found.name, "something else reads this weight, too"));
                continue;
            }
            match rewriting.weight(graph, &found)? {
                Ok(folds) => {
                    change.fold_dequantize |= folds;
                    change.changed.push(found.name);
                }
                Err(why) => change.skipped.push(skipped(&found.name, why)),
            }
        }
        rewriting.finish(graph);
        if change.changed.is_empty() {
            let message = "optimize.recipe: nothing to quantise: the model has no convolution or matrix product with constant weights in FP32 that is worth it";
            return Err(failure(FailureReason::Unsupported, message));
        }
        Ok(change)
    }
}

struct Rewriting {
    dynamic: bool,
    names: Names,
    /// What becomes of the nodes, by their index.
    replaced: HashMap<usize, Replacement>,
    added: Vec<TensorProto>,
}

impl Rewriting {
    /// Quantises one weight with all its uses, and says whether a `DequantizeLinear` is to be folded; or why it is left alone.
    fn weight(&mut self, graph: &GraphProto, found: &Weight) -> Result<Result<bool, &'static str>, Failure> {
        let original = &graph.initializer[found.initializer];
        let unreadable = |why: &str| {
            failure(
                FailureReason::UnreadableModel,
                format!("cannot quantise the weight `{}`: {why}", found.name),
            )
        };
        let shape = weights::shape(original).map_err(|error| unreadable(&error.to_string()))?;
        let values = weights::floats(original).map_err(|error| unreadable(&error.to_string()))?;
        if values.is_empty() {
            return Ok(Err("it is empty"));
        }
        let operator = found.uses[0].operator;
        let axis = operator.channel_axis(shape.len());
        if found.uses.iter().any(|used| used.operator.channel_axis(shape.len()) != axis) {
            return Ok(Err("its uses disagree about which axis its channels are"));
        }
        let products = found
            .uses
            .iter()
            .map(|used| Product::of(&graph.node[used.node], used.operator, &shape))
            .collect::<Option<Vec<_>>>();
        // A node of which both operands are weights is rewritten for one of them.
        if found.uses.iter().any(|used| self.replaced.contains_key(&used.node)) {
            return Ok(Err("the other operand of its product is quantised"));
        }
        let products = products.filter(|_| self.dynamic);
        let largest = if products.is_some() { PRODUCT_WEIGHT_MAX } else { WEIGHT_MAX };
        let quantized = quantize_channels(&values, &shape, axis, largest).map_err(|_| unreadable("it holds NaN or infinity"))?;

        let stem = found.name.clone();
        let (mut tensors, mut replacements) = (Vec::new(), Vec::new());
        match &products {
            Some(products) => {
                let name = self.names.fresh(&format!("{stem}_int8"));
                tensors.push(columns_last(&name, &quantized.values, &shape, axis));
                let scale = self.names.fresh(&format!("{stem}_scale"));
                tensors.push(float_tensor(&scale, &[quantized.scales.len()], &quantized.scales));
                for (used, product) in found.uses.iter().zip(products) {
                    let nodes = self.product(&graph.node[used.node], product, &name, &scale, &quantized.scales, &mut tensors);
                    replacements.push((used.node, Replacement { nodes, node: None }));
                }
            }
            None => {
                let name = self.names.fresh(&format!("{stem}_int8"));
                let scale = self.names.fresh(&format!("{stem}_scale"));
                let floats = self.names.fresh(&format!("{stem}_float"));
                tensors.push(tensor(
                    &name,
                    DataType::Int8,
                    &shape,
                    quantized.values.iter().map(|value| *value as u8).collect(),
                ));
                tensors.push(float_tensor(&scale, &[quantized.scales.len()], &quantized.scales));
                let mut dequantize = Some(node(
                    "DequantizeLinear",
                    &[&name, &scale],
                    &floats,
                    vec![integer("axis", axis as i64)],
                ));
                for used in &found.uses {
                    let mut user = graph.node[used.node].clone();
                    user.input[used.input].clone_from(&floats);
                    replacements.push((
                        used.node,
                        Replacement {
                            nodes: dequantize.take().into_iter().collect(),
                            node: Some(user),
                        },
                    ));
                }
            }
        }
        if !smaller(graph, original, &tensors, &replacements) {
            return Ok(Err("it is so small that quantisation would make the file larger"));
        }
        self.added.extend(tensors);
        self.replaced.extend(replacements);
        Ok(Ok(products.is_none()))
    }

    /// The nodes of a matrix product in integers.
    fn product(
        &mut self,
        original: &NodeProto,
        product: &Product,
        weight: &str,
        scale: &str,
        scales: &[f32],
        tensors: &mut Vec<TensorProto>,
    ) -> Vec<NodeProto> {
        let output = original.output[0].as_str();
        let mut fresh = |suffix: &str| self.names.fresh(&format!("{output}_{suffix}"));
        let (quantized, step, zero) = (fresh("uint8"), fresh("step"), fresh("zero"));
        let (integers, floats, both, scaled) = (fresh("int32"), fresh("float"), fresh("scale"), fresh("scaled"));
        let mut quantize = node("DynamicQuantizeLinear", &[&original.input[0]], &quantized, vec![]);
        quantize.output.extend([step.clone(), zero.clone()]);
        let scale = if product.alpha == 1.0 {
            scale.to_owned()
        } else {
            let name = fresh("alpha_scale");
            tensors.push(float_tensor(
                &name,
                &[scales.len()],
                &scales.iter().map(|scale| scale * product.alpha).collect::<Vec<_>>(),
            ));
            name
        };
        let last = if product.bias.is_some() { scaled.as_str() } else { output };
        let mut nodes = vec![
            quantize,
            node("MatMulInteger", &[&quantized, weight, &zero], &integers, vec![]),
            node("Cast", &[&integers], &floats, vec![integer("to", DataType::Float as i64)]),
            node("Mul", &[&step, &scale], &both, vec![]),
            node("Mul", &[&floats, &both], last, vec![]),
        ];
        nodes.extend(product.bias.as_ref().map(|bias| node("Add", &[&scaled, bias], output, vec![])));
        nodes
    }

    fn finish(mut self, graph: &mut GraphProto) {
        let nodes = std::mem::take(&mut graph.node);
        for (index, node) in nodes.into_iter().enumerate() {
            match self.replaced.remove(&index) {
                Some(replacement) => {
                    graph.node.extend(replacement.nodes);
                    graph.node.extend(replacement.node);
                }
                None => graph.node.push(node),
            }
        }
        graph.initializer.extend(self.added);
        simplify::remove_dead(graph);
    }
}

/// A product that can be taken in integers: of an activation with a weight of two axes.
struct Product {
    bias: Option<String>,
    alpha: f32,
}

impl Product {
    fn of(node: &NodeProto, operator: Operator, shape: &[usize]) -> Option<Self> {
        if shape.len() != 2 {
            return None;
        }
        match operator {
            Operator::MatMul => Some(Self { bias: None, alpha: 1.0 }),
            Operator::Gemm { .. } => {
                let float = |name: &str| attribute(node, name).map_or(1.0, AttributeProto::f);
                let bias = node.input.get(2).filter(|name| !name.is_empty()).cloned();
                let plain =
                    attribute(node, "transA").is_none_or(|attribute| attribute.i() == 0) && (bias.is_none() || float("beta") == 1.0);
                plain.then(|| Self {
                    bias,
                    alpha: float("alpha"),
                })
            }
            _ => None,
        }
    }
}

/// The integers with the channels as columns, as `MatMulInteger` takes them.
fn columns_last(name: &str, values: &[i8], shape: &[usize], axis: usize) -> TensorProto {
    if axis == 1 {
        return tensor(name, DataType::Int8, shape, values.iter().map(|value| *value as u8).collect());
    }
    let (rows, columns) = (shape[0], shape[1]);
    let transposed = (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column] as u8));
    tensor(name, DataType::Int8, &[columns, rows], transposed.collect())
}

fn smaller(graph: &GraphProto, original: &TensorProto, tensors: &[TensorProto], replacements: &[(usize, Replacement)]) -> bool {
    let nodes = replacements
        .iter()
        .flat_map(|(_, replacement)| replacement.nodes.iter().chain(&replacement.node))
        .map(NodeProto::encoded_len);
    let after = tensors.iter().map(TensorProto::encoded_len).sum::<usize>() + nodes.sum::<usize>();
    let before = original.encoded_len()
        + replacements
            .iter()
            .map(|(index, _)| graph.node[*index].encoded_len())
            .sum::<usize>();
    after < before
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_weight_comes_back_within_half_its_channels_scale(
            values in proptest::collection::vec(-1e3_f32..1e3, 24),
            axis in 0_usize..3,
            largest in prop_oneof![Just(WEIGHT_MAX), Just(PRODUCT_WEIGHT_MAX)],
        ) {
            let shape = [2, 3, 4];
            let quantized = quantize_channels(&values, &shape, axis, largest).unwrap();
            let inner: usize = shape[axis + 1..].iter().product();
            for (index, value) in values.iter().enumerate() {
                let scale = quantized.scales[index / inner % shape[axis]];
                let error = (f32::from(quantized.values[index]) * scale - value).abs();
                prop_assert!(error <= scale / 2.0 * 1.0001, "{value} is off by {error} at scale {scale}");
                prop_assert!(f32::from(quantized.values[index]).abs() <= largest);
            }
        }
    }

    #[test]
    fn zero_stays_zero_and_a_channel_of_zeros_does_no_harm() {
        let quantized = quantize_channels(&[0.0, 0.0, 1.0, 0.0], &[2, 2], 0, WEIGHT_MAX).unwrap();
        assert_eq!(quantized.values, [0, 0, 127, 0]);
        assert_eq!(quantized.scales, [1.0, 1.0 / 127.0]);
        assert!(quantize_channels(&[f32::INFINITY], &[1, 1], 0, WEIGHT_MAX).is_err());
    }

    #[test]
    fn rows_become_columns() {
        let tensor = columns_last("w", &[1, 2, 3, 4, 5, 6], &[2, 3], 0);
        assert_eq!(tensor.dims, [3, 2]);
        assert_eq!(tensor.raw_data(), [1, 4, 2, 5, 3, 6]);
    }
}
