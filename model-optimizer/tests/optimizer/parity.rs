//! Beside onnxruntime.quantization: the same scales, integers and layouts where they are defined, and where we differ, by what rule.
//!
//! `tests/parity/onnxruntime_quantization.py` records what it makes.

use plimsoll_optimizer::calibration::Calibration;
use plimsoll_optimizer::calibration::histogram::{Histogram, least_entropy};
use plimsoll_optimizer::compress::{self, Setting};
use plimsoll_optimizer::evaluate::dataset::Dataset;
use plimsoll_optimizer::graph::{attribute, float_tensor, integers, node};
use plimsoll_optimizer::progress::Console;
use plimsoll_runtime::engine::Tensor;
use plimsoll_runtime::onnx::{self, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, weights};
use serde::Deserialize;
use serde_json::{Value, json};

use super::generator::declared;

fn recorded<T: serde::de::DeserializeOwned>(what: &str) -> Vec<T> {
    let recorded: Value = serde_json::from_str(include_str!("../parity/onnxruntime_quantization.json")).unwrap();
    let cases: Vec<T> = serde_json::from_value(recorded[what].clone()).unwrap();
    assert!(!cases.is_empty());
    cases
}

fn model(nodes: Vec<NodeProto>, input: &[usize], output: usize, constants: Vec<TensorProto>) -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto {
            domain: Some(String::new()),
            version: Some(17),
        }],
        graph: Some(GraphProto {
            name: Some("parity".into()),
            node: nodes,
            initializer: constants,
            input: vec![declared("x", input)],
            output: vec![declared("y", &[output])],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

fn product(weight: &[f32], shape: [usize; 2]) -> ModelProto {
    let constants = vec![float_tensor("w", &shape, weight)];
    model(vec![node("MatMul", &["x", "w"], "y", vec![])], &shape[..1], shape[1], constants)
}

/// The graph that quantising `model` by the fields of `quantize` gives.
fn quantized(mut model: ModelProto, quantize: Value, calibration: Option<&Calibration>) -> GraphProto {
    let original = model.clone();
    let setting = Setting {
        calibration,
        original: &original,
        threads: 1,
        engine: None,
        console: &Console::silent(),
    };
    let entry = serde_json::from_value(json!({"quantize": quantize})).unwrap();
    compress::technique(&entry).unwrap().apply(&mut model, &setting).unwrap();
    model.graph.unwrap()
}

fn stored<'a>(graph: &'a GraphProto, name: &str) -> &'a TensorProto {
    let known = graph.initializer.iter().map(TensorProto::name).collect::<Vec<_>>();
    let found = graph.initializer.iter().find(|tensor| tensor.name() == name);
    found.unwrap_or_else(|| panic!("there is no {name} among {known:?}"))
}

fn values(graph: &GraphProto, name: &str) -> Vec<f32> {
    weights::floats(stored(graph, name)).unwrap()
}

/// To within a few steps of single precision.
fn assert_close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert!(
            (ours - theirs).abs() <= 4.0 * f32::EPSILON * theirs.abs(),
            "{what}: {ours}, not {theirs}"
        );
    }
}

#[derive(Deserialize)]
struct Dynamic {
    shape: [usize; 2],
    weight: Vec<f32>,
    alternating: bool,
    scales: Vec<f32>,
    zero_points: Vec<i8>,
    integers: Vec<i8>,
}

