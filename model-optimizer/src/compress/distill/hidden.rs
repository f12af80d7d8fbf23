//! Values inside of the model that follow the teacher's, beside the outputs.

use std::collections::{HashMap, HashSet};

use plimsoll_package::recipe::HiddenState;
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, ModelProto};

use super::forward::live_nodes;
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::elements::element_types;
use crate::graph::shape::{Dim, Shapes};
use crate::graph::weight::{self, Operator};

/// Most values that are chosen where the recipe names none.
const CHOSEN_MAX: usize = 16;

/// A value of the model in training, and the teacher's that it follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hidden {
    pub(super) value: String,
    pub(super) teacher: String,
}

impl Hidden {
    /// Whether the shapes of the two are equal.
    ///
    /// # Errors
    /// [`FailureReason::InvalidInputs`] where they are not.
    pub(super) fn check(&self, given: &[usize], taught: &[usize]) -> Result<(), Failure> {
        if given == taught {
            return Ok(());
        }
        let Self { value, teacher } = self;
        let message = format!(
            "cannot distil: hiddenStates: `{value}` has the shape {given:?} where the teacher's `{teacher}` has {taught:?}; pair values of one shape"
        );
        Err(failure(FailureReason::InvalidInputs, message))
    }
}

/// The values of `model` that follow those of `teacher`: those that are `asked` for or, where there are none, what layers with weights
/// read. `outputs` are compared anyway.
///
/// # Errors
/// In words, where one that is named cannot be compared, or none can be chosen.
pub(super) fn find(asked: &[HiddenState], model: &ModelProto, teacher: &ModelProto, outputs: &[String]) -> Result<Vec<Hidden>, String> {
    let (Some(graph), Some(teacher_graph)) = (&model.graph, &teacher.graph) else {
        return Ok(vec![]);
    };
    let trained = computed(graph, outputs);
    let taught = made(teacher_graph);
    if asked.is_empty() {
        let (shapes, wanted) = (Shapes::of(model), Shapes::of(teacher));
        let differ = |name: &str| match (sizes(&shapes, name), sizes(&wanted, name)) {
            (Some(one), Some(other)) => one.len() != other.len() || one.iter().zip(&other).any(|(one, other)| unequal(*one, *other)),
            _ => false,
        };
        let alike = activations(teacher_graph).into_iter().filter(|name| {
            trained.contains(name) && taught.contains(name) && !outputs.iter().any(|output| output == name) && !differ(name)
        });
        let chosen = spread(alike.collect(), CHOSEN_MAX);
        if chosen.is_empty() {
            return Err("hiddenStates: no layer of the model reads what one of the teacher reads, by name and shape; name pairs".into());
        }
        let alone = |name: &str| Hidden {
            value: name.to_owned(),
            teacher: name.to_owned(),
        };
        return Ok(chosen.into_iter().map(alone).collect());
    }
    let named = |pair: &HiddenState| {
        let HiddenState { value, teacher } = pair;
        let teacher = teacher.as_ref().unwrap_or(value);
        let unknown = |whose: &str, name: &str| {
            format!(
                "hiddenStates: the {whose} computes no floats named `{name}` on the way to its outputs; look its name up in a viewer such as Netron"
            )
        };
        if !trained.contains(value.as_str()) {
            return Err(unknown("model", value));
        }
        if !taught.contains(teacher.as_str()) {
            return Err(unknown("teacher", teacher));
        }
        Ok(Hidden {
            value: value.clone(),
            teacher: teacher.clone(),
        })
    };
    asked.iter().map(named).collect()
}

fn sizes(shapes: &Shapes, name: &str) -> Option<Vec<Option<usize>>> {
    Some(shapes.get(name)?.iter().map(Dim::size).collect())
}

/// Whether two sizes, as far as they are known, are not the same.
fn unequal(one: Option<usize>, other: Option<usize>) -> bool {
    matches!((one, other), (Some(one), Some(other)) if one != other)
}

/// The floats that nodes of `graph` make.
fn made(graph: &GraphProto) -> HashSet<&str> {
    let types = element_types(graph);
    let outputs = graph.node.iter().flat_map(|node| node.output.iter().map(String::as_str));
    outputs.filter(|name| is_float(&types, name)).collect()
}

