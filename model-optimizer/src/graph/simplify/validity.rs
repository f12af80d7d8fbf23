//! ONNX's own rules that everything else relies on: tensors fill their shapes, each value has one maker, and none depends on itself.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, external, weights};

use super::{subgraphs, subgraphs_mut};

/// Refuses a model of which a tensor holds more or fewer values than its shape says.
pub(super) fn check_tensors(model: &mut ModelProto) -> Result<(), String> {
    external::for_each_tensor(model, &mut |tensor| check_tensor(tensor))
}

fn check_tensor(tensor: &TensorProto) -> Result<(), String> {
    let expected = weights::byte_length(tensor).map_err(|error| error.to_string())?;
    let Some(expected) = expected else { return Ok(()) };
    let unfilled = |held: u64, of: &str, expected: u64| {
        Err(format!(
            "tensor `{}` holds {held} {of}, and its shape {:?} says {expected}; the file is damaged, export the model again",
            tensor.name(),
            tensor.dims
        ))
    };
    if !tensor.raw_data().is_empty() {
        let held = tensor.raw_data().len() as u64;
        return if held == expected {
            Ok(())
        } else {
            unfilled(held, "bytes", expected)
        };
    }
    let values = tensor.dims.iter().product::<i64>() as u64;
    let (held, expected) = match DataType::try_from(tensor.data_type()) {
        Ok(DataType::Float) => (tensor.float_data.len(), values),
        Ok(DataType::Complex64) => (tensor.float_data.len(), 2 * values),
        Ok(DataType::Double) => (tensor.double_data.len(), values),
        Ok(DataType::Int64) => (tensor.int64_data.len(), values),
        Ok(DataType::Uint32 | DataType::Uint64) => (tensor.uint64_data.len(), values),
        // Two 4-bit values share a word, as they share a byte.
        Ok(DataType::Int4 | DataType::Uint4 | DataType::Float4e2m1) => (tensor.int32_data.len(), expected),
        _ => (tensor.int32_data.len(), values),
    };
    if held as u64 == expected {
        Ok(())
    } else {
        unfilled(held as u64, "values", expected)
    }
}

/// Puts the nodes of `graph` and of the bodies within into an order in which each follows what it reads; nodes that are in order stay.
pub(super) fn sort(graph: &mut GraphProto) -> Result<(), String> {
    sort_within(graph, None)
}

/// The values that a body sees.
struct Scope<'a> {
    names: HashSet<String>,
    outer: Option<&'a Scope<'a>>,
}

impl Scope<'_> {
    fn holds(&self, name: &str) -> bool {
        self.names.contains(name) || self.outer.is_some_and(|outer| outer.holds(name))
    }
}

fn sort_within(graph: &mut GraphProto, outer: Option<&Scope>) -> Result<(), String> {
    if let Some(order) = order(graph, outer)? {
        let mut nodes: Vec<Option<NodeProto>> = std::mem::take(&mut graph.node).into_iter().map(Some).collect();
        graph.node = order.into_iter().filter_map(|index| nodes[index].take()).collect();
    }
    if graph.node.iter().flat_map(subgraphs).next().is_none() {
        return Ok(());
    }
    let made = graph.node.iter().flat_map(|node| node.output.iter().map(String::as_str));
    let names = given(graph).chain(made).map(str::to_owned).collect();
    let scope = Scope { names, outer };
    let mut bodies = graph.node.iter_mut().flat_map(subgraphs_mut);
    bodies.try_for_each(|body| sort_within(body, Some(&scope)))
}

/// The values that a graph has without computing them.
fn given(graph: &GraphProto) -> impl Iterator<Item = &str> {
    let sparse = graph.sparse_initializer.iter().filter_map(|tensor| tensor.values.as_ref());
    let tensors = graph.initializer.iter().chain(sparse).map(TensorProto::name);
    graph.input.iter().map(ValueInfoProto::name).chain(tensors)
}

