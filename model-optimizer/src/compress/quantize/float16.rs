//! Half precision: weights and computation in 16-bit floats, inputs and outputs of the graph as they were.
//!
//! Each value has its own name in single precision and another in half precision; whoever needs the one that is not there gets a
//! `Cast`. So any node may stay in single precision without regard to its neighbours.

use std::collections::{HashMap, HashSet};

use half::f16;
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, ModelProto, NodeProto, TensorProto, mapping, weights};
use rayon::prelude::*;

use super::{Exclusion, nothing_to_quantize, raise, skipped, unreadable};
use crate::calibration::Observed;
use crate::compress::{Change, Setting, Technique};
use crate::failure::Failure;
use crate::graph::elements::element_types;
use crate::graph::{Names, integer, is_standard, node, reads, simplify, subgraphs, tensor};

/// Operators that take half precision in every version from 13 on (ONNX operator reference), and lose little by it.
const HALF: &str = "Abs Add AveragePool Ceil Clip Concat Conv ConvTranspose Cos DepthToSpace Div Einsum Elu Erf Exp Expand Flatten Floor \
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish LayerNormalization \
    LeakyRelu MatMul Max MaxPool Mean Min Mish Mul Neg PRelu Pad Reciprocal Relu Reshape Round Selu Sigmoid Sin Slice \
    Softplus Softmax SpaceToDepth Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze";
/// Operators that pass a value on as it is, or change it by little: what is too large for half precision stays so.
const PASSES_ON: &str =
    "Add Concat Expand Flatten Gather Identity Max Min Mul Neg Reshape Slice Squeeze Sub Tile Transpose Unsqueeze Where";
/// Operators whose parameters are for their own arithmetic.
const INTEGER: [&str; 2] = ["Quantize", "Dequantize"];
/// A constant of fewer values is not worth a `Cast`.
const CONSTANT_MIN: usize = 256;
/// The largest number in half precision.
const LARGEST: f32 = 65504.0;

/// Half precision.
#[derive(Debug, Clone)]
pub struct Float16 {
    /// Names of nodes that stay as they are.
    pub exclude: Vec<String>,
}

impl Technique for Float16 {
    fn apply(&self, model: &mut ModelProto, setting: &Setting) -> Result<Change, Failure> {
        raise(model)?;
        let Some(graph) = &model.graph else { return Ok(Change::default()) };
        let exclusion = Exclusion::of(&self.exclude, graph)?;
        let mut change = Change::default();
        let types = element_types(graph);
        let mut beyond = constants_beyond(graph, &mut change)?;
        if let Some(calibration) = setting.calibration {
            let computed = graph.node.iter().filter(|node| is_standard(node)).flat_map(|node| &node.output);
            let observed: Vec<Observed> = computed
                .filter(|name| types.get(*name) == Some(&DataType::Float))
                .map(|name| Observed {
                    name: name.clone(),
                    channel_axis: None,
                })
                .collect();
            let statistics = calibration.statistics(model, &observed)?;
            let exceeds = |range: (f32, f32)| range.0 < -LARGEST || range.1 > LARGEST;
            let large = observed.into_iter().zip(&statistics);
            beyond.extend(
                large
                    .filter(|(_, statistics)| exceeds(statistics.histogram.min_max()))
                    .map(|(observed, _)| observed.name),
            );
        }
        let Some(graph) = &mut model.graph else {
            return Ok(Change::default());
        };
        let halved: Vec<bool> = graph
            .node
            .iter()
            .map(|node| is_halved(node, &types, &exclusion, &mut beyond, &mut change))
            .collect();
        let mut halving = Halving::of(graph, &types);
        halving.choose(graph, &beyond, &exclusion);
        halving.apply(graph, &halved, &mut change)?;
        if change.changed.is_empty() {
            return Err(nothing_to_quantize());
        }
        Ok(change)
    }
}

/// Constants that half precision does not hold.
fn constants_beyond(graph: &GraphProto, change: &mut Change) -> Result<HashSet<String>, Failure> {
    let mut beyond = HashSet::new();
    for constant in graph
        .initializer
        .iter()
        .filter(|tensor| tensor.data_type() == DataType::Float as i32)
    {
        let values = weights::floats(constant).map_err(|error| unreadable(constant.name(), &error.to_string()))?;
        mapping::release(constant.raw_data());
        // Not `abs() > LARGEST`, which a NaN would pass.
        if !values.par_iter().all(|value| value.abs() <= LARGEST) {
            change.skipped.push(skipped(
                constant.name(),
                "it holds a value beyond 65504, the largest in half precision, or NaN",
            ));
            beyond.insert(constant.name().to_owned());
        }
    }
    Ok(beyond)
}

