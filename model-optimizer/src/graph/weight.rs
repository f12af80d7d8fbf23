//! Where a model's weights are: the constant operands of convolutions and matrix products.

use std::collections::{BTreeMap, HashMap, HashSet};

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, NodeProto, TensorProto, mapping};
use rayon::prelude::*;

use super::{attribute, is_standard, subgraphs, subgraphs_mut};

/// Fewest bytes of a tensor whose pages are given back once it was read.
const RELEASED_BYTES_MIN: usize = 8 << 20;

/// How a node uses a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// A convolution; output channels are the weight's first axis.
    Conv,
    /// A transposed convolution; output channels are the weight's second axis.
    ConvTranspose,
    /// A matrix product with an addition; output features are the columns or, transposed, the rows.
    Gemm {
        /// Whether the weight is used transposed.
        transposed: bool,
    },
    /// A matrix product from the right; output features are the last axis.
    MatMul,
    /// A matrix product from the left; output features are the axis before the last.
    MatMulLeft,
    /// A table of rows that are looked up.
    Gather,
    /// The weights of an `LSTM`, `GRU` or `RNN` for its input or its state: directions, gates times hidden units, inputs.
    Recurrent,
}

impl Operator {
    /// The axis of the weight's output channels, of `rank` axes.
    #[must_use]
    pub fn channel_axis(self, rank: usize) -> usize {
        match self {
            Self::Conv | Self::Gather | Self::Gemm { transposed: true } => 0,
            Self::ConvTranspose | Self::Gemm { transposed: false } | Self::Recurrent => 1,
            Self::MatMul => rank - 1,
            Self::MatMulLeft => rank - 2,
        }
    }
}

/// Where a weight's rows lie, each of which makes one output channel: `outer` blocks of `length` times `inner` values; the values of a
/// row are `inner` apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Blocks of rows.
    pub outer: usize,
    /// Values of a row: the size of the dimension that a product sums over.
    pub length: usize,
    /// Rows of a block.
    pub inner: usize,
}

impl Operator {
    /// The axis of the input channels or features, of `rank` axes; `None` for a table that is looked up.
    #[must_use]
    pub fn input_axis(self, rank: usize) -> Option<usize> {
        match self {
            Self::Conv | Self::Gemm { transposed: true } => Some(1),
            Self::ConvTranspose | Self::Gemm { transposed: false } => Some(0),
            Self::MatMul => Some(rank - 2),
            Self::MatMulLeft | Self::Recurrent => Some(rank - 1),
            Self::Gather => None,
        }
    }

    /// The rows of a weight of shape `dims` of two or more axes: along the inner dimension of a product, and along the input channels
    /// and the kernel of a convolution (the input channels alone of a transposed one).
    #[must_use]
    pub fn rows(self, dims: &[usize]) -> Rows {
        let rank = dims.len();
        let (first, last) = match self {
            Self::Conv => (1, rank),
            Self::ConvTranspose | Self::Gemm { transposed: false } => (0, 1),
            Self::Gemm { transposed: true } | Self::Gather => (1, 2),
            Self::MatMul => (rank - 2, rank - 1),
            Self::MatMulLeft | Self::Recurrent => (rank - 1, rank),
        };
        Rows {
            outer: dims[..first].iter().product(),
            length: dims[first..last].iter().product(),
            inner: dims[last..].iter().product(),
        }
    }
}

/// A use of a weight by a node of the graph itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// Index of the node.
    pub node: usize,
    /// Which of its inputs the weight is.
    pub input: usize,
    /// How it is used.
    pub operator: Operator,
}

/// A weight: an initialiser in single precision of two or more axes, with every use that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    /// Index of the initialiser.
    pub initializer: usize,
    /// The tensor's name.
    pub name: String,
    /// Its uses.
    pub uses: Vec<Use>,
}

/// The weights of `graph`, in the order of the nodes that first use them.
#[must_use]
pub fn find(graph: &GraphProto) -> Vec<Weight> {
    let index: HashMap<&str, usize> = graph
        .initializer
        .iter()
        .enumerate()
        .map(|(index, tensor)| (tensor.name(), index))
        .collect();
    let mut weights: Vec<Weight> = Vec::new();
    let mut positions: HashMap<usize, usize> = HashMap::new();
    for (node_index, node) in graph.node.iter().enumerate().filter(|(_, node)| is_standard(node)) {
        for (input, name) in node.input.iter().enumerate() {
            let Some(&initializer) = index.get(name.as_str()) else { continue };
            if !is_weight(&graph.initializer[initializer]) {
                continue;
            }
            let Some(operator) = operator(node, input) else { continue };
            let used = Use {
                node: node_index,
                input,
                operator,
            };
            let position = *positions.entry(initializer).or_insert(weights.len());
            if position == weights.len() {
                weights.push(Weight {
                    initializer,
                    name: name.clone(),
                    uses: Vec::new(),
                });
            }
            weights[position].uses.push(used);
        }
    }
    weights
}

