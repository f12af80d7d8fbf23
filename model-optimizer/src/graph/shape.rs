//! Shape inference: the sizes of values, as far as they follow from the graph's inputs.
//!
//! Sizes that are known when the model runs alone (the batch, the length of a sequence) are symbols, and integers that are computed from
//! shapes are followed through the graph, for exporters compute the shapes of `Reshape` so. Branches and loops are opaque: what is
//! said of their outputs in the model counts.

use std::collections::HashMap;

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{ModelProto, NodeProto, TensorProto, ValueInfoProto, tensor_shape_proto, type_proto, weights};

use super::is_standard;

mod arithmetic;
mod operators;

pub(crate) use operators::{axis_of, is_broadcasting, permutation};

/// The size of an axis: a number times symbols, each of which is a size that is known when the model runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dim {
    factor: usize,
    /// Ascending.
    symbols: Vec<u32>,
}

impl Dim {
    /// A number.
    #[must_use]
    pub fn of(size: usize) -> Self {
        Self {
            factor: size,
            symbols: Vec::new(),
        }
    }

    fn symbol(symbol: u32) -> Self {
        Self {
            factor: 1,
            symbols: vec![symbol],
        }
    }

    /// The number, where it is one.
    #[must_use]
    pub fn size(&self) -> Option<usize> {
        (self.symbols.is_empty() || self.factor == 0).then_some(self.factor)
    }

    /// The product of two sizes; `None` where it overflows.
    #[must_use]
    pub fn times(&self, other: &Self) -> Option<Self> {
        let mut symbols: Vec<u32> = self.symbols.iter().chain(&other.symbols).copied().collect();
        symbols.sort_unstable();
        Some(Self {
            factor: self.factor.checked_mul(other.factor)?,
            symbols,
        })
    }

    /// The quotient of two sizes, where it is a size for whatever the symbols are.
    #[must_use]
    pub fn divided_by(&self, other: &Self) -> Option<Self> {
        if other.factor == 0 || !self.factor.is_multiple_of(other.factor) {
            return None;
        }
        let mut symbols = self.symbols.clone();
        for symbol in &other.symbols {
            symbols.remove(symbols.iter().position(|own| own == symbol)?);
        }
        Some(Self {
            factor: self.factor / other.factor,
            symbols,
        })
    }

    /// The product of many sizes.
    pub(super) fn product<'a>(dims: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        dims.into_iter().try_fold(Self::of(1), |product, dim| product.times(dim))
    }
}

/// An element of a tensor of integers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Integer {
    /// A number.
    Known(i64),
    /// A size that holds symbols.
    Size(Dim),
    /// It depends on more than shapes.
    Unknown,
}

impl From<&Dim> for Integer {
    fn from(dim: &Dim) -> Self {
        match dim.size().map(i64::try_from) {
            Some(Ok(size)) => Self::Known(size),
            Some(Err(_)) => Self::Unknown,
            None => Self::Size(dim.clone()),
        }
    }
}

/// Most elements of a tensor of integers that is followed.
const INTEGERS_MAX: usize = 64;
/// Most elements of a tensor of floats that is remembered: one for each axis.
const FLOATS_MAX: usize = 8;

/// The shapes of a graph's values.
#[derive(Debug, Default)]
pub struct Shapes {
    shapes: HashMap<String, Vec<Dim>>,
    integers: HashMap<String, Vec<Integer>>,
    /// Of a few constants, such as the scales of a `Resize`.
    floats: HashMap<String, Vec<f32>>,
    refusals: HashMap<String, String>,
    symbols: HashMap<String, u32>,
    next_symbol: u32,
}