/// Whether a node is computed in half precision. `beyond` are the values that half precision does not hold.
fn is_halved(
    node: &NodeProto,
    types: &HashMap<String, DataType>,
    exclusion: &Exclusion,
    beyond: &mut HashSet<String>,
    change: &mut Change,
) -> bool {
    let is_float = |name: &&String| types.get(*name) == Some(&DataType::Float);
    let large = node.input.iter().chain(&node.output).any(|name| beyond.contains(name));
    if large && is_among(PASSES_ON, node) {
        beyond.extend(node.output.iter().cloned());
    }
    // What makes a value of unknown type may make it in single precision.
    let values = node.input.iter().chain(&node.output);
    let known = values.filter(|name| !name.is_empty()).all(|name| types.contains_key(name));
    let floats = node.input.iter().any(|name| is_float(&name)) && node.output.iter().any(|name| is_float(&name));
    if !floats {
        return false;
    }
    if exclusion.contains(node) {
        change.skipped.push(skipped(node.name(), "it is excluded"));
        return false;
    }
    if large {
        if !node.name().is_empty() {
            change.skipped.push(skipped(
                node.name(),
                "it reads or gives values beyond 65504, the largest in half precision",
            ));
        }
        return false;
    }
    is_among(HALF, node) && known && subgraphs(node).next().is_none()
}

fn is_among(operators: &str, node: &NodeProto) -> bool {
    is_standard(node) && operators.split_whitespace().any(|operator| operator == node.op_type())
}

struct Halving {
    names: Names,
    floats: HashSet<String>,
    constants: HashMap<String, usize>,
    /// Constants that are stored in half precision whoever reads them.
    stored: HashSet<String>,
    /// The names in half precision of values that have one.
    half: HashMap<String, String>,
    /// Values that have their name in single precision.
    single: HashSet<String>,
    /// Halves to be written when all is known.
    wanted: Vec<String>,
}

impl Halving {
    fn of(graph: &GraphProto, types: &HashMap<String, DataType>) -> Self {
        let is_float = |(name, kind): (&String, &DataType)| (*kind == DataType::Float).then(|| name.clone());
        let constants = graph.initializer.iter().enumerate();
        Self {
            names: Names::of(graph),
            floats: types.iter().filter_map(is_float).collect(),
            constants: constants.map(|(index, tensor)| (tensor.name().to_owned(), index)).collect(),
            stored: HashSet::new(),
            half: HashMap::new(),
            single: graph.input.iter().map(|input| input.name().to_owned()).collect(),
            wanted: Vec::new(),
        }
    }

    /// Chooses the constants that nodes in single precision read, too, from their halves: large ones within the range.
    fn choose(&mut self, graph: &GraphProto, beyond: &HashSet<String>, exclusion: &Exclusion) {
        let keeps = |node: &&NodeProto| {
            exclusion.contains(node) || !is_standard(node) || INTEGER.iter().any(|operator| node.op_type().contains(operator))
        };
        let kept: HashSet<&String> = graph.node.iter().filter(keeps).flat_map(|node| &node.input).collect();
        let is_output = |name: &str| graph.output.iter().any(|output| output.name() == name);
        let large = graph.initializer.iter().filter(|tensor| {
            let count: i64 = tensor.dims.iter().product();
            tensor.data_type() == DataType::Float as i32 && count >= CONSTANT_MIN as i64 && !is_output(tensor.name())
        });
        let names = large.map(|tensor| tensor.name().to_owned());
        self.stored = names.filter(|name| !beyond.contains(name) && !kept.contains(name)).collect();
    }

