//! Products that are taken in integers, in a graph that is quantised already.

use std::collections::HashMap;

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, NodeProto, weights};

use super::neighbours;
use crate::graph::attribute;
use crate::graph::weight::Operator;

/// Brings weights of products in integers that were trained back to what every processor computes alike (see [`neighbours::limit`]).
pub(crate) fn limit_pairs(graph: &mut GraphProto) {
    let products = weights_of_products(graph);
    for initializer in &mut graph.initializer {
        let uses = products.iter().filter(|(name, _)| name == initializer.name());
        let operators: Vec<Operator> = uses.map(|(_, operator)| *operator).collect();
        let Ok(shape) = weights::shape(initializer) else { continue };
        let is_full = initializer.raw_data().len() == shape.iter().product::<usize>();
        if operators.is_empty() || initializer.data_type() != DataType::Int8 as i32 || shape.len() < 2 || !is_full {
            continue;
        }
        let mut values: Vec<i8> = initializer.raw_data().iter().map(|byte| byte.cast_signed()).collect();
        for operator in operators {
            neighbours::limit(&mut values, &shape, operator);
        }
        initializer.raw_data = Some(values.into_iter().map(i8::cast_unsigned).collect());
    }
}

/// The names of the integers that are multiplied as such, and how.
fn weights_of_products(graph: &GraphProto) -> Vec<(String, Operator)> {
    let dequantized: HashMap<&str, &NodeProto> = graph
        .node
        .iter()
        .filter(|node| node.op_type() == "DequantizeLinear")
        .map(|node| (node.output[0].as_str(), node))
        .collect();
    let constant = |name: &str| graph.initializer.iter().any(|tensor| tensor.name() == name);
    let of = |node: &NodeProto| {
        if node.op_type() == "MatMulInteger" {
            return Some((node.input[1].clone(), Operator::MatMul));
        }
        let operator = match node.op_type() {
            "Conv" => Operator::Conv,
            "MatMul" => Operator::MatMul,
            "Gemm" => Operator::Gemm {
                transposed: attribute(node, "transB").map_or(0, AttributeProto::i) != 0,
            },
            _ => return None,
        };
        let integers = |input: usize| Some(&dequantized.get(node.input.get(input)?.as_str())?.input[0]);
        // An engine multiplies in integers where both operands are.
        let (activation, weight) = (integers(0)?, integers(1)?);
        (!constant(activation) && constant(weight)).then(|| (weight.clone(), operator))
    };
    graph.node.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{node, tensor};

    #[test]
    fn trained_weights_are_limited_where_they_are_multiplied_in_integers() {
        let integers = |name: &str| tensor(name, DataType::Int8, &[2, 2], vec![127, 3, 100, 4]);
        let dequantize = |name: &str, output: &str| node("DequantizeLinear", &[name, "scale"], output, vec![]);
        let mut graph = GraphProto {
            node: vec![
                node("MatMulInteger", &["x", "dynamic"], "a", vec![]),
                dequantize("x_uint8", "x_float"),
                dequantize("static", "static_float"),
                node("MatMul", &["x_float", "static_float"], "b", vec![]),
                dequantize("weight-only", "weight-only_float"),
                node("MatMul", &["y", "weight-only_float"], "c", vec![]),
            ],
            initializer: ["dynamic", "static", "weight-only"].map(integers).into(),
            ..GraphProto::default()
        };
        limit_pairs(&mut graph);
        let values: Vec<&[u8]> = graph.initializer.iter().map(|tensor| tensor.raw_data()).collect();
        assert_eq!(values, [&[28, 3, 100, 4], &[28, 3, 100, 4], &[127, 3, 100, 4]]);
    }
}