/// The order that the nodes are to come in, where they are not in order.
fn order(graph: &GraphProto, outer: Option<&Scope>) -> Result<Option<Vec<usize>>, String> {
    let given: HashSet<&str> = given(graph).collect();
    let mut makers: HashMap<&str, usize> = HashMap::new();
    for (index, node) in graph.node.iter().enumerate() {
        for output in node.output.iter().map(String::as_str).filter(|output| !output.is_empty()) {
            if given.contains(output) || makers.insert(output, index).is_some() {
                return Err(format!(
                    "its node {} makes `{output}`, which something else gives as well; each value has one maker",
                    shown(node)
                ));
            }
        }
    }
    let is_given = |name: &str| given.contains(name) || outer.is_some_and(|outer| outer.holds(name));
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); graph.node.len()];
    let mut waits: Vec<usize> = vec![0; graph.node.len()];
    let mut in_order = true;
    for (index, node) in graph.node.iter().enumerate() {
        for name in reads_of(node) {
            match makers.get(name) {
                Some(&maker) => {
                    in_order &= maker < index;
                    readers[maker].push(index);
                    waits[index] += 1;
                }
                None if is_given(name) => {}
                None => return Err(format!("its node {} reads `{name}`, which nothing makes", shown(node))),
            }
        }
    }
    if let Some(output) = graph
        .output
        .iter()
        .map(ValueInfoProto::name)
        .find(|name| !makers.contains_key(name) && !is_given(name))
    {
        return Err(format!("nothing makes its output `{output}`"));
    }
    if in_order {
        return Ok(None);
    }
    // Kahn 1962, "Topological sorting of large networks"; of the nodes that may come next, the one that came first before.
    let mut ready: BinaryHeap<Reverse<usize>> = (0..waits.len()).filter(|index| waits[*index] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(waits.len());
    while let Some(Reverse(next)) = ready.pop() {
        order.push(next);
        for &reader in &readers[next] {
            waits[reader] -= 1;
            if waits[reader] == 0 {
                ready.push(Reverse(reader));
            }
        }
    }
    if order.len() == graph.node.len() {
        return Ok(Some(order));
    }
    let node = on_cycle(&readers, &waits).map_or_else(String::new, |index| {
        format!(": the node {} depends on itself", shown(&graph.node[index]))
    });
    Err(format!("its graph has a cycle{node}; export the model again"))
}

/// A node of a cycle: where one ends up that goes from a node that waits to one that it waits for, as many times as there are nodes.
fn on_cycle(readers: &[Vec<usize>], waits: &[usize]) -> Option<usize> {
    let mut awaited: HashMap<usize, usize> = HashMap::new();
    for (maker, readers) in readers.iter().enumerate().filter(|(maker, _)| waits[*maker] > 0) {
        awaited.extend(readers.iter().map(|reader| (*reader, maker)));
    }
    let first = *awaited.keys().filter(|index| waits[**index] > 0).min()?;
    (0..readers.len()).try_fold(first, |index, _| awaited.get(&index).copied())
}

/// The values that a node reads, those of graphs around it that its bodies read among them.
fn reads_of(node: &NodeProto) -> Vec<&str> {
    let mut names: Vec<&str> = node.input.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
    subgraphs(node).for_each(|body| collect_captured(body, &mut names));
    names
}

fn collect_captured<'a>(body: &'a GraphProto, names: &mut Vec<&'a str>) {
    let made = body.node.iter().flat_map(|node| node.output.iter().map(String::as_str));
    let own: HashSet<&str> = given(body).chain(made).collect();
    let inner = body
        .node
        .iter()
        .flat_map(reads_of)
        .chain(body.output.iter().map(ValueInfoProto::name));
    names.extend(inner.filter(|name| !own.contains(name)));
}