#[test]
fn weights_of_dynamic_quantisation_are_those_of_quantize_dynamic() {
    for case in recorded::<Dynamic>("dynamic") {
        assert!(case.zero_points.iter().all(|zero| *zero == 0), "symmetric, as ours");
        for scheme in ["Int8Weights", "Int8Dynamic"] {
            // A weight of few rows is stored only where the scheme is all that is asked for; the product of integers needs more rows.
            let graph = quantized(product(&case.weight, case.shape), json!({"scheme": scheme}), None);
            let (scales, whole) = (values(&graph, "w_scale"), values(&graph, "w_int8"));
            if scheme == "Int8Weights" || case.alternating {
                assert_close(&scales, &case.scales, scheme);
                let same = whole
                    .iter()
                    .zip(&case.integers)
                    .filter(|(ours, theirs)| **ours == f32::from(**theirs))
                    .count();
                assert_eq!(same, case.integers.len(), "{scheme}");
                continue;
            }
            // Neighbours never add up to more than 128, so that the result does not depend on the processor: a scale may be larger.
            let columns = case.shape[1];
            for (column, (ours, theirs)) in scales.iter().zip(&case.scales).enumerate() {
                let column: Vec<f32> = case.weight.iter().skip(column).step_by(columns).copied().collect();
                let pairs = column.chunks_exact(2).map(|pair| (pair[0] + pair[1]).abs());
                let most = pairs.chain(column.iter().map(|value| value.abs())).fold(0.0, f32::max);
                assert_close(&[*ours], &[most / 127.0], scheme);
                assert!(*ours >= theirs * (1.0 - f32::EPSILON));
            }
            assert!(scales.iter().zip(&case.scales).any(|(ours, theirs)| *ours > theirs * 1.01));
        }
    }
}

#[derive(Deserialize)]
struct Activation {
    scale: f32,
    zero_point: u8,
}

#[derive(Deserialize)]
struct Static {
    kernel: Vec<f32>,
    bias: Vec<f32>,
    weight: Vec<f32>,
    samples: Vec<f32>,
    activations: std::collections::BTreeMap<String, Activation>,
    kernel_scales: Vec<f32>,
    weight_scales: Vec<f32>,
    weight_integers: Vec<i8>,
}

#[test]
fn ranges_of_static_quantisation_are_those_of_quantize_static() {
    for case in recorded::<Static>("static") {
        let nodes = vec![
            node("Conv", &["x", "k", "b"], "c", vec![integers("pads", &[1; 4])]),
            node("Relu", &["c"], "r", vec![]),
            node("Flatten", &["r"], "f", vec![]),
            node("MatMul", &["f", "w"], "y", vec![]),
        ];
        let constants = vec![
            float_tensor("k", &[4, 2, 3, 3], &case.kernel),
            float_tensor("b", &[4], &case.bias),
            float_tensor("w", &[64, 3], &case.weight),
        ];
        let model = model(nodes, &[2, 4, 4], 3, constants);
        let (specs, _) = onnx::signature(&model).unwrap();
        let samples = Tensor::new(vec![case.samples.len() / 32, 2, 4, 4], case.samples.clone()).unwrap();
        let calibration = Calibration::new(Dataset::of_tensors(vec![samples], &specs, None).unwrap(), 1);
        let graph = quantized(model, json!({"scheme": "Int8Static", "range": "MinMax"}), Some(&calibration));
        assert_eq!(case.activations.len(), 2);
        for (name, Activation { scale, zero_point }) in &case.activations {
            assert_close(&values(&graph, &format!("{name}_scale")), &[*scale], name);
            assert_eq!(values(&graph, &format!("{name}_zero")), [f32::from(*zero_point)], "{name}");
        }
        // Its neighbours are of unlike signs.
        assert_close(&values(&graph, "w_scale"), &case.weight_scales, "the product's weight");
        let whole: Vec<f32> = case.weight_integers.iter().map(|value| f32::from(*value)).collect();
        assert_eq!(values(&graph, "w_int8"), whole);
        for (ours, theirs) in values(&graph, "k_scale").iter().zip(&case.kernel_scales) {
            assert!((theirs * (1.0 - f32::EPSILON)..2.0 * theirs).contains(ours), "{ours} for {theirs}");
        }
    }
}

#[derive(Deserialize)]
struct Blocks {
    shape: [usize; 2],
    weight: Vec<f32>,
    symmetric: bool,
    dims: Vec<i64>,
    bytes: Vec<u8>,
    scales: Vec<f32>,
    zero_points: Vec<u8>,
    attributes: std::collections::BTreeMap<String, i64>,
}

