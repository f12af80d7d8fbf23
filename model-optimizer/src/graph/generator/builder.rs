//! A model, node by node.

use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, ValueInfoProto,
    attribute_proto::AttributeType, tensor_shape_proto,
};

use plimsoll_optimizer::graph::{fixed_shape, float_tensor, integer, integers, node, tensor, value_info};

/// Builds a model node by node.
pub(crate) struct Builder {
    pub(super) graph: GraphProto,
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
    value_info(name, DataType::Float, Some(batched(shape)))
}

fn batched(shape: &[usize]) -> TensorShapeProto {
    use tensor_shape_proto::dimension::Value as Size;
    let dimension = |value| tensor_shape_proto::Dimension {
        value: Some(value),
        ..Default::default()
    };
    let batch = dimension(Size::DimParam("batch".into()));
    let dim = std::iter::once(batch).chain(shape.iter().map(|size| dimension(Size::DimValue(*size as i64))));
    TensorShapeProto { dim: dim.collect() }
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

    pub(super) fn fresh(&mut self, stem: &str) -> String {
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
        self.graph.input = vec![value_info("x", DataType::Int64, Some(batched(&[length])))];
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

    pub(super) fn activation(&mut self, input: &Value) -> Value {
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
pub(super) fn bare(name: &str, kind: DataType, shape: &[usize]) -> ValueInfoProto {
    value_info(name, kind, Some(fixed_shape(shape)))
}

pub(super) fn body(name: &str, graph: GraphProto) -> AttributeProto {
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

pub(super) fn text(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::String as i32),
        s: Some(value.as_bytes().to_vec()),
        ..AttributeProto::default()
    }
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
    pub(crate) fn branch(&mut self, input: &Value) -> Value {
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
    pub(super) fn repeat(&mut self, input: &Value) -> Value {
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
    pub(crate) fn scan(&mut self, input: &Value) -> Value {
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
