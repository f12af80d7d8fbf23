//! Nodes that pass their input on: `Identity`, and in inference `Dropout`.

use std::collections::{HashMap, HashSet};

use plimsoll_runtime::onnx::{GraphProto, NodeProto};

use super::constant::Constant;
use super::{attribute, collect_outputs, is_standard, reads, rename_reads, subgraphs_mut};

/// Lets readers of such a node read its input, in a model of that version of the standard operators. A node that makes an output of a
/// graph stays, for outputs keep their names.
pub(super) fn forward(graph: &mut GraphProto, version: i64) {
    let mut outputs = HashSet::new();
    collect_outputs(graph, &mut outputs);
    let reads = reads(graph);
    let passes_on = |node: &NodeProto| match node.op_type() {
        _ if !is_standard(node) => false,
        "Identity" => node.output.len() == 1,
        "Dropout" => !is_training(node, graph, version) && node.output.iter().skip(1).all(|mask| !reads.contains_key(mask.as_str())),
        _ => false,
    };
    let mut renamed: HashMap<String, String> = HashMap::new();
    let mut kept = Vec::with_capacity(graph.node.len());
    for node in &graph.node {
        let forwarded = match (node.input.first(), node.output.first()) {
            (Some(input), Some(output)) => !input.is_empty() && passes_on(node) && !outputs.contains(output.as_str()),
            _ => false,
        };
        if forwarded {
            // Nodes are in order, so a chain of them resolves as it is met.
            let origin = renamed.get(&node.input[0]).unwrap_or(&node.input[0]).clone();
            renamed.insert(node.output[0].clone(), origin);
        }
        kept.push(!forwarded);
    }
    let mut kept = kept.into_iter();
    graph.node.retain(|_| kept.next().unwrap_or(true));
    if !renamed.is_empty() {
        rename_reads(graph, &renamed);
    }
    graph
        .node
        .iter_mut()
        .flat_map(subgraphs_mut)
        .for_each(|body| forward(body, version));
}

/// From version 12 on an input tells, before 7 an attribute; in between, graphs are of inference alone.
fn is_training(node: &NodeProto, graph: &GraphProto, version: i64) -> bool {
    if version < 7 {
        return attribute(node, "is_test").is_none_or(|is_test| is_test.i() == 0);
    }
    let Some(training) = node.input.get(2).filter(|name| !name.is_empty()) else {
        return false;
    };
    let held = graph.initializer.iter().find(|tensor| tensor.name() == training);
    held.and_then(Constant::of).is_none_or(|constant| constant.bytes[..] != [0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::{Builder, assert_same};
    use crate::graph::tensor;
    use plimsoll_runtime::onnx::tensor_proto::DataType;

    #[test]
    fn dropout_and_identity_go_and_the_outputs_stay() {
        let (mut builder, x) = Builder::new(1, &[6]);
        let value = builder.product(&x, 8, true);
        let value = builder.unary("Dropout", &value);
        let value = builder.unary("Identity", &value);
        let value = builder.product(&value, 4, false);
        let value = builder.unary("Identity", &value);
        let before = builder.finish(&value);
        let mut after = before.clone();
        forward(after.graph.as_mut().unwrap(), 17);
        let left: Vec<&str> = after.graph.as_ref().unwrap().node.iter().map(NodeProto::op_type).collect();
        assert_eq!(left, ["MatMul", "Add", "MatMul", "Identity"], "the output keeps its name");
        assert_same(&before, &after, 0.0);
    }

    #[test]
    fn a_dropout_that_trains_or_whose_mask_is_read_stays() {
        let dropout = |training: u8, mask: &str| {
            let node = NodeProto {
                op_type: Some("Dropout".into()),
                input: ["x", "", "training"].map(str::to_owned).to_vec(),
                output: ["d", "mask"].map(str::to_owned).to_vec(),
                ..NodeProto::default()
            };
            let mut graph = GraphProto {
                initializer: vec![tensor("training", DataType::Bool, &[], vec![training])],
                node: vec![node, crate::graph::node("Cast", &[mask], "y", vec![])],
                ..GraphProto::default()
            };
            forward(&mut graph, 13);
            graph.node.len()
        };
        assert_eq!(dropout(0, "d"), 1);
        assert_eq!(dropout(1, "d"), 2);
        assert_eq!(dropout(0, "mask"), 2);
    }
}
