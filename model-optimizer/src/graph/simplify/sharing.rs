//! Sharing of initialisers that hold the same.

use std::collections::hash_map::DefaultHasher;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash as _, Hasher as _};

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, TensorProto, mapping};

use super::constant::Constant;
use super::{collect_outputs, rename_reads, subgraphs_mut};

/// Bytes at the beginning of a tensor that tell it from others of its shape, before all of them are compared.
const HASHED_BYTES: usize = 4096;

/// Lets nodes that read one of several initialisers of equal type, shape and bytes read the first of them, in `graph` and, each for
/// itself, in the bodies within. Vectors of floats (biases, scales of normalisations) stay as they are: they are small, and techniques
/// that change one of them do not mean the other.
pub(super) fn share(graph: &mut GraphProto) {
    let mut outputs = HashSet::new();
    collect_outputs(graph, &mut outputs);
    let mut alike: HashMap<(i32, &[i64]), Vec<usize>> = HashMap::new();
    for (place, tensor) in graph.initializer.iter().enumerate() {
        if is_shared(tensor) && !outputs.contains(tensor.name()) {
            alike.entry((tensor.data_type(), &tensor.dims[..])).or_default().push(place);
        }
    }
    // Only what has a twin in shape is read.
    let mut twins: HashMap<(usize, u64), Vec<usize>> = HashMap::new();
    for places in alike.into_values().filter(|places| places.len() > 1) {
        for place in &places {
            if let Some(constant) = Constant::of(&graph.initializer[*place]) {
                let mut hasher = DefaultHasher::new();
                constant.bytes[..constant.bytes.len().min(HASHED_BYTES)].hash(&mut hasher);
                twins.entry((places[0], hasher.finish())).or_default().push(*place);
            }
        }
    }
    let mut renamed: HashMap<String, String> = HashMap::new();
    for places in twins.into_values() {
        let mut firsts: Vec<(usize, Constant)> = Vec::new();
        for place in places {
            let tensor = &graph.initializer[place];
            let Some(constant) = Constant::of(tensor) else { continue };
            let twin = firsts.iter().find(|(_, first)| *first == constant);
            // What was compared need not stay in memory.
            mapping::release(&constant.bytes[..]);
            match twin {
                Some((first, _)) => drop(renamed.insert(tensor.name().to_owned(), graph.initializer[*first].name().to_owned())),
                None => firsts.push((place, constant)),
            }
        }
    }
    if !renamed.is_empty() {
        graph.initializer.retain(|tensor| !renamed.contains_key(tensor.name()));
        rename_reads(graph, &renamed);
    }
    graph.node.iter_mut().flat_map(subgraphs_mut).for_each(share);
}

fn is_shared(tensor: &TensorProto) -> bool {
    let float = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
    tensor.dims.len() >= 2 || !float.iter().any(|kind| *kind as i32 == tensor.data_type())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::{Builder, assert_same};
    use crate::graph::simplify::simplify;

    #[test]
    fn a_weight_that_is_there_twice_is_kept_once() {
        let (mut builder, x) = Builder::new(3, &[6]);
        let weight = builder.constant(&[6, 6], 0.0);
        let twin = builder.copy(&weight);
        let other = builder.constant(&[6, 6], 0.0);
        let bias = builder.constant(&[6], 0.0);
        let own_bias = builder.copy(&bias);
        let mut value = x;
        for (weight, bias) in [(&weight, &bias), (&twin, &own_bias), (&other, &bias)] {
            let product = builder.push("MatMul", &[&value.name, weight], vec![], &[6]);
            value = builder.push("Add", &[&product.name, bias], vec![], &[6]);
        }
        let before = builder.finish(&value);
        let mut after = before.clone();
        simplify(&mut after).unwrap();
        let graph = after.graph.as_ref().unwrap();
        let names: Vec<&str> = graph.initializer.iter().map(TensorProto::name).collect();
        assert_eq!(names, [&weight, &other, &bias, &own_bias]);
        assert_eq!(graph.node[2].input[1], weight);
        assert_same(&before, &after, 0.0);
    }

    #[test]
    fn tensors_that_differ_at_their_end_or_in_type_are_not_the_same() {
        let zeros = |name: &str, kind: DataType| crate::graph::tensor(name, kind, &[2, 2000], vec![0; 16_000]);
        let mut last = vec![0; 16_000];
        last[15_999] = 1;
        let mut graph = GraphProto {
            initializer: vec![
                zeros("a", DataType::Float),
                crate::graph::tensor("b", DataType::Float, &[2, 2000], last),
                zeros("c", DataType::Int32),
                zeros("d", DataType::Float),
            ],
            node: vec![crate::graph::node("Sum", &["a", "b", "c", "d"], "y", vec![])],
            ..GraphProto::default()
        };
        share(&mut graph);
        assert_eq!(graph.node[0].input, ["a", "b", "c", "a"]);
        assert_eq!(graph.initializer.len(), 3);
    }
}
