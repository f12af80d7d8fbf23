//! What became of each weight: its form, its bytes, its zeros and the distribution of its values, before and after compression.

use std::collections::HashMap;
use std::ops::Range;

use plimsoll_package::report::layer::{Distribution, LayerChange, LayerState};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, OnnxError, TensorProto, mapping, weights};
use rayon::prelude::*;

use crate::failure::{Failure, FailureReason, failure};
use crate::graph::{attribute, subgraphs};

/// Most weights of a report.
const LAYERS_MAX: usize = 512;
/// Bins of a distribution.
const BINS: usize = 64;
/// Values that a thread decodes at a time.
const PIECE: usize = 1 << 15;
/// Fewest bytes of a mapped file whose pages are given back.
const RELEASED_BYTES_MIN: usize = 1 << 16;
/// What techniques append to a weight's name for the tensor that stands in its place.
const FORMS: [&str; 3] = ["_int8", "_blocks", "_half"];
/// Operators whose operand is a weight even where it is a vector.
const PRODUCTS: [&str; 5] = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"];

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
        let was = before.stored(weight)?;
        let is = forms.into_iter().map(|form| after.stored(form)).collect::<Result<Vec<_>, _>>()?;
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

/// The constants of a graph with its branches and loop bodies, and who makes and reads each value.
#[derive(Default)]
struct Wiring<'a> {
    constants: HashMap<&'a str, &'a TensorProto>,
    makers: HashMap<&'a str, &'a NodeProto>,
    readers: HashMap<&'a str, Vec<&'a NodeProto>>,
}

