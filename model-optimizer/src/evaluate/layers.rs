//! What became of each weight: its form, its bytes, its zeros and the distribution of its values, before and after compression.

use std::collections::HashMap;

use plimsoll_package::report::layer::{LayerChange, LayerState};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{ModelProto, OnnxError, TensorProto, mapping, weights};
use rayon::prelude::*;

use crate::failure::{Failure, FailureReason, failure};
use values::{Grid, Integers, Layout, Numbers};
use wiring::Wiring;

mod values;
mod wiring;

/// Most weights of a report.
const LAYERS_MAX: usize = 512;
/// Fewest bytes of a mapped file whose pages are given back.
const RELEASED_BYTES_MIN: usize = 1 << 16;

/// What became of the weights of `before` in `after`, the largest first, at most 512. A weight is a constant of two or more axes in floats
/// or in quantised integers; it is found again by its name, or by the name that a technique gives what stands in its place.
///
/// Distributions have 64 bins over the values before and after together; they cost three passes over all weights, the rest costs one.
///
/// # Errors
/// [`FailureReason::UnreadableModel`] where a weight does not hold the values that its shape asks for.
pub fn changes(before: &ModelProto, after: &ModelProto, distributions: bool) -> Result<Vec<LayerChange>, Failure> {
    let (Some(before), Some(after)) = (&before.graph, &after.graph) else {
        return Ok(vec![]);
    };
    let (before, after) = (Wiring::of(before), Wiring::of(after));
    let mut forms: HashMap<&str, Vec<&TensorProto>> = HashMap::new();
    for tensor in after.constants.values().filter(|tensor| tensor.dims.len() >= 2) {
        if let Some(origin) = before.origin(tensor.name()) {
            forms.entry(origin).or_default().push(tensor);
        }
    }
    let mut weights = before.weights();
    weights.truncate(LAYERS_MAX);
    let changes = weights.into_par_iter().map(|(weight, operator)| -> Result<LayerChange, OnnxError> {
        let mut forms = forms.get(weight.name()).cloned().unwrap_or_default();
        // What stands in its place first, and what is left of itself last.
        forms.sort_by_key(|form| (form.name() == weight.name(), form.name()));
        let was = Stored::of(weight, before.grid(weight))?;
        let is = forms
            .into_iter()
            .map(|form| Stored::of(form, after.grid(form)))
            .collect::<Result<Vec<_>, _>>()?;
        let change = compare(weight.name(), operator, &was, &is, distributions);
        for data in is.iter().chain([&was]).map(|stored| stored.tensor.raw_data()) {
            if data.len() >= RELEASED_BYTES_MIN {
                mapping::release(data);
            }
        }
        Ok(change)
    });
    changes.collect::<Result<_, _>>().map_err(|error| {
        let message = format!("a weight cannot be compared: {error}");
        failure(FailureReason::UnreadableModel, message)
    })
}

fn compare(name: &str, operator: &str, was: &Stored, is: &[Stored], distributions: bool) -> LayerChange {
    let both = || is.first().into_iter().chain([was]);
    let bounds = (distributions && both().all(|stored| stored.is_comparable)).then(|| {
        let bounds = both().map(|stored| stored.numbers.bounds());
        bounds.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), bounds| {
            (low.min(bounds.0), high.max(bounds.1))
        })
    });
    let bounds = bounds.filter(|(low, high)| low.is_finite() && high.is_finite());
    LayerChange {
        weight: name.to_owned(),
        operator: operator.to_owned(),
        before: was.state(was.bytes, bounds),
        after: is
            .first()
            .map(|shown| shown.state(is.iter().map(|stored| stored.bytes).sum(), bounds)),
    }
}

/// A weight as it lies in a model.
struct Stored<'a> {
    tensor: &'a TensorProto,
    element_type: &'static str,
    shape: Vec<usize>,
    bytes: u64,
    numbers: Numbers<'a>,
    /// Whether its values are those of the weight, and no integers whose scale nobody knows.
    is_comparable: bool,
}

