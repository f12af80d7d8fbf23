//! Random valid models for tests: small convolutional, dense, attention and recurrent networks, with branches, loops, functions and old
//! operators, and with what real ones are made of.

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_runtime::engine::{self, LoadOptions, Tensor};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, attribute_proto::AttributeType, tensor_shape_proto, type_proto,
};

// By the crate's name, since the whole-program tests include this file.
use plimsoll_optimizer::calibration::Calibration;
use plimsoll_optimizer::convert;
use plimsoll_optimizer::evaluate::dataset::Dataset;
use plimsoll_optimizer::graph::{float_tensor, integer, integers, node, tensor};

/// Builds a model node by node.
pub(crate) struct Builder {
    graph: GraphProto,
    state: u64,
    count: usize,
}

/// A value of the model: its name and its shape without the batch.
#[derive(Debug, Clone)]
pub(crate) struct Value {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

/// A float value with a symbolic batch before `shape`.
pub(crate) fn declared(name: &str, shape: &[usize]) -> ValueInfoProto {
    use tensor_shape_proto::dimension::Value as Size;
    let dimension = |value| tensor_shape_proto::Dimension {
        value: Some(value),
        ..Default::default()
    };
    let batch = dimension(Size::DimParam("batch".into()));
    let dim = std::iter::once(batch).chain(shape.iter().map(|size| dimension(Size::DimValue(*size as i64))));
    let kind = type_proto::Tensor {
        elem_type: Some(DataType::Float as i32),
        shape: Some(TensorShapeProto { dim: dim.collect() }),
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

impl Builder {
    /// With an input `x` of that shape, the batch left out.
    pub(crate) fn new(seed: u64, shape: &[usize]) -> (Self, Value) {
        let graph = GraphProto {
            name: Some("generated".into()),
            input: vec![declared("x", shape)],
            ..GraphProto::default()
        };
        let builder = Self {
            graph,
            state: seed,
            count: 0,
        };
        let input = Value {
            name: "x".into(),
            shape: shape.to_vec(),
        };
        (builder, input)
    }

    /// The model whose only output is `value`.
    pub(crate) fn finish(mut self, value: &Value) -> ModelProto {
        self.graph.output = vec![declared(&value.name, &value.shape)];
        ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto {
                domain: Some(String::new()),
                version: Some(17),
            }],
            graph: Some(self.graph),
            ..ModelProto::default()
        }
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        // SplitMix64.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 16) as usize % bound
    }

    fn fresh(&mut self, stem: &str) -> String {
        self.count += 1;
        format!("{stem}{}", self.count)
    }

    /// A constant of random floats around `mean`.
    pub(crate) fn constant(&mut self, shape: &[usize], mean: f32) -> String {
        let name = self.fresh("w");
        let spread = 1.0 / (shape.iter().skip(1).product::<usize>() as f32).sqrt();
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| mean + (self.below(2001) as f32 / 1000.0 - 1.0) * spread)
            .collect();
        self.graph.initializer.push(float_tensor(&name, shape, &values));
        name
    }

    /// A constant of equal floats.
    pub(crate) fn filled(&mut self, length: usize, value: f32) -> String {
        let name = self.fresh("w");
        self.graph.initializer.push(float_tensor(&name, &[length], &vec![value; length]));
        name
    }

    /// A constant that holds what another holds.
    pub(crate) fn copy(&mut self, constant: &str) -> String {
        let name = self.fresh("w");
        let held = self.graph.initializer.iter().find(|tensor| tensor.name() == constant).unwrap();
        let copy = TensorProto {
            name: Some(name.clone()),
            ..held.clone()
        };
        self.graph.initializer.push(copy);
        name
    }

    /// A constant of these floats.
    pub(crate) fn floats(&mut self, values: &[f32]) -> String {
        let name = self.fresh("w");
        self.graph.initializer.push(float_tensor(&name, &[values.len()], values));
        name
    }

    /// A single truth value without an axis.
    pub(crate) fn flag(&mut self, value: bool) -> String {
        let name = self.fresh("n");
        self.graph
            .initializer
            .push(tensor(&name, DataType::Bool, &[], vec![u8::from(value)]));
        name
    }

    /// A single integer without an axis.
    pub(crate) fn scalar(&mut self, value: i64) -> String {
        let name = self.fresh("n");
        self.graph
            .initializer
            .push(tensor(&name, DataType::Int64, &[], value.to_le_bytes().to_vec()));
        name
    }

