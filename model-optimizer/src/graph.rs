//! The model in memory: ONNX's own messages, whose weights stay in the mapped file until they are changed.

use std::collections::{HashMap, HashSet};

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{
    AttributeProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, attribute_proto::AttributeType,
    tensor_shape_proto, type_proto,
};

pub mod dependency;
pub mod elements;
// The whole-program tests build with what the unit tests leave.
#[cfg(test)]
#[allow(dead_code)]
pub(crate) mod generator;
pub mod operators;
pub mod opset;
pub mod serialize;
pub mod shape;
pub mod simplify;
pub mod weight;

/// The subgraphs of a node (branches, loop bodies).
pub fn subgraphs(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute
        .iter()
        .flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs))
}

/// The same, to be changed.
pub fn subgraphs_mut(node: &mut NodeProto) -> impl Iterator<Item = &mut GraphProto> {
    node.attribute
        .iter_mut()
        .flat_map(|attribute| attribute.g.iter_mut().chain(&mut attribute.graphs))
}

/// How often each value is read, by nodes (in subgraphs, too) and as an output of the graph.
#[must_use]
pub fn reads(graph: &GraphProto) -> HashMap<&str, usize> {
    let mut reads = HashMap::new();
    count_reads(graph, &mut reads);
    reads
}

fn count_reads<'a>(graph: &'a GraphProto, reads: &mut HashMap<&'a str, usize>) {
    let inputs = graph.node.iter().flat_map(|node| node.input.iter().map(String::as_str));
    let outputs = graph.output.iter().map(ValueInfoProto::name);
    for name in inputs.chain(outputs).filter(|name| !name.is_empty()) {
        *reads.entry(name).or_default() += 1;
    }
    graph
        .node
        .iter()
        .flat_map(subgraphs)
        .for_each(|subgraph| count_reads(subgraph, reads));
}

/// Names that are not taken in a graph: those that are, each with the number that was last put behind it.
pub struct Names(HashMap<String, usize>);

impl Names {
    /// Of everything in `graph`.
    #[must_use]
    pub fn of(graph: &GraphProto) -> Self {
        let mut taken = HashSet::new();
        collect_names(graph, &mut taken);
        Self(taken.into_iter().map(|name| (name, 1)).collect())
    }

    /// A name that begins with `stem` and is taken from now on.
    pub fn fresh(&mut self, stem: &str) -> String {
        let mut name = stem.to_owned();
        if let Some(&last) = self.0.get(stem) {
            let mut count = last;
            while self.0.contains_key(&name) {
                count += 1;
                name = format!("{stem}_{count}");
            }
            self.0.insert(stem.to_owned(), count);
        }
        self.0.insert(name.clone(), 1);
        name
    }
}

fn collect_names(graph: &GraphProto, names: &mut HashSet<String>) {
    names.extend(graph.initializer.iter().map(|tensor| tensor.name().to_owned()));
    names.extend(graph.input.iter().chain(&graph.output).map(|value| value.name().to_owned()));
    for node in &graph.node {
        names.extend(node.input.iter().chain(&node.output).cloned());
        names.insert(node.name().to_owned());
        subgraphs(node).for_each(|subgraph| collect_names(subgraph, names));
    }
}

/// A node of ONNX's standard operators.
#[must_use]
pub fn node(op_type: &str, inputs: &[&str], output: &str, attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        op_type: Some(op_type.to_owned()),
        input: inputs.iter().map(|input| (*input).to_owned()).collect(),
        output: vec![output.to_owned()],
        attribute: attributes,
        ..NodeProto::default()
    }
}

/// An integer attribute.
#[must_use]
pub fn integer(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Int as i32),
        i: Some(value),
        ..AttributeProto::default()
    }
}

/// An attribute of several integers.
#[must_use]
pub fn integers(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Ints as i32),
        ints: values.to_vec(),
        ..AttributeProto::default()
    }
}

/// A node's attribute.
#[must_use]
pub fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name() == name)
}

/// What a graph declares of a value that is a tensor; without a shape, of any.
#[must_use]
pub fn value_info(name: &str, kind: DataType, shape: Option<TensorShapeProto>) -> ValueInfoProto {
    let kind = type_proto::Tensor {
        elem_type: Some(kind as i32),
        shape,
    };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(kind)),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}

/// A shape whose every size is known.
#[must_use]
pub fn fixed_shape(sizes: &[usize]) -> TensorShapeProto {
    let dim = sizes.iter().map(|size| tensor_shape_proto::Dimension {
        value: Some(tensor_shape_proto::dimension::Value::DimValue(*size as i64)),
        ..Default::default()
    });
    TensorShapeProto { dim: dim.collect() }
}

/// A tensor of raw little-endian bytes.
#[must_use]
pub fn tensor(name: &str, kind: DataType, dims: &[usize], raw: Vec<u8>) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        dims: dims.iter().map(|&size| size as i64).collect(),
        data_type: Some(kind as i32),
        raw_data: Some(serialize::spilled(raw)),
        ..TensorProto::default()
    }
}

/// A tensor of single-precision floats.
#[must_use]
pub fn float_tensor(name: &str, dims: &[usize], values: &[f32]) -> TensorProto {
    tensor(
        name,
        DataType::Float,
        dims,
        values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    )
}

/// Whether a node is of ONNX's own domain.
#[must_use]
pub fn is_standard(node: &NodeProto) -> bool {
    matches!(node.domain(), "" | "ai.onnx")
}