impl<'a> Stored<'a> {
    fn of(tensor: &'a TensorProto, grid: Option<Grid<'a>>) -> Result<Self, OnnxError> {
        let kind = DataType::try_from(tensor.data_type()).unwrap_or_default();
        let shape = weights::shape(tensor)?;
        let is_integer = matches!(kind, DataType::Int8 | DataType::Uint8);
        let mut stored = Self {
            tensor,
            element_type: kind.as_str_name(),
            bytes: byte_length(tensor),
            is_comparable: !is_integer || grid.is_some(),
            numbers: Numbers::Floats(&[]),
            shape,
        };
        let data = tensor.raw_data();
        let whole = weights::byte_length(tensor)? == Some(data.len() as u64);
        stored.numbers = match grid {
            Some(grid) if is_integer && whole => {
                stored.bytes += byte_length(grid.scale) + grid.zero.map_or(0, byte_length);
                if let Layout::Blocks { bits, inputs, outputs, .. } = grid.layout {
                    stored.shape = vec![outputs, inputs];
                    stored.element_type = if bits == 4 {
                        DataType::Uint4.as_str_name()
                    } else {
                        stored.element_type
                    };
                }
                Numbers::Integers(Integers::of(data, kind == DataType::Int8, &stored.shape, &grid)?)
            }
            _ if kind == DataType::Float && whole => Numbers::Floats(data.as_chunks().0),
            _ => Numbers::Decoded(weights::floats(tensor)?),
        };
        Ok(stored)
    }

    fn state(&self, bytes: u64, bounds: Option<(f32, f32)>) -> LayerState {
        LayerState {
            element_type: self.element_type.to_owned(),
            shape: self.shape.iter().map(|size| *size as u64).collect(),
            bytes,
            sparsity: self.numbers.zeros() as f64 / self.numbers.len().max(1) as f64,
            distribution: bounds.map(|(low, high)| self.numbers.distribution(low, high)),
        }
    }
}

