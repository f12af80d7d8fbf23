//! Weights of matrix products in blocks of 4- or 8-bit integers, for ONNX Runtime's `MatMulNBits`.

use std::collections::HashMap;

use plimsoll_package::recipe::{Granularity, Rounding};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, mapping, weights};
use rayon::prelude::*;

use super::gptq::{self, Hessian};
use super::int8::{Int8, Products};
use super::{Exclusion, nothing_to_quantize, raise, skipped, unreadable};
use crate::compress::{Change, Setting, Technique};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::weight::{self, Operator};
use crate::graph::{Names, attribute, float_tensor, integer, node, reads, simplify, tensor};

/// The domain of `MatMulNBits`.
const DOMAIN: &str = "com.microsoft";
/// By how much zero points must lower the squared error to be worth their bytes.
const ZERO_POINT_GAIN: f64 = 0.9;
/// `MatMulNBits`'s `accuracy_level`: activations are quantised to 8 bits, block by block, and products taken in integers.
const ACCURACY_LEVEL: i64 = 4;
/// Most bytes of Hessians that are gathered in one pass over the calibration data.
const HESSIAN_BYTES_MAX: usize = 512 << 20;

/// Block-wise quantisation of matrix products.
#[derive(Debug, Clone)]
pub struct Blocks {
    /// Bits of a weight: 4 or 8.
    pub bits: u32,
    /// Consecutive weights, along the inner dimension of the product, that share a scale.
    pub block_size: usize,
    /// How weights are rounded.
    pub rounding: Rounding,
    /// Names of nodes that stay as they are.
    pub exclude: Vec<String>,
}

/// A product whose weight is quantised.
struct Product {
    node: usize,
    initializer: usize,
    /// Whether the weight's rows are the outputs.
    rows: bool,
}

impl Technique for Blocks {
    fn apply(&self, model: &mut ModelProto, setting: &Setting) -> Result<Change, Failure> {
        let calibration = match self.rounding {
            Rounding::Nearest => None,
            Rounding::Gptq => Some(setting.calibration("quantize with rounding Gptq")?),
        };
        raise(model)?;
        let Some(graph) = &model.graph else { return Ok(Change::default()) };
        let exclusion = Exclusion::of(&self.exclude, graph)?;
        let mut change = Change::default();
        let products = products(graph, &exclusion, &mut change);
        let mut quantized: Vec<(usize, Stored)> = Vec::with_capacity(products.len());
        match calibration {
            None => {
                for product in &products {
                    quantized.push((product.node, self.quantize(graph, product, None)?));
                }
            }
            Some(calibration) => {
                for part in parts(graph, &products) {
                    let inputs = part.iter().map(|product| graph.node[product.node].input[0].clone());
                    let hessians = gptq::hessians(model, calibration, inputs.collect())?;
                    for product in part {
                        let hessian = hessians.get(&graph.node[product.node].input[0]);
                        quantized.push((product.node, self.quantize(graph, product, hessian)?));
                    }
                }
            }
        }
        let Some(graph) = &mut model.graph else {
            return Ok(Change::default());
        };
        self.rewrite(graph, quantized, &mut change);
        let tables = Int8 {
            products: Products::WeightOnly,
            fold: false,
            granularity: Granularity::PerChannel,
            in_floats: vec![],
            exclude: vec![],
        };
        let tables = tables.rewrite(graph, &exclusion, |operator| operator == Operator::Gather)?;
        let in_blocks = !change.changed.is_empty();
        change.changed.extend(tables.changed);
        change.skipped.extend(tables.skipped);
        if change.changed.is_empty() {
            return Err(nothing_to_quantize());
        }
        let imported = model.opset_import.iter().any(|import| import.domain() == DOMAIN);
        if in_blocks && !imported {
            model.opset_import.push(OperatorSetIdProto {
                domain: Some(DOMAIN.to_owned()),
                version: Some(1),
            });
        }
        Ok(change)
    }
}