fn shown(node: &NodeProto) -> String {
    format!("`{}` ({})", node.name(), node.op_type())
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

    fn graph(nodes: Vec<NodeProto>) -> GraphProto {
        GraphProto {
            input: vec![value("x")],
            output: vec![value("y")],
            node: nodes,
            ..GraphProto::default()
        }
    }

    fn named(name: &str, node: NodeProto) -> NodeProto {
        NodeProto {
            name: Some(name.into()),
            ..node
        }
    }

    #[test]
    fn nodes_come_to_follow_what_they_and_their_bodies_read() {
        let body = GraphProto {
            output: vec![value("b")],
            node: vec![node("Add", &["late", "x"], "b", vec![])],
            ..GraphProto::default()
        };
        let branch = AttributeProto {
            name: Some("then_branch".into()),
            g: Some(body),
            ..AttributeProto::default()
        };
        let mut sorted = graph(vec![
            node("If", &["x"], "i", vec![branch]),
            node("Add", &["i", "late"], "y", vec![]),
            node("Neg", &["x"], "late", vec![]),
        ]);
        sort(&mut sorted).unwrap();
        assert_eq!(sorted.node.iter().map(NodeProto::op_type).collect::<Vec<_>>(), ["Neg", "If", "Add"]);
    }

    #[test]
    fn what_depends_on_itself_is_refused_by_the_name_of_a_node_of_the_cycle() {
        let mut cyclic = graph(vec![
            named("outside", node("Exp", &["b"], "y", vec![])),
            named("one", node("Add", &["x", "b"], "a", vec![])),
            named("two", node("Neg", &["a"], "b", vec![])),
        ]);
        let said = sort(&mut cyclic).unwrap_err();
        assert!(said.starts_with("its graph has a cycle: the node `"), "{said}");
        assert!(said.contains("`one` (Add)") || said.contains("`two` (Neg)"), "{said}");
        let alone = sort(&mut graph(vec![named("n", node("Add", &["x", "y"], "y", vec![]))])).unwrap_err();
        assert!(alone.contains("`n` (Add) depends on itself"), "{alone}");
    }

    #[test]
    fn values_without_a_maker_and_with_two_are_refused() {
        let said = sort(&mut graph(vec![named("n", node("Add", &["x", "gone"], "y", vec![]))])).unwrap_err();
        assert_eq!(said, "its node `n` (Add) reads `gone`, which nothing makes");
        assert_eq!(sort(&mut graph(vec![])).unwrap_err(), "nothing makes its output `y`");
        let twice = vec![node("Neg", &["x"], "y", vec![]), named("n", node("Exp", &["x"], "y", vec![]))];
        assert!(sort(&mut graph(twice)).unwrap_err().starts_with("its node `n` (Exp) makes `y`"));
    }

    #[test]
    fn tensors_that_do_not_fill_their_shapes_are_refused() {
        let check = |tensor: TensorProto| {
            let graph = GraphProto {
                initializer: vec![tensor],
                ..GraphProto::default()
            };
            check_tensors(&mut ModelProto {
                graph: Some(graph),
                ..ModelProto::default()
            })
        };
        let whole = float_tensor("w", &[2, 2], &[1.0; 4]);
        check(whole.clone()).unwrap();
        let cut = TensorProto {
            raw_data: Some(whole.raw_data().to_vec()[..12].to_vec().into()),
            ..whole.clone()
        };
        let said = check(cut).unwrap_err();
        assert!(
            said.starts_with("tensor `w` holds 12 bytes, and its shape [2, 2] says 16"),
            "{said}"
        );
        let typed = TensorProto {
            raw_data: None,
            float_data: vec![1.0; 3],
            ..whole.clone()
        };
        assert!(check(typed).unwrap_err().contains("holds 3 values, and its shape [2, 2] says 4"));
        let huge = TensorProto {
            dims: vec![1 << 60],
            ..whole
        };
        assert!(check(huge).unwrap_err().contains("has more values than memory has addresses"));
    }
}