    /// A constant of integers.
    pub(crate) fn numbers(&mut self, values: &[i64]) -> String {
        let name = self.fresh("n");
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.graph.initializer.push(tensor(&name, DataType::Int64, &[values.len()], bytes));
        name
    }

    /// Rows of a table, looked up by an input of `length` numbers that takes the place of the one there was.
    pub(crate) fn embedding(&mut self, length: usize, features: usize) -> Value {
        let mut input = declared("x", &[length]);
        if let Some(type_proto::Value::TensorType(tensor)) = input.r#type.as_mut().and_then(|kind| kind.value.as_mut()) {
            tensor.elem_type = Some(DataType::Int64 as i32);
        }
        self.graph.input = vec![input];
        let table = self.constant(&[20, features], 0.0);
        self.push("Gather", &[&table, "x"], vec![], &[length, features])
    }

    /// A node with the shape of its output, the batch left out.
    pub(crate) fn push(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<AttributeProto>, shape: &[usize]) -> Value {
        let name = self.fresh("v");
        self.graph.node.push(NodeProto {
            name: Some(format!("{name}/{op_type}")),
            ..node(op_type, inputs, &name, attributes)
        });
        Value {
            name,
            shape: shape.to_vec(),
        }
    }

    /// A convolution with a kernel of 3, `groups` and a bias.
    pub(crate) fn convolution(&mut self, input: &Value, channels: usize, groups: usize) -> Value {
        let weight = self.constant(&[channels, input.shape[0] / groups, 3, 3], 0.0);
        let bias = self.constant(&[channels], 0.1);
        let attributes = vec![integer("group", groups as i64), integers("pads", &[1, 1, 1, 1])];
        let shape = [channels, input.shape[1], input.shape[2]];
        self.push("Conv", &[&input.name, &weight, &bias], attributes, &shape)
    }

    /// A matrix product along the last axis, with a bias where it is asked for.
    pub(crate) fn product(&mut self, input: &Value, features: usize, biased: bool) -> Value {
        let inner = input.shape[input.shape.len() - 1];
        let mut shape = input.shape.clone();
        shape[input.shape.len() - 1] = features;
        let weight = self.constant(&[inner, features], 0.0);
        let product = self.push("MatMul", &[&input.name, &weight], vec![], &shape);
        if !biased {
            return product;
        }
        let bias = self.constant(&[features], 0.1);
        self.push("Add", &[&product.name, &bias], vec![], &shape)
    }

    pub(crate) fn add(&mut self, a: &Value, b: &Value) -> Value {
        self.push("Add", &[&a.name, &b.name], vec![], &a.shape)
    }

    pub(crate) fn unary(&mut self, op_type: &str, input: &Value) -> Value {
        self.push(op_type, &[&input.name], vec![], &input.shape)
    }

    pub(crate) fn layer_norm(&mut self, input: &Value) -> Value {
        let features = input.shape[input.shape.len() - 1];
        let (scale, bias) = (self.constant(&[features], 1.0), self.constant(&[features], 0.0));
        self.push(
            "LayerNormalization",
            &[&input.name, &scale, &bias],
            vec![integer("axis", -1)],
            &input.shape,
        )
    }

    pub(crate) fn batch_norm(&mut self, input: &Value) -> Value {
        let channels = input.shape[0];
        let constants = [1.0, 0.0, 0.0, 2.5].map(|mean| self.constant(&[channels], mean));
        let inputs: Vec<&str> = std::iter::once(&input.name).chain(&constants).map(String::as_str).collect();
        self.push("BatchNormalization", &inputs, vec![], &input.shape)
    }

    fn activation(&mut self, input: &Value) -> Value {
        let op_type = ["Relu", "Sigmoid", "Tanh"][self.below(3)];
        self.unary(op_type, input)
    }

    /// Self-attention of `heads` heads, exported as by torch: the batch in `Reshape` is 0 or -1.
    pub(crate) fn attention(&mut self, input: &Value, heads: usize) -> Value {
        let (length, features) = (input.shape[0], input.shape[1]);
        let depth = features / heads;
        let split = self.numbers(&[0, -1, heads as i64, depth as i64]);
        let merge = self.numbers(&[-1, length as i64, features as i64]);
        let mut part = |order: &[i64], shape: &[usize]| {
            let part = self.product(input, features, true);
            let part = self.push("Reshape", &[&part.name, &split], vec![], &[length, heads, depth]);
            self.push("Transpose", &[&part.name], vec![integers("perm", order)], shape)
        };
        let query = part(&[0, 2, 1, 3], &[heads, length, depth]);
        let key = part(&[0, 2, 3, 1], &[heads, depth, length]);
        let value = part(&[0, 2, 1, 3], &[heads, length, depth]);
        let scores = self.push("MatMul", &[&query.name, &key.name], vec![], &[heads, length, length]);
        let scores = self.push("Softmax", &[&scores.name], vec![integer("axis", -1)], &[heads, length, length]);
        let mixed = self.push("MatMul", &[&scores.name, &value.name], vec![], &[heads, length, depth]);
        let mixed = self.push(
            "Transpose",
            &[&mixed.name],
            vec![integers("perm", &[0, 2, 1, 3])],
            &[length, heads, depth],
        );
        let mixed = self.push("Reshape", &[&mixed.name, &merge], vec![], &[length, features]);
        self.product(&mixed, features, true)
    }

    /// Two products with an activation in between.
    pub(crate) fn feed_forward(&mut self, input: &Value, width: usize) -> Value {
        let features = input.shape[input.shape.len() - 1];
        let hidden = self.product(input, width, true);
        let hidden = self.activation(&hidden);
        self.product(&hidden, features, true)
    }
}

