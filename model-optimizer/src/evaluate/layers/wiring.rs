//! Who makes and reads each value of a graph, and so which of its constants are weights and how integers become numbers.

use std::collections::HashMap;

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, NodeProto, TensorProto};

use super::byte_length;
use super::values::{Grid, Layout};
use crate::graph::{attribute, subgraphs};

/// What techniques append to a weight's name for the tensor that stands in its place.
const FORMS: [&str; 3] = ["_int8", "_blocks", "_half"];
/// Operators whose operand is a weight even where it is a vector.
const PRODUCTS: [&str; 5] = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"];

/// The constants of a graph with its branches and loop bodies, and who makes and reads each value.
#[derive(Default)]
pub(super) struct Wiring<'a> {
    pub(super) constants: HashMap<&'a str, &'a TensorProto>,
    makers: HashMap<&'a str, &'a NodeProto>,
    readers: HashMap<&'a str, Vec<&'a NodeProto>>,
}

impl<'a> Wiring<'a> {
    pub(super) fn of(graph: &'a GraphProto) -> Self {
        let mut wiring = Self::default();
        wiring.add(graph);
        wiring
    }

    fn add(&mut self, graph: &'a GraphProto) {
        self.constants
            .extend(graph.initializer.iter().map(|tensor| (tensor.name(), tensor)));
        for node in &graph.node {
            self.makers.extend(node.output.iter().map(|output| (output.as_str(), node)));
            for input in &node.input {
                self.readers.entry(input).or_default().push(node);
            }
            subgraphs(node).for_each(|subgraph| self.add(subgraph));
        }
    }

    /// The weights with the operators that use them, the largest first.
    pub(super) fn weights(&self) -> Vec<(&'a TensorProto, &'a str)> {
        let tensors = self
            .constants
            .values()
            .filter(|tensor| tensor.dims.len() >= 2 && !tensor.dims.contains(&0));
        let weight = |tensor: &'a TensorProto| {
            let operator = self.readers.get(tensor.name())?.first()?.op_type();
            let is_wide = tensor.dims.iter().filter(|size| **size > 1).count() >= 2;
            let is_weight = match DataType::try_from(tensor.data_type()).ok()? {
                DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double => is_wide || PRODUCTS.contains(&operator),
                DataType::Int8 | DataType::Uint8 => self.grid(tensor).is_some(),
                _ => false,
            };
            is_weight.then_some((tensor, operator))
        };
        let mut weights: Vec<_> = tensors.copied().filter_map(weight).collect();
        weights.sort_by_cached_key(|(tensor, _)| (std::cmp::Reverse(byte_length(tensor)), tensor.name()));
        weights
    }

    /// The constant of this graph that `name` stands for in a compressed one.
    pub(super) fn origin(&self, name: &str) -> Option<&'a str> {
        let constant = |name: &str| self.constants.get_key_value(name).map(|(name, _)| *name);
        let digits = |character: char| character.is_ascii_digit();
        // A name that was taken already got a number.
        let numbered = name.trim_end_matches(digits).strip_suffix('_');
        let stems = [Some(name), numbered];
        let stem = |stem: &str| FORMS.iter().find_map(|form| constant(stem.strip_suffix(form)?));
        constant(name).or_else(|| stems.into_iter().flatten().find_map(stem))
    }

    /// How the nodes that read a tensor of integers make numbers of it; `None` where they do not, or their scales are no constants.
    pub(super) fn grid(&self, tensor: &TensorProto) -> Option<Grid<'a>> {
        let readers = self.readers.get(tensor.name())?;
        readers
            .iter()
            .find_map(|node| self.grid_of(node, tensor))
            .filter(|grid| grid.fits(tensor))
    }

    fn grid_of(&self, node: &'a NodeProto, tensor: &TensorProto) -> Option<Grid<'a>> {
        let reads = |index: usize| node.input.get(index).is_some_and(|name| name == tensor.name());
        let constant = |index: usize| self.constants.get(node.input.get(index)?.as_str()).copied();
        let integer = |name: &str, default: i64| attribute(node, name).map_or(default, AttributeProto::i);
        let rank = tensor.dims.len() as i64;
        let channels = |axis: i64, scale, zero| Grid {
            scale,
            zero,
            layout: Layout::Channels {
                axis: axis.rem_euclid(rank) as usize,
            },
        };
        match node.op_type() {
            "DequantizeLinear" if reads(0) && integer("block_size", 0) == 0 => {
                Some(channels(integer("axis", 1), constant(1)?, constant(2)))
            }
            "MatMulInteger" if reads(1) => Some(channels(-1, self.factor(node.output.first()?)?, constant(3))),
            "Gather" if reads(0) => Some(channels(0, self.factor(node.output.first()?)?, None)),
            "MatMulNBits" if reads(1) => Some(Grid {
                scale: constant(2)?,
                zero: constant(3),
                layout: Layout::Blocks {
                    bits: integer("bits", 4) as u32,
                    block_size: usize::try_from(integer("block_size", 0)).ok()?,
                    inputs: usize::try_from(integer("K", 0)).ok()?,
                    outputs: usize::try_from(integer("N", 0)).ok()?,
                },
            }),
            _ => None,
        }
    }

    /// The constant that an integer `value` is multiplied by once it is a float.
    fn factor(&self, mut value: &'a str) -> Option<&'a TensorProto> {
        loop {
            let [reader] = self.readers.get(value)?.as_slice() else {
                return None;
            };
            let other = reader.input.iter().find(|input| *input != value);
            match (reader.op_type(), other) {
                ("Cast", _) => {}
                ("Mul", Some(other)) => {
                    if let Some(constant) = self.constant(other) {
                        return Some(constant);
                    }
                }
                _ => return None,
            }
            value = reader.output.first()?;
        }
    }

    /// The constant that `value` is, or is looked up in, or has as a factor.
    fn constant(&self, value: &str) -> Option<&'a TensorProto> {
        if let Some(constant) = self.constants.get(value) {
            return Some(*constant);
        }
        let maker = self.makers.get(value)?;
        match maker.op_type() {
            "Cast" | "Gather" => self.constant(maker.input.first()?),
            "Mul" => maker.input.iter().find_map(|input| self.constant(input)),
            _ => None,
        }
    }
}
