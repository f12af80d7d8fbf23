//! The values of a weight: as they lie in the file, or what quantised integers stand for.

use std::ops::Range;

use plimsoll_package::report::layer::Distribution;
use plimsoll_runtime::onnx::{OnnxError, TensorProto, weights};
use rayon::prelude::*;

/// Bins of a distribution.
pub(super) const BINS: usize = 64;
/// Values that are looked at together, so that the compiler takes several at once.
const LANES: usize = 16;
/// Values that a thread decodes at a time.
const PIECE: usize = 1 << 15;

/// How integers become numbers: their distance from `zero`, times `scale`.
pub(super) struct Grid<'a> {
    pub(super) scale: &'a TensorProto,
    pub(super) zero: Option<&'a TensorProto>,
    pub(super) layout: Layout,
}

/// Which values share a scale.
#[derive(Clone, Copy)]
pub(super) enum Layout {
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
    pub(super) fn fits(&self, tensor: &TensorProto) -> bool {
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

/// The values of a weight, decoded piece by piece so that a large one is never in memory as a whole.
pub(super) enum Numbers<'a> {
    /// Floats as they lie in the file.
    Floats(&'a [[u8; 4]]),
    /// Values of another type, or that are no raw bytes.
    Decoded(Vec<f32>),
    Integers(Integers<'a>),
}

/// Quantised values: rows of `inputs` integers, each row padded to `padded`.
pub(super) struct Integers<'a> {
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
    pub(super) fn of(data: &'a [u8], signed: bool, shape: &[usize], grid: &Grid) -> Result<Self, OnnxError> {
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
            let mut start = range.start;
            while start < range.end {
                let channel = start % self.scales.len();
                let end = range.end.min(start + self.scales.len() - channel);
                let grids = self.scales[channel..].iter().zip(&self.zeros[channel..]);
                if self.signed {
                    let integers = self.data[start..end].iter().map(|byte| f32::from(byte.cast_signed()));
                    values.extend(integers.zip(grids).map(|(integer, (scale, zero))| (integer - zero) * scale));
                } else {
                    values.extend(
                        (start..end)
                            .zip(grids)
                            .map(|(place, (scale, zero))| (self.integer(place) - zero) * scale),
                    );
                }
                start = end;
            }
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
    pub(super) fn len(&self) -> usize {
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

    pub(super) fn zeros(&self) -> usize {
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
    pub(super) fn bounds(&self) -> (f32, f32) {
        let none = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        let of_piece = |values: &[f32]| {
            values.chunks(LANES).fold(none, |(mut low, mut high), chunk| {
                // NaN is neither smaller nor larger.
                for ((low, high), value) in low.iter_mut().zip(&mut high).zip(chunk) {
                    *low = if *value < *low { *value } else { *low };
                    *high = if *value > *high { *value } else { *high };
                }
                (low, high)
            })
        };
        let (lows, highs): (Vec<_>, Vec<_>) = self.scan(of_piece).into_iter().unzip();
        (
            lows.into_iter().flatten().fold(f32::INFINITY, f32::min),
            highs.into_iter().flatten().fold(f32::NEG_INFINITY, f32::max),
        )
    }

    /// Values that are no numbers are in no bin.
    pub(super) fn distribution(&self, low: f32, high: f32) -> Distribution {
        // Values that are all the same lie in the middle of a bin, not on an edge.
        let (low, high) = if low < high { (low, high) } else { (low - 0.5, high + 0.5) };
        let per_value = BINS as f64 / (f64::from(high) - f64::from(low));
        let bin = |value: f32| {
            let bin = (((f64::from(value) - f64::from(low)) * per_value) as i32).min(BINS as i32 - 1);
            if value.is_nan() { BINS } else { bin as usize }
        };
        // Neighbours are counted apart: one need not wait for the other where both are in the same bin.
        let of_piece = |values: &[f32]| {
            let mut counts = [[0_u32; BINS + 1]; LANES];
            for chunk in values.chunks(LANES) {
                for (counts, value) in counts.iter_mut().zip(chunk) {
                    counts[bin(*value)] += 1;
                }
            }
            let total = |bin: usize| counts.iter().map(|counts| u64::from(counts[bin])).sum::<u64>();
            std::array::from_fn::<u64, BINS, _>(total)
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