/// A value of a body, whose shape says nothing of a batch.
fn bare(name: &str, kind: DataType, shape: &[usize]) -> ValueInfoProto {
    let dimension = |size: &usize| tensor_shape_proto::Dimension {
        value: Some(tensor_shape_proto::dimension::Value::DimValue(*size as i64)),
        ..Default::default()
    };
    let kind = type_proto::Tensor {
        elem_type: Some(kind as i32),
        shape: Some(TensorShapeProto {
            dim: shape.iter().map(dimension).collect(),
        }),
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

fn body(name: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Graph as i32),
        g: Some(graph),
        ..AttributeProto::default()
    }
}

pub(crate) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Float as i32),
        f: Some(value),
        ..AttributeProto::default()
    }
}

fn text(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::String as i32),
        s: Some(value.as_bytes().to_vec()),
        ..AttributeProto::default()
    }
}

/// A random model of any kind; the same seed gives the same.
pub(crate) fn any_model(seed: u64) -> ModelProto {
    match seed % 8 {
        0 => convolutional(seed),
        1 => dense(seed),
        2 => transformer(seed),
        3 => recurrent(seed),
        4 => upsampling(seed),
        5 => nested(seed),
        6 => functional(seed),
        _ => old(seed),
    }
}

/// A random model without what control flow and recurrences bring; the same seed gives the same.
pub(crate) fn model(seed: u64) -> ModelProto {
    match seed % 3 {
        0 => convolutional(seed),
        1 => dense(seed),
        _ => transformer(seed),
    }
}

fn convolutional(seed: u64) -> ModelProto {
    let (mut builder, input) = Builder::new(seed, &[3, 8, 8]);
    let mut value = builder.convolution(&input, 8, 1);
    for _ in 0..2 + builder.below(4) {
        let (channels, height, width) = (value.shape[0], value.shape[1], value.shape[2]);
        value = match builder.below(8) {
            0 => {
                let wider = 4 * (1 + builder.below(4));
                builder.convolution(&value, wider, 1)
            }
            1 => builder.convolution(&value, channels, channels),
            2 => builder.convolution(&value, channels * 2, 2),
            3 => builder.batch_norm(&value),
            4 => {
                let inner = builder.convolution(&value, channels, 1);
                let inner = builder.activation(&inner);
                builder.add(&inner, &value)
            }
            5 => {
                let branch = builder.convolution(&value, 4, 1);
                let shape = [channels + 4, height, width];
                builder.push("Concat", &[&value.name, &branch.name], vec![integer("axis", 1)], &shape)
            }
            6 if height >= 4 => {
                let attributes = vec![integers("kernel_shape", &[2, 2]), integers("strides", &[2, 2])];
                builder.push("MaxPool", &[&value.name], attributes, &[channels, height / 2, width / 2])
            }
            _ => builder.activation(&value),
        };
    }
    let (channels, area) = (value.shape[0], value.shape[1] * value.shape[2]);
    let flat = match builder.below(3) {
        0 => {
            let pooled = builder.push("GlobalAveragePool", &[&value.name], vec![], &[channels, 1, 1]);
            builder.push("Flatten", &[&pooled.name], vec![], &[channels])
        }
        1 => builder.push("Flatten", &[&value.name], vec![], &[channels * area]),
        _ => {
            let shape = builder.numbers(&[-1, (channels * area) as i64]);
            builder.push("Reshape", &[&value.name, &shape], vec![], &[channels * area])
        }
    };
    let (weight, bias) = (builder.constant(&[5, flat.shape[0]], 0.0), builder.constant(&[5], 0.0));
    let output = builder.push("Gemm", &[&flat.name, &weight, &bias], vec![integer("transB", 1)], &[5]);
    builder.finish(&output)
}

