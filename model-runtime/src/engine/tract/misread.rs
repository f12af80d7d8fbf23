//! What tract takes for something else and computes without a word: models that hold it are refused, so that no one is answered wrongly.

use crate::onnx::{AttributeProto, GraphProto, NodeProto};

/// The first node that tract would misread, in words.
pub(super) fn find(graph: &GraphProto) -> Option<String> {
    graph.node.iter().find_map(|node| {
        let inside = node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()).find_map(find);
        inside.or_else(|| misread(node).map(|what| format!("node `{}`: {what}", node.output.first().map_or("", String::as_str))))
    })
}

/// How tract 0.23 misreads the node, as ONNX's node tests show (`docs/onnx-conformance.md`).
fn misread(node: &NodeProto) -> Option<&'static str> {
    if !matches!(node.domain(), "" | "ai.onnx") {
        return None;
    }
    let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name() == name);
    let says = |name: &str, text: &[u8]| attribute(name).is_some_and(|attribute| attribute.s() == text);
    match node.op_type() {
        "RNN" | "GRU" | "LSTM" if says("direction", b"reverse") => Some("tract does not run a sequence backwards alone"),
        "SpaceToDepth" if says("mode", b"CRD") => Some("tract does not know the mode CRD"),
        "Swish" if attribute("alpha").map(AttributeProto::f).is_some_and(|alpha| alpha != 1.0) => Some("tract does not know alpha"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(op_type: &str, attribute: AttributeProto) -> NodeProto {
        NodeProto {
            op_type: Some(op_type.to_owned()),
            output: vec!["y".to_owned()],
            attribute: vec![attribute],
            ..NodeProto::default()
        }
    }

    #[test]
    fn what_is_misread_is_found_in_branches_too() {
        let direction = |direction: &str| AttributeProto {
            name: Some("direction".to_owned()),
            s: Some(direction.as_bytes().to_vec()),
            ..AttributeProto::default()
        };
        let graph = |node| GraphProto {
            node: vec![node],
            ..GraphProto::default()
        };
        let reversed = graph(node("GRU", direction("reverse")));
        assert_eq!(find(&reversed).unwrap(), "node `y`: tract does not run a sequence backwards alone");
        assert_eq!(find(&graph(node("GRU", direction("forward")))), None);
        assert_eq!(find(&graph(node("GRU", direction("bidirectional")))), None);
        let branch = AttributeProto {
            g: Some(reversed),
            ..AttributeProto::default()
        };
        assert!(find(&graph(node("If", branch))).is_some());
        let alpha = |alpha| AttributeProto {
            name: Some("alpha".to_owned()),
            f: Some(alpha),
            ..AttributeProto::default()
        };
        assert_eq!(find(&graph(node("Swish", alpha(1.0)))), None);
        assert!(find(&graph(node("Swish", alpha(0.5)))).is_some());
    }
}