impl Shapes {
    /// Of the values of the graph of `model`; those within branches, loops and functions are not looked at.
    #[must_use]
    pub fn of(model: &ModelProto) -> Self {
        let mut shapes = Self::default();
        let Some(graph) = &model.graph else { return shapes };
        for tensor in &graph.initializer {
            shapes.constant(tensor.name(), tensor);
        }
        for input in &graph.input {
            if !shapes.shapes.contains_key(input.name())
                && let Some(shape) = shapes.declared(input, true)
            {
                shapes.shapes.insert(input.name().to_owned(), shape);
            }
        }
        let declared: HashMap<&str, &ValueInfoProto> = graph
            .value_info
            .iter()
            .chain(&graph.output)
            .map(|value| (value.name(), value))
            .collect();
        for node in &graph.node {
            let inferred = shapes.node(node);
            let why = match inferred {
                Ok(inferred) => {
                    for (output, shape) in node.output.iter().zip(inferred).filter(|(output, _)| !output.is_empty()) {
                        shapes.shapes.insert(output.clone(), shape);
                    }
                    "the operator's further outputs are not known".to_owned()
                }
                Err(why) => why,
            };
            for output in node.output.iter().filter(|output| !output.is_empty()) {
                if shapes.shapes.contains_key(output) {
                    continue;
                }
                match declared.get(output.as_str()).and_then(|value| shapes.declared(value, false)) {
                    Some(shape) => drop(shapes.shapes.insert(output.clone(), shape)),
                    None => {
                        let why = format!("the shape of `{output}` ({} `{}`) is not known: {why}", node.op_type(), node.name());
                        shapes.refusals.insert(output.clone(), why);
                    }
                }
            }
        }
        shapes
    }

    /// The shape of a value.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[Dim]> {
        self.shapes.get(name).map(Vec::as_slice)
    }

    /// The elements of a tensor of integers of at most one axis, where it is small and follows from shapes and constants.
    #[must_use]
    pub fn integers(&self, name: &str) -> Option<&[Integer]> {
        self.integers.get(name).map(Vec::as_slice)
    }

    /// The numbers in a tensor of integers, where all are known.
    #[must_use]
    pub fn numbers(&self, name: &str) -> Option<Vec<i64>> {
        let number = |integer: &Integer| match integer {
            Integer::Known(number) => Some(*number),
            _ => None,
        };
        self.integers.get(name)?.iter().map(number).collect()
    }

    /// Why the shape of a value is not known, naming the node.
    #[must_use]
    pub fn refusal(&self, name: &str) -> String {
        let unknown = || format!("the shape of `{name}` is not known: nothing in the graph makes it");
        self.refusals.get(name).cloned().unwrap_or_else(unknown)
    }

    fn fresh(&mut self) -> Dim {
        self.next_symbol += 1;
        Dim::symbol(self.next_symbol)
    }

    fn constant(&mut self, name: &str, tensor: &TensorProto) {
        let Ok(shape) = weights::shape(tensor) else { return };
        if shape.len() <= 1
            && shape.iter().product::<usize>() <= INTEGERS_MAX
            && let Some(values) = integers_of(tensor)
        {
            self.integers
                .insert(name.to_owned(), values.into_iter().map(Integer::Known).collect());
        }
        if matches!(shape[..], [length] if length <= FLOATS_MAX)
            && tensor.data_type() == DataType::Float as i32
            && let Ok(values) = weights::floats(tensor)
        {
            self.floats.insert(name.to_owned(), values);
        }
        self.shapes.insert(name.to_owned(), shape.into_iter().map(Dim::of).collect());
    }

    /// What the model says of a value. Symbols of inputs are known by their names, those of other values may be an exporter's guesses.
    fn declared(&mut self, value: &ValueInfoProto, named: bool) -> Option<Vec<Dim>> {
        use tensor_shape_proto::dimension::Value;
        let Some(type_proto::Value::TensorType(tensor)) = value.r#type.as_ref()?.value.as_ref() else {
            return None;
        };
        let dims = &tensor.shape.as_ref()?.dim;
        let dim = |dim: &tensor_shape_proto::Dimension| match &dim.value {
            Some(Value::DimValue(size)) if *size >= 0 => usize::try_from(*size).map_or_else(|_| self.fresh(), Dim::of),
            Some(Value::DimParam(name)) if named && !name.is_empty() => match self.symbols.get(name) {
                Some(symbol) => Dim::symbol(*symbol),
                None => {
                    let dim = self.fresh();
                    self.symbols.insert(name.clone(), self.next_symbol);
                    dim
                }
            },
            _ => self.fresh(),
        };
        Some(dims.iter().map(dim).collect())
    }

    fn node(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        if !is_standard(node) {
            return Err(format!("it is of the domain `{}`", node.domain()));
        }
        let shapes = self.infer(node)?;
        // Of a matrix the elements would be taken for those of its first axis.
        if shapes.first().is_some_and(|shape| shape.len() <= 1)
            && let Some(integers) = self.arithmetic(node)
        {
            self.integers.extend(node.output.first().map(|output| (output.clone(), integers)));
        }
        Ok(shapes)
    }
}