/// The floats that are computed from the inputs on the way to `outputs`.
fn computed<'a>(graph: &'a GraphProto, outputs: &[String]) -> HashSet<&'a str> {
    let types = element_types(graph);
    let mut computed: HashSet<&str> = graph.input.iter().map(|input| input.name()).collect();
    for tensor in &graph.initializer {
        computed.remove(tensor.name());
    }
    let inputs = computed.clone();
    for node in live_nodes(graph, outputs) {
        if node.input.iter().any(|input| computed.contains(input.as_str())) {
            computed.extend(node.output.iter().map(String::as_str));
        }
    }
    computed.retain(|name| !inputs.contains(name) && is_float(&types, name));
    computed
}

fn is_float(types: &HashMap<String, DataType>, name: &str) -> bool {
    let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
    types.get(name).is_some_and(|kind| floats.contains(kind))
}

/// What the layers of `graph` with weights read, in the order of the layers.
fn activations(graph: &GraphProto) -> Vec<&str> {
    let mut uses: Vec<_> = weight::find(graph).into_iter().flat_map(|weight| weight.uses).collect();
    uses.sort_by_key(|used| used.node);
    let mut known = HashSet::new();
    let activation = |used: &weight::Use| match used.operator {
        Operator::Gather => None,
        Operator::MatMulLeft => graph.node[used.node].input.get(1),
        _ => graph.node[used.node].input.first(),
    };
    let activations = uses.iter().filter_map(activation).map(String::as_str);
    activations.filter(|name| known.insert(*name)).collect()
}

/// At most `most` of `all`, evenly spread, with the last one.
fn spread<T: Copy>(all: Vec<T>, most: usize) -> Vec<T> {
    if all.len() <= most {
        return all;
    }
    (1..=most).map(|place| all[place * all.len() / most - 1]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::Builder;

    fn named(value: &str, teacher: Option<&str>) -> HiddenState {
        HiddenState {
            value: value.into(),
            teacher: teacher.map(str::to_owned),
        }
    }

    /// Three products with activations in between; the names of what the later two read.
    fn perceptron(width: usize) -> (ModelProto, [String; 2], Vec<String>) {
        let (mut builder, x) = Builder::new(3, &[6]);
        let hidden = builder.product(&x, width, true);
        let first = builder.unary("Tanh", &hidden);
        let hidden = builder.product(&first, 5, true);
        let second = builder.unary("Relu", &hidden);
        let y = builder.product(&second, 4, true);
        let names = [first.name, second.name];
        (builder.finish(&y), names, vec![y.name])
    }

    #[test]
    fn what_layers_read_is_chosen_where_its_shape_is_the_teachers() {
        let (model, names, outputs) = perceptron(8);
        let chosen = |model: &ModelProto, teacher: &ModelProto| -> Vec<String> {
            let found = find(&[], model, teacher, &outputs).unwrap();
            assert!(found.iter().all(|hidden| hidden.value == hidden.teacher));
            found.into_iter().map(|hidden| hidden.value).collect()
        };
        assert_eq!(chosen(&model, &model), names);
        let (wider, ..) = perceptron(16);
        assert_eq!(chosen(&model, &wider), names[1..]);
    }

    #[test]
    fn values_that_are_named_must_be_there() {
        let (model, [first, second], outputs) = perceptron(8);
        let found = find(&[named(&first, Some(&second))], &model, &model, &outputs).unwrap();
        let expected = Hidden {
            value: first.clone(),
            teacher: second,
        };
        assert_eq!(found, [expected]);
        for (pair, words) in [
            (named("x", None), "the model computes no floats named `x`"),
            (named("nothing", None), "the model computes no floats named `nothing`"),
            (named(&first, Some("w1")), "the teacher computes no floats named `w1`"),
        ] {
            let refused = find(&[pair], &model, &model, &outputs).unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
    }

    #[test]
    fn of_many_a_few_are_spread_over_all() {
        assert_eq!(spread((0..40).collect(), 4), [9, 19, 29, 39]);
        assert_eq!(spread(vec![1, 2], 4), [1, 2]);
    }
}