fn products(graph: &GraphProto, exclusion: &Exclusion, change: &mut Change) -> Vec<Product> {
    let read_counts = reads(graph);
    let mut products = Vec::new();
    for found in weight::find(graph) {
        if found.uses.iter().all(|used| used.operator == Operator::Gather) {
            continue;
        }
        let tensor = &graph.initializer[found.initializer];
        let refused = match found.uses.as_slice() {
            _ if read_counts.get(found.name.as_str()) != Some(&found.uses.len()) => "something else reads this weight, too",
            [used] if exclusion.contains(&graph.node[used.node]) => "its node is excluded",
            [used] if tensor.dims.len() == 2 && !tensor.dims.contains(&0) => match used.operator {
                Operator::MatMul | Operator::Gemm { .. } if is_plain(&graph.node[used.node]) => {
                    products.push(Product {
                        node: used.node,
                        initializer: found.initializer,
                        rows: used.operator == (Operator::Gemm { transposed: true }),
                    });
                    continue;
                }
                Operator::MatMul | Operator::Gemm { .. } => "its product is scaled, or of a transposed activation",
                Operator::MatMulLeft => "its product is from the left",
                _ => "blocks are of matrix products alone, and this is of a convolution or a recurrence",
            },
            [_] => "blocks are of matrices, and this has more axes or is empty",
            _ => "several nodes use it",
        };
        change.skipped.push(skipped(&found.name, refused));
    }
    products
}

fn is_plain(node: &NodeProto) -> bool {
    let is_one = |name: &str| attribute(node, name).map_or(1.0, AttributeProto::f) == 1.0;
    let transposed = attribute(node, "transA").is_some_and(|attribute| attribute.i() != 0);
    let bias = node.input.get(2).is_some_and(|name| !name.is_empty());
    node.op_type() == "MatMul" || !transposed && is_one("alpha") && (!bias || is_one("beta"))
}

/// The products in parts whose Hessians fit into memory together.
fn parts<'a>(graph: &GraphProto, products: &'a [Product]) -> Vec<Vec<&'a Product>> {
    let mut parts: Vec<Vec<&Product>> = Vec::new();
    let mut sizes: HashMap<&str, usize> = HashMap::new();
    for product in products {
        let input = graph.node[product.node].input[0].as_str();
        let features = graph.initializer[product.initializer].dims[usize::from(product.rows)] as usize;
        let known = sizes.contains_key(input);
        let bytes = 4 * features * features;
        if parts.is_empty() || !known && sizes.values().sum::<usize>() + bytes > HESSIAN_BYTES_MAX {
            sizes.clear();
            parts.push(Vec::new());
        }
        sizes.insert(input, bytes);
        if let Some(part) = parts.last_mut() {
            part.push(product);
        }
    }
    parts
}

/// A matrix in blocks, as `MatMulNBits` takes it; its tensors have no names yet. Large ones lie on the disk, so that memory holds one matrix.
struct Stored {
    name: String,
    inputs: usize,
    outputs: usize,
    values: TensorProto,
    scales: TensorProto,
    /// Where any is not the middle of the range.
    zero_points: Option<TensorProto>,
}

/// A matrix quantised in blocks along its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// The integers of each row, of whole blocks; what pads the last one is zero.
    pub values: Vec<u8>,
    /// The scale of each block, row after row.
    pub scales: Vec<f32>,
    /// The integer of each block that stands for zero.
    pub zero_points: Vec<u8>,
}

/// The scale and zero point of a block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// The distance of neighbouring values.
    pub scale: f32,
    /// The integer that stands for zero.
    pub zero_point: f32,
    /// The largest integer.
    pub largest: f32,
}

impl Grid {
    /// Of a block of finite `values` in `bits` bits. Without zero points, the value of largest magnitude is the lowest integer, which has
    /// no counterpart above; with them the integers span the values and zero.
    #[must_use]
    pub fn of(values: &[f32], bits: u32, asymmetric: bool) -> Self {
        let largest = ((1_u32 << bits) - 1) as f32;
        let middle = (1_u32 << (bits - 1)) as f32;
        let (low, high) = values
            .iter()
            .fold((0.0_f32, 0.0_f32), |(low, high), value| (low.min(*value), high.max(*value)));
        let scale = if asymmetric {
            (high - low) / largest
        } else if high > -low {
            high / -middle
        } else {
            -low / middle
        };
        if scale.abs() < f32::MIN_POSITIVE {
            return Self {
                scale: 1.0,
                zero_point: middle,
                largest,
            };
        }
        let zero_point = if asymmetric {
            (-low / scale).round_ties_even().clamp(0.0, largest)
        } else {
            middle
        };
        Self {
            scale,
            zero_point,
            largest,
        }
    }

    /// The integer nearest to `value`.
    #[must_use]
    pub fn round(&self, value: f32) -> f32 {
        (value / self.scale + self.zero_point).round_ties_even().clamp(0.0, self.largest)
    }

    /// What an integer stands for.
    #[must_use]
    pub fn value(&self, integer: f32) -> f32 {
        (integer - self.zero_point) * self.scale
    }
}

