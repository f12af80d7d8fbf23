//! Inlining of the functions that a model defines (onnx.proto, `FunctionProto`; `docs/IR.md`, "Functions").

use std::collections::HashMap;

use plimsoll_runtime::onnx::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto};

use super::subgraphs_mut;
use crate::graph::{Names, node};

/// Most functions that call each other one within another.
const DEPTH_MAX: usize = 64;
/// Most nodes that are made; long names count for more.
const NODES_MAX: usize = 1 << 20;
/// Bytes of a node's names that count as another node.
const NAME_BYTES: usize = 64;

/// The domain, the name and the overload by which a node calls a function.
type Key = (String, String, String);

/// Puts the nodes of functions in the place of their calls. A function of operators in other versions than the model's stays, for its
/// nodes would mean something else there.
pub(super) fn inline(model: &mut ModelProto) -> Result<(), String> {
    let Some(graph) = model.graph.as_mut().filter(|_| !model.functions.is_empty()) else {
        return Ok(());
    };
    let imports = &mut model.opset_import;
    let mut bodies: HashMap<Key, &FunctionProto> = HashMap::new();
    for function in &model.functions {
        if agree(&function.opset_import, imports) {
            let key = (
                function.domain().to_owned(),
                function.name().to_owned(),
                function.overload().to_owned(),
            );
            bodies.insert(key, function);
            // What a function calls, the model does now.
            for import in &function.opset_import {
                if !imports.iter().any(|known| same_domain(known, import)) {
                    imports.push(import.clone());
                }
            }
        }
    }
    let mut inlining = Inlining {
        names: Names::of(graph),
        nodes_left: NODES_MAX,
        bodies,
    };
    inlining.graph(graph, 0)?;
    let stays = inlining.bodies.len() < model.functions.len();
    if !stays {
        model.functions.clear();
    }
    Ok(())
}

fn same_domain(a: &OperatorSetIdProto, b: &OperatorSetIdProto) -> bool {
    let standard = |domain: &str| matches!(domain, "" | "ai.onnx");
    a.domain() == b.domain() || standard(a.domain()) && standard(b.domain())
}

/// Whether the domains that both import are of one version.
fn agree(one: &[OperatorSetIdProto], other: &[OperatorSetIdProto]) -> bool {
    one.iter().all(|import| {
        other
            .iter()
            .all(|known| !same_domain(known, import) || known.version() == import.version())
    })
}

struct Inlining<'a> {
    bodies: HashMap<Key, &'a FunctionProto>,
    names: Names,
    nodes_left: usize,
}

impl Inlining<'_> {
    fn graph(&mut self, graph: &mut GraphProto, depth: usize) -> Result<(), String> {
        let nodes = std::mem::take(&mut graph.node);
        self.nodes(nodes, &mut graph.node, depth)
    }

    /// Appends `nodes` to `made`, calls replaced by what they call.
    fn nodes(&mut self, nodes: Vec<NodeProto>, made: &mut Vec<NodeProto>, depth: usize) -> Result<(), String> {
        for mut node in nodes {
            let values = node.input.iter().chain(&node.output);
            let names = values.map(String::len).sum::<usize>() + node.name().len();
            self.nodes_left = self
                .nodes_left
                .checked_sub(1 + names / NAME_BYTES)
                .ok_or_else(|| format!("its functions make more than {NODES_MAX} nodes"))?;
            let key = (node.domain().to_owned(), node.op_type().to_owned(), node.overload().to_owned());
            match self.bodies.get(&key).copied() {
                Some(_) if depth == DEPTH_MAX => {
                    return Err(format!(
                        "its function `{}` calls itself, or functions call each other more than {DEPTH_MAX} deep",
                        node.op_type()
                    ));
                }
                Some(function) => {
                    let body = self.instance(function, &node);
                    self.nodes(body, made, depth + 1)?;
                }
                None => {
                    subgraphs_mut(&mut node).try_for_each(|body| self.graph(body, depth))?;
                    made.push(node);
                }
            }
        }
        Ok(())
    }

    /// The nodes of `function` on the values of `call`.
    fn instance(&mut self, function: &FunctionProto, call: &NodeProto) -> Vec<NodeProto> {
        let mut renamed: HashMap<String, String> = HashMap::new();
        for (index, input) in function.input.iter().enumerate() {
            renamed.insert(input.clone(), call.input.get(index).cloned().unwrap_or_default());
        }
        // An output that is an input as well, or another output, takes a node of its own.
        let mut copies = Vec::new();
        for (output, given) in function.output.iter().zip(&call.output).filter(|(_, given)| !given.is_empty()) {
            if renamed.contains_key(output) {
                copies.push((output, given));
            } else {
                renamed.insert(output.clone(), given.clone());
            }
        }
        let mut instance = Instance {
            stem: if call.name().is_empty() { call.op_type() } else { call.name() },
            call,
            function,
            renamed,
            names: &mut self.names,
        };
        let mut nodes: Vec<NodeProto> = function.node.iter().map(|node| instance.node(node)).collect();
        for (output, given) in copies {
            nodes.push(node("Identity", &[&instance.value(output)], given, vec![]));
        }
        nodes
    }
}

