//! Weights that nodes only ever read in other pieces, or in another order: they are stored as they are read. So exporters of PyTorch leave a
//! recurrence in a branch, whose gates ONNX orders otherwise.

use std::collections::HashSet;

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, NodeProto, TensorProto, weights};

use super::folding::{self, Parts};
use super::{hoisting, remove_dead, sharing};
use crate::graph::subgraphs;

/// Fewest values of a weight that is looked at: others are not worth compressing.
const VALUES_MIN: usize = 256;
/// Most bytes that all pieces take on the way, to those of the weights that they come from.
const BYTES_TIMES: usize = 16;

/// Stores weights as they are read, in `graph` and the bodies within, where that does not make the model larger.
pub(super) fn arrange(graph: &mut GraphProto) {
    let names = moved(graph);
    if names.is_empty() {
        return;
    }
    let before = bytes(graph, &|_| true);
    let bytes_left = bytes(graph, &|tensor| names.contains(tensor.name())).saturating_mul(BYTES_TIMES);
    let mut arranged = graph.clone();
    folding::fold_parts(&mut arranged, &mut Parts { names, bytes_left });
    hoisting::hoist(&mut arranged);
    sharing::share(&mut arranged);
    remove_dead(&mut arranged);
    if bytes(&arranged, &|_| true) <= before {
        *graph = arranged;
    }
}

/// The names of weights that every node that reads them cuts up or moves about, by nothing but constants.
fn moved(graph: &GraphProto) -> HashSet<String> {
    let (mut constants, mut names) = (HashSet::new(), HashSet::new());
    visit(graph, &mut |graph| {
        constants.extend(graph.initializer.iter().map(|tensor| tensor.name().to_owned()));
        let large = graph
            .initializer
            .iter()
            .filter(|tensor| tensor.data_type() == DataType::Float as i32 && count(tensor) >= VALUES_MIN);
        names.extend(large.map(|tensor| tensor.name().to_owned()));
    });
    let moves = |node: &NodeProto| Parts::moves(node) && node.input.iter().all(|input| input.is_empty() || constants.contains(input));
    let (mut read, mut others) = (HashSet::new(), HashSet::new());
    visit(graph, &mut |graph| {
        others.extend(graph.output.iter().map(|output| output.name().to_owned()));
        for node in &graph.node {
            let readers = if moves(node) { &mut read } else { &mut others };
            readers.extend(node.input.iter().cloned());
        }
    });
    names.retain(|name| read.contains(name) && !others.contains(name));
    names
}

fn visit(graph: &GraphProto, see: &mut impl FnMut(&GraphProto)) {
    see(graph);
    graph.node.iter().flat_map(subgraphs).for_each(|body| visit(body, see));
}

/// How many values a tensor has; none where its shape is none.
fn count(tensor: &TensorProto) -> usize {
    weights::shape(tensor).map_or(0, |shape| shape.iter().product())
}

/// About how many bytes those constants take that are `counted`.
fn bytes(graph: &GraphProto, counted: &impl Fn(&TensorProto) -> bool) -> usize {
    let mut sum = 0;
    visit(graph, &mut |graph| {
        let tensors = graph.initializer.iter().filter(|tensor| counted(tensor));
        sum += tensors.map(prost::Message::encoded_len).sum::<usize>();
    });
    sum
}

#[cfg(test)]
mod tests {
    use plimsoll_runtime::onnx::ModelProto;

    use super::*;
    use crate::graph::generator::{Builder, assert_same};
    use crate::graph::simplify::simplify;
    use crate::graph::{integer, node, subgraphs_mut, tensor};

    fn numbers(name: &str, values: &[i64]) -> TensorProto {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensor(name, DataType::Int64, &[values.len()], bytes)
    }

    /// A product with either of two weights, which the branches put together of two parts of `outer`, of 32 by 32, as `rows` say of each.
    fn cut(rows: [[[i64; 2]; 2]; 2]) -> ModelProto {
        let (mut builder, x) = Builder::new(3, &[32]);
        let y = builder.branch(&x);
        let outer = builder.constant(&[32, 32], 0.0);
        let mut model = builder.finish(&y);
        let graph = model.graph.as_mut().unwrap();
        for (body, rows) in graph.node.iter_mut().flat_map(subgraphs_mut).zip(rows) {
            let (mut nodes, mut parts) = (Vec::new(), Vec::new());
            for (index, range) in rows.into_iter().enumerate() {
                let [start, end, axis, part] = ["start", "end", "axis", "part"].map(|what| format!("{}_{what}{index}", body.name()));
                body.initializer
                    .extend([(&start, range[0]), (&end, range[1]), (&axis, 0)].map(|(name, number)| numbers(name, &[number])));
                nodes.push(node("Slice", &[&outer, &start, &end, &axis], &part, vec![]));
                parts.push(part);
            }
            let whole = format!("{}_whole", body.name());
            nodes.push(node("Concat", &[&parts[0], &parts[1]], &whole, vec![integer("axis", 0)]));
            body.node[0].input[1] = whole;
            body.node.splice(0..0, nodes);
        }
        model
    }

    fn operators(model: &ModelProto) -> Vec<Vec<&str>> {
        let bodies = model.graph.iter().flat_map(|graph| &graph.node).flat_map(subgraphs);
        bodies.map(|body| body.node.iter().map(NodeProto::op_type).collect()).collect()
    }

    fn weights(model: &ModelProto) -> usize {
        let tensors = model.graph.iter().flat_map(|graph| &graph.initializer);
        tensors.filter(|tensor| count(tensor) >= VALUES_MIN).count()
    }

    #[test]
    fn a_weight_that_branches_put_together_anew_is_stored_once_as_they_read_it() {
        let before = cut([[[16, 32], [0, 16]]; 2]);
        let mut after = before.clone();
        simplify(&mut after).unwrap();
        assert_eq!(operators(&after), [["MatMul", "Tanh"], ["MatMul", "Relu"]]);
        assert_eq!(weights(&after), 1);
        assert_same(&before, &after, 0.0);
    }

    #[test]
    fn what_would_be_larger_stays_cut_up_as_the_model_runs() {
        let before = cut([[[16, 32], [0, 16]], [[0, 16], [16, 32]]]);
        let mut after = before.clone();
        simplify(&mut after).unwrap();
        assert!(operators(&after).iter().all(|operators| operators.contains(&"Slice")));
        assert_eq!(weights(&after), 1);
        assert_same(&before, &after, 0.0);
    }

    #[test]
    fn a_weight_that_is_looked_up_or_used_as_it_is_stays() {
        let (mut builder, x) = Builder::new(3, &[16]);
        let weight = builder.constant(&[16, 32], 0.0);
        let y = builder.push("MatMul", &[&x.name, &weight], vec![], &[32]);
        let mut model = builder.finish(&y);
        let graph = model.graph.as_mut().unwrap();
        graph.initializer.push(numbers("first", &[0]));
        graph.node.push(node("Gather", &[&weight, "first"], "row", vec![]));
        assert!(moved(graph).is_empty());
        graph.node.remove(0);
        assert_eq!(moved(graph), HashSet::from([weight]));
    }
}