/// Rounds each weight to the nearest value of its block. `rows` holds rows of `inputs` weights.
#[must_use]
pub fn round_to_nearest(rows: &[f32], inputs: usize, bits: u32, block_size: usize, asymmetric: bool) -> Quantized {
    let blocks = inputs.div_ceil(block_size);
    let count = rows.len() / inputs;
    let mut quantized = Quantized {
        values: vec![0; count * blocks * block_size],
        scales: vec![0.0; count * blocks],
        zero_points: vec![0; count * blocks],
    };
    quantized
        .rows(blocks, block_size)
        .zip(rows.par_chunks(inputs))
        .for_each(|(mut row, weights)| {
            for (index, weights) in weights.chunks(block_size).enumerate() {
                let grid = Grid::of(weights, bits, asymmetric);
                for (integer, weight) in row.values[index * block_size..].iter_mut().zip(weights) {
                    *integer = grid.round(*weight) as u8;
                }
                row.set(index, grid);
            }
        });
    quantized
}

/// One row of a quantised matrix.
pub struct Row<'a> {
    /// Its integers.
    pub values: &'a mut [u8],
    scales: &'a mut [f32],
    zero_points: &'a mut [u8],
}

impl Row<'_> {
    /// Notes the scale and zero point of a block.
    pub fn set(&mut self, block: usize, grid: Grid) {
        self.scales[block] = grid.scale;
        self.zero_points[block] = grid.zero_point as u8;
    }
}

impl Quantized {
    /// The rows, of that many `blocks`.
    pub fn rows(&mut self, blocks: usize, block_size: usize) -> impl IndexedParallelIterator<Item = Row<'_>> {
        let values = self.values.par_chunks_mut(blocks * block_size);
        let grids = self.scales.par_chunks_mut(blocks).zip(self.zero_points.par_chunks_mut(blocks));
        values.zip(grids).map(|(values, (scales, zero_points))| Row {
            values,
            scales,
            zero_points,
        })
    }

    /// The sum of squared errors to the `rows` that it was made of.
    #[must_use]
    pub fn squared_error(&self, rows: &[f32], inputs: usize, block_size: usize) -> f64 {
        let blocks = inputs.div_ceil(block_size);
        let of_row = |(index, row): (usize, &[f32])| {
            let integers = &self.values[index * blocks * block_size..];
            let mut error = 0.0_f32;
            for (block, weights) in row.chunks(block_size).enumerate() {
                let (scale, zero) = (
                    self.scales[index * blocks + block],
                    f32::from(self.zero_points[index * blocks + block]),
                );
                for (integer, weight) in integers[block * block_size..].iter().zip(weights) {
                    error += ((f32::from(*integer) - zero) * scale - weight).powi(2);
                }
            }
            f64::from(error)
        };
        rows.par_chunks(inputs).enumerate().map(of_row).sum()
    }
}

impl Blocks {
    fn quantize(&self, graph: &GraphProto, product: &Product, hessian: Option<&Hessian>) -> Result<Stored, Failure> {
        let original = &graph.initializer[product.initializer];
        let values = weights::floats(original).map_err(|error| unreadable(original.name(), &error.to_string()))?;
        mapping::release(original.raw_data());
        if values.iter().any(|value| !value.is_finite()) {
            return Err(unreadable(original.name(), "it holds NaN or infinity"));
        }
        let (first, second) = (original.dims[0] as usize, original.dims[1] as usize);
        let (inputs, rows) = if product.rows {
            (second, values)
        } else {
            let rows = transposed(&values, first, second);
            drop(values);
            (first, rows)
        };
        let nearest = |asymmetric| {
            let quantized = round_to_nearest(&rows, inputs, self.bits, self.block_size, asymmetric);
            (quantized.squared_error(&rows, inputs, self.block_size), quantized)
        };
        let (symmetric, asymmetric) = (nearest(false), nearest(true));
        let helps = asymmetric.0 < symmetric.0 * ZERO_POINT_GAIN;
        let quantized = match hessian.filter(|hessian| hessian.features() == inputs) {
            Some(hessian) => gptq::quantize(&rows, hessian, self.bits, self.block_size, helps).map_err(|why| {
                failure(
                    FailureReason::InvalidDataset,
                    format!("cannot quantise the weight `{}`: {why}", original.name()),
                )
            })?,
            None if helps => asymmetric.1,
            None => symmetric.1,
        };
        let Quantized {
            values,
            scales,
            zero_points,
        } = quantized;
        let (blocks, outputs) = (inputs.div_ceil(self.block_size), rows.len() / inputs);
        drop(rows);
        let middle = 1_u8 << (self.bits - 1);
        let zero_points = zero_points.iter().any(|zero| *zero != middle).then_some(zero_points);
        let bytes = self.block_size * self.bits as usize / 8;
        Ok(Stored {
            name: original.name().to_owned(),
            inputs,
            outputs,
            values: tensor(
                "",
                DataType::Uint8,
                &[outputs, blocks, bytes],
                packed(values, blocks * self.block_size, self.bits),
            ),
            scales: float_tensor("", &[outputs * blocks], &scales),
            zero_points: zero_points.map(|zero_points| {
                let packed = packed(zero_points, blocks, self.bits);
                tensor("", DataType::Uint8, &[packed.len()], packed)
            }),
        })
    }