fn dense(seed: u64) -> ModelProto {
    let (mut builder, input) = Builder::new(seed, &[6]);
    let mut value = builder.product(&input, 12, true);
    for _ in 0..2 + builder.below(4) {
        let features = value.shape[0];
        value = match builder.below(6) {
            0 => {
                let (weight, bias) = (builder.constant(&[features, 8], 0.0), builder.constant(&[8], 0.0));
                builder.push("Gemm", &[&value.name, &weight, &bias], vec![], &[8])
            }
            1 => builder.layer_norm(&value),
            2 => {
                let inner = builder.feed_forward(&value, 10);
                builder.add(&inner, &value)
            }
            3 => {
                let branch = builder.product(&value, 5, false);
                builder.push("Concat", &[&value.name, &branch.name], vec![integer("axis", -1)], &[features + 5])
            }
            4 => {
                let gate = builder.product(&value, features, true);
                let gate = builder.unary("Sigmoid", &gate);
                let value = builder.product(&value, features, false);
                builder.push("Mul", &[&gate.name, &value.name], vec![], &[features])
            }
            _ => builder.activation(&value),
        };
    }
    let output = builder.product(&value, 4, true);
    builder.finish(&output)
}

fn transformer(seed: u64) -> ModelProto {
    let (mut builder, input) = Builder::new(seed, &[5, 6]);
    let mut value = match builder.below(2) {
        0 => builder.embedding(5, 16),
        _ => builder.product(&input, 16, true),
    };
    for _ in 0..1 + builder.below(2) {
        let heads = [2, 4, 8][builder.below(3)];
        let attended = builder.attention(&value, heads);
        let sum = builder.add(&attended, &value);
        value = builder.layer_norm(&sum);
        let width = 8 + builder.below(24);
        let inner = builder.feed_forward(&value, width);
        let sum = builder.add(&inner, &value);
        value = if builder.below(2) == 0 { builder.layer_norm(&sum) } else { sum };
    }
    let output = builder.product(&value, 3, true);
    builder.finish(&output)
}

/// A model that multiplies by one of two weights, which its branches both call `w`, by the sign of what it is given.
pub(crate) fn branching() -> ModelProto {
    let (mut builder, _) = Builder::new(5, &[16]);
    let limit = tensor("limit", DataType::Float, &[], 0.0_f32.to_le_bytes().to_vec());
    builder.graph.initializer.push(limit);
    let branch = |builder: &mut Builder, name: &str| {
        let (weight, small) = (builder.constant(&[16, 32], 0.0), builder.constant(&[1, 32], 0.0));
        let initializer = [(weight, "w"), (small, "small")].map(|(constant, name)| {
            let index = builder
                .graph
                .initializer
                .iter()
                .position(|tensor| *tensor.name() == constant)
                .unwrap();
            TensorProto {
                name: Some(name.to_owned()),
                ..builder.graph.initializer.remove(index)
            }
        });
        let output = format!("{name}_y");
        body(
            name,
            GraphProto {
                name: Some(name.to_owned()),
                initializer: initializer.into(),
                node: vec![
                    node("MatMul", &["x", "w"], &format!("{name}_product"), vec![]),
                    node("Add", &[&format!("{name}_product"), "small"], &output, vec![]),
                ],
                output: vec![declared(&output, &[32])],
                ..GraphProto::default()
            },
        )
    };
    let branches = ["then_branch", "else_branch"].map(|name| branch(&mut builder, name));
    builder.graph.node.extend([
        node("ReduceSum", &["x"], "sum", vec![integer("keepdims", 0)]),
        node("Greater", &["sum", "limit"], "positive", vec![]),
        node("If", &["positive"], "y", branches.into()),
    ]);
    builder.finish(&Value {
        name: "y".into(),
        shape: vec![32],
    })
}