struct Instance<'a> {
    stem: &'a str,
    call: &'a NodeProto,
    function: &'a FunctionProto,
    renamed: HashMap<String, String>,
    names: &'a mut Names,
}

impl Instance<'_> {
    /// What a value of the function is called here.
    fn value(&mut self, name: &str) -> String {
        if name.is_empty() {
            return String::new();
        }
        if let Some(known) = self.renamed.get(name) {
            return known.clone();
        }
        let fresh = self.names.fresh(&format!("{}/{name}", self.stem));
        self.renamed.insert(name.to_owned(), fresh.clone());
        fresh
    }

    fn node(&mut self, node: &NodeProto) -> NodeProto {
        let values = |instance: &mut Self, names: &[String]| names.iter().map(|name| instance.value(name)).collect();
        NodeProto {
            input: values(self, &node.input),
            output: values(self, &node.output),
            name: Some(self.names.fresh(&format!("{}/{}", self.stem, node.name()))),
            attribute: node.attribute.iter().filter_map(|attribute| self.attribute(attribute)).collect(),
            ..node.clone()
        }
    }

    /// An attribute that refers to one of the call takes its value, by default the function's; without either it is left out.
    fn attribute(&mut self, attribute: &AttributeProto) -> Option<AttributeProto> {
        let mut own = attribute.clone();
        if !attribute.ref_attr_name().is_empty() {
            let wanted = |given: &&AttributeProto| given.name() == attribute.ref_attr_name();
            let given = self.call.attribute.iter().find(wanted);
            own = given.or_else(|| self.function.attribute_proto.iter().find(wanted))?.clone();
            own.name.clone_from(&attribute.name);
            return Some(own);
        }
        own.g.iter_mut().chain(&mut own.graphs).for_each(|body| self.body(body));
        Some(own)
    }

    fn body(&mut self, body: &mut GraphProto) {
        let infos = body.input.iter_mut().chain(&mut body.output).chain(&mut body.value_info);
        for info in infos {
            info.name = Some(self.value(info.name()));
        }
        for tensor in &mut body.initializer {
            tensor.name = Some(self.value(tensor.name()));
        }
        body.node = std::mem::take(&mut body.node).iter().map(|node| self.node(node)).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    use crate::graph::generator::{Builder, assert_same};
    use crate::graph::simplify::simplify;
    use crate::graph::{float_tensor, integer, subgraphs};
    use plimsoll_runtime::onnx::attribute_proto::AttributeType;

    fn import(domain: &str, version: i64) -> OperatorSetIdProto {
        OperatorSetIdProto {
            domain: Some(domain.into()),
            version: Some(version),
        }
    }

    fn function(name: &str, inputs: &[&str], outputs: &[&str], node: Vec<NodeProto>) -> FunctionProto {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        FunctionProto {
            name: Some(name.into()),
            domain: Some("local".into()),
            input: owned(inputs),
            output: owned(outputs),
            node,
            opset_import: vec![import("", 17), import("local", 1)],
            ..FunctionProto::default()
        }
    }

    fn call(name: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            domain: Some("local".into()),
            name: Some(format!("to_{output}")),
            ..node(name, inputs, output, vec![])
        }
    }

    fn referring(attribute: AttributeProto, to: &str) -> AttributeProto {
        AttributeProto {
            ref_attr_name: Some(to.into()),
            i: None,
            ..attribute
        }
    }

    #[test]
    fn calls_become_what_they_call_with_their_own_values_and_attributes() {
        let normal = function(
            "Normal",
            &["x", "unused"],
            &["y"],
            vec![
                node("Softmax", &["x"], "t", vec![referring(integer("axis", 0), "along")]),
                call("Twice", &["t"], "y"),
            ],
        );
        let twice = function(
            "Twice",
            &["x"],
            &["y"],
            vec![node("Add", &["x", "x"], "t", vec![]), node("Neg", &["t"], "y", vec![])],
        );
        let (mut builder, x) = Builder::new(5, &[3, 4]);
        let value = builder.product(&x, 4, true);
        let mut before = builder.finish(&value);
        before.opset_import.push(import("local", 1));
        before.functions = vec![normal, twice];
        let graph = before.graph.as_mut().unwrap();
        let given = graph.output[0].name().to_owned();
        let mut first = call("Normal", &[&given], "first");
        first.attribute.push(integer("along", 1));
        let mut second = call("Normal", &["first"], "second");
        second.attribute.push(integer("along", -1));
        graph.node.extend([first, second]);
        graph.output[0].name = Some("second".into());
        let mut after = before.clone();
        simplify(&mut after).unwrap();
        assert!(after.functions.is_empty());
        let graph = after.graph.as_ref().unwrap();
        let operators: Vec<&str> = graph.node.iter().map(NodeProto::op_type).collect();
        assert_eq!(operators, ["MatMul", "Add", "Softmax", "Add", "Neg", "Softmax", "Add", "Neg"]);
        let axes: Vec<i64> = graph
            .node
            .iter()
            .filter(|node| node.op_type() == "Softmax")
            .map(|node| node.attribute[0].i())
            .collect();
        assert_eq!(axes, [1, -1]);
        assert_same(&before, &after, 1e-6);
    }

    #[test]
    fn a_function_that_calls_itself_or_makes_too_many_nodes_is_refused() {
        let model = |functions: Vec<FunctionProto>| {
            let (builder, x) = Builder::new(5, &[3]);
            let mut model = builder.finish(&x);
            let graph = model.graph.as_mut().unwrap();
            graph.node = vec![call(functions[0].name(), &["x"], "y")];
            graph.output[0].name = Some("y".into());
            model.functions = functions;
            model
        };
        let itself = function("F", &["x"], &["y"], vec![call("F", &["x"], "y")]);
        assert!(
            simplify(&mut model(vec![itself]))
                .unwrap_err()
                .starts_with("its function `F` calls itself")
        );
        let doubling = (0..40).map(|level| {
            let next = format!("F{}", level + 1);
            function(
                &format!("F{level}"),
                &["x"],
                &["y"],
                vec![call(&next, &["x"], "t"), call(&next, &["t"], "y")],
            )
        });
        assert!(
            simplify(&mut model(doubling.collect()))
                .unwrap_err()
                .contains("make more than 1048576 nodes")
        );
    }

    #[test]
    fn functions_of_other_versions_stay() {
        let (builder, x) = Builder::new(5, &[3]);
        let mut model = builder.finish(&x);
        let mut older = function("F", &["x"], &["y"], vec![node("Neg", &["x"], "y", vec![])]);
        older.opset_import = vec![import("", 11)];
        model.functions = vec![older];
        let graph = model.graph.as_mut().unwrap();
        graph.node = vec![call("F", &["x"], "y")];
        graph.output[0].name = Some("y".into());
        let before = model.clone();
        simplify(&mut model).unwrap();
        assert_eq!(model, before);
    }

    #[test]
    fn bodies_of_branches_within_a_function_get_names_of_their_own() {
        let branch = |name: &str, factor: f32| {
            let body = GraphProto {
                name: Some(name.into()),
                output: vec![plimsoll_runtime::onnx::ValueInfoProto {
                    name: Some("b".into()),
                    ..Default::default()
                }],
                initializer: vec![float_tensor("factor", &[1], &[factor])],
                node: vec![node("Mul", &["x", "factor"], "b", vec![])],
                ..GraphProto::default()
            };
            AttributeProto {
                name: Some(name.into()),
                r#type: Some(AttributeType::Graph as i32),
                g: Some(body),
                ..AttributeProto::default()
            }
        };
        let chosen = function(
            "Chosen",
            &["x"],
            &["y"],
            vec![
                node("ReduceSum", &["x"], "sum", vec![integer("keepdims", 0)]),
                node("Cast", &["sum"], "condition", vec![integer("to", 9)]),
                node(
                    "If",
                    &["condition"],
                    "y",
                    vec![branch("then_branch", 2.0), branch("else_branch", 3.0)],
                ),
            ],
        );
        let (builder, x) = Builder::new(6, &[3]);
        let mut before = builder.finish(&x);
        before.opset_import.push(import("local", 1));
        before.functions = vec![chosen];
        let graph = before.graph.as_mut().unwrap();
        graph.node = vec![call("Chosen", &["x"], "one"), call("Chosen", &["one"], "y")];
        graph.output[0].name = Some("y".into());
        let mut after = before.clone();
        simplify(&mut after).unwrap();
        let bodies = after.graph.as_ref().unwrap().node.iter().flat_map(subgraphs);
        let names: HashSet<&str> = bodies.map(|body| body.initializer[0].name()).collect();
        assert_eq!(names, HashSet::from(["to_one/factor", "to_y/factor"]));
        assert_same(&before, &after, 0.0);
    }
}