/// The names of all that nodes of `graph`, and of the bodies within, use as a weight.
pub(super) fn names_used(graph: &GraphProto) -> HashSet<String> {
    let mut names = HashSet::new();
    for node in &graph.node {
        let used = node.input.iter().enumerate();
        let used = used.filter(|(input, _)| is_standard(node) && operator(node, *input).is_some());
        names.extend(used.map(|(_, name)| name.clone()));
        subgraphs(node).for_each(|body| names.extend(names_used(body)));
    }
    names
}

/// A weight that branches or the bodies of loops read from the graph around them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// Index of the initialiser.
    pub initializer: usize,
    /// The tensor's name.
    pub name: String,
    /// How nodes use it, in bodies and in the graph itself; `None` where one of them uses it in a way that is not known.
    pub operators: Option<Vec<Operator>>,
    /// The names of these nodes.
    pub nodes: Vec<String>,
}

/// The weights of `graph` that nodes in branches and loop bodies read.
#[must_use]
pub fn captured(graph: &GraphProto) -> Vec<Captured> {
    let index = graph.initializer.iter().enumerate();
    let index: HashMap<&str, usize> = index
        .filter(|(_, tensor)| is_weight(tensor))
        .map(|(index, tensor)| (tensor.name(), index))
        .collect();
    let mut captured: BTreeMap<usize, Captured> = BTreeMap::new();
    let mut note = |node: &NodeProto, hidden: &HashSet<&str>, within: bool| {
        for (input, name) in node.input.iter().enumerate().filter(|(_, name)| !hidden.contains(name.as_str())) {
            let Some(&initializer) = index.get(name.as_str()) else { continue };
            if !within && !captured.contains_key(&initializer) {
                continue;
            }
            let captured = captured.entry(initializer).or_insert_with(|| Captured {
                initializer,
                name: name.clone(),
                operators: Some(Vec::new()),
                nodes: Vec::new(),
            });
            captured.nodes.push(node.name().to_owned());
            match (operator(node, input).filter(|_| is_standard(node)), &mut captured.operators) {
                (Some(operator), Some(operators)) => operators.push(operator),
                _ => captured.operators = None,
            }
        }
    };
    for body in graph.node.iter().flat_map(subgraphs) {
        visit(body, &HashSet::new(), &mut |node, hidden| note(node, hidden, true));
    }
    for node in &graph.node {
        note(node, &HashSet::new(), false);
    }
    for output in &graph.output {
        if let Some(captured) = index.get(output.name()).and_then(|index| captured.get_mut(index)) {
            captured.operators = None;
        }
    }
    captured.into_values().collect()
}

/// Calls `see` with each node of `body` and of the bodies within, and with the names that hide those of the graph around.
fn visit<'a>(body: &'a GraphProto, hidden: &HashSet<&'a str>, see: &mut impl FnMut(&NodeProto, &HashSet<&str>)) {
    let given = body.input.iter().map(|input| input.name());
    let constant = body.initializer.iter().map(TensorProto::name);
    let made = body.node.iter().flat_map(|node| node.output.iter().map(String::as_str));
    let hidden: HashSet<&str> = hidden.iter().copied().chain(given).chain(constant).chain(made).collect();
    for node in &body.node {
        see(node, &hidden);
        subgraphs(node).for_each(|inner| visit(inner, &hidden, see));
    }
}

/// Whether a tensor can be a weight: two or more axes in single precision.
pub(super) fn is_weight(tensor: &TensorProto) -> bool {
    tensor.data_type() == DataType::Float as i32 && tensor.dims.len() >= 2
}

/// How `node`, of ONNX's own operators, uses what its input of that index is, were it a weight.
#[must_use]
pub fn operator(node: &NodeProto, input: usize) -> Option<Operator> {
    match (node.op_type(), input) {
        ("Conv", 1) => Some(Operator::Conv),
        ("ConvTranspose", 1) => Some(Operator::ConvTranspose),
        ("Gemm", 1) => Some(Operator::Gemm {
            transposed: attribute(node, "transB").is_some_and(|attribute| attribute.i() != 0),
        }),
        ("MatMul", 1) => Some(Operator::MatMul),
        ("MatMul", 0) => Some(Operator::MatMulLeft),
        ("LSTM" | "GRU" | "RNN", 1 | 2) => Some(Operator::Recurrent),
        ("Gather", 0) if attribute(node, "axis").is_none_or(|attribute| attribute.i() == 0) => Some(Operator::Gather),
        _ => None,
    }
}