/// A model that multiplies three times by the weight `w` of a loop's body.
pub(crate) fn looping() -> ModelProto {
    let (mut builder, _) = Builder::new(6, &[16]);
    let weight = builder.constant(&[16, 16], 0.0);
    let weight = TensorProto {
        name: Some("w".to_owned()),
        ..builder
            .graph
            .initializer
            .iter()
            .find(|tensor| *tensor.name() == weight)
            .unwrap()
            .clone()
    };
    builder.graph.initializer.clear();
    let times = tensor("times", DataType::Int64, &[], 3_i64.to_le_bytes().to_vec());
    let goes_on = tensor("goes_on", DataType::Bool, &[], vec![1]);
    builder.graph.initializer.extend([times, goes_on]);
    let scalar = |name: &str, kind: DataType| {
        let kind = type_proto::Tensor {
            elem_type: Some(kind as i32),
            shape: Some(TensorShapeProto::default()),
        };
        ValueInfoProto {
            name: Some(name.to_owned()),
            r#type: Some(TypeProto {
                value: Some(type_proto::Value::TensorType(kind)),
                ..TypeProto::default()
            }),
            ..ValueInfoProto::default()
        }
    };
    let graph = GraphProto {
        name: Some("body".to_owned()),
        input: vec![
            scalar("time", DataType::Int64),
            scalar("going", DataType::Bool),
            declared("state", &[16]),
        ],
        initializer: vec![weight],
        node: vec![
            node("Identity", &["going"], "still_going", vec![]),
            node("MatMul", &["state", "w"], "product", vec![]),
            node("Tanh", &["product"], "next", vec![]),
        ],
        output: vec![scalar("still_going", DataType::Bool), declared("next", &[16])],
        ..GraphProto::default()
    };
    builder
        .graph
        .node
        .push(node("Loop", &["times", "goes_on", "x"], "y", vec![body("body", graph)]));
    builder.finish(&Value {
        name: "y".into(),
        shape: vec![16],
    })
}

/// Recurrences over a sequence, in one direction or both.
fn recurrent(seed: u64) -> ModelProto {
    const STEPS: usize = 6;
    let (mut builder, input) = Builder::new(seed, &[STEPS, 5]);
    let mut value = builder.push("Transpose", &[&input.name], vec![integers("perm", &[1, 0, 2])], &[STEPS, 5]);
    for _ in 0..1 + builder.below(2) {
        let (operator, gates) = [("LSTM", 4), ("GRU", 3), ("RNN", 1)][builder.below(3)];
        let (hidden, features) = (4 * (1 + builder.below(3)), value.shape[1]);
        let both = builder.below(2) == 1;
        let directions = if both { 2 } else { 1 };
        let weight = builder.constant(&[directions, gates * hidden, features], 0.0);
        let state = builder.constant(&[directions, gates * hidden, hidden], 0.0);
        let bias = builder.constant(&[directions, 2 * gates * hidden], 0.0);
        let mut inputs = vec![value.name.as_str(), &weight, &state];
        if builder.below(2) == 1 {
            inputs.push(&bias);
        }
        let mut attributes = vec![
            integer("hidden_size", hidden as i64),
            text("direction", if both { "bidirectional" } else { "forward" }),
        ];
        if operator == "GRU" && builder.below(2) == 1 {
            attributes.push(integer("linear_before_reset", 1));
        }
        // [steps, directions, batch, hidden]
        let made = builder.push(operator, &inputs, attributes, &[]);
        let turned = builder.push("Transpose", &[&made.name], vec![integers("perm", &[0, 2, 1, 3])], &[]);
        let flat = builder.numbers(&[0, 0, -1]);
        value = builder.push("Reshape", &[&turned.name, &flat], vec![], &[STEPS, directions * hidden]);
    }
    let features = value.shape[1];
    let turned = builder.push("Transpose", &[&value.name], vec![integers("perm", &[1, 0, 2])], &[STEPS, features]);
    let turned = builder.activation(&turned);
    let output = builder.product(&turned, 3, true);
    builder.finish(&output)
}