impl<'a> Wiring<'a> {
    fn of(graph: &'a GraphProto) -> Self {
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
    fn weights(&self) -> Vec<(&'a TensorProto, &'a str)> {
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
    fn origin(&self, name: &str) -> Option<&'a str> {
        let mut stem = name;
        loop {
            if let Some((name, _)) = self.constants.get_key_value(stem) {
                return Some(*name);
            }
            let numbered = || {
                stem.trim_end_matches(|character: char| character.is_ascii_digit())
                    .strip_suffix('_')
            };
            stem = FORMS.iter().find_map(|form| stem.strip_suffix(form)).or_else(numbered)?;
        }
    }

    fn stored(&self, tensor: &'a TensorProto) -> Result<Stored<'a>, OnnxError> {
        Stored::of(tensor, self.grid(tensor))
    }

    /// How the nodes that read a tensor of integers make numbers of it; `None` where they do not, or their scales are no constants.
    fn grid(&self, tensor: &TensorProto) -> Option<Grid<'a>> {
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

/// How integers become numbers: their distance from `zero`, times `scale`.
struct Grid<'a> {
    scale: &'a TensorProto,
    zero: Option<&'a TensorProto>,
    layout: Layout,
}

/// Which values share a scale.
#[derive(Clone, Copy)]
enum Layout {
    /// Those of each index of an axis, or all.
    Channels { axis: usize },
    /// Consecutive ones of each row, packed (ONNX Runtime, `MatMulNBits`).
    Blocks {
        bits: u32,
        block_size: usize,
        inputs: usize,
        outputs: usize,
    },
}

impl Grid<'_> {
    /// Whether there is a scale for every value of `tensor`.
    fn fits(&self, tensor: &TensorProto) -> bool {
        let count = |tensor: &TensorProto| weights::shape(tensor).map(|shape| shape.iter().product::<usize>()).ok();
        let zeros = self.zero.map_or(Some(1), count);
        match self.layout {
            Layout::Channels { axis } => {
                let (scales, size) = (count(self.scale), tensor.dims.get(axis).map(|size| *size as usize));
                (scales == Some(1) || scales == size) && (zeros == Some(1) || zeros == scales)
            }
            Layout::Blocks {
                bits,
                block_size,
                inputs,
                outputs,
            } => {
                let blocks = inputs.div_ceil(block_size.max(1));
                let packed = |values: usize| values.checked_mul(bits as usize).map(|bits| bits.div_ceil(8));
                let zero_bytes = packed(blocks).and_then(|row| row.checked_mul(outputs));
                let bytes = blocks
                    .checked_mul(block_size)
                    .and_then(packed)
                    .and_then(|row| row.checked_mul(outputs));
                matches!(bits, 4 | 8)
                    && inputs > 0
                    && outputs > 0
                    && count(self.scale) == outputs.checked_mul(blocks)
                    && count(tensor) == bytes
                    && self.zero.is_none_or(|zero| Some(zero.raw_data().len()) == zero_bytes)
            }
        }
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

/// The values of a weight, decoded piece by piece so that a large one is never in memory as a whole.
enum Numbers<'a> {
    /// Floats as they lie in the file.
    Floats(&'a [[u8; 4]]),
    /// Values of another type, or that are no raw bytes.
    Decoded(Vec<f32>),
    Integers(Integers<'a>),
}

/// Quantised values: rows of `inputs` integers, each row padded to `padded`.
struct Integers<'a> {
    data: &'a [u8],
    bits: u32,
    signed: bool,
    count: usize,
    inputs: usize,
    padded: usize,
    /// Consecutive integers that share a scale; the scales begin anew after the last one.
    run: usize,
    scales: Vec<f32>,
    /// As many as scales.
    zeros: Vec<f32>,
}

impl<'a> Integers<'a> {
    fn of(data: &'a [u8], signed: bool, shape: &[usize], grid: &Grid) -> Result<Self, OnnxError> {
        let scales = weights::floats(grid.scale)?;
        let count: usize = shape.iter().product();
        Ok(match grid.layout {
            Layout::Channels { axis } => {
                let mut zeros = grid.zero.map_or_else(|| Ok(vec![0.0]), weights::floats)?;
                zeros.resize(scales.len(), zeros[0]);
                Self {
                    data,
                    bits: 8,
                    signed,
                    count,
                    inputs: count,
                    padded: count,
                    run: if scales.len() == 1 {
                        count
                    } else {
                        shape[axis + 1..].iter().product()
                    },
                    scales,
                    zeros,
                }
            }
            Layout::Blocks {
                bits,
                block_size,
                inputs,
                outputs,
            } => {
                let blocks = inputs.div_ceil(block_size);
                let middle = (1_u32 << (bits - 1)) as f32;
                let zeros = match grid.zero {
                    Some(zero) => {
                        let row = (blocks * bits as usize).div_ceil(8);
                        let of_row = |row: &[u8]| (0..blocks).map(|block| unpacked(row, bits, block)).collect::<Vec<_>>();
                        zero.raw_data().chunks(row).flat_map(of_row).map(f32::from).collect()
                    }
                    None => vec![middle; outputs * blocks],
                };
                Self {
                    data,
                    bits,
                    signed: false,
                    count,
                    inputs,
                    padded: blocks * block_size,
                    run: block_size,
                    scales,
                    zeros,
                }
            }
        })
    }

    fn integer(&self, place: usize) -> f32 {
        match unpacked(self.data, self.bits, place) {
            byte if self.signed => f32::from(byte.cast_signed()),
            byte => f32::from(byte),
        }
    }

    /// Appends the values of `range`.
    fn decode(&self, range: Range<usize>, values: &mut Vec<f32>) {
        if self.run == 1 {
            let grids = self.scales.iter().zip(&self.zeros).cycle().skip(range.start % self.scales.len());
            values.extend(range.zip(grids).map(|(place, (scale, zero))| (self.integer(place) - zero) * scale));
            return;
        }
        let mut index = range.start;
        while index < range.end {
            let (row, column) = (index / self.inputs, index % self.inputs);
            let place = row * self.padded + column;
            let channel = place / self.run % self.scales.len();
            let (scale, zero) = (self.scales[channel], self.zeros[channel]);
            let count = (range.end - index).min(self.inputs - column).min(self.run - place % self.run);
            values.extend((place..place + count).map(|place| (self.integer(place) - zero) * scale));
            index += count;
        }
    }
}

/// The integer of that index among such of `bits` bits, 4 or 8, the first in a byte's low half.
fn unpacked(data: &[u8], bits: u32, index: usize) -> u8 {
    match bits {
        4 => data[index / 2] >> (4 * (index % 2)) & 0xf,
        _ => data[index],
    }
}

impl Numbers<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Floats(words) => words.len(),
            Self::Decoded(values) => values.len(),
            Self::Integers(integers) => integers.count,
        }
    }

