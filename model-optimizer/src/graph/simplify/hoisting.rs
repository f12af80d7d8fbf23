//! Weights of branches and loop bodies, which move to the graph around them: it is written tensor by tensor, and what compresses weights
//! finds them there. A body sees the values of the graphs around it.

use std::collections::{HashMap, HashSet};

use plimsoll_runtime::onnx::{GraphProto, TensorProto};

use crate::graph::{Names, subgraphs, subgraphs_mut, weight};

/// Fewest values of a tensor that moves: others are not worth compressing.
const VALUES_MIN: i64 = 256;

/// Moves the weights of all bodies to `graph`. Where a name is taken elsewhere, the weight gets another one.
pub(super) fn hoist(graph: &mut GraphProto) {
    if graph.node.iter().flat_map(subgraphs).next().is_none() {
        return;
    }
    let mut taken = HashMap::new();
    count_definitions(graph, &mut taken);
    let mut hoisting = Hoisting {
        names: Names::of(graph),
        taken,
        hoisted: Vec::new(),
    };
    for body in graph.node.iter_mut().flat_map(subgraphs_mut) {
        hoisting.visit(body);
    }
    graph.initializer.append(&mut hoisting.hoisted);
}

/// How often each name is given to a value, in the graph and the bodies within.
fn count_definitions(graph: &GraphProto, counts: &mut HashMap<String, usize>) {
    let given = graph.input.iter().map(|input| input.name());
    let constant = graph.initializer.iter().map(|tensor| tensor.name());
    let made = graph.node.iter().flat_map(|node| node.output.iter().map(String::as_str));
    for name in given.chain(constant).chain(made) {
        *counts.entry(name.to_owned()).or_default() += 1;
    }
    graph
        .node
        .iter()
        .flat_map(subgraphs)
        .for_each(|body| count_definitions(body, counts));
}

struct Hoisting {
    names: Names,
    taken: HashMap<String, usize>,
    hoisted: Vec<TensorProto>,
}

impl Hoisting {
    fn visit(&mut self, body: &mut GraphProto) {
        for inner in body.node.iter_mut().flat_map(subgraphs_mut) {
            self.visit(inner);
        }
        // What a body is given anew each time, or gives as it is, is no weight.
        let fixed: HashSet<String> = body.input.iter().chain(&body.output).map(|value| value.name().to_owned()).collect();
        let used = weight::names_used(body);
        let goes = |tensor: &TensorProto| {
            weight::is_weight(tensor)
                && tensor.dims.iter().product::<i64>() >= VALUES_MIN
                && used.contains(tensor.name())
                && !fixed.contains(tensor.name())
        };
        let (hoisted, kept): (Vec<TensorProto>, Vec<TensorProto>) = std::mem::take(&mut body.initializer).into_iter().partition(goes);
        body.initializer = kept;
        for mut tensor in hoisted {
            if self.taken.get(tensor.name()).is_some_and(|count| *count > 1) {
                let name = self.names.fresh(tensor.name());
                rename(body, tensor.name(), &name);
                tensor.name = Some(name);
            }
            self.hoisted.push(tensor);
        }
    }
}

/// Lets nodes of `body` read `new` in place of `old`, and those of bodies within, unless these have an `old` of their own.
fn rename(body: &mut GraphProto, old: &str, new: &str) {
    for node in &mut body.node {
        node.input
            .iter_mut()
            .filter(|input| *input == old)
            .for_each(|input| *input = new.to_owned());
        for inner in subgraphs_mut(node).filter(|inner| !defines(inner, old)) {
            rename(inner, old, new);
        }
    }
}

fn defines(graph: &GraphProto, name: &str) -> bool {
    let is_made = graph.node.iter().any(|node| node.output.iter().any(|output| output == name));
    is_made || graph.input.iter().any(|input| input.name() == name) || graph.initializer.iter().any(|tensor| tensor.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::{assert_same, branching, looping};

    #[test]
    fn weights_leave_their_branches_and_nothing_changes() {
        let model = branching();
        let mut hoisted = model.clone();
        let graph = hoisted.graph.as_mut().unwrap();
        hoist(graph);
        let names: Vec<&str> = graph.initializer.iter().map(TensorProto::name).collect();
        // Both branches call their weight `w`, which one name cannot stand for.
        assert_eq!(names, ["limit", "w_2", "w_3"]);
        let left = graph.node.iter().flat_map(subgraphs).flat_map(|body| &body.initializer);
        assert_eq!(left.map(TensorProto::name).collect::<Vec<_>>(), ["small", "small"]);
        assert_same(&model, &hoisted, 0.0);
    }

    #[test]
    fn a_weight_leaves_its_loop_under_its_own_name() {
        let model = looping();
        let mut hoisted = model.clone();
        let graph = hoisted.graph.as_mut().unwrap();
        hoist(graph);
        assert_eq!(graph.initializer.last().unwrap().name(), "w");
        assert!(graph.node.iter().flat_map(subgraphs).all(|body| body.initializer.is_empty()));
        assert_same(&model, &hoisted, 0.0);
    }

    #[test]
    fn what_a_body_gives_as_it_is_stays_there() {
        let mut model = looping();
        let graph = model.graph.as_mut().unwrap();
        let body = graph.node.iter_mut().flat_map(subgraphs_mut).next().unwrap();
        body.output[1].name = Some("w".into());
        let before = graph.clone();
        hoist(graph);
        assert_eq!(*graph, before);
    }
}