/// Transposed convolutions, in groups too.
fn upsampling(seed: u64) -> ModelProto {
    let (mut builder, input) = Builder::new(seed, &[4, 4, 4]);
    let mut value = builder.convolution(&input, 8, 1);
    for _ in 0..1 + builder.below(2) {
        let (channels, height, width) = (value.shape[0], value.shape[1], value.shape[2]);
        let halves = if channels.is_multiple_of(2) { 2 } else { 1 };
        let groups = [1, halves, channels][builder.below(3)];
        let filters = groups * (1 + builder.below(3));
        let weight = builder.constant(&[channels, filters / groups, 2, 2], 0.0);
        let bias = builder.constant(&[filters], 0.0);
        let mut inputs = vec![value.name.as_str(), &weight];
        if builder.below(2) == 1 {
            inputs.push(&bias);
        }
        let attributes = vec![integer("group", groups as i64), integers("strides", &[2, 2])];
        value = builder.push("ConvTranspose", &inputs, attributes, &[filters, 2 * height, 2 * width]);
        if builder.below(2) == 1 {
            value = builder.batch_norm(&value);
        }
        value = builder.activation(&value);
    }
    let output = builder.convolution(&value, 2, 1);
    builder.finish(&output)
}

/// Branches and loops whose bodies have weights of their own and read those of the graph around them.
fn nested(seed: u64) -> ModelProto {
    const STEPS: usize = 5;
    let (mut builder, input) = Builder::new(seed, &[STEPS, 6]);
    let features = 8;
    let mut value = builder.product(&input, features, true);
    for _ in 0..1 + builder.below(3) {
        value = match builder.below(3) {
            0 => builder.branch(&value),
            1 => builder.repeat(&value),
            _ => builder.scan(&value),
        };
        if builder.below(2) == 1 {
            value = builder.activation(&value);
        }
    }
    let output = builder.product(&value, 3, true);
    builder.finish(&output)
}

impl Builder {
    /// A weight, of the graph or of the body that it is put into.
    fn inner_weight(&mut self, shape: &[usize], graph: &mut GraphProto) -> String {
        let name = self.constant(shape, 0.0);
        if self.below(2) == 1 {
            graph.initializer.extend(self.graph.initializer.pop());
        }
        name
    }

    /// `If`: a product with one weight or another, by the sign of the sum of all values.
    fn branch(&mut self, input: &Value) -> Value {
        let features = input.shape[input.shape.len() - 1];
        let sum = self.push("ReduceSum", &[&input.name], vec![integer("keepdims", 0)], &[]);
        let zero = self.fresh("w");
        self.graph.initializer.push(float_tensor(&zero, &[], &[0.0]));
        let positive = self.push("Greater", &[&sum.name, &zero], vec![], &[]);
        let mut branch = |activation: &str| {
            let mut graph = GraphProto {
                name: Some(self.fresh("branch")),
                ..GraphProto::default()
            };
            let weight = self.inner_weight(&[features, features], &mut graph);
            let (product, output) = (self.fresh("v"), self.fresh("v"));
            graph.node = vec![
                node("MatMul", &[&input.name, &weight], &product, vec![]),
                node(activation, &[&product], &output, vec![]),
            ];
            graph.output = vec![declared(&output, &input.shape)];
            graph
        };
        let (one, other) = (branch("Tanh"), branch("Relu"));
        let attributes = vec![body("then_branch", one), body("else_branch", other)];
        self.push("If", &[&positive.name], attributes, &input.shape)
    }

    /// `Loop`: a product, three times over.
    fn repeat(&mut self, input: &Value) -> Value {
        let features = input.shape[input.shape.len() - 1];
        let mut graph = GraphProto {
            name: Some(self.fresh("loop")),
            ..GraphProto::default()
        };
        let weight = self.inner_weight(&[features, features], &mut graph);
        let [step, go, before, product, after, goes] = [(); 6].map(|()| self.fresh("v"));
        graph.node = vec![
            node("MatMul", &[&before, &weight], &product, vec![]),
            node("Tanh", &[&product], &after, vec![]),
            node("Identity", &[&go], &goes, vec![]),
        ];
        graph.input = vec![
            bare(&step, DataType::Int64, &[]),
            bare(&go, DataType::Bool, &[]),
            declared(&before, &input.shape),
        ];
        graph.output = vec![bare(&goes, DataType::Bool, &[]), declared(&after, &input.shape)];
        let (times, go) = (self.scalar(3), self.flag(true));
        self.push("Loop", &[&times, &go, &input.name], vec![body("body", graph)], &input.shape)
    }

