//! The types of the elements of a graph's values, as far as they follow from the graph.

use std::collections::HashMap;

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, NodeProto, ValueInfoProto, type_proto};

use super::{attribute, is_standard};

/// The element type of every value of `graph` itself that is known: of its inputs, initialisers and described values, and of what
/// nodes of ONNX's own operators, and ONNX Runtime's `MatMulNBits`, make of them.
#[must_use]
pub fn element_types(graph: &GraphProto) -> HashMap<String, DataType> {
    let described = graph.input.iter().chain(&graph.value_info).chain(&graph.output);
    let mut types: HashMap<String, DataType> = described.filter_map(described_type).collect();
    for tensor in &graph.initializer {
        types.extend(
            DataType::try_from(tensor.data_type())
                .ok()
                .map(|kind| (tensor.name().to_owned(), kind)),
        );
    }
    for node in graph
        .node
        .iter()
        .filter(|node| is_standard(node) || node.op_type() == "MatMulNBits")
    {
        for (index, output) in node.output.iter().enumerate().filter(|(_, output)| !output.is_empty()) {
            if !types.contains_key(output)
                && let Some(kind) = output_type(node, index, &types)
            {
                types.insert(output.clone(), kind);
            }
        }
    }
    types
}

fn described_type(value: &ValueInfoProto) -> Option<(String, DataType)> {
    match value.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some((value.name().to_owned(), DataType::try_from(tensor.elem_type()).ok()?)),
        _ => None,
    }
}

/// What the operator's type constraints say (ONNX operator reference, up to opset 25).
fn output_type(node: &NodeProto, output: usize, types: &HashMap<String, DataType>) -> Option<DataType> {
    let input = |index: usize| types.get(node.input.get(index)?).copied();
    let named = |name: &str| attribute(node, name).and_then(|attribute| DataType::try_from(attribute.i() as i32).ok());
    match (node.op_type(), output) {
        ("Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero" | "NonMaxSuppression", _) => Some(DataType::Int64),
        ("TopK" | "MaxPool", 1) | ("Unique", 1..) => Some(DataType::Int64),
        ("Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Not" | "And" | "Or" | "Xor", _)
        | ("IsNaN" | "IsInf" | "RegexFullMatch", _)
        | ("Dropout", 1) => Some(DataType::Bool),
        ("MatMulInteger" | "ConvInteger", _) => Some(DataType::Int32),
        ("DynamicQuantizeLinear", 0 | 2) => Some(DataType::Uint8),
        ("DynamicQuantizeLinear", _) => Some(DataType::Float),
        ("Cast", _) => named("to"),
        ("QuantizeLinear", _) => input(2).or_else(|| named("output_dtype")).or(Some(DataType::Uint8)),
        ("DequantizeLinear" | "Where" | "CastLike", _) => input(1),
        ("OneHot", _) => input(2),
        ("ConstantOfShape" | "Constant", _) => {
            let held = attribute(node, "value").and_then(|attribute: &AttributeProto| attribute.t.as_ref());
            match held {
                Some(tensor) => DataType::try_from(tensor.data_type()).ok(),
                None => (node.op_type() == "ConstantOfShape").then_some(DataType::Float),
            }
        }
        ("LayerNormalization", 1..) => Some(DataType::Float),
        // What these make depends on more than their first input.
        ("If" | "Loop" | "Scan" | "EyeLike" | "Multinomial" | "Bernoulli" | "TfIdfVectorizer" | "ImageDecoder", _)
        | ("RandomNormal" | "RandomNormalLike" | "RandomUniform" | "RandomUniformLike", _)
        | ("HannWindow" | "HammingWindow" | "BlackmanWindow" | "MelWeightMatrix", _)
        | ("StringSplit" | "QLinearConv" | "QLinearMatMul", _) => None,
        (operator, _) if operator.contains("Sequence") || operator.contains("Optional") => None,
        _ => input(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{float_tensor, integer, node};

    #[test]
    fn types_follow_the_operators() {
        let graph = GraphProto {
            initializer: vec![float_tensor("x", &[2], &[1.0, 2.0])],
            node: vec![
                node("Shape", &["x"], "shape", vec![]),
                node("Cast", &["shape"], "float", vec![integer("to", DataType::Float as i64)]),
                node("Add", &["x", "float"], "sum", vec![]),
                node("Less", &["sum", "x"], "less", vec![]),
                node("Where", &["less", "sum", "x"], "chosen", vec![]),
                node("Loop", &["x"], "unknown", vec![]),
                node("Neg", &["unknown"], "negated", vec![]),
            ],
            ..GraphProto::default()
        };
        let types = element_types(&graph);
        let of = |name: &str| types.get(name).copied();
        assert_eq!(of("shape"), Some(DataType::Int64));
        assert_eq!(of("sum"), Some(DataType::Float));
        assert_eq!(of("less"), Some(DataType::Bool));
        assert_eq!(of("chosen"), Some(DataType::Float));
        assert_eq!(of("negated"), None);
    }
}
