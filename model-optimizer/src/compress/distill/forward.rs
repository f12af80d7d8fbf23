//! An interpreter of ONNX graphs over candle's tensors, through which gradients flow.
//!
//! Floats of every width are computed in one type, on the device that trains. Integers and booleans are `I64` and `U8` tensors in main
//! memory and take no part in autograd. Only quantised values that stand for a trained weight or an activation are floats (of whole
//! numbers), so that gradients pass through them.

use std::collections::{HashMap, HashSet};

use candle_core::{DType, Device, Tensor};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, NodeProto, TensorProto, weights};

use super::operators::{self, Call, Operator};
use super::quantization::OUTPUT_TYPE;
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::{attribute, integer, is_standard};

/// Where, and in which type of floats, a graph is computed.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) device: Device,
    pub(super) dtype: DType,
}

/// The part of a graph that some of its values depend on, ready to be run.
pub(super) struct Forward {
    nodes: Vec<(NodeProto, Operator)>,
    constants: HashMap<String, Tensor>,
    opset: i64,
    place: Place,
}

impl Forward {
    /// Of the nodes of `graph` that `wanted` depend on. The initialisers in `trained` are not kept: [`run`](Self::run) is given their
    /// values.
    ///
    /// # Errors
    /// [`FailureReason::UnsupportedOperator`], naming every node that cannot be computed here or that lets no gradient through to
    /// what is trained; [`FailureReason::UnreadableModel`] where a constant cannot be read.
    pub(super) fn new(graph: &GraphProto, opset: i64, wanted: &[String], trained: &HashSet<String>, place: Place) -> Result<Self, Failure> {
        let live = live_nodes(graph, wanted);
        let mut nodes = Vec::with_capacity(live.len());
        let mut refused = Vec::new();
        let mut dependent: HashSet<&str> = trained.iter().map(String::as_str).collect();
        for &node in &live {
            let depends = node.input.iter().any(|name| dependent.contains(name.as_str()));
            if depends {
                dependent.extend(node.output.iter().map(String::as_str));
            }
            let described = || format!("{} (node `{}`)", node.op_type(), label(node));
            match operators::find(node).filter(|_| is_standard(node)) {
                Some(_) if depends && operators::is_step(node) => refused.push(format!("{}, a step", described())),
                Some(operator) => nodes.push((with_output_type(node, graph), operator)),
                None => refused.push(described()),
            }
        }
        if !refused.is_empty() {
            let message = format!(
                "cannot distil: there is no gradient for {}; leave distill out of optimize.recipe, or export the model without them",
                refused.join(", ")
            );
            return Err(failure(FailureReason::UnsupportedOperator, message));
        }
        let read: HashSet<&str> = live.iter().flat_map(|node| node.input.iter().map(String::as_str)).collect();
        let constants = graph
            .initializer
            .iter()
            .filter(|tensor| read.contains(tensor.name()) && !trained.contains(tensor.name()));
        let constants = constants
            .map(|tensor| Ok((tensor.name().to_owned(), constant(tensor, &place)?)))
            .collect::<Result<_, Failure>>()?;
        Ok(Self {
            nodes,
            constants,
            opset,
            place,
        })
    }

    /// Where it is computed.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Computes `wanted` from `values`, which hold the graph's inputs and what is trained.
    ///
    /// # Errors
    /// [`FailureReason::UnsupportedOperator`], naming the node that cannot be computed and why.
    pub(super) fn run(&self, mut values: HashMap<String, Tensor>, wanted: &[String]) -> Result<Vec<Tensor>, Failure> {
        let missing = |name: &str| {
            failure(
                FailureReason::UnsupportedOperator,
                format!("cannot distil: no value is known for `{name}`"),
            )
        };
        for (node, operator) in &self.nodes {
            let input = |name: &String| match name.as_str() {
                "" => Ok(None),
                name => {
                    let value = values.get(name).or_else(|| self.constants.get(name));
                    value.cloned().map(Some).ok_or_else(|| missing(name))
                }
            };
            let call = Call {
                node,
                inputs: node.input.iter().map(input).collect::<Result<_, _>>()?,
                opset: self.opset,
                place: &self.place,
            };
            let outputs = operator(&call).map_err(|error| {
                let message = format!("cannot distil: {} (node `{}`): {error}", node.op_type(), label(node));
                failure(FailureReason::UnsupportedOperator, message)
            })?;
            values.extend(node.output.iter().cloned().zip(outputs));
        }
        let value = |name: &String| values.get(name).or_else(|| self.constants.get(name)).cloned();
        wanted.iter().map(|name| value(name).ok_or_else(|| missing(name))).collect()
    }
}

