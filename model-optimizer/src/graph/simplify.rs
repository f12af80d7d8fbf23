//! Passes that change no result: what is constant is computed, what can be merged is, and what nothing reads goes.
//!
//! They reach into the bodies of branches and loops, whose nodes see the values of the graphs around them.

use std::collections::{HashMap, HashSet};

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};

use super::shape::Shapes;
use super::{attribute, is_standard, opset, reads, subgraphs, subgraphs_mut, tensor};

mod arrangement;
mod constant;
mod folding;
mod functions;
mod fusion;
mod hoisting;
mod identities;
mod operators;
mod sharing;
mod validity;

/// The first version of the format in which an initialiser need not be an input as well.
const IR_VERSION_MIN: i64 = 4;

/// Applies every pass to the model. Nodes come to lie in an order in which each follows what it reads.
///
/// # Errors
/// In words, where the model breaks ONNX's own rules: a cycle, a value that nothing or more than one node makes, a tensor that does not
/// fill its shape, a function that calls itself. The model is then not to be used further.
pub fn simplify(model: &mut ModelProto) -> Result<(), String> {
    validity::check_tensors(model)?;
    let ir_version = model.ir_version().max(IR_VERSION_MIN);
    model.ir_version = Some(ir_version);
    model.doc_string = None;
    functions::inline(model)?;
    let version = opset::version(model);
    let Some(graph) = &mut model.graph else { return Ok(()) };
    // An initialiser that is an input as well is a default that a caller could override; a served model's weights are fixed.
    let given: HashSet<String> = graph.initializer.iter().map(|tensor| tensor.name().to_owned()).collect();
    graph.input.retain(|input| !given.contains(input.name()));
    validity::sort(graph)?;
    strip(graph);
    identities::forward(graph, version);
    remove_dead(graph);
    let shapes = Shapes::of(model);
    let Some(graph) = &mut model.graph else { return Ok(()) };
    folding::fold(graph, &shapes);
    fusion::fuse(graph, version);
    hoisting::hoist(graph);
    sharing::share(graph);
    remove_dead(graph);
    arrangement::arrange(graph);
    Ok(())
}

/// Drops the stack traces that exporters write into nodes, and moves the values of `Constant` nodes to the initialisers.
fn strip(graph: &mut GraphProto) {
    for node in &mut graph.node {
        node.doc_string = None;
        subgraphs_mut(node).for_each(strip);
    }
    // A graph's output must be made by a node.
    let outputs: HashSet<&str> = graph.output.iter().map(ValueInfoProto::name).collect();
    let mut initializers = Vec::new();
    graph.node.retain(|node| {
        if node.op_type() != "Constant" || !is_standard(node) || node.output.iter().any(|output| outputs.contains(output.as_str())) {
            return true;
        }
        let value = constant(node);
        let moved = value.is_some();
        initializers.extend(value);
        !moved
    });
    graph.initializer.extend(initializers);
}

fn constant(node: &NodeProto) -> Option<TensorProto> {
    let name = node.output.first()?;
    let float_bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let integer_bytes = |values: &[i64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    if let Some(value) = attribute(node, "value").and_then(|value| value.t.as_ref()) {
        return Some(TensorProto {
            name: Some(name.clone()),
            ..value.clone()
        });
    }
    if let Some(value) = attribute(node, "value_float") {
        return Some(tensor(name, DataType::Float, &[], float_bytes(&[value.f()])));
    }
    if let Some(value) = attribute(node, "value_int") {
        return Some(tensor(name, DataType::Int64, &[], integer_bytes(&[value.i()])));
    }
    if let Some(values) = attribute(node, "value_floats") {
        return Some(tensor(name, DataType::Float, &[values.floats.len()], float_bytes(&values.floats)));
    }
    if let Some(values) = attribute(node, "value_ints") {
        return Some(tensor(name, DataType::Int64, &[values.ints.len()], integer_bytes(&values.ints)));
    }
    // Sparse and string constants stay where they are.
    None
}

/// Lets nodes, in bodies too, read the values that `renamed` maps to in place of its keys.
fn rename_reads(graph: &mut GraphProto, renamed: &HashMap<String, String>) {
    for node in &mut graph.node {
        for input in &mut node.input {
            if let Some(name) = renamed.get(input) {
                input.clone_from(name);
            }
        }
        subgraphs_mut(node).for_each(|body| rename_reads(body, renamed));
    }
}

/// The outputs of a graph and of all bodies within: values whose names are not to change.
fn collect_outputs<'a>(graph: &'a GraphProto, outputs: &mut HashSet<&'a str>) {
    outputs.extend(graph.output.iter().map(ValueInfoProto::name));
    graph
        .node
        .iter()
        .flat_map(subgraphs)
        .for_each(|body| collect_outputs(body, outputs));
}

