//! The operators of a model.

use plimsoll_runtime::onnx::{GraphProto, ModelProto, NodeProto};

use super::subgraphs;

/// Domains that engines know.
const KNOWN_DOMAINS: [&str; 4] = ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"];

/// The first node of a domain that no engine knows, and that the model does not define itself.
#[must_use]
pub fn unknown(model: &ModelProto) -> Option<&NodeProto> {
    let defined = |node: &NodeProto| {
        model
            .functions
            .iter()
            .any(|function| function.domain() == node.domain() && function.name() == node.op_type())
    };
    find(model.graph.as_ref()?, &|node| {
        !KNOWN_DOMAINS.contains(&node.domain()) && !defined(node)
    })
}

/// The words by which tract and ONNX Runtime say that they lack an operator.
const LACKING: [&str; 3] = ["Unimplemented", "is not a registered function/op", "NOT_IMPLEMENTED"];

/// The first node that the words of engines say they lack: whose operator they name beside saying so.
#[must_use]
pub fn lacking<'a>(model: &'a ModelProto, words: &str) -> Option<&'a NodeProto> {
    if !LACKING.iter().any(|lacking| words.contains(lacking)) {
        return None;
    }
    let said: Vec<&str> = words
        .split(|character: char| !character.is_alphanumeric() && character != '_')
        .collect();
    find(model.graph.as_ref()?, &|node| said.contains(&node.op_type()))
}

fn find<'a>(graph: &'a GraphProto, wanted: &dyn Fn(&NodeProto) -> bool) -> Option<&'a NodeProto> {
    graph.node.iter().find_map(|node| {
        if wanted(node) {
            Some(node)
        } else {
            subgraphs(node).find_map(|subgraph| find(subgraph, wanted))
        }
    })
}