    fn apply(mut self, graph: &mut GraphProto, halved: &[bool], change: &mut Change) -> Result<(), Failure> {
        let nodes = std::mem::take(&mut graph.node);
        let mut rewritten = Vec::with_capacity(nodes.len());
        for (mut node, halved) in nodes.into_iter().zip(halved) {
            if *halved {
                for input in &mut node.input {
                    if self.floats.contains(input) {
                        *input = self.in_half(input, &mut rewritten);
                    }
                }
                for output in &mut node.output {
                    if self.floats.contains(output) {
                        let name = self.names.fresh(&format!("{output}_half"));
                        self.half.insert(std::mem::replace(output, name.clone()), name);
                    }
                }
            } else {
                let mut read: Vec<String> = node.input.clone();
                subgraphs(&node).for_each(|subgraph| read.extend(reads(subgraph).into_keys().map(str::to_owned)));
                for name in read {
                    self.in_single(&name, &mut rewritten);
                }
                self.single.extend(node.output.iter().cloned());
            }
            rewritten.push(node);
        }
        let outputs: Vec<String> = graph.output.iter().map(|output| output.name().to_owned()).collect();
        for output in outputs {
            self.in_single(&output, &mut rewritten);
        }
        graph.node = rewritten;
        for name in &self.wanted {
            let original = &graph.initializer[self.constants[name]];
            let halves = halves(original, &self.half[name])?;
            graph.initializer.push(halves);
            change.changed.push(name.clone());
        }
        // Nodes make these now.
        graph.initializer.retain(|tensor| !self.stored.contains(tensor.name()));
        // Descriptions are of values in single precision; engines find the types of the others.
        simplify::remove_dead(graph);
        Ok(())
    }

    /// The name of `value` in half precision.
    fn in_half(&mut self, value: &str, nodes: &mut Vec<NodeProto>) -> String {
        if let Some(name) = self.half.get(value) {
            return name.clone();
        }
        let name = self.names.fresh(&format!("{value}_half"));
        if self.constants.contains_key(value) {
            self.wanted.push(value.to_owned());
        } else {
            nodes.push(node("Cast", &[value], &name, vec![integer("to", DataType::Float16 as i64)]));
        }
        self.half.insert(value.to_owned(), name.clone());
        name
    }

    /// Sees that `value` is there in single precision.
    fn in_single(&mut self, value: &str, nodes: &mut Vec<NodeProto>) {
        let made = self.half.contains_key(value) && !self.constants.contains_key(value);
        if (made || self.stored.contains(value)) && self.single.insert(value.to_owned()) {
            let half = self.in_half(value, nodes);
            nodes.push(node("Cast", &[&half], value, vec![integer("to", DataType::Float as i64)]));
        }
    }
}

/// A tensor in half precision, each value rounded to the nearest.
fn halves(original: &TensorProto, name: &str) -> Result<TensorProto, Failure> {
    let unreadable = |why: String| unreadable(original.name(), &why);
    let values = weights::floats(original).map_err(|error| unreadable(error.to_string()))?;
    mapping::release(original.raw_data());
    let shape = weights::shape(original).map_err(|error| unreadable(error.to_string()))?;
    let mut bytes = vec![0; 2 * values.len()];
    bytes
        .par_chunks_mut(1 << 15)
        .zip(values.par_chunks(1 << 14))
        .for_each(|(bytes, values)| {
            for (bytes, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *bytes = f16::from_f32(*value).to_le_bytes();
            }
        });
    Ok(tensor(name, DataType::Float16, &shape, bytes))
}

#[cfg(test)]
mod tests {
    use plimsoll_package::manifest::Engine as EngineKind;
    use plimsoll_package::recipe::{Quantize, QuantizeScheme};
    use plimsoll_runtime::engine::Tensor;
    use prost::Message as _;

    use super::super::fixture::{apply, model, named, numbers, operators, run, sqnr, value};
    use super::*;
    use crate::graph::{float_tensor, is_standard};