    fn rewrite(&self, graph: &mut GraphProto, quantized: Vec<(usize, Stored)>, change: &mut Change) {
        let mut names = Names::of(graph);
        let mut replaced: HashMap<usize, Vec<NodeProto>> = HashMap::new();
        for (index, stored) in quantized {
            change.changed.push(stored.name.clone());
            let (tensors, nodes) = self.product(&graph.node[index], stored, &mut names);
            graph.initializer.extend(tensors);
            replaced.insert(index, nodes);
        }
        for (index, node) in std::mem::take(&mut graph.node).into_iter().enumerate() {
            match replaced.remove(&index) {
                Some(nodes) => graph.node.extend(nodes),
                None => graph.node.push(node),
            }
        }
        simplify::remove_dead(graph);
    }

    /// `MatMulNBits` in the place of a product (ONNX Runtime, `docs/ContribOperators.md`).
    fn product(&self, original: &NodeProto, stored: Stored, names: &mut Names) -> (Vec<TensorProto>, Vec<NodeProto>) {
        let Stored { name, inputs, outputs, .. } = stored;
        let mut tensors = vec![(stored.values, "blocks"), (stored.scales, "scale")];
        tensors.extend(stored.zero_points.map(|zero_points| (zero_points, "zero")));
        let mut operands = vec![original.input[0].clone()];
        let named = |(tensor, suffix): (TensorProto, &str)| {
            operands.push(names.fresh(&format!("{name}_{suffix}")));
            TensorProto {
                name: operands.last().cloned(),
                ..tensor
            }
        };
        let tensors: Vec<TensorProto> = tensors.into_iter().map(named).collect();
        let operands: Vec<&str> = operands.iter().map(String::as_str).collect();
        let output = original.output[0].as_str();
        let bias = original.input.get(2).filter(|name| !name.is_empty());
        let result = if bias.is_some() {
            names.fresh(&format!("{output}_product"))
        } else {
            output.to_owned()
        };
        let attributes = vec![
            integer("K", inputs as i64),
            integer("N", outputs as i64),
            integer("bits", i64::from(self.bits)),
            integer("block_size", self.block_size as i64),
            integer("accuracy_level", ACCURACY_LEVEL),
        ];
        let mut nodes = vec![NodeProto {
            domain: Some(DOMAIN.to_owned()),
            name: original.name.clone(),
            ..node("MatMulNBits", &operands, &result, attributes)
        }];
        nodes.extend(bias.map(|bias| node("Add", &[&result, bias], output, vec![])));
        (tensors, nodes)
    }
}

/// Integers of `bits` bits in bytes, the first in the low half; each `row` of them begins a byte.
fn packed(values: Vec<u8>, row: usize, bits: u32) -> Vec<u8> {
    if bits == 8 {
        return values;
    }
    let pair = |pair: &[u8]| pair[0] | pair.get(1).copied().unwrap_or(0) << 4;
    values.chunks(row).flat_map(|row| row.chunks(2).map(pair)).collect()
}

/// A matrix of `rows` times `columns` with its axes exchanged.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut result = vec![0.0; values.len()];
    result.par_chunks_mut(16 * rows).enumerate().for_each(|(strip, result)| {
        let first = strip * 16;
        for row in 0..rows {
            let source = &values[row * columns + first..row * columns + (first + 16).min(columns)];
            for (column, value) in source.iter().enumerate() {
                result[column * rows + row] = *value;
            }
        }
    });
    result
}