#[test]
fn blocks_lie_as_the_matmulnbits_quantizer_lays_them() {
    for case in recorded::<Blocks>("blocks") {
        let graph = quantized(product(&case.weight, case.shape), json!({"scheme": "Int4", "blockSize": 32}), None);
        let made = graph.node.iter().find(|node| node.op_type() == "MatMulNBits").unwrap();
        for (name, value) in &case.attributes {
            assert_eq!(attribute(made, name).map(onnx::AttributeProto::i), Some(*value), "{name}");
        }
        let input = |index: usize| stored(&graph, &made.input[index]);
        assert_eq!(input(1).dims, case.dims);
        assert_close(&weights::floats(input(2)).unwrap(), &case.scales, "scales");
        if case.symmetric {
            assert!(made.input.len() == 3, "the middle stands for zero: {:?}", made.input);
        } else {
            // A row's last byte may hold one block alone; what pads it means nothing.
            let blocks = case.dims[1] as usize;
            let zeros = |bytes: &[u8]| -> Vec<u8> {
                let rows = bytes.chunks_exact(blocks.div_ceil(2));
                rows.flat_map(|row| (0..blocks).map(|block| row[block / 2] >> (4 * (block % 2)) & 0xf))
                    .collect()
            };
            assert_eq!(zeros(input(3).raw_data()), zeros(&case.zero_points));
        }
        // Both round to the nearest; of a value half-way between two integers either may be taken.
        let bytes = input(1).raw_data();
        assert_eq!(bytes.len(), case.bytes.len());
        let nibbles = |byte: &u8| [byte & 0xf, byte >> 4];
        let pairs = bytes.iter().flat_map(nibbles).zip(case.bytes.iter().flat_map(nibbles));
        let (inputs, outputs) = (case.shape[0], case.shape[1]);
        let per_row = 2 * case.bytes.len() / outputs;
        let mut unlike = 0;
        for (place, (ours, theirs)) in pairs.enumerate() {
            let (row, column) = (place % per_row, place / per_row);
            if ours == theirs || row >= inputs {
                continue;
            }
            let step = case.scales[place / 32];
            let zero = if case.symmetric { 8.0 } else { 0.0 };
            let halves = (case.weight[row * outputs + column] / step + zero) * 2.0;
            assert!(
                ours.abs_diff(theirs) == 1 && (halves - halves.round()).abs() < 1e-3,
                "{place}: {ours}, not {theirs}"
            );
            unlike += 1;
        }
        assert!(unlike <= 2, "{unlike} integers differ");
    }
}

#[derive(Deserialize)]
struct Ranges {
    name: String,
    bins: Vec<u64>,
    entropy: [f32; 2],
    percentile: [f32; 2],
}

#[test]
fn ranges_of_histograms_are_those_of_its_calibrators() {
    /// The width of a recorded bin.
    const BIN: f32 = 16.0 / 2048.0;
    for case in recorded::<Ranges>("ranges") {
        let mut histogram = Histogram::default();
        for (bin, count) in case.bins.iter().enumerate() {
            let middle = -8.0 + (bin as f32 + 0.5) * BIN;
            histogram.add(&vec![middle; *count as usize]);
        }
        let (low, high) = histogram.percentile(1e-4);
        let near = |ours: f32, theirs: f32, bins: f32| (ours - theirs).abs() <= bins * BIN;
        let [least, most] = case.percentile;
        assert!(
            near(low, least, 1.5) && near(high, most, 1.5),
            "{}: {low}..{high}, not {least}..{most}",
            case.name
        );
        // It takes one bin more above zero than below, and makes up for empty bins by smoothing. So its levels lie askew to the bins, and of
        // values that are cut off at zero the many zeros share a level with others: what is the best range to it is not by Migacz's measure.
        if case.name == "cut at zero" {
            continue;
        }
        let half = least_entropy(&case.bins, 255) as f32 * BIN;
        let theirs = case.entropy[1].max(-case.entropy[0]);
        assert!(near(half, theirs, 64.0), "{}: {half}, not {theirs}", case.name);
    }
}