    /// Attention of a sequence to itself, with a mask whose constant half precision does not hold, and an upsampling at the end, whose
    /// scales must be in single precision.
    fn attention() -> ModelProto {
        let square = |name: &str, seed| float_tensor(name, &[16, 16], &numbers(256, seed).iter().map(|v| v / 4.0).collect::<Vec<_>>());
        let transposed = plimsoll_runtime::onnx::AttributeProto {
            name: Some("perm".into()),
            r#type: Some(plimsoll_runtime::onnx::attribute_proto::AttributeType::Ints as i32),
            ints: vec![0, 2, 1],
            ..Default::default()
        };
        model(
            vec![value("x", DataType::Float, &[4, 16]), value("keep", DataType::Float, &[1, 4])],
            vec![
                named("query", node("MatMul", &["x", "wq"], "q", vec![])),
                named("key", node("MatMul", &["x", "wk"], "k", vec![])),
                node("Transpose", &["k"], "kt", vec![transposed]),
                node("MatMul", &["q", "kt"], "scores", vec![]),
                node("Sub", &["one", "keep"], "drop", vec![]),
                named("mask", node("Mul", &["drop", "lowest"], "masked", vec![])),
                named("sum", node("Add", &["scores", "masked"], "summed", vec![])),
                node("Softmax", &["summed"], "weights", vec![integer("axis", -1)]),
                node("MatMul", &["weights", "x"], "mixed", vec![]),
                named("resize", node("Resize", &["mixed", "", "scales"], "y", vec![])),
            ],
            vec![
                square("wq", 1),
                square("wk", 2),
                float_tensor("one", &[], &[1.0]),
                float_tensor("lowest", &[], &[f32::MIN]),
                float_tensor("scales", &[3], &[1.0, 2.0, 1.0]),
            ],
            vec![value("y", DataType::Float, &[8, 16])],
        )
    }

    fn samples() -> Vec<Tensor> {
        let keep = [1.0_f32, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0];
        vec![
            Tensor::new(vec![2, 4, 16], numbers(128, 6)).unwrap(),
            Tensor::new(vec![2, 1, 4], keep.to_vec()).unwrap(),
        ]
    }

    #[test]
    fn the_result_loads_and_agrees_on_both_engines() {
        let original = attention();
        let before = run(EngineKind::OnnxRuntime, &original, true, &samples());
        for calibration in [None, Some(samples())] {
            let (model, change) = apply(&original, &Quantize::of(QuantizeScheme::Float16), calibration).unwrap();
            assert_eq!(change.changed, ["wq", "wk", "one"]);
            let skipped: Vec<&str> = change.skipped.iter().map(|skipped| skipped.name.as_str()).collect();
            assert_eq!(skipped, ["lowest", "mask", "sum"]);
            for kind in [EngineKind::Tract, EngineKind::OnnxRuntime] {
                let sqnr = sqnr(&before, &run(kind, &model, true, &samples()));
                assert!(sqnr > 50.0, "{kind}: {sqnr:.1} dB");
            }
        }
    }

    #[test]
    fn weights_of_what_stays_wide_are_stored_in_half_and_those_of_excluded_nodes_are_not() {
        let product = |name: &str, weight: &str, output: &str| named(name, node("MatMul", &["x", weight], output, vec![]));
        let normalized = node("BatchNormalization", &["x", "s", "b", "m", "v"], "n", vec![]);
        let vector = |name: &str, seed| float_tensor(name, &[256], &numbers(256, seed).iter().map(|v| v.abs() + 0.1).collect::<Vec<_>>());
        let original = model(
            vec![value("x", DataType::Float, &[256])],
            vec![normalized, product("wide", "w", "p"), node("Add", &["n", "p"], "y", vec![])],
            vec![
                vector("s", 1),
                vector("b", 2),
                vector("m", 3),
                vector("v", 4),
                float_tensor("w", &[256, 256], &numbers(256 * 256, 5)),
            ],
            vec![value("y", DataType::Float, &[256])],
        );
        let samples = vec![Tensor::new(vec![2, 256], numbers(512, 6)).unwrap()];
        let before = run(EngineKind::OnnxRuntime, &original, true, &samples);
        let quantize = Quantize {
            exclude: vec!["wide".into()],
            ..Quantize::of(QuantizeScheme::Float16)
        };
        let (model, change) = apply(&original, &quantize, None).unwrap();
        assert_eq!(change.changed, ["s", "b", "m", "v"]);
        assert!(model.graph.as_ref().unwrap().node.iter().all(is_standard));
        assert!(sqnr(&before, &run(EngineKind::OnnxRuntime, &model, true, &samples)) > 50.0);
        let (model, _) = apply(&original, &Quantize::of(QuantizeScheme::Float16), None).unwrap();
        assert!(model.encoded_len() * 19 < original.encoded_len() * 10, "{}", model.encoded_len());
        assert!(operators(&model).contains(&"Cast"));
    }
}