    /// `Scan`: a recurrence over the steps, written out.
    fn scan(&mut self, input: &Value) -> Value {
        let (steps, features) = (input.shape[0], input.shape[1]);
        let axes = vec![integers("axes", &[1]), integer("keepdims", 0)];
        let first = self.push("ReduceMean", &[&input.name], axes, &[features]);
        let turned = self.push("Transpose", &[&input.name], vec![integers("perm", &[1, 0, 2])], &[]);
        let mut graph = GraphProto {
            name: Some(self.fresh("scan")),
            ..GraphProto::default()
        };
        let weight = self.inner_weight(&[features, features], &mut graph);
        let state_weight = self.inner_weight(&[features, features], &mut graph);
        let [state, row, one, other, sum, after, shown, last, all] = [(); 9].map(|()| self.fresh("v"));
        graph.node = vec![
            node("MatMul", &[&row, &weight], &one, vec![]),
            node("MatMul", &[&state, &state_weight], &other, vec![]),
            node("Add", &[&one, &other], &sum, vec![]),
            node("Tanh", &[&sum], &after, vec![]),
            node("Identity", &[&after], &shown, vec![]),
        ];
        graph.input = [&state, &row].map(|name| declared(name, &[features])).to_vec();
        graph.output = [&after, &shown].map(|name| declared(name, &[features])).to_vec();
        let mut scan = node(
            "Scan",
            &[&first.name, &turned.name],
            &last,
            vec![body("body", graph), integer("num_scan_inputs", 1)],
        );
        scan.output.push(all.clone());
        scan.name = Some(format!("{all}/Scan"));
        self.graph.node.push(scan);
        self.push("Transpose", &[&all], vec![integers("perm", &[1, 0, 2])], &[steps, features])
    }
}

/// Calls of a function of the model's own, with an attribute.
fn functional(seed: u64) -> ModelProto {
    const DOMAIN: &str = "generated.functions";
    let (mut builder, input) = Builder::new(seed, &[6]);
    let mut value = builder.product(&input, 8, true);
    for _ in 0..1 + builder.below(3) {
        let (features, width) = (value.shape[0], 4 + builder.below(8));
        let (weight, bias) = (builder.constant(&[features, width], 0.0), builder.constant(&[width], 0.1));
        let slope = [0.0, 0.1, 0.5][builder.below(3)];
        value = builder.push("Layer", &[&value.name, &weight, &bias], vec![float("slope", slope)], &[width]);
        builder.graph.node.last_mut().unwrap().domain = Some(DOMAIN.to_owned());
    }
    let output = builder.product(&value, 4, true);
    let mut model = builder.finish(&output);
    let slope = AttributeProto {
        name: Some("alpha".into()),
        r#type: Some(AttributeType::Float as i32),
        ref_attr_name: Some("slope".into()),
        ..AttributeProto::default()
    };
    model.functions = vec![FunctionProto {
        name: Some("Layer".into()),
        domain: Some(DOMAIN.into()),
        input: ["x", "w", "b"].map(str::to_owned).to_vec(),
        output: vec!["y".to_owned()],
        attribute: vec!["slope".to_owned()],
        node: vec![
            node("MatMul", &["x", "w"], "product", vec![]),
            node("Add", &["product", "b"], "sum", vec![]),
            node("LeakyRelu", &["sum"], "y", vec![slope]),
        ],
        opset_import: model.opset_import.clone(),
        ..FunctionProto::default()
    }];
    model.opset_import.push(OperatorSetIdProto {
        domain: Some(DOMAIN.to_owned()),
        version: Some(1),
    });
    model
}