/// Removes nodes that no output depends on, and then the initialisers and descriptions of values that are gone.
pub fn remove_dead(graph: &mut GraphProto) {
    for body in graph.node.iter_mut().flat_map(subgraphs_mut) {
        remove_dead(body);
    }
    let mut live: HashSet<String> = graph.output.iter().map(|output| output.name().to_owned()).collect();
    let mut kept = vec![false; graph.node.len()];
    // Backwards, since nodes are in order.
    for (index, node) in graph.node.iter().enumerate().rev() {
        if node.output.iter().any(|output| live.contains(output)) {
            kept[index] = true;
            live.extend(node.input.iter().cloned());
            subgraphs(node).for_each(|subgraph| live.extend(reads(subgraph).into_keys().map(str::to_owned)));
        }
    }
    let mut index = 0..;
    graph.node.retain(|_| index.next().is_some_and(|index| kept[index]));
    graph.initializer.retain(|tensor| live.contains(tensor.name()));
    let made: HashSet<&str> = graph.node.iter().flat_map(|node| node.output.iter().map(String::as_str)).collect();
    graph.value_info.retain(|value| made.contains(value.name()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{float_tensor, node};
    use plimsoll_runtime::onnx::AttributeProto;

    fn value(name: &str) -> ValueInfoProto {
        ValueInfoProto {
            name: Some(name.into()),
            ..ValueInfoProto::default()
        }
    }

    #[test]
    fn constants_move_identities_vanish_and_the_dead_go() {
        let held = AttributeProto {
            name: Some("value".into()),
            t: Some(float_tensor("", &[1], &[2.0])),
            ..AttributeProto::default()
        };
        let graph = GraphProto {
            input: vec![value("x"), value("w")],
            output: vec![value("y")],
            initializer: vec![float_tensor("w", &[1], &[1.0]), float_tensor("unused", &[1], &[1.0])],
            node: vec![
                node("Constant", &[], "c", vec![held]),
                node("Identity", &["c"], "c1", vec![]),
                node("Identity", &["c1"], "c2", vec![]),
                node("Mul", &["x", "c2"], "m", vec![]),
                node("Exp", &["m"], "dead", vec![]),
                node("Add", &["m", "w"], "y", vec![]),
            ],
            value_info: vec![value("m"), value("dead")],
            ..GraphProto::default()
        };
        let mut model = ModelProto {
            ir_version: Some(3),
            graph: Some(graph),
            ..ModelProto::default()
        };
        simplify(&mut model).unwrap();
        let graph = model.graph.unwrap();
        assert_eq!(graph.node.iter().map(NodeProto::op_type).collect::<Vec<_>>(), ["Mul", "Add"]);
        assert_eq!(graph.node[0].input, ["x", "c"]);
        assert_eq!(graph.initializer.iter().map(TensorProto::name).collect::<Vec<_>>(), ["w", "c"]);
        assert_eq!(graph.input.len(), 1, "a weight is no input of a served model");
        assert_eq!(graph.value_info.len(), 1);
        assert_eq!(model.ir_version, Some(4));
    }

    #[test]
    fn the_dead_within_a_body_go_and_keep_nothing_outside_alive() {
        let body = GraphProto {
            output: vec![value("b")],
            node: vec![node("Neg", &["outside"], "dead", vec![]), node("Abs", &["x"], "b", vec![])],
            ..GraphProto::default()
        };
        let branch = |name: &str| AttributeProto {
            name: Some(name.into()),
            g: Some(body.clone()),
            ..AttributeProto::default()
        };
        let mut graph = GraphProto {
            input: vec![value("x"), value("c")],
            output: vec![value("y")],
            node: vec![
                node("Exp", &["x"], "outside", vec![]),
                node("If", &["c"], "y", vec![branch("then_branch"), branch("else_branch")]),
            ],
            ..GraphProto::default()
        };
        remove_dead(&mut graph);
        assert_eq!(graph.node.len(), 1);
        assert!(subgraphs(&graph.node[0]).all(|body| body.node.len() == 1));
    }
}