/// Gives nodes that use weights and have no name that of their output, for by its name a recipe leaves a node out.
pub fn name_users(graph: &mut GraphProto) {
    let taken: HashSet<String> = graph.node.iter().map(|node| node.name().to_owned()).collect();
    let users: Vec<usize> = find(graph).iter().flat_map(|weight| &weight.uses).map(|used| used.node).collect();
    for user in users {
        let node = &mut graph.node[user];
        let output = node
            .output
            .first()
            .filter(|output| node.name().is_empty() && !taken.contains(*output));
        if let Some(output) = output.cloned() {
            node.name = Some(output);
        }
    }
}

/// A weight of convolutions, matrix products and recurrences.
pub struct ProductWeight<'a> {
    /// The initialiser.
    pub tensor: &'a mut TensorProto,
    /// The ways in which it is used, each once; at least one, and none of them [`Operator::Gather`].
    pub operators: Vec<Operator>,
}

/// The weights of convolutions, matrix products and recurrences in `graph` and in the branches and loop bodies within, in the order of the nodes
/// that first use them. Tables that are only looked up are none.
#[must_use]
pub fn of_products(graph: &mut GraphProto) -> Vec<ProductWeight<'_>> {
    let mut uses = HashMap::new();
    collect_uses(graph, &mut uses);
    let mut found = Vec::new();
    collect_used(graph, &uses, &mut found);
    found.sort_by_key(|(order, _)| *order);
    found.into_iter().map(|(_, weight)| weight).collect()
}

/// Of each name: when it is first used, and how.
type Uses = HashMap<String, (usize, Vec<Operator>)>;

fn collect_uses(graph: &GraphProto, uses: &mut Uses) {
    for node in &graph.node {
        for (input, name) in node.input.iter().enumerate().filter(|_| is_standard(node)) {
            let Some(operator) = operator(node, input).filter(|operator| *operator != Operator::Gather) else {
                continue;
            };
            let next = uses.len();
            let (_, operators) = uses.entry(name.clone()).or_insert_with(|| (next, Vec::new()));
            if !operators.contains(&operator) {
                operators.push(operator);
            }
        }
        subgraphs(node).for_each(|subgraph| collect_uses(subgraph, uses));
    }
}

fn collect_used<'a>(graph: &'a mut GraphProto, uses: &Uses, found: &mut Vec<(usize, ProductWeight<'a>)>) {
    for tensor in graph.initializer.iter_mut().filter(|tensor| is_weight(tensor)) {
        if let Some((order, operators)) = uses.get(tensor.name()) {
            let operators = operators.clone();
            found.push((*order, ProductWeight { tensor, operators }));
        }
    }
    for subgraph in graph.node.iter_mut().flat_map(subgraphs_mut) {
        collect_used(subgraph, uses, found);
    }
}

/// The share of zeros among the values of a graph's weights, in floats or in 8-bit integers; `0.0..=1.0`.
#[must_use]
pub fn sparsity(graph: &GraphProto) -> f64 {
    let counted = graph.initializer.par_iter().filter(|tensor| tensor.dims.len() >= 2).map(|tensor| {
        let data = tensor.raw_data();
        let counts = match DataType::try_from(tensor.data_type()) {
            Ok(DataType::Int8) => (data.iter().filter(|byte| **byte == 0).count(), data.len()),
            Ok(DataType::Float) => {
                let raw = data.as_chunks::<4>().0;
                let is_zero = |value: f32| value == 0.0;
                let zeros = raw.iter().filter(|bytes| is_zero(f32::from_le_bytes(**bytes))).count();
                let listed = tensor.float_data.iter().filter(|value| is_zero(**value)).count();
                (zeros + listed, raw.len() + tensor.float_data.len())
            }
            _ => (0, 0),
        };
        // Of a large model no more than a tensor is to lie in memory.
        if data.len() >= RELEASED_BYTES_MIN {
            mapping::release(data);
        }
        counts
    });
    let (zeros, all) = counted.reduce(|| (0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    if all == 0 { 0.0 } else { zeros as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{float_tensor, node};

    #[test]
    fn what_uses_a_weight_has_a_name() {
        let named = NodeProto {
            name: Some("b".into()),
            ..node("MatMul", &["a", "w"], "c", vec![])
        };
        let mut graph = GraphProto {
            initializer: vec![float_tensor("w", &[1, 1], &[1.0])],
            node: vec![
                node("MatMul", &["x", "w"], "a", vec![]),
                named,
                node("MatMul", &["c", "w"], "b", vec![]),
                node("Relu", &["b"], "y", vec![]),
            ],
            ..GraphProto::default()
        };
        name_users(&mut graph);
        let names: Vec<&str> = graph.node.iter().map(NodeProto::name).collect();
        assert_eq!(names, ["a", "b", "", ""], "a name that is taken would stand for two nodes");
    }
}