/// Operators in the forms that they had in the versions 7 to 12, with initialisers that are inputs, too.
fn old(seed: u64) -> ModelProto {
    let (mut builder, input) = Builder::new(seed, &[6]);
    let version = 7 + builder.below(6) as i64;
    let mut value = builder.product(&input, 12, true);
    for _ in 0..2 + builder.below(3) {
        let features = value.shape[0];
        value = match builder.below(6) {
            0 => {
                let (weight, bias) = (builder.constant(&[10, features], 0.0), builder.constant(&[10], 0.0));
                builder.push("Gemm", &[&value.name, &weight, &bias], vec![integer("transB", 1)], &[10])
            }
            1 => {
                // From version 11 on the bounds are inputs.
                let bounds = [-0.5, 0.75];
                if version < 11 {
                    let attributes = vec![float("min", bounds[0]), float("max", bounds[1])];
                    builder.push("Clip", &[&value.name], attributes, &[features])
                } else {
                    let [low, high] = bounds.map(|bound| {
                        let name = builder.fresh("w");
                        builder.graph.initializer.push(float_tensor(&name, &[], &[bound]));
                        name
                    });
                    builder.push("Clip", &[&value.name, &low, &high], vec![], &[features])
                }
            }
            2 => {
                // Over all that comes behind the batch, which is what a softmax of axis 1 was.
                let wide = builder.push("Unsqueeze", &[&value.name], vec![integers("axes", &[2])], &[features, 1]);
                let shares = builder.push("Softmax", &[&wide.name], vec![integer("axis", 1)], &[features, 1]);
                builder.push("Squeeze", &[&shares.name], vec![integers("axes", &[2])], &[features])
            }
            3 => builder.push(
                "Dropout",
                &[&value.name],
                if version < 12 { vec![float("ratio", 0.3)] } else { vec![] },
                &[features],
            ),
            4 => {
                let sum = vec![integers("axes", &[1]), integer("keepdims", 1)];
                let sum = builder.push("ReduceSum", &[&value.name], sum, &[1]);
                builder.push("Sub", &[&value.name, &sum.name], vec![], &[features])
            }
            _ => builder.activation(&value),
        };
    }
    let output = builder.product(&value, 4, true);
    let mut model = builder.finish(&output);
    model.opset_import[0].version = Some(version);
    model.ir_version = Some(3);
    let graph = model.graph.as_mut().unwrap();
    let shape = |tensor: &TensorProto| tensor.dims.iter().map(|size| *size as usize).collect::<Vec<_>>();
    let given = graph.initializer.iter().map(|tensor| {
        let kind = DataType::try_from(tensor.data_type()).unwrap();
        bare(tensor.name(), kind, &shape(tensor))
    });
    graph.input.extend(given.collect::<Vec<_>>());
    model
}

/// Samples drawn from the signature of `model`.
pub(crate) fn samples(model: &ModelProto) -> Dataset {
    let (inputs, _) = plimsoll_runtime::onnx::signature(model).unwrap();
    Dataset::drawn(&inputs, 8, false).unwrap()
}

/// All samples drawn from the signature of `model` as one batch.
pub(crate) fn inputs(model: &ModelProto) -> Vec<Tensor> {
    let samples = samples(model);
    samples.batch(0..samples.samples()).unwrap()
}

/// Calibration data drawn from the signature of `model`.
pub(crate) fn calibration(model: &ModelProto) -> Calibration {
    Calibration::new(samples(model), 1)
}

/// The outputs of `model` on `inputs` by one engine, or its words.
pub(crate) fn try_run(kind: EngineKind, model: &ModelProto, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    convert::write(model, &path).unwrap();
    let engine = engine::load(kind, &path, &LoadOptions::default()).map_err(|error| error.to_string())?;
    engine.run(inputs).map_err(|error| error.to_string())
}

/// The outputs of `model` on `inputs`, by each engine that is here.
pub(crate) fn run(model: &ModelProto, inputs: &[Tensor]) -> Vec<(EngineKind, Vec<Tensor>)> {
    let run = |kind| (kind, try_run(kind, model, inputs).unwrap_or_else(|error| panic!("{kind}: {error}")));
    convert::engines().into_iter().map(run).collect()
}

/// Asserts that two models give the same outputs on drawn inputs, by every engine that runs the first of them, of which there is one at
/// least; values may differ by `tolerance`, relative to those above 1.
pub(crate) fn assert_same(before: &ModelProto, after: &ModelProto, tolerance: f64) {
    let inputs = inputs(before);
    let mut refusals = Vec::new();
    let engines = convert::engines();
    for &kind in &engines {
        let expected = match try_run(kind, before, &inputs) {
            Ok(expected) => expected,
            Err(refusal) => {
                refusals.push(format!("{kind}: {refusal}"));
                continue;
            }
        };
        let given = try_run(kind, after, &inputs).unwrap_or_else(|error| panic!("{kind} runs the model before and not after: {error}"));
        assert_eq!(expected.len(), given.len());
        for (expected, given) in expected.iter().zip(&given) {
            assert_eq!(expected.shape(), given.shape(), "{kind}");
            let (expected, given) = (expected.data().to_f64().unwrap(), given.data().to_f64().unwrap());
            for (expected, given) in expected.iter().zip(&given) {
                let same = expected == given || (expected - given).abs() <= tolerance * expected.abs().max(1.0);
                assert!(same, "{kind}: {given} is not {expected}");
            }
        }
    }
    assert!(refusals.len() < engines.len(), "no engine runs the model: {refusals:?}");
}
