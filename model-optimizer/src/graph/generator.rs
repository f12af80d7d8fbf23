//! Random valid models for tests: small convolutional, dense, attention and recurrent networks, with branches, loops, functions and old
//! operators, and with what real ones are made of.

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, OperatorSetIdProto, TensorProto, attribute_proto::AttributeType,
};

// By the crate's name, since the whole-program tests include this file.
use plimsoll_optimizer::graph::{float_tensor, integer, integers, node, tensor};

// By their paths, for the same reason.
#[path = "generator/agreement.rs"]
pub(crate) mod agreement;
#[path = "generator/builder.rs"]
mod builder;

pub(crate) use agreement::assert_same;
pub(crate) use builder::{Builder, Value, declared, float};
use builder::{bare, body, text};

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
    let graph = GraphProto {
        name: Some("body".to_owned()),
        input: vec![
            bare("time", DataType::Int64, &[]),
            bare("going", DataType::Bool, &[]),
            declared("state", &[16]),
        ],
        initializer: vec![weight],
        node: vec![
            node("Identity", &["going"], "still_going", vec![]),
            node("MatMul", &["state", "w"], "product", vec![]),
            node("Tanh", &["product"], "next", vec![]),
        ],
        output: vec![bare("still_going", DataType::Bool, &[]), declared("next", &[16])],
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