#[cfg(test)]
mod tests {
    use plimsoll_package::manifest::Engine as EngineKind;
    use plimsoll_package::recipe::{BlockSize, Quantize, QuantizeScheme};
    use plimsoll_runtime::engine::Tensor;

    use super::super::fixture::{apply, model, named, numbers, run, sqnr, value};
    use super::*;

    /// Two products, the second transposed and with a bias; 72 features are no whole number of blocks.
    fn products() -> ModelProto {
        let gemm = node("Gemm", &["h", "b", "c"], "y", vec![integer("transB", 1)]);
        model(
            vec![value("x", DataType::Float, &[72])],
            vec![named("first", node("MatMul", &["x", "a"], "h", vec![])), named("second", gemm)],
            vec![
                float_tensor("a", &[72, 48], &numbers(72 * 48, 1)),
                float_tensor("b", &[33, 48], &numbers(33 * 48, 2)),
                float_tensor("c", &[33], &numbers(33, 3)),
            ],
            vec![value("y", DataType::Float, &[33])],
        )
    }

    fn samples() -> Vec<Tensor> {
        vec![Tensor::new(vec![100, 72], numbers(7200, 4)).unwrap()]
    }

    #[test]
    fn both_widths_all_block_sizes_and_both_roundings_run_and_agree() {
        let original = products();
        let before = run(EngineKind::OnnxRuntime, &original, true, &samples());
        for (scheme, floor) in [(QuantizeScheme::Int4, 14.0), (QuantizeScheme::Int8Blocks, 35.0)] {
            for size in [16, 32, 64, 128, 256] {
                for rounding in [Rounding::Nearest, Rounding::Gptq] {
                    let quantize = Quantize {
                        block_size: Some(BlockSize(size)),
                        rounding: Some(rounding),
                        ..Quantize::of(scheme)
                    };
                    let (model, change) = apply(&original, &quantize, Some(samples())).unwrap();
                    assert_eq!(change.changed, ["a", "b"]);
                    let sqnr = sqnr(&before, &run(EngineKind::OnnxRuntime, &model, false, &samples()));
                    assert!(sqnr > floor, "{scheme} of {size}, {rounding}: {sqnr:.1} dB");
                }
            }
        }
    }

    #[test]
    fn what_is_no_matrix_product_is_listed() {
        let quantize = Quantize {
            exclude: vec!["second".into()],
            ..Quantize::of(QuantizeScheme::Int4)
        };
        let (model, change) = apply(&products(), &quantize, None).unwrap();
        assert_eq!(change.skipped, [skipped("b", "its node is excluded")]);
        assert!(
            model
                .opset_import
                .iter()
                .any(|import| import.domain() == "com.microsoft" && import.version() == 1)
        );
    }

    #[test]
    fn the_value_of_largest_magnitude_is_exact_without_a_zero_point() {
        for values in [[1.0, -8.0, 3.0], [8.0, -7.0, 0.0]] {
            let grid = Grid::of(&values, 4, false);
            let largest = if values[1] == -8.0 { -8.0 } else { 8.0 };
            assert_eq!(grid.value(grid.round(largest)), largest);
            assert_eq!((grid.round(largest), grid.zero_point), (0.0, 8.0));
        }
        let grid = Grid::of(&[1.0, 4.0], 4, true);
        assert_eq!((grid.zero_point, grid.value(15.0)), (0.0, 4.0));
        assert_eq!(Grid::of(&[0.0; 4], 4, true).value(8.0), 0.0);
    }

    #[test]
    fn integers_of_four_bits_share_bytes_row_by_row() {
        assert_eq!(packed(vec![1, 2, 3, 4, 5, 6], 3, 4), [0x21, 0x03, 0x54, 0x06]);
        assert_eq!(packed(vec![1, 2], 2, 8), [1, 2]);
    }

    #[test]
    fn hessians_are_gathered_in_parts_that_fit_into_memory() {
        let wide = TensorProto {
            dims: vec![8192, 1],
            ..TensorProto::default()
        };
        let nodes = ["x", "y", "y", "z"].map(|input| node("MatMul", &[input, "w"], "h", vec![]));
        let graph = GraphProto {
            node: nodes.to_vec(),
            initializer: vec![wide],
            ..GraphProto::default()
        };
        let products: Vec<Product> = (0..4)
            .map(|node| Product {
                node,
                initializer: 0,
                rows: false,
            })
            .collect();
        let sizes: Vec<usize> = parts(&graph, &products).iter().map(Vec::len).collect();
        assert_eq!(sizes, [3, 1], "256 MiB each, and what two products read counts once");
    }
}