/// The values of a tensor of 32- or 64-bit integers or booleans.
#[must_use]
pub fn integers_of(tensor: &TensorProto) -> Option<Vec<i64>> {
    let raw = tensor.raw_data();
    let kind = DataType::try_from(tensor.data_type()).ok()?;
    let values: Vec<i64> = match kind {
        DataType::Int64 if raw.is_empty() => tensor.int64_data.clone(),
        DataType::Int64 => raw.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
        DataType::Int32 | DataType::Bool if raw.is_empty() => tensor.int32_data.iter().map(|value| i64::from(*value)).collect(),
        DataType::Int32 => raw
            .as_chunks()
            .0
            .iter()
            .map(|bytes| i64::from(i32::from_le_bytes(*bytes)))
            .collect(),
        DataType::Bool => raw.iter().map(|byte| i64::from(*byte)).collect(),
        _ => return None,
    };
    let length = weights::shape(tensor).ok()?.iter().product::<usize>();
    (values.len() == length).then_some(values)
}

#[cfg(test)]
mod tests {
    use plimsoll_runtime::onnx::GraphProto;

    use super::*;
    use crate::graph::generator::declared;
    use crate::graph::{float_tensor, integer, integers, node};

    /// Why the shape of `v`, which `made` makes of an `x` of a batch of 3 by 4, is not known; there is a weight `w` of 2 by 2, too.
    fn refusal(mut made: NodeProto) -> String {
        made.name = Some("it".into());
        let graph = GraphProto {
            input: vec![declared("x", &[3, 4])],
            initializer: vec![float_tensor("w", &[2, 2], &[0.0; 4])],
            node: vec![made],
            ..GraphProto::default()
        };
        let shapes = Shapes::of(&ModelProto {
            graph: Some(graph),
            ..ModelProto::default()
        });
        assert_eq!(shapes.get("v"), None);
        shapes.refusal("v")
    }

    #[test]
    fn a_shape_that_is_not_known_is_refused_with_its_node_and_the_reason() {
        let custom = NodeProto {
            domain: Some("example.org".into()),
            ..node("Attend", &["x"], "v", vec![])
        };
        let told = integers("pads", &[1]);
        for (made, operator, why) in [
            (custom, "Attend", "it is of the domain `example.org`"),
            (
                node("Unique", &["x"], "v", vec![]),
                "Unique",
                "the operator is not one whose shape is inferred",
            ),
            (node("Relu", &[], "v", vec![]), "Relu", "it has no input 0"),
            (
                node("Relu", &["gone"], "v", vec![]),
                "Relu",
                "the shape of `gone` is not known: nothing in the graph makes it",
            ),
            (
                node("Reshape", &["x", "gone"], "v", vec![]),
                "Reshape",
                "the shape that it is told (`gone`) depends on more than shapes",
            ),
            (
                node("Concat", &["x", "w"], "v", vec![integer("axis", 0)]),
                "Concat",
                "its inputs have different numbers of axes",
            ),
            (
                node("Flatten", &["x"], "v", vec![integer("axis", 9)]),
                "Flatten",
                "it works along axis 9 of a value of 3 axes",
            ),
            (
                node("Transpose", &["x"], "v", vec![integers("perm", &[0, 1])]),
                "Transpose",
                "its order does not name every axis",
            ),
            (
                node("MaxPool", &["x"], "v", vec![integers("kernel_shape", &[2]), told]),
                "MaxPool",
                "its pads are not two for each spatial axis",
            ),
            (
                node("Conv", &["x", "w"], "v", vec![]),
                "Conv",
                "its weight and input do not have the same spatial axes",
            ),
        ] {
            assert_eq!(refusal(made), format!("the shape of `v` ({operator} `it`) is not known: {why}"));
        }
    }

    #[test]
    fn what_follows_from_an_unknown_shape_names_where_it_began() {
        let mut first = node("Unique", &["x"], "u", vec![]);
        first.name = Some("first".into());
        let graph = GraphProto {
            input: vec![declared("x", &[4])],
            node: vec![first, node("Relu", &["u"], "v", vec![]), node("Exp", &["v"], "y", vec![])],
            ..GraphProto::default()
        };
        let shapes = Shapes::of(&ModelProto {
            graph: Some(graph),
            ..ModelProto::default()
        });
        assert!(shapes.refusal("y").contains("(Unique `first`)"), "{}", shapes.refusal("y"));
        assert_eq!(shapes.refusal("z"), "the shape of `z` is not known: nothing in the graph makes it");
    }
}
