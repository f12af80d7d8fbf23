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

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use plimsoll_package::manifest::{Datatype, Engine as EngineKind};
    use plimsoll_runtime::engine::{self, LoadOptions};
    use plimsoll_runtime::onnx::{AttributeProto, ModelProto, OperatorSetIdProto, ValueInfoProto};

    use super::*;
    use crate::convert;
    use crate::graph::{fixed_shape, float_tensor, node, tensor, value_info};

    /// A small graph from floats (named a, b, c) to the floats `y`.
    struct Case {
        nodes: Vec<NodeProto>,
        inputs: Vec<Vec<usize>>,
        constants: Vec<TensorProto>,
        /// The values that inputs are drawn from.
        range: (f32, f32),
        has_gradient: bool,
    }

    impl Case {
        fn new(op_type: &str, inputs: &[&[usize]], attributes: Vec<AttributeProto>) -> Self {
            let names = ["a", "b", "c", "d", "e"];
            Self::of(vec![node(op_type, &names[..inputs.len()], "y", attributes)], inputs)
        }

        fn of(nodes: Vec<NodeProto>, inputs: &[&[usize]]) -> Self {
            Self {
                nodes,
                inputs: inputs.iter().map(|dims| dims.to_vec()).collect(),
                constants: vec![],
                range: (-2.0, 2.0),
                has_gradient: true,
            }
        }

        /// With further inputs of the last node, which are constants.
        fn with(mut self, constants: Vec<TensorProto>) -> Self {
            let last = self.nodes.last_mut().unwrap();
            last.input.extend(constants.iter().map(|constant| constant.name().to_owned()));
            self.constants.extend(constants);
            self
        }

        fn from(mut self, low: f32, high: f32) -> Self {
            self.range = (low, high);
            self
        }

        fn steps(mut self) -> Self {
            self.has_gradient = false;
            self
        }

        fn name(&self) -> String {
            let types: Vec<String> = self
                .nodes
                .iter()
                .map(|node| format!("{} {:?}", node.op_type(), node.attribute))
                .collect();
            format!("{} of {:?}", types.join(", "), self.inputs)
        }

        fn graph(&self) -> GraphProto {
            let names = ["a", "b", "c", "d", "e"];
            GraphProto {
                name: Some("case".into()),
                node: self.nodes.clone(),
                input: names.iter().zip(&self.inputs).map(|(name, dims)| value(name, Some(dims))).collect(),
                output: vec![value("y", None)],
                initializer: self.constants.clone(),
                ..GraphProto::default()
            }
        }

        /// The inputs, drawn by a fixed seed and no two of them near each other, so that no largest value is in doubt.
        fn values(&self) -> Vec<Vec<f32>> {
            let total: usize = self.inputs.iter().map(|dims| dims.iter().product::<usize>()).sum();
            let mut order: Vec<usize> = (0..total).collect();
            crate::compress::distill::samples::shuffle(&mut order, 7);
            let (low, high) = self.range;
            let mut drawn = order.iter().map(|&place| low + (high - low) * (place as f32 + 0.37) / total as f32);
            let count = |dims: &Vec<usize>| dims.iter().product::<usize>();
            self.inputs.iter().map(|dims| drawn.by_ref().take(count(dims)).collect()).collect()
        }

        fn forward(&self, dtype: DType, trained: bool) -> (Forward, Vec<Var>) {
            let place = Place {
                device: Device::Cpu,
                dtype,
            };
            let names = ["a", "b", "c", "d", "e"];
            let trained = names[..if trained { self.inputs.len() } else { 0 }]
                .iter()
                .map(|name| (*name).to_owned())
                .collect();
            let forward = Forward::new(&self.graph(), OPSET, &["y".to_owned()], &trained, place).unwrap();
            let vars = self.inputs.iter().zip(self.values()).map(|(dims, values)| {
                let value = Tensor::from_vec(values, dims.as_slice(), &Device::Cpu)
                    .unwrap()
                    .to_dtype(dtype)
                    .unwrap();
                Var::from_tensor(&value).unwrap()
            });
            (forward, vars.collect())
        }
    }

    const OPSET: i64 = 20;

    fn run(forward: &Forward, vars: &[Var]) -> Tensor {
        let names = ["a", "b", "c", "d", "e"].map(str::to_owned);
        let values = names.into_iter().zip(vars.iter().map(|var| var.as_tensor().clone())).collect();
        forward.run(values, &["y".to_owned()]).unwrap().remove(0)
    }

    fn value(name: &str, dims: Option<&[usize]>) -> ValueInfoProto {
        value_info(name, DataType::Float, dims.map(fixed_shape))
    }

    fn ints(name: &str, values: &[i64]) -> AttributeProto {
        AttributeProto {
            name: Some(name.into()),
            r#type: Some(plimsoll_runtime::onnx::attribute_proto::AttributeType::Ints as i32),
            ints: values.to_vec(),
            ..AttributeProto::default()
        }
    }

    fn float(name: &str, value: f32) -> AttributeProto {
        AttributeProto {
            name: Some(name.into()),
            r#type: Some(plimsoll_runtime::onnx::attribute_proto::AttributeType::Float as i32),
            f: Some(value),
            ..AttributeProto::default()
        }
    }

    fn text(name: &str, value: &str) -> AttributeProto {
        AttributeProto {
            name: Some(name.into()),
            r#type: Some(plimsoll_runtime::onnx::attribute_proto::AttributeType::String as i32),
            s: Some(value.as_bytes().to_vec()),
            ..AttributeProto::default()
        }
    }

    fn held(name: &str, value: TensorProto) -> AttributeProto {
        AttributeProto {
            name: Some(name.into()),
            r#type: Some(plimsoll_runtime::onnx::attribute_proto::AttributeType::Tensor as i32),
            t: Some(value),
            ..AttributeProto::default()
        }
    }

    fn indices(name: &str, dims: &[usize], values: &[i64]) -> TensorProto {
        tensor(
            name,
            DataType::Int64,
            dims,
            values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        )
    }

    fn list(name: &str, values: &[i64]) -> TensorProto {
        indices(name, &[values.len()], values)
    }

    fn int8(name: &str, kind: DataType, dims: &[usize], values: &[i16]) -> TensorProto {
        tensor(name, kind, dims, values.iter().map(|value| *value as u8).collect())
    }

    /// Every operator of the table in at least one case.
    fn cases() -> Vec<Case> {
        let image: &[usize] = &[2, 4, 5, 6];
        let mut cases = Vec::new();
        for op_type in [
            "Abs",
            "Cos",
            "Elu",
            "Erf",
            "Exp",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "LeakyRelu",
            "Neg",
            "Relu",
            "Sigmoid",
            "Sin",
            "Softplus",
            "Tanh",
            "LogSoftmax",
            "Softmax",
            "Dropout",
            "Transpose",
            "Flatten",
        ] {
            cases.push(Case::new(op_type, &[&[3, 4, 2]], vec![]));
        }
        for op_type in ["Log", "Sqrt", "Reciprocal"] {
            cases.push(Case::new(op_type, &[&[3, 4]], vec![]).from(0.3, 3.0));
        }
        for op_type in ["Ceil", "Floor", "Round", "Sign"] {
            cases.push(Case::new(op_type, &[&[3, 4]], vec![]).steps());
        }
        cases.push(Case::new("Gelu", &[&[3, 4]], vec![text("approximate", "tanh")]));
        cases.push(Case::new("Softmax", &[&[3, 4, 2]], vec![integer("axis", 1)]));
        for op_type in ["Add", "Sub", "Mul", "Max", "Min"] {
            cases.push(Case::new(op_type, &[&[3, 1, 4], &[2, 1]], vec![]));
        }
        cases.push(Case::new("Sum", &[&[3, 4], &[4], &[3, 1]], vec![]));
        cases.push(Case::new("Div", &[&[3, 4], &[4]], vec![]).from(0.4, 2.0));
        for exponent in [2.0, 3.0, 0.5, 1.7] {
            cases.push(
                Case::new("Pow", &[&[3, 4]], vec![])
                    .with(vec![float_tensor("e", &[], &[exponent])])
                    .from(0.4, 2.0),
            );
        }
        cases.push(Case::new("PRelu", &[&[2, 3, 4], &[3, 1]], vec![]));
        cases.push(Case::new("Clip", &[&[3, 4]], vec![]).with(vec![float_tensor("low", &[], &[-1.0]), float_tensor("high", &[], &[0.5])]));
        // Products.
        cases.push(Case::new("MatMul", &[&[2, 3, 4], &[4, 5]], vec![]));
        cases.push(Case::new("MatMul", &[&[2, 1, 3, 4], &[3, 4, 2]], vec![]));
        cases.push(Case::new("MatMul", &[&[4], &[4, 5]], vec![]));
        cases.push(Case::new("MatMul", &[&[2, 3, 4], &[4]], vec![]));
        cases.push(Case::new("Gemm", &[&[3, 4], &[4, 5], &[5]], vec![]));
        let turned = vec![integer("transA", 1), integer("transB", 1), float("alpha", 0.5), float("beta", 2.0)];
        cases.push(Case::new("Gemm", &[&[4, 3], &[5, 4], &[1, 5]], turned));
        // Convolutions: padded, strided and dilated; grouped; depthwise; of one dimension; padded by size.
        cases.push(Case::new(
            "Conv",
            &[image, &[3, 4, 3, 2], &[3]],
            vec![ints("pads", &[1, 0, 2, 1]), ints("strides", &[2, 1]), ints("dilations", &[1, 2])],
        ));
        cases.push(Case::new("Conv", &[image, &[6, 2, 2, 2]], vec![integer("group", 2)]));
        cases.push(Case::new(
            "Conv",
            &[image, &[4, 1, 3, 3], &[4]],
            vec![integer("group", 4), ints("pads", &[1, 1, 1, 1])],
        ));
        cases.push(Case::new(
            "Conv",
            &[&[2, 3, 7], &[4, 3, 3]],
            vec![ints("strides", &[2]), ints("pads", &[1, 1])],
        ));
        cases.push(Case::new(
            "Conv",
            &[image, &[2, 4, 3, 3]],
            vec![text("auto_pad", "SAME_UPPER"), ints("strides", &[2, 2])],
        ));
        cases.push(Case::new("Conv", &[image, &[2, 4, 1, 1]], vec![]));
        cases.push(Case::new(
            "ConvTranspose",
            &[&[2, 4, 3, 3], &[4, 3, 3, 2], &[3]],
            vec![
                ints("strides", &[2, 2]),
                ints("pads", &[1, 0, 0, 1]),
                ints("output_padding", &[1, 0]),
            ],
        ));
        cases.push(Case::new("ConvTranspose", &[&[1, 4, 5], &[4, 2, 3]], vec![integer("group", 2)]));
        cases.push(Case::new(
            "MaxPool",
            &[image],
            vec![ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2])],
        ));
        cases.push(
            Case::new(
                "MaxPool",
                &[image],
                vec![ints("kernel_shape", &[3, 3]), ints("strides", &[2, 2]), ints("pads", &[1, 1, 1, 1])],
            )
            .from(-3.0, -1.0),
        );
        cases.push(Case::new(
            "MaxPool",
            &[&[1, 1, 6, 6]],
            vec![ints("kernel_shape", &[3, 3]), ints("strides", &[2, 2]), integer("ceil_mode", 1)],
        ));
        cases.push(Case::new(
            "AveragePool",
            &[image],
            vec![ints("kernel_shape", &[3, 2]), ints("pads", &[1, 0, 1, 1])],
        ));
        let counted = vec![
            ints("kernel_shape", &[3, 2]),
            ints("pads", &[1, 0, 1, 1]),
            integer("count_include_pad", 1),
        ];
        cases.push(Case::new("AveragePool", &[image], counted));
        cases.push(Case::new("GlobalAveragePool", &[image], vec![]));
        cases.push(Case::new("GlobalMaxPool", &[image], vec![]));
        // Norms.
        let variance = float_tensor("variance", &[4], &[0.5, 1.0, 2.0, 0.1]);
        let mean = float_tensor("mean", &[4], &[0.1, -0.2, 0.3, 0.0]);
        cases.push(Case::new("BatchNormalization", &[image, &[4], &[4]], vec![]).with(vec![mean, variance]));
        cases.push(Case::new(
            "LayerNormalization",
            &[&[2, 3, 4], &[4], &[4]],
            vec![float("epsilon", 1e-3)],
        ));
        cases.push(Case::new("LayerNormalization", &[&[2, 3, 4], &[3, 4]], vec![integer("axis", 1)]));
        cases.push(Case::new("InstanceNormalization", &[&[2, 3, 5], &[3], &[3]], vec![]));
        // Reductions.
        for op_type in ["ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"] {
            cases.push(Case::new(op_type, &[&[2, 3, 4]], vec![]).with(vec![list("axes", &[-1, 0])]));
            cases.push(Case::new(op_type, &[&[2, 3, 4]], vec![integer("keepdims", 0)]).with(vec![list("axes", &[1])]));
            cases.push(Case::new(op_type, &[&[2, 3]], vec![]));
        }
        // Shapes.
        cases.push(Case::new("Reshape", &[&[2, 3, 4]], vec![]).with(vec![list("shape", &[0, -1, 2])]));
        cases.push(Case::new("Transpose", &[&[2, 3, 4]], vec![ints("perm", &[1, 2, 0])]));
        cases.push(Case::new("Squeeze", &[&[2, 1, 4, 1]], vec![]).with(vec![list("axes", &[-1])]));
        cases.push(Case::new("Unsqueeze", &[&[2, 4]], vec![]).with(vec![list("axes", &[0, 2])]));
        cases.push(Case::new("Concat", &[&[2, 3], &[2, 1], &[2, 2]], vec![integer("axis", -1)]));
        cases.push(Case::new("Expand", &[&[3, 1]], vec![]).with(vec![list("shape", &[2, 1, 4])]));
        cases.push(Case::new("Tile", &[&[2, 3]], vec![]).with(vec![list("repeats", &[2, 1])]));
        cases.push(Case::new("Gather", &[&[4, 3]], vec![]).with(vec![indices("rows", &[2, 2], &[0, -1, 2, 0])]));
        cases.push(Case::new("Gather", &[&[2, 4, 3]], vec![integer("axis", 1)]).with(vec![indices("row", &[], &[2])]));
        for (starts, ends, steps) in [
            (vec![1, 0], vec![i64::MAX, -1], vec![1, 1]),
            (vec![-1, 0], vec![i64::MIN, 3], vec![-1, 2]),
        ] {
            let constants = vec![
                list("starts", &starts),
                list("ends", &ends),
                list("axes", &[1, -1]),
                list("steps", &steps),
            ];
            cases.push(Case::new("Slice", &[&[2, 3, 4]], vec![]).with(constants));
        }
        let mut split = node("Split", &["a", "parts"], "p", vec![integer("axis", 1)]);
        split.output.push("q".into());
        let mut parted = Case::of(vec![split, node("MatMul", &["p", "q"], "y", vec![])], &[&[3, 4]]);
        parted.nodes[0].input[1] = "parts".into();
        parted.constants.push(list("parts", &[1, 3]));
        parted.nodes.insert(1, node("Transpose", &["p"], "t", vec![]));
        parted.nodes[2] = node("MatMul", &["t", "q"], "y", vec![]);
        cases.push(parted);
        cases.push(Case::new("Pad", &[&[2, 3]], vec![]).with(vec![list("pads", &[0, 1, 1, 2]), float_tensor("value", &[], &[0.7])]));
        for mode in ["reflect", "edge"] {
            cases.push(Case::new("Pad", &[&[2, 4]], vec![text("mode", mode)]).with(vec![list("pads", &[1, 2, 0, 3])]));
        }
        cases.push(Case::new("Trilu", &[&[2, 3, 4]], vec![integer("upper", 0)]).with(vec![indices("k", &[], &[1])]));
        cases.push(Case::new("Trilu", &[&[3, 3]], vec![]));
        // Conditions, and arithmetic of shapes.
        for op_type in ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"] {
            let nodes = vec![
                node(op_type, &["a", "b"], "condition", vec![]),
                node("Where", &["condition", "a", "c"], "y", vec![]),
            ];
            cases.push(Case::of(nodes, &[&[3, 4], &[4], &[3, 1]]));
        }
        for op_type in ["And", "Or", "Xor"] {
            let nodes = vec![
                node("Greater", &["a", "b"], "g", vec![]),
                node("Less", &["a", "c"], "l", vec![]),
                node(op_type, &["g", "l"], "both", vec![]),
                node("Not", &["both"], "none", vec![]),
                node("Where", &["none", "a", "b"], "y", vec![]),
            ];
            cases.push(Case::of(nodes, &[&[3, 4], &[4], &[3, 1]]));
        }
        let mut counted = Case::of(
            vec![
                node("Shape", &["a"], "shape", vec![]),
                node("Gather", &["shape", "one"], "size", vec![]),
                node("Range", &["zero", "size", "one"], "places", vec![]),
                node("Cast", &["places"], "floats", vec![integer("to", DataType::Float as i64)]),
                node(
                    "ConstantOfShape",
                    &["shape"],
                    "ones",
                    vec![held("value", float_tensor("", &[1], &[3.0]))],
                ),
                node("Mul", &["ones", "floats"], "grid", vec![]),
                node("Constant", &[], "half", vec![float("value_float", 0.5)]),
                node("Mul", &["grid", "half"], "scaled", vec![]),
                node("Mul", &["a", "scaled"], "y", vec![]),
            ],
            &[&[3, 4]],
        );
        counted.constants = vec![indices("zero", &[], &[0]), indices("one", &[], &[1])];
        cases.push(counted);
        // Quantisation.
        let scale = || float_tensor("scale", &[3], &[0.01, 0.02, 0.03]);
        let mut weight_only = Case::of(
            vec![
                node("DequantizeLinear", &["w", "scale", "zero"], "f", vec![integer("axis", 1)]),
                node("MatMul", &["a", "f"], "y", vec![]),
            ],
            &[&[4, 2]],
        );
        weight_only.constants = vec![
            int8("w", DataType::Int8, &[2, 3], &[1, -2, 127, 50, -127, 3]),
            scale(),
            int8("zero", DataType::Int8, &[3], &[0, 1, -2]),
        ];
        cases.push(weight_only);
        let mut fixed = Case::of(
            vec![
                node("QuantizeLinear", &["a", "scale", "zero"], "q", vec![integer("axis", 1)]),
                node("DequantizeLinear", &["q", "scale", "zero"], "y", vec![integer("axis", 1)]),
            ],
            &[&[4, 3]],
        );
        fixed.constants = vec![scale(), int8("zero", DataType::Uint8, &[3], &[128, 100, 0])];
        cases.push(fixed.steps());
        let mut quantize = node("DynamicQuantizeLinear", &["a"], "q", vec![]);
        quantize.output.extend(["step".to_owned(), "middle".to_owned()]);
        let mut dynamic = Case::of(
            vec![
                quantize,
                node("MatMulInteger", &["q", "w", "middle"], "product", vec![]),
                node("Cast", &["product"], "floats", vec![integer("to", DataType::Float as i64)]),
                node("Mul", &["step", "scale"], "both", vec![]),
                node("Mul", &["floats", "both"], "y", vec![]),
            ],
            &[&[4, 2]],
        );
        dynamic.constants = vec![int8("w", DataType::Int8, &[2, 3], &[1, -2, 64, 50, -64, 3]), scale()];
        cases.push(dynamic.steps());
        cases
    }

    #[test]
    fn the_table_is_in_order_and_every_operator_has_a_case() {
        assert!(operators::OPERATORS.is_sorted_by_key(|(name, _)| *name));
        let cases = cases();
        for (name, _) in operators::OPERATORS {
            assert!(
                cases.iter().flat_map(|case| &case.nodes).any(|node| node.op_type() == *name),
                "{name}"
            );
        }
    }

    #[test]
    fn every_operator_gives_what_the_engine_gives() {
        let folder = tempfile::tempdir().unwrap();
        for case in cases() {
            let model = ModelProto {
                ir_version: Some(8),
                opset_import: vec![OperatorSetIdProto {
                    domain: None,
                    version: Some(OPSET),
                }],
                graph: Some(case.graph()),
                ..ModelProto::default()
            };
            let path = folder.path().join("case.onnx");
            convert::write(&model, &path).unwrap();
            let options = LoadOptions {
                // Otherwise ONNX Runtime computes a product with dequantised weights in integers.
                fold_dequantize: true,
                ..LoadOptions::default()
            };
            let mut kinds = convert::engines();
            kinds.sort_by_key(|kind| *kind != EngineKind::OnnxRuntime);
            let engine = engine::load(kinds[0], &path, &options).unwrap_or_else(|error| panic!("{}: {error}", case.name()));
            let inputs: Vec<engine::Tensor> = case
                .inputs
                .iter()
                .zip(case.values())
                .map(|(dims, values)| engine::Tensor::new(dims.clone(), values).unwrap())
                .collect();
            let expected = engine
                .run(&inputs)
                .unwrap_or_else(|error| panic!("{}: {error}", case.name()))
                .remove(0);
            assert_eq!(expected.datatype(), Datatype::Fp32);
            let (forward, vars) = case.forward(DType::F32, false);
            let given = run(&forward, &vars);
            assert_eq!(given.dims(), expected.shape(), "{}", case.name());
            let given = given.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (given, expected) in given.iter().zip(expected.as_f32().unwrap()) {
                let difference = (given - expected).abs();
                assert!(
                    difference <= 2e-5 * expected.abs().max(1.0),
                    "{}: {given}, not {expected}",
                    case.name()
                );
            }
        }
    }

    #[test]
    fn every_gradient_is_that_of_finite_differences() {
        for case in cases().into_iter().filter(|case| case.has_gradient) {
            let (forward, vars) = case.forward(DType::F64, true);
            // A sum of the outputs with weights that differ, so that no error cancels.
            let summed = |vars: &[Var]| {
                let y = run(&forward, vars).flatten_all().unwrap();
                let weights: Vec<f64> = (0..y.elem_count()).map(|index| (1.0 + index as f64).sin()).collect();
                (y * Tensor::new(weights, &Device::Cpu).unwrap()).unwrap().sum_all().unwrap()
            };
            let gradients = summed(&vars).backward().unwrap();
            for (index, var) in vars.iter().enumerate() {
                let gradient = gradients
                    .get(var.as_tensor())
                    .map(|gradient| gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap());
                let values = var.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                let gradient = gradient.unwrap_or_else(|| vec![0.0; values.len()]);
                for place in 0..values.len() {
                    let moved = |by: f64| {
                        let mut values = values.clone();
                        values[place] += by;
                        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
                        summed(&vars).to_scalar::<f64>().unwrap()
                    };
                    let step = 1e-5;
                    let slope = (moved(step) - moved(-step)) / (2.0 * step);
                    moved(0.0);
                    let difference = (slope - gradient[place]).abs();
                    assert!(
                        difference <= 1e-5 * slope.abs().max(1.0),
                        "{}: input {index}, place {place}: {}, not {slope}",
                        case.name(),
                        gradient[place]
                    );
                }
            }
        }
    }

    #[test]
    fn gradients_pass_straight_through_rounding_but_not_through_clamping() {
        let mut case = Case::of(
            vec![
                node("QuantizeLinear", &["a", "scale", "zero"], "q", vec![]),
                node("DequantizeLinear", &["q", "scale", "zero"], "y", vec![]),
            ],
            &[&[64]],
        )
        .from(-1.5, 1.5);
        case.constants = vec![float_tensor("scale", &[], &[0.01]), int8("zero", DataType::Int8, &[], &[0])];
        let (forward, vars) = case.forward(DType::F32, true);
        let gradients = run(&forward, &vars).sum_all().unwrap().backward().unwrap();
        let gradient = gradients.get(vars[0].as_tensor()).unwrap().to_vec1::<f32>().unwrap();
        // From -128.5 to 127.5 steps.
        let inside: Vec<f32> = case.values()[0]
            .iter()
            .map(|value| f32::from((-1.285..=1.275).contains(value)))
            .collect();
        assert!(inside.contains(&0.0) && inside.contains(&1.0));
        for (gradient, inside) in gradient.iter().zip(inside) {
            assert!((gradient - inside).abs() < 1e-6, "{gradient}, not {inside}");
        }
    }

    #[test]
    fn all_nodes_without_a_gradient_are_named_at_once() {
        let mut named = node("Loop", &["a"], "l", vec![]);
        named.name = Some("the loop".into());
        let nodes = vec![
            named,
            node("Round", &["a"], "r", vec![]),
            node("NonZero", &["r"], "unread", vec![]),
            node("Det", &["l"], "d", vec![]),
            node("Add", &["r", "d"], "y", vec![]),
        ];
        let graph = Case::of(nodes, &[&[2]]).graph();
        let place = Place {
            device: Device::Cpu,
            dtype: DType::F32,
        };
        let trained = HashSet::from(["a".to_owned()]);
        let refused = Forward::new(&graph, OPSET, &["y".to_owned()], &trained, place).err().unwrap();
        assert_eq!(refused.reason, FailureReason::UnsupportedOperator);
        assert!(
            refused
                .message
                .contains("Loop (node `the loop`), Round (node `r`), a step, Det (node `d`);"),
            "{}",
            refused.message
        );
    }
}