fn byte_length(tensor: &TensorProto) -> u64 {
    weights::byte_length(tensor).ok().flatten().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use plimsoll_package::recipe::{Quantize, QuantizeScheme, Technique};
    use plimsoll_runtime::onnx::{GraphProto, NodeProto, OperatorSetIdProto, ValueInfoProto};

    use super::values::BINS;
    use super::*;
    use crate::compress::quantize::blocks;
    use crate::compress::quantize::integers::{self, WEIGHT_MAX};
    use crate::compress::quantize::neighbours;
    use crate::compress::{self, Setting};
    use crate::graph::weight::Operator;
    use crate::graph::{float_tensor, integer, node, tensor};
    use crate::progress::Console;

    /// Numbers of a fixed sequence in `-0.5..0.5`, a quarter of them zero.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..count).map(|_| if next() < 0.25 { 0.0 } else { next() - 0.5 }).collect()
    }

    fn model(initializer: Vec<TensorProto>, node: Vec<NodeProto>) -> ModelProto {
        let value = |name: &str| ValueInfoProto {
            name: Some(name.into()),
            ..ValueInfoProto::default()
        };
        ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto {
                domain: None,
                version: Some(17),
            }],
            graph: Some(GraphProto {
                input: vec![value("x"), value("ids"), value("picture")],
                output: ["looked", "product", "gemm", "convolved"].map(value).to_vec(),
                initializer,
                node,
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        }
    }

    /// A table, a product, a transposed product and a convolution.
    fn layers() -> ModelProto {
        model(
            vec![
                float_tensor("table", &[64, 40], &numbers(2560, 1)),
                float_tensor("inner", &[400, 100], &numbers(40_000, 2)),
                float_tensor("rows", &[32, 1100], &numbers(35_200, 3)),
                float_tensor("kernel", &[16, 8, 3, 3], &numbers(1152, 4)),
                float_tensor("bias", &[32], &numbers(32, 5)),
                tensor("indices", DataType::Int64, &[2, 2], vec![0; 32]),
            ],
            vec![
                node("Gather", &["table", "ids"], "looked", vec![]),
                node("MatMul", &["x", "inner"], "product", vec![]),
                node("Gemm", &["x", "rows", "bias"], "gemm", vec![integer("transB", 1)]),
                node("Conv", &["picture", "kernel"], "convolved", vec![]),
            ],
        )
    }

    fn quantized(original: &ModelProto, scheme: QuantizeScheme) -> ModelProto {
        let setting = Setting {
            calibration: None,
            original,
            threads: 1,
            engine: None,
            console: &Console::silent(),
        };
        let entry = Technique {
            quantize: Some(Quantize::of(scheme)),
            ..Technique::default()
        };
        let mut model = original.clone();
        compress::technique(&entry).unwrap().apply(&mut model, &setting).unwrap();
        model
    }

    fn floats(model: &ModelProto, name: &str) -> (Vec<f32>, Vec<usize>) {
        let tensor = model
            .graph
            .as_ref()
            .unwrap()
            .initializer
            .iter()
            .find(|tensor| tensor.name() == name)
            .unwrap();
        (weights::floats(tensor).unwrap(), weights::shape(tensor).unwrap())
    }

    /// By the definition of a histogram.
    fn histogram(values: &[f32], low: f64, high: f64) -> Vec<u64> {
        let mut counts = vec![0; BINS];
        for value in values {
            let bin = (0..BINS)
                .rev()
                .find(|bin| f64::from(*value) >= low + (high - low) * *bin as f64 / BINS as f64);
            counts[bin.unwrap()] += 1;
        }
        counts
    }

    /// The values that 8-bit integers stand for, with a scale for each index of `axis`.
    fn in_bytes(values: &[f32], shape: &[usize], axis: usize, product: Option<Operator>) -> Vec<f32> {
        let quantized = match product {
            Some(operator) => neighbours::quantize(values, shape, Some(axis), operator),
            None => integers::quantize(values, shape, Some(axis), WEIGHT_MAX),
        };
        let quantized = quantized.unwrap();
        let inner: usize = shape[axis + 1..].iter().product();
        let values = quantized.values.iter().enumerate();
        values
            .map(|(index, value)| f32::from(*value) * quantized.scales[index / inner % shape[axis]])
            .collect()
    }

    fn check(change: &LayerChange, before: &[f32], after: &[f32]) {
        let name = &change.weight;
        let state = change.after.as_ref().unwrap();
        let (was, is) = (change.before.distribution.as_ref().unwrap(), state.distribution.as_ref().unwrap());
        let all = || before.iter().chain(after);
        let (low, high) = (all().copied().fold(f32::MAX, f32::min), all().copied().fold(f32::MIN, f32::max));
        assert_eq!(
            [was.low, was.high, is.low, is.high],
            [low, high, low, high].map(f64::from),
            "{name}"
        );
        assert_eq!(was.counts, histogram(before, was.low, was.high), "{name} before");
        assert_eq!(is.counts, histogram(after, is.low, is.high), "{name} after");
        let zeros = |values: &[f32]| values.iter().filter(|value| **value == 0.0).count() as f64 / values.len() as f64;
        assert_eq!([change.before.sparsity, state.sparsity], [zeros(before), zeros(after)], "{name}");
    }

    #[test]
    fn integers_are_shown_as_the_values_that_they_stand_for() {
        let original = layers();
        for scheme in [QuantizeScheme::Int8Dynamic, QuantizeScheme::Int8Weights] {
            let changes = changes(&original, &quantized(&original, scheme), true).unwrap();
            let names: Vec<&str> = changes.iter().map(|change| change.weight.as_str()).collect();
            assert_eq!(names, ["inner", "rows", "table", "kernel"], "the largest first, and no vector");
            let operators: Vec<&str> = changes.iter().map(|change| change.operator.as_str()).collect();
            assert_eq!(operators, ["MatMul", "Gemm", "Gather", "Conv"]);
            for (change, axis) in changes.iter().zip([1, 0, 0, 0]) {
                let (before, shape) = floats(&original, &change.weight);
                let product = match change.operator.as_str() {
                    "MatMul" => Some(Operator::MatMul),
                    "Gemm" => Some(Operator::Gemm { transposed: true }),
                    _ => None,
                };
                let product = product.filter(|_| scheme == QuantizeScheme::Int8Dynamic);
                check(change, &before, &in_bytes(&before, &shape, axis, product));
                let (was, is) = (&change.before, change.after.as_ref().unwrap());
                assert_eq!((was.element_type.as_str(), is.element_type.as_str()), ("FLOAT", "INT8"));
                assert_eq!(
                    (was.bytes, is.bytes),
                    (4 * before.len() as u64, (before.len() + 4 * shape[axis]) as u64)
                );
            }
        }
    }

    #[test]
    fn blocks_are_shown_without_what_pads_them_and_with_their_zero_points() {
        let original = layers();
        let compressed = quantized(&original, QuantizeScheme::Int4);
        let changes = changes(&original, &compressed, true).unwrap();
        let change = changes.iter().find(|change| change.weight == "rows").unwrap();
        let (before, _) = floats(&original, "rows");
        // Rows of 1100 are 35 blocks of 32, of which the last is padded.
        let dequantized = |asymmetric| {
            let quantized = blocks::round_to_nearest(&before, 1100, 4, 32, asymmetric);
            let value = |index: usize| {
                let (row, column) = (index / 1100, index % 1100);
                let (place, block) = (row * 1120 + column, row * 35 + column / 32);
                (f32::from(quantized.values[place]) - f32::from(quantized.zero_points[block])) * quantized.scales[block]
            };
            (0..before.len()).map(value).collect::<Vec<_>>()
        };
        let has_zeros = compressed
            .graph
            .as_ref()
            .unwrap()
            .initializer
            .iter()
            .any(|tensor| tensor.name() == "rows_zero");
        check(change, &before, &dequantized(has_zeros));
        let after = change.after.as_ref().unwrap();
        assert_eq!((after.element_type.as_str(), after.shape.as_slice()), ("UINT4", &[32, 1100][..]));
        assert_eq!(after.bytes, 32 * (35 * (16 + 4) + if has_zeros { 18 } else { 0 }));
        // Blocks are always of rows.
        let inner = changes.iter().find(|change| change.weight == "inner").unwrap();
        assert_eq!(inner.after.as_ref().unwrap().shape, [100, 400]);
    }

    #[test]
    fn halves_and_zeros_are_found_and_what_is_gone_is_absent() {
        let original = layers();
        let halved = changes(&original, &quantized(&original, QuantizeScheme::Float16), false).unwrap();
        let after = halved[2].after.as_ref().unwrap();
        assert_eq!((after.element_type.as_str(), after.bytes), ("FLOAT16", 5120));
        assert!(
            halved.iter().all(|change| change.before.distribution.is_none()),
            "they were not asked for"
        );
        let mut pruned = original.clone();
        let graph = pruned.graph.as_mut().unwrap();
        graph.initializer[0] = float_tensor("table", &[64, 40], &[vec![0.0; 2559], vec![-0.0]].concat());
        graph.initializer.remove(1);
        let changes = changes(&original, &pruned, true).unwrap();
        assert_eq!(changes[0].after, None);
        assert_eq!(changes[0].before.distribution.as_ref().unwrap().counts.iter().sum::<u64>(), 40_000);
        assert_eq!(changes[1].after.as_ref(), Some(&changes[1].before), "nothing became of it");
        assert_eq!(changes[2].after.as_ref().unwrap().sparsity, 1.0);
    }

    #[test]
    fn a_weight_whose_name_looks_like_anothers_quantised_form_is_its_own() {
        let both = || {
            model(
                vec![
                    float_tensor("w", &[4, 40], &numbers(160, 1)),
                    float_tensor("w_int8", &[8, 40], &numbers(320, 2)),
                ],
                vec![
                    node("MatMul", &["x", "w"], "product", vec![]),
                    node("MatMul", &["x", "w_int8"], "gemm", vec![]),
                ],
            )
        };
        let mut compressed = both();
        compressed.graph.as_mut().unwrap().initializer[0].name = Some("w_int8_2".into());
        let changes = changes(&both(), &compressed, false).unwrap();
        let shapes: Vec<_> = changes.iter().map(|change| &change.after.as_ref().unwrap().shape).collect();
        assert_eq!(shapes, [&[8, 40], &[4, 40]]);
    }

    #[test]
    fn values_that_are_all_the_same_fall_into_one_bin_and_infinite_ones_into_none() {
        let constant = |value: f32| {
            model(
                vec![float_tensor("w", &[2, 3], &[value; 6])],
                vec![node("MatMul", &["x", "w"], "product", vec![])],
            )
        };
        let changes = |value| changes(&constant(value), &constant(value), true).unwrap();
        let distribution = changes(2.0)[0].before.distribution.clone().unwrap();
        assert_eq!((distribution.low, distribution.high, distribution.counts[32]), (1.5, 2.5, 6));
        assert_eq!(changes(f32::INFINITY)[0].before.distribution, None);
        assert_eq!(changes(f32::NAN)[0].before.distribution, None);
    }
}
