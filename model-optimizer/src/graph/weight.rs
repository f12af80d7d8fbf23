//! Where a model's weights are: the constant operands of convolutions and matrix products.

use std::collections::HashMap;

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, NodeProto, TensorProto};

use super::{attribute, is_standard};

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
}

impl Operator {
    /// The axis of the weight's output channels, of `rank` axes.
    #[must_use]
    pub fn channel_axis(self, rank: usize) -> usize {
        match self {
            Self::Conv | Self::Gather | Self::Gemm { transposed: true } => 0,
            Self::ConvTranspose | Self::Gemm { transposed: false } => 1,
            Self::MatMul => rank - 1,
            Self::MatMulLeft => rank - 2,
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
    for (node_index, node) in graph.node.iter().enumerate().filter(|(_, node)| is_standard(node)) {
        for (input, name) in node.input.iter().enumerate() {
            let Some(&initializer) = index.get(name.as_str()) else { continue };
            let tensor = &graph.initializer[initializer];
            let Some(operator) = operator(node, input, tensor) else { continue };
            let used = Use {
                node: node_index,
                input,
                operator,
            };
            match weights.iter_mut().find(|weight| weight.initializer == initializer) {
                Some(weight) => weight.uses.push(used),
                None => weights.push(Weight {
                    initializer,
                    name: name.clone(),
                    uses: vec![used],
                }),
            }
        }
    }
    weights
}

fn operator(node: &NodeProto, input: usize, tensor: &TensorProto) -> Option<Operator> {
    if tensor.data_type() != DataType::Float as i32 || tensor.dims.len() < 2 {
        return None;
    }
    match (node.op_type(), input) {
        ("Conv", 1) => Some(Operator::Conv),
        ("ConvTranspose", 1) => Some(Operator::ConvTranspose),
        ("Gemm", 1) => Some(Operator::Gemm {
            transposed: attribute(node, "transB").is_some_and(|attribute| attribute.i() != 0),
        }),
        ("MatMul", 1) => Some(Operator::MatMul),
        ("MatMul", 0) => Some(Operator::MatMulLeft),
        ("Gather", 0) if attribute(node, "axis").is_none_or(|attribute| attribute.i() == 0) => Some(Operator::Gather),
        _ => None,
    }
}

/// The share of zeros among the values of a graph's weights, in floats or in 8-bit integers; `0.0..=1.0`.
#[must_use]
pub fn sparsity(graph: &GraphProto) -> f64 {
    let (mut zeros, mut all) = (0_usize, 0_usize);
    for tensor in graph.initializer.iter().filter(|tensor| tensor.dims.len() >= 2) {
        let data = tensor.raw_data();
        if tensor.data_type() == DataType::Int8 as i32 {
            zeros += data.iter().filter(|byte| **byte == 0).count();
            all += data.len();
        } else if tensor.data_type() == DataType::Float as i32 {
            let floats = data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .chain(tensor.float_data.iter().copied());
            for value in floats {
                zeros += usize::from(value == 0.0);
                all += 1;
            }
        }
    }
    if all == 0 { 0.0 } else { zeros as f64 / all as f64 }
}
