//! Constant folding: what follows from initialisers and static shapes is computed once.

use std::collections::{HashMap, HashSet};

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, NodeProto, TensorProto};

use super::constant::Constant;
use super::operators::{self, evaluate};
use super::{is_standard, reads, subgraphs_mut};
use crate::graph::shape::{Dim, Shapes};

/// Most bytes by which a fold may make the model larger.
const GROWTH_BYTES_MAX: usize = 1024;
/// Operators on sizes that shape inference follows, where every operand is a 64-bit integer.
const ON_SIZES: [&str; 12] = [
    "Shape",
    "Size",
    "Gather",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Reshape",
];

/// Replaces nodes whose result is known by that result, in `graph` and the bodies within. `shapes` are those of `graph`. What would make
/// the model larger by more than 1 KiB stays: a constant that others read, too, is not gained back.
pub(super) fn fold(graph: &mut GraphProto, shapes: &Shapes) {
    fold_within(graph, Some(shapes), None, &mut Parts::default());
}

/// Replaces nodes that make `parts` of constants, too, however large these are.
pub(super) fn fold_parts(graph: &mut GraphProto, parts: &mut Parts) {
    fold_within(graph, None, None, parts);
}

/// Constants of which every piece is to be folded, and their pieces.
#[derive(Default)]
pub(super) struct Parts {
    /// Their names.
    pub(super) names: HashSet<String>,
    /// Most bytes that further pieces may take together.
    pub(super) bytes_left: usize,
}

impl Parts {
    /// Operators that give values that they are given, in other places.
    const MOVES: [&str; 8] = [
        "Concat",
        "Flatten",
        "Gather",
        "Reshape",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    ];

    /// Whether `node` may make pieces of constants.
    pub(super) fn moves(node: &NodeProto) -> bool {
        is_standard(node) && Self::MOVES.contains(&node.op_type())
    }

    fn are_made_by(&self, node: &NodeProto) -> bool {
        Self::moves(node) && node.input.iter().any(|input| self.names.contains(input))
    }
}

/// The constants that nodes of a graph see.
struct Scope<'a> {
    given: HashMap<&'a str, &'a TensorProto>,
    folded: HashMap<String, TensorProto>,
    /// What the graph computes, which hides constants of graphs around it.
    computed: HashSet<String>,
    outer: Option<&'a Scope<'a>>,
}

impl Scope<'_> {
    fn own(&self, name: &str) -> Option<&TensorProto> {
        self.given.get(name).copied().or_else(|| self.folded.get(name))
    }

    fn find(&self, name: &str) -> Option<&TensorProto> {
        let own = self.own(name);
        match self.outer {
            Some(outer) if own.is_none() && !self.computed.contains(name) => outer.find(name),
            _ => own,
        }
    }
}

fn fold_within(graph: &mut GraphProto, shapes: Option<&Shapes>, outer: Option<&Scope>, parts: &mut Parts) {
    let outputs: HashSet<String> = graph.output.iter().map(|output| output.name().to_owned()).collect();
    let mut left: HashMap<String, usize> = reads(graph).into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
    let initializers = std::mem::take(&mut graph.initializer);
    let nodes = std::mem::take(&mut graph.node);
    let made = nodes.iter().flat_map(|node| node.output.iter());
    let mut scope = Scope {
        given: initializers.iter().map(|tensor| (tensor.name(), tensor)).collect(),
        folded: HashMap::new(),
        computed: graph
            .input
            .iter()
            .map(|input| input.name().to_owned())
            .chain(made.cloned())
            .collect(),
        outer,
    };
    let mut results: Vec<String> = Vec::new();
    // Values that shape inference computes as an engine would: in 64-bit integers from end to end.
    let mut sizes: HashSet<String> = HashSet::new();
    for mut node in nodes {
        let folded = match node.output.as_slice() {
            [output] if is_standard(&node) && !outputs.contains(output) => {
                let size = shapes.and_then(|shapes| size(&node, shapes, &scope, &mut sizes));
                size.or_else(|| computed(&node, &scope, &left, parts))
                    .map(|constant| (output.clone(), constant))
            }
            _ => None,
        };
        match folded {
            Some((output, constant)) => {
                for input in &node.input {
                    if let Some(count) = left.get_mut(input) {
                        *count -= 1;
                    }
                }
                scope.folded.insert(output.clone(), constant.tensor(&output));
                results.push(output);
            }
            None => {
                subgraphs_mut(&mut node).for_each(|body| fold_within(body, None, Some(&scope), parts));
                graph.node.push(node);
            }
        }
    }
    let mut folded = std::mem::take(&mut scope.folded);
    drop(scope);
    graph.initializer = initializers;
    graph
        .initializer
        .extend(results.into_iter().filter_map(|name| folded.remove(&name)));
}

