//! Raising a model's version of ONNX's operators, where what it means stays the same.

use std::collections::HashMap;

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, type_proto};

use super::{Names, attribute, integer, is_standard, subgraphs, tensor};

/// The oldest version that is raised.
const RAISED_MIN: i64 = 11;
/// The version that has `DequantizeLinear` with an axis.
pub const QUANTIZED: i64 = 13;
/// The version of the format that goes with it.
const IR_VERSION: i64 = 7;

/// The version of the standard operators that `model` asks for.
#[must_use]
pub fn version(model: &ModelProto) -> i64 {
    let standard = model.opset_import.iter().find(|import| matches!(import.domain(), "" | "ai.onnx"));
    standard.map_or(1, OperatorSetIdProto::version)
}

/// Raises `model` to version 13 where it is of an older one.
///
/// # Errors
/// In words, where an operator would mean something else there; the model is then unchanged.
pub fn raise(model: &mut ModelProto) -> Result<(), String> {
    let from = version(model);
    if from >= QUANTIZED {
        return Ok(());
    }
    if from < RAISED_MIN {
        return Err(format!(
            "the model is of opset {from}, and quantised weights need {QUANTIZED}; export it with opset {QUANTIZED} or later"
        ));
    }
    let Some(graph) = &mut model.graph else { return Ok(()) };
    let nested = graph.node.iter().flat_map(subgraphs).next().is_some();
    if nested || !model.functions.is_empty() {
        return Err(format!(
            "the model is of opset {from} and has branches or loops; export it with opset {QUANTIZED} or later"
        ));
    }
    let ranks = known_ranks(graph);
    let mut names = Names::of(graph);
    let mut initializers = Vec::new();
    let mut nodes = graph.node.clone();
    for node in nodes.iter_mut().filter(|node| is_standard(node)) {
        raise_node(node, &ranks, &mut names, &mut initializers).map_err(|why| {
            format!(
                "the model is of opset {from}, and its node `{}` {why}; export it with opset {QUANTIZED} or later",
                node.name()
            )
        })?;
    }
    graph.node = nodes;
    graph.initializer.extend(initializers);
    for import in model
        .opset_import
        .iter_mut()
        .filter(|import| matches!(import.domain(), "" | "ai.onnx"))
    {
        import.version = Some(QUANTIZED);
    }
    model.ir_version = Some(model.ir_version().max(IR_VERSION));
    Ok(())
}

/// What changed between 11 and 13 in ONNX's operator changelog: axes and sizes became inputs, and the softmax family works along one
/// axis instead of on a matrix.
fn raise_node(
    node: &mut NodeProto,
    ranks: &HashMap<String, usize>,
    names: &mut Names,
    initializers: &mut Vec<TensorProto>,
) -> Result<(), String> {
    let op_type = node.op_type().to_owned();
    match op_type.as_str() {
        "Squeeze" | "Unsqueeze" | "ReduceSum" | "Split" => {
            let name = if op_type == "Split" { "split" } else { "axes" };
            let Some(position) = node.attribute.iter().position(|attribute| attribute.name() == name) else {
                return Ok(());
            };
            let values = node.attribute.remove(position).ints;
            let input = names.fresh(&format!("{}_{name}", node.output.first().map_or("", String::as_str)));
            initializers.push(tensor(
                &input,
                DataType::Int64,
                &[values.len()],
                values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            ));
            node.input.push(input);
            Ok(())
        }
        "Softmax" | "LogSoftmax" | "Hardmax" => {
            let axis = attribute(node, "axis").map_or(1, AttributeProto::i);
            let rank = node.output.iter().chain(&node.input).find_map(|name| ranks.get(name));
            let last = axis == -1 || rank.is_some_and(|&rank| axis == rank as i64 - 1);
            if !last {
                return Err(format!("({op_type} along axis {axis}) means something else there"));
            }
            node.attribute.retain(|attribute| attribute.name() != "axis");
            node.attribute.push(integer("axis", -1));
            Ok(())
        }
        "Dropout" if !node.attribute.is_empty() => {
            // In inference it passes its input on, whatever its ratio.
            node.attribute.clear();
            Ok(())
        }
        _ => Ok(()),
    }
}

fn known_ranks(graph: &GraphProto) -> HashMap<String, usize> {
    let values = graph.value_info.iter().chain(&graph.output).chain(&graph.input);
    let rank = |kind: &type_proto::Value| match kind {
        type_proto::Value::TensorType(tensor) => tensor.shape.as_ref().map(|shape| shape.dim.len()),
        _ => None,
    };
    values
        .filter_map(|value| Some((value.name().to_owned(), rank(value.r#type.as_ref()?.value.as_ref()?)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::node;

    fn model(version: i64, nodes: Vec<NodeProto>) -> ModelProto {
        let graph = GraphProto {
            node: nodes,
            ..GraphProto::default()
        };
        let import = OperatorSetIdProto {
            domain: None,
            version: Some(version),
        };
        ModelProto {
            opset_import: vec![import],
            graph: Some(graph),
            ..ModelProto::default()
        }
    }

    #[test]
    fn axes_become_inputs() {
        let axes = AttributeProto {
            name: Some("axes".into()),
            ints: vec![0, 2],
            ..AttributeProto::default()
        };
        let mut raised = model(11, vec![node("Unsqueeze", &["x"], "y", vec![axes])]);
        raise(&mut raised).unwrap();
        assert_eq!(version(&raised), 13);
        let graph = raised.graph.unwrap();
        assert_eq!(graph.node[0].input, ["x", "y_axes"]);
        assert!(graph.node[0].attribute.is_empty());
        assert_eq!(graph.initializer[0].raw_data().len(), 16);
    }

    #[test]
    fn a_softmax_over_several_axes_is_refused_and_over_the_last_one_kept() {
        let mut refused = model(12, vec![node("Softmax", &["x"], "y", vec![])]);
        assert!(
            raise(&mut refused)
                .unwrap_err()
                .contains("(Softmax along axis 1) means something else")
        );
        assert_eq!(version(&refused), 12);
        let mut kept = model(12, vec![node("Softmax", &["x"], "y", vec![integer("axis", -1)])]);
        raise(&mut kept).unwrap();
        assert!(raise(&mut model(9, vec![])).unwrap_err().contains("opset 9"));
    }
}
