//! What a whole recipe left as it was, and why: the part of it that no technique looked at.

use std::collections::{HashMap, HashSet};

use plimsoll_package::report::{Skipped, TechniqueReport};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, ModelProto, NodeProto, TensorProto};
use prost::Message as _;

use super::skipped;
use crate::graph::weight::{self, Operator};
use crate::graph::{is_standard, subgraphs};

/// Fewest bytes of a tensor that is worth a word.
const BYTES_MIN: usize = 1 << 10;

/// The constants of `original` that neither `steps` changed nor `known` names, each with the reason. Of `compressed` those count that are there
/// still.
#[must_use]
pub fn untouched(original: &ModelProto, compressed: &ModelProto, steps: &[TechniqueReport], known: &[Skipped]) -> Vec<Skipped> {
    let (Some(original), Some(compressed)) = (&original.graph, &compressed.graph) else {
        return vec![];
    };
    let changed = steps.iter().flat_map(|step| &step.changed);
    let told: HashSet<&str> = changed
        .map(String::as_str)
        .chain(known.iter().map(|skipped| skipped.name.as_str()))
        .collect();
    let mut left = HashSet::new();
    constants(compressed, false, &mut |tensor, _| {
        left.insert((tensor.name().to_owned(), tensor.data_type()));
    });
    let mut readers: HashMap<&str, Vec<(&NodeProto, usize)>> = HashMap::new();
    collect_readers(original, &mut readers);
    let mut untouched = Vec::new();
    constants(original, false, &mut |tensor, within| {
        let is_left = left.contains(&(tensor.name().to_owned(), tensor.data_type()));
        if is_left && tensor.encoded_len() >= BYTES_MIN && !told.contains(tensor.name()) {
            let readers = readers.get(tensor.name()).map(Vec::as_slice).unwrap_or_default();
            untouched.push(skipped(tensor.name(), reason(tensor, within, readers)));
        }
    });
    untouched
}

/// Calls `see` with the initialisers of `graph` and of the bodies within, and with whether they are of a body.
fn constants<'a>(graph: &'a GraphProto, within: bool, see: &mut impl FnMut(&'a TensorProto, bool)) {
    for tensor in &graph.initializer {
        see(tensor, within);
    }
    for body in graph.node.iter().flat_map(subgraphs) {
        constants(body, true, see);
    }
}

/// The nodes that read each name, and by which of their inputs.
fn collect_readers<'a>(graph: &'a GraphProto, readers: &mut HashMap<&'a str, Vec<(&'a NodeProto, usize)>>) {
    for node in &graph.node {
        for (input, name) in node.input.iter().enumerate() {
            readers.entry(name).or_default().push((node, input));
        }
        subgraphs(node).for_each(|body| collect_readers(body, readers));
    }
}

fn reason(tensor: &TensorProto, within: bool, readers: &[(&NodeProto, usize)]) -> String {
    let named = |node: &NodeProto| {
        let domain = if is_standard(node) {
            String::new()
        } else {
            format!("{}.", node.domain())
        };
        match node.name() {
            "" => format!("its node, {domain}{},", node.op_type()),
            name => format!("its node `{name}`, {domain}{},", node.op_type()),
        }
    };
    if tensor.data_type() != DataType::Float as i32 {
        let kind = DataType::try_from(tensor.data_type()).map_or("unknown", |kind| kind.as_str_name());
        return format!("its elements are of the type {kind}, and weights are compressed in FLOAT alone");
    }
    if let Some((node, _)) = readers.iter().find(|(node, _)| !is_standard(node)) {
        return format!("{} is of no standard operator, which may do anything with it", named(node));
    }
    if tensor.dims.len() < 2 {
        return "it has one axis, as biases and factors have: what little it weighs is read as it is".into();
    }
    let uses: Vec<Option<Operator>> = readers.iter().map(|(node, input)| weight::operator(node, *input)).collect();
    match uses.iter().position(Option::is_none) {
        Some(other) => format!("{} takes no weights that could be compressed", named(readers[other].0)),
        None if within => "a branch or a loop's body holds it, and gives it as it is".into(),
        None if !uses.is_empty() && uses.iter().all(|used| *used == Some(Operator::Gather)) => {
            "it is a table of rows that are looked up, which no technique of the recipe changes".into()
        }
        None => "no technique of the recipe changes it".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::branching;
    use crate::graph::{float_tensor, node, tensor};

    fn large(name: &str, dims: &[usize]) -> TensorProto {
        float_tensor(name, dims, &vec![1.0; dims.iter().product()])
    }

    #[test]
    fn all_that_stays_is_listed_with_its_reason() {
        let custom = NodeProto {
            domain: Some("example.org".into()),
            name: Some("special".into()),
            ..node("Warp", &["x", "warped"], "a", vec![])
        };
        let half = tensor("half", DataType::Float16, &[32, 32], vec![0; 2048]);
        let graph = GraphProto {
            initializer: vec![
                large("warped", &[32, 32]),
                half,
                large("added", &[32, 32]),
                large("bias", &[512]),
                large("table", &[32, 32]),
                large("pruned", &[32, 32]),
                large("refused", &[32, 32]),
                large("tiny", &[2, 2]),
            ],
            node: vec![
                custom,
                node("MatMul", &["x", "half"], "b", vec![]),
                node("Add", &["x", "added"], "c", vec![]),
                node("Add", &["x", "bias"], "d", vec![]),
                node("Gather", &["table", "ids"], "e", vec![]),
            ],
            ..GraphProto::default()
        };
        let original = ModelProto {
            graph: Some(graph),
            ..ModelProto::default()
        };
        let steps = [TechniqueReport {
            technique: Default::default(),
            changed: vec!["pruned".into()],
            size_after: 0,
            buys: String::new(),
        }];
        let known = [skipped("refused", "it is excluded")];
        let listed = untouched(&original, &original, &steps, &known);
        let words: Vec<(&str, &str)> = listed
            .iter()
            .map(|skipped| (skipped.name.as_str(), skipped.reason.as_str()))
            .collect();
        assert_eq!(
            words,
            [
                (
                    "warped",
                    "its node `special`, example.org.Warp, is of no standard operator, which may do anything with it"
                ),
                (
                    "half",
                    "its elements are of the type FLOAT16, and weights are compressed in FLOAT alone"
                ),
                ("added", "its node, Add, takes no weights that could be compressed"),
                (
                    "bias",
                    "it has one axis, as biases and factors have: what little it weighs is read as it is"
                ),
                (
                    "table",
                    "it is a table of rows that are looked up, which no technique of the recipe changes"
                ),
            ]
        );
        // What is gone needs no word.
        assert!(untouched(&original, &ModelProto::default(), &steps, &known).is_empty());
    }

    #[test]
    fn what_lies_within_branches_is_listed_too() {
        let model = branching();
        let names: Vec<String> = untouched(&model, &model, &[], &[])
            .into_iter()
            .map(|skipped| skipped.name)
            .collect();
        assert_eq!(names, ["w", "w"]);
    }
}