/// The node, with the type that it quantises to as an attribute where only its zero point's type says it.
fn with_output_type(node: &NodeProto, graph: &GraphProto) -> NodeProto {
    let mut node = node.clone();
    if node.op_type() == "QuantizeLinear" && attribute(&node, OUTPUT_TYPE).is_none() {
        let zero = node
            .input
            .get(2)
            .and_then(|name| graph.initializer.iter().find(|tensor| tensor.name() == name));
        if let Some(kind) = zero.map(TensorProto::data_type) {
            node.attribute.push(integer(OUTPUT_TYPE, i64::from(kind)));
        }
    }
    node
}

/// A node's name, or its first output where it has none.
pub(super) fn label(node: &NodeProto) -> &str {
    match (node.name(), node.output.first()) {
        ("", Some(output)) => output,
        (name, _) => name,
    }
}

/// The nodes that `wanted` depend on, in the graph's order.
pub(super) fn live_nodes<'a>(graph: &'a GraphProto, wanted: &[String]) -> Vec<&'a NodeProto> {
    let mut needed: HashSet<&str> = wanted.iter().map(String::as_str).collect();
    let mut live = Vec::new();
    // Backwards, since nodes are in order.
    for node in graph.node.iter().rev() {
        if node.output.iter().any(|output| needed.contains(output.as_str())) {
            needed.extend(node.input.iter().map(String::as_str));
            live.push(node);
        }
    }
    live.reverse();
    live
}

fn constant(tensor: &TensorProto, place: &Place) -> Result<Tensor, Failure> {
    of_proto(tensor, place).map_err(|error| failure(FailureReason::UnreadableModel, format!("the constant `{}`: {error}", tensor.name())))
}

/// The values of a constant: floats in the type and on the device of `place`, integers as `I64`, booleans as `U8`.
///
/// # Errors
/// Where it cannot be read, or holds no plain numbers.
pub(super) fn of_proto(tensor: &TensorProto, place: &Place) -> candle_core::Result<Tensor> {
    let shape = weights::shape(tensor).map_err(candle_core::Error::wrap)?;
    let kind = DataType::try_from(tensor.data_type()).unwrap_or_default();
    match kind {
        DataType::Float | DataType::Double | DataType::Float16 | DataType::Bfloat16 => {
            let values = weights::floats(tensor).map_err(candle_core::Error::wrap)?;
            Tensor::from_vec(values, shape, &place.device)?.to_dtype(place.dtype)
        }
        DataType::Bool => {
            let values = weights::floats(tensor).map_err(candle_core::Error::wrap)?;
            Tensor::from_vec(values.iter().map(|value| u8::from(*value != 0.0)).collect(), shape, &Device::Cpu)
        }
        DataType::Int64 => {
            // Not through floats, which lose the last digits of a large integer.
            let raw = tensor.raw_data();
            let values = if raw.is_empty() {
                tensor.int64_data.clone()
            } else {
                raw.as_chunks::<8>().0.iter().map(|word| i64::from_le_bytes(*word)).collect()
            };
            Tensor::from_vec(values, shape, &Device::Cpu)
        }
        _ => {
            let values = weights::floats(tensor).map_err(candle_core::Error::wrap)?;
            Tensor::from_vec(values.iter().map(|value| *value as i64).collect(), shape, &Device::Cpu)
        }
    }
}