/// What the node makes of sizes, where all of them are known.
fn size(node: &NodeProto, shapes: &Shapes, scope: &Scope, sizes: &mut HashSet<String>) -> Option<Constant> {
    let is_size =
        |name: &String| sizes.contains(name) || scope.find(name).is_some_and(|tensor| tensor.data_type() == DataType::Int64 as i32);
    let output = &node.output[0];
    let operands = node.input.iter().filter(|input| !input.is_empty());
    if !ON_SIZES.contains(&node.op_type()) || !matches!(node.op_type(), "Shape" | "Size") && !operands.clone().all(is_size) {
        return None;
    }
    sizes.insert(output.clone());
    let numbers = shapes.numbers(output)?;
    let shape: Vec<usize> = shapes.get(output)?.iter().map(Dim::size).collect::<Option<_>>()?;
    (shape.len() <= 1 && shape.iter().product::<usize>() == numbers.len()).then(|| Constant::of_integers(shape, &numbers))
}

/// What the node makes of constants, where all its inputs are, and the result is not too large for what goes in its place.
fn computed(node: &NodeProto, scope: &Scope, left: &HashMap<String, usize>, parts: &mut Parts) -> Option<Constant> {
    if !operators::KNOWN.contains(&node.op_type()) {
        return None;
    }
    let mut inputs = Vec::with_capacity(node.input.len());
    let mut freed = 0_usize;
    for (index, name) in node.input.iter().enumerate() {
        if name.is_empty() {
            inputs.push(None);
            continue;
        }
        let constant = Constant::of(scope.find(name)?)?;
        let here = node.input.iter().filter(|input| *input == name).count();
        let first = node.input.iter().position(|input| input == name) == Some(index);
        if first && scope.own(name).is_some() && left.get(name) == Some(&here) {
            freed += constant.bytes.len();
        }
        inputs.push(Some(constant));
    }
    let fits = freed + GROWTH_BYTES_MAX;
    if !parts.are_made_by(node) {
        return evaluate(node, &inputs, fits);
    }
    let made = evaluate(node, &inputs, fits.max(parts.bytes_left))?;
    parts.bytes_left = parts.bytes_left.saturating_sub(made.bytes.len());
    parts.names.extend(node.output.iter().cloned());
    Some(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::generator::{Builder, assert_same, declared};
    use crate::graph::simplify::simplify;
    use crate::graph::{float_tensor, integer, integers, node, tensor, value_info};
    use plimsoll_runtime::onnx::{AttributeProto, ModelProto, TensorShapeProto, ValueInfoProto, tensor_shape_proto};

    fn numbers(name: &str, shape: &[usize], values: &[i64]) -> TensorProto {
        Constant::of_integers(shape.to_vec(), values).tensor(name)
    }

    fn output(name: &str, kind: DataType, rank: usize) -> ValueInfoProto {
        let dim = vec![tensor_shape_proto::Dimension::default(); rank];
        value_info(name, kind, Some(TensorShapeProto { dim }))
    }

    /// A model whose output is what `node` makes of `constants`, times one, and an input beside it.
    fn over_constants(constants: Vec<TensorProto>, made: NodeProto, kind: DataType, rank: usize) -> ModelProto {
        let (builder, x) = Builder::new(0, &[2]);
        let mut model = builder.finish(&x);
        let graph = model.graph.as_mut().unwrap();
        let result = made.output[0].clone();
        graph.output = vec![declared("z", &[2]), output("y", kind, rank)];
        graph.initializer = constants;
        graph.node = vec![node("Neg", &["x"], "z", vec![]), made, node("Identity", &[&result], "y", vec![])];
        model
    }

    #[test]
    fn every_operator_gives_what_engines_give() {
        let matrix = || float_tensor("a", &[2, 3], &[1.0, -2.5, 3.0, 4.0, 5.5, -6.0]);
        let row = || float_tensor("b", &[3], &[2.0, 0.5, -4.0]);
        let cases: Vec<(Vec<TensorProto>, NodeProto, DataType, usize)> = vec![
            (vec![matrix(), row()], node("Add", &["a", "b"], "c", vec![]), DataType::Float, 2),
            (vec![matrix(), row()], node("Sub", &["b", "a"], "c", vec![]), DataType::Float, 2),
            (vec![matrix(), row()], node("Mul", &["a", "b"], "c", vec![]), DataType::Float, 2),
            (vec![matrix(), row()], node("Div", &["a", "b"], "c", vec![]), DataType::Float, 2),
            (
                vec![numbers("a", &[3], &[7, -7, 9]), numbers("b", &[], &[2])],
                node("Div", &["a", "b"], "c", vec![]),
                DataType::Int64,
                1,
            ),
            (
                vec![matrix()],
                node("Cast", &["a"], "c", vec![integer("to", DataType::Int64 as i64)]),
                DataType::Int64,
                2,
            ),
            (
                vec![matrix()],
                node("Cast", &["a"], "c", vec![integer("to", DataType::Bool as i64)]),
                DataType::Bool,
                2,
            ),
            (
                vec![numbers("a", &[2], &[3, -1])],
                node("Cast", &["a"], "c", vec![integer("to", DataType::Float as i64)]),
                DataType::Float,
                1,
            ),
            (
                vec![matrix()],
                node("Concat", &["a", "a"], "c", vec![integer("axis", -1)]),
                DataType::Float,
                2,
            ),
            (
                vec![numbers("s", &[2], &[2, 3])],
                node(
                    "ConstantOfShape",
                    &["s"],
                    "c",
                    vec![AttributeProto {
                        name: Some("value".into()),
                        r#type: Some(plimsoll_runtime::onnx::attribute_proto::AttributeType::Tensor as i32),
                        t: Some(numbers("", &[1], &[5])),
                        ..AttributeProto::default()
                    }],
                ),
                DataType::Int64,
                2,
            ),
            (
                vec![row(), numbers("s", &[2], &[2, 1])],
                node("Expand", &["b", "s"], "c", vec![]),
                DataType::Float,
                2,
            ),
            (
                vec![matrix()],
                node("Flatten", &["a"], "c", vec![integer("axis", 0)]),
                DataType::Float,
                2,
            ),
            (
                vec![matrix(), numbers("i", &[2], &[-1, 0])],
                node("Gather", &["a", "i"], "c", vec![integer("axis", 1)]),
                DataType::Float,
                2,
            ),
            (
                vec![matrix(), numbers("s", &[3], &[0, -1, 1])],
                node("Reshape", &["a", "s"], "c", vec![]),
                DataType::Float,
                3,
            ),
            (
                vec![
                    matrix(),
                    numbers("from", &[2], &[-1, 2]),
                    numbers("to", &[2], &[-9, i64::MIN]),
                    numbers("axes", &[2], &[0, -1]),
                    numbers("steps", &[2], &[-1, -2]),
                ],
                node("Slice", &["a", "from", "to", "axes", "steps"], "c", vec![]),
                DataType::Float,
                2,
            ),
            (
                vec![matrix(), numbers("from", &[1], &[1]), numbers("to", &[1], &[i64::MAX])],
                node("Slice", &["a", "from", "to"], "c", vec![]),
                DataType::Float,
                2,
            ),
            (
                vec![float_tensor("u", &[1, 3, 1], &[1.0, 2.0, 3.0]), numbers("axes", &[1], &[-1])],
                node("Squeeze", &["u", "axes"], "c", vec![]),
                DataType::Float,
                2,
            ),
            (
                vec![float_tensor("u", &[1, 3, 1], &[1.0, 2.0, 3.0])],
                node("Squeeze", &["u"], "c", vec![]),
                DataType::Float,
                1,
            ),
            (
                vec![float_tensor("u", &[1, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])],
                node("Transpose", &["u"], "c", vec![integers("perm", &[2, 0, 1])]),
                DataType::Float,
                3,
            ),
            (
                vec![row(), numbers("axes", &[2], &[0, -1])],
                node("Unsqueeze", &["b", "axes"], "c", vec![]),
                DataType::Float,
                3,
            ),
        ];
        for (constants, made, kind, rank) in cases {
            let name = made.op_type().to_owned();
            let before = over_constants(constants, made, kind, rank);
            let mut after = before.clone();
            simplify(&mut after).unwrap();
            let graph = after.graph.as_ref().unwrap();
            assert_eq!(graph.node.len(), 2, "{name} is folded");
            assert_eq!(graph.initializer.len(), 1, "{name}: what went into it goes");
            assert_same(&before, &after, 0.0);
        }
    }

    #[test]
    fn static_sizes_are_folded_and_open_ones_are_not() {
        // As torch exports `x.view(x.size(0), x.size(1) * x.size(2))`.
        let (mut builder, x) = Builder::new(0, &[3, 4]);
        let x = builder.unary("Relu", &x);
        let [zero, one, two] = [0, 1, 2].map(|axis| builder.scalar(axis));
        let shape = builder.push("Shape", &[&x.name], vec![], &[3]);
        let [batch, rows, columns] = [&zero, &one, &two].map(|axis| builder.push("Gather", &[&shape.name, axis], vec![], &[]));
        let product = builder.push("Mul", &[&rows.name, &columns.name], vec![], &[]);
        let first = builder.numbers(&[0]);
        let parts = [&batch, &product].map(|part| builder.push("Unsqueeze", &[&part.name, &first], vec![], &[1]));
        let wanted = builder.push("Concat", &[&parts[0].name, &parts[1].name], vec![integer("axis", 0)], &[2]);
        let y = builder.push("Reshape", &[&x.name, &wanted.name], vec![], &[12]);
        let before = builder.finish(&y);
        let mut after = before.clone();
        simplify(&mut after).unwrap();
        let left: Vec<&str> = after.graph.as_ref().unwrap().node.iter().map(NodeProto::op_type).collect();
        assert_eq!(
            left,
            ["Relu", "Shape", "Gather", "Unsqueeze", "Concat", "Reshape"],
            "the batch stays open"
        );
        assert_same(&before, &after, 0.0);
    }

    #[test]
    fn a_fold_that_makes_the_model_larger_is_left_and_tied_weights_stay_tied() {
        let count = |others: &[&str], op_type: &str| {
            let mut nodes = vec![node(op_type, &["w"], "t", vec![]), node("MatMul", &["x", "t"], "y", vec![])];
            nodes.extend(others.iter().map(|name| node("Gather", &["w", "x"], name, vec![])));
            let mut graph = GraphProto {
                node: nodes,
                initializer: vec![float_tensor("w", &[32, 16], &[0.5; 512])],
                ..GraphProto::default()
            };
            fold_parts(&mut graph, &mut Parts::default());
            graph.node.len()
        };
        assert_eq!(count(&[], "Transpose"), 1, "the weight gives way to its transpose");
        assert_eq!(
            count(&["rows"], "Transpose"),
            3,
            "a table that is looked up, too, would be there twice"
        );
        let large = GraphProto {
            node: vec![
                node("ConstantOfShape", &["s"], "zeros", vec![]),
                node("Neg", &["zeros"], "y", vec![]),
            ],
            initializer: vec![numbers("s", &[2], &[1 << 30, 1 << 30])],
            ..GraphProto::default()
        };
        let mut left = large.clone();
        fold_parts(&mut left, &mut Parts::default());
        assert_eq!(left, large);
    }

    #[test]
    fn bodies_see_the_constants_around_them() {
        let body = GraphProto {
            output: vec![output("b", DataType::Float, 1)],
            initializer: vec![float_tensor("one", &[1], &[1.0])],
            node: vec![
                node("Add", &["outside", "one"], "two", vec![]),
                node("Mul", &["x", "two"], "b", vec![]),
            ],
            ..GraphProto::default()
        };
        let branch = |name: &str| AttributeProto {
            name: Some(name.into()),
            g: Some(body.clone()),
            ..AttributeProto::default()
        };
        let mut graph = GraphProto {
            initializer: vec![float_tensor("half", &[1], &[0.5]), tensor("c", DataType::Bool, &[], vec![1])],
            node: vec![
                node("Add", &["half", "half"], "outside", vec![]),
                node("If", &["c"], "y", vec![branch("then_branch"), branch("else_branch")]),
            ],
            output: vec![output("y", DataType::Float, 1)],
            ..GraphProto::default()
        };
        fold_parts(&mut graph, &mut Parts::default());
        assert_eq!(graph.node.len(), 1);
        for body in super::super::subgraphs(&graph.node[0]) {
            assert_eq!(body.node.len(), 1);
            let two = body.initializer.iter().find(|tensor| tensor.name() == "two").unwrap();
            assert_eq!(two.raw_data(), 2.0_f32.to_le_bytes());
        }
    }
}