    /// What `look` makes of each piece, in order.
    fn scan<T: Send>(&self, look: impl Fn(&[f32]) -> T + Sync) -> Vec<T> {
        let decode = |values: &mut Vec<f32>, piece: usize| {
            let range = piece * PIECE..((piece + 1) * PIECE).min(self.len());
            values.clear();
            match self {
                Self::Floats(words) => values.extend(words[range].iter().map(|word| f32::from_le_bytes(*word))),
                Self::Decoded(decoded) => values.extend_from_slice(&decoded[range]),
                Self::Integers(integers) => integers.decode(range, values),
            }
            look(values)
        };
        let pieces = (0..self.len().div_ceil(PIECE)).into_par_iter();
        pieces.map_init(|| Vec::with_capacity(PIECE), decode).collect()
    }

    fn zeros(&self) -> usize {
        match self {
            // Both zeros but for their sign.
            Self::Floats(words) => {
                let of_piece =
                    |piece: &[[u8; 4]]| piece.iter().map(|word| u32::from(u32::from_le_bytes(*word) << 1 == 0)).sum::<u32>() as usize;
                words.par_chunks(PIECE).map(of_piece).sum()
            }
            Self::Integers(integers) if integers.bits == 8 && integers.zeros.iter().all(|zero| *zero == 0.0) => {
                let of_piece = |piece: &[u8]| piece.iter().map(|byte| u32::from(*byte == 0)).sum::<u32>() as usize;
                integers.data.par_chunks(PIECE).map(of_piece).sum()
            }
            _ => self
                .scan(|values| values.iter().filter(|value| **value == 0.0).count())
                .into_iter()
                .sum(),
        }
    }

    /// The least and the largest value.
    fn bounds(&self) -> (f32, f32) {
        let merge = |(low, high): (f32, f32), (other_low, other_high): (f32, f32)| (low.min(other_low), high.max(other_high));
        let none = (f32::INFINITY, f32::NEG_INFINITY);
        let of_piece = |values: &[f32]| values.iter().fold(none, |bounds, value| merge(bounds, (*value, *value)));
        self.scan(of_piece).into_iter().fold(none, merge)
    }

    /// Values that are no numbers are in no bin.
    fn distribution(&self, low: f32, high: f32) -> Distribution {
        // Values that are all the same lie in the middle of a bin, not on an edge.
        let (low, high) = if low < high { (low, high) } else { (low - 0.5, high + 0.5) };
        let per_value = BINS as f64 / (f64::from(high) - f64::from(low));
        let of_piece = |values: &[f32]| {
            let mut counts = [0_u64; BINS];
            for value in values.iter().filter(|value| !value.is_nan()) {
                counts[(((f64::from(*value) - f64::from(low)) * per_value) as usize).min(BINS - 1)] += 1;
            }
            counts
        };
        let mut counts = vec![0; BINS];
        for piece in self.scan(of_piece) {
            counts.iter_mut().zip(piece).for_each(|(count, more)| *count += more);
        }
        Distribution {
            low: low.into(),
            high: high.into(),
            counts,
        }
    }
}

#[cfg(test)]
mod tests {
    use plimsoll_package::recipe::{Quantize, QuantizeScheme, Technique};

    use super::*;
    use crate::compress::quantize::blocks;
    use crate::compress::quantize::integers::{self, PRODUCT_WEIGHT_MAX, WEIGHT_MAX};
    use crate::compress::{self, Setting};
    use crate::graph::{float_tensor, integer, node, tensor};
    use crate::progress::Console;
    use plimsoll_runtime::onnx::{OperatorSetIdProto, ValueInfoProto};

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
    fn in_bytes(values: &[f32], shape: &[usize], axis: usize, largest: f32) -> Vec<f32> {
        let quantized = integers::quantize(values, shape, Some(axis), largest).unwrap();
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
                let in_products = scheme == QuantizeScheme::Int8Dynamic && matches!(change.operator.as_str(), "MatMul" | "Gemm");
                let largest = if in_products { PRODUCT_WEIGHT_MAX } else { WEIGHT_MAX };
                check(change, &before, &in_bytes(&before, &shape, axis, largest));
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
