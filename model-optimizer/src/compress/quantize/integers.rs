//! Weights as 8-bit integers around zero.

use rayon::prelude::*;

use crate::graph::weight::{Operator, Rows};

/// Largest quantised weight.
pub const WEIGHT_MAX: f32 = 127.0;
/// Largest magnitude of the sum of two neighbours among the weights that a product in integers sums over. Processors without VNNI add the
/// products of such a pair with 8-bit activations in 16 bits, which hold 255 times 128 but not 255 times 254: the result would depend on
/// the processor that serves.
const PAIR_MAX: i16 = 128;

/// Values that share a scale but have no other order are worked on in pieces of this many.
const PIECE: usize = 1 << 15;

/// A value is NaN or infinite.
#[derive(Debug, PartialEq, Eq)]
pub struct NotFinite;

/// A float, in memory as such or as the bytes of a file.
pub trait Float: Copy + Sync {
    /// It.
    fn get(self) -> f32;
}

impl Float for f32 {
    fn get(self) -> f32 {
        self
    }
}

/// Little-endian, wherever it lies.
impl Float for [u8; 4] {
    fn get(self) -> f32 {
        f32::from_le_bytes(self)
    }
}

/// A weight in 8-bit integers with the scale of each of its channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// In the order of the floats.
    pub values: Vec<i8>,
    /// One for each channel, or one for all; positive.
    pub scales: Vec<f32>,
}

impl Quantized {
    /// The integers as the bytes of a tensor.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.values.into_iter().map(i8::cast_unsigned).collect()
    }
}

/// Quantises `values` of shape `shape` to integers of at most `largest`, each channel of `axis` by itself or, without an axis, all with
/// one scale: a value is its integer times its scale, within half a scale.
///
/// # Errors
/// [`NotFinite`] where a value is NaN or infinite.
///
/// Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2.1,
/// with the zero point at 0.
pub fn quantize<T: Float>(values: &[T], shape: &[usize], axis: Option<usize>, largest: f32) -> Result<Quantized, NotFinite> {
    let channels = axis.map_or(1, |axis| shape[axis]);
    let inner = axis.map_or(values.len(), |axis| shape[axis + 1..].iter().product());
    let mut scales = largest_magnitudes(values, channels, inner)?;
    for scale in &mut scales {
        *scale = scale_of(*scale, largest);
    }
    Ok(Quantized {
        values: with_scales(values, &scales, inner, largest),
        scales,
    })
}

/// Quantises the weight of a product that is taken in integers, as [`quantize`] does with integers of at most [`WEIGHT_MAX`], but so that
/// neither does the sum of two neighbours exceed [`PAIR_MAX`]. Neighbours are the first and second of the weights that `operator`
/// sums over, the third and fourth and so on, of a convolution by the kernel first as well as by the channel first, as engines differ.
///
/// With a scale for each channel, the scale is as large as that takes. One scale for all would be too large for nearly all, so that it is
/// the one of least squared error, and what lies beyond is cut off.
///
/// To halve all integers would be as exact and lose a whole bit; neighbours that are both large and of one sign are rare.
///
/// # Errors
/// [`NotFinite`] where a value is NaN or infinite.
pub fn quantize_product<T: Float>(values: &[T], shape: &[usize], axis: Option<usize>, operator: Operator) -> Result<Quantized, NotFinite> {
    let rows = operator.rows(shape);
    let kernel = kernel(operator, shape);
    let magnitudes = row_magnitudes(values, rows, kernel)?;
    let scales = match axis {
        None => {
            let largest = magnitudes.into_iter().fold(0.0, f32::max);
            vec![scale_of(least_error(values, rows, kernel, largest), WEIGHT_MAX)]
        }
        Some(axis) => {
            let mut scales = vec![0.0_f32; shape[axis]];
            let inner: usize = shape[axis + 1..].iter().product();
            let block = rows.length * rows.inner;
            for (index, magnitude) in magnitudes.into_iter().enumerate() {
                let first = index / rows.inner * block + index % rows.inner;
                let scale = &mut scales[first / inner % shape[axis]];
                *scale = scale.max(magnitude);
            }
            scales.into_iter().map(|largest| scale_of(largest, WEIGHT_MAX)).collect()
        }
    };
    Ok(Quantized {
        values: product_with_scales(values, shape, axis, operator, &scales),
        scales,
    })
}

/// The integers of the weight of a product in integers under given `scales`, one for each index of `axis`.
#[must_use]
pub fn product_with_scales<T: Float>(values: &[T], shape: &[usize], axis: Option<usize>, operator: Operator, scales: &[f32]) -> Vec<i8> {
    let inner = axis.map_or(values.len(), |axis| shape[axis + 1..].iter().product());
    let mut integers = with_scales(values, scales, inner, WEIGHT_MAX);
    if axis.is_none() {
        limit_pairs(&mut integers, shape, operator);
    }
    integers
}

/// The magnitude that is best the largest integer under one scale: of a larger one all values are rounded more coarsely, of a smaller one more
/// of them are cut off. `largest` is the largest of [`row_magnitudes`].
fn least_error<T: Float>(values: &[T], rows: Rows, kernel: usize, largest: f32) -> f32 {
    const BINS: usize = 1 << 12;
    let per_unit = BINS as f32 / largest;
    if !per_unit.is_normal() {
        return largest;
    }
    let count = |counts: &mut [u32], one: f32, other: f32| {
        let magnitude = one.abs().max(other.abs()).max((one + other).abs());
        counts[((magnitude * per_unit) as usize).min(BINS - 1)] += 1;
    };
    let zeros = || vec![0_u32; BINS];
    let of_piece = |mut counts: Vec<u32>, piece: &[T]| {
        for two in piece.chunks(2 * rows.inner) {
            let (one, other) = two.split_at(rows.inner.min(two.len()));
            if other.is_empty() {
                one.iter().for_each(|one| count(&mut counts, one.get(), 0.0));
            }
            for (one, other) in one.iter().zip(other) {
                count(&mut counts, one.get(), other.get());
            }
        }
        counts
    };
    let merge = |mut counts: Vec<u32>, others: Vec<u32>| {
        counts.iter_mut().zip(others).for_each(|(count, other)| *count += other);
        counts
    };
    // A row of a convolution, or pairs of rows of a matrix, as many as a core works on at a time.
    let block = rows.length * rows.inner;
    let piece = match kernel {
        1 => (rows.inner * (PIECE / rows.inner).max(2).next_multiple_of(2)).min(block),
        _ => block,
    };
    let pieces = values.par_chunks(block).flat_map(|block| block.par_chunks(piece));
    let counts = pieces.fold(zeros, of_piece).reduce(zeros, merge);
    // The error of rounding is that of values which lie anywhere between two integers; that of cutting off is what the larger of a pair loses.
    let rounding = values.len() as f64 / (12.0 * f64::from(WEIGHT_MAX).powi(2));
    let (mut beyond, mut sum, mut squares) = (0.0, 0.0, 0.0);
    let mut best = (f64::INFINITY, BINS);
    for (bin, count) in counts.into_iter().enumerate().rev() {
        let limit = (bin + 1) as f64;
        let error = (rounding + beyond) * limit.powi(2) - 2.0 * limit * sum + squares;
        if error < best.0 {
            best = (error, bin + 1);
        }
        let (count, middle) = (f64::from(count), bin as f64 + 0.5);
        beyond += count;
        sum += count * middle;
        squares += count * middle.powi(2);
    }
    largest * (best.1 as f32 / BINS as f32)
}

/// The places of each two neighbours in a row of a convolution's weight, by the channel first.
fn by_channel(length: usize, kernel: usize) -> impl Iterator<Item = (usize, usize)> {
    let channels = length / kernel;
    let at = move |place: usize| place % channels * kernel + place / channels;
    (1..length).step_by(2).map(move |place| (at(place - 1), at(place)))
}

/// The positions of a kernel that moves over space; 1 for a matrix product.
fn kernel(operator: Operator, shape: &[usize]) -> usize {
    match operator {
        Operator::Conv => shape[2..].iter().product(),
        _ => 1,
    }
}

/// The largest magnitude of a value, and of the sum of two neighbours, in each of `rows`. Of two with unlike signs the sum is no larger than
/// they are.
fn row_magnitudes<T: Float>(values: &[T], rows: Rows, kernel: usize) -> Result<Vec<f32>, NotFinite> {
    const INFINITE: u32 = f32::INFINITY.to_bits();
    // The bits of floats without a sign are in the order of the floats, NaN and infinity last.
    let magnitude = |value: f32| value.to_bits() & !(1 << 31);
    let pair = |one: &T, other: &T| {
        let sum = (one.get() + other.get()).clamp(f32::MIN, f32::MAX);
        magnitude(one.get()).max(magnitude(other.get())).max(magnitude(sum))
    };
    let alone = |value: &T| magnitude(value.get());
    if values.is_empty() {
        return Ok(vec![0.0; rows.outer * rows.inner]);
    }
    let block = rows.length * rows.inner;
    let maxima: Vec<u32> = if rows.inner == 1 {
        let of_row = |row: &[T]| {
            let (pairs, last) = row.as_chunks::<2>();
            let mut largest = pairs.iter().map(|[one, other]| pair(one, other)).fold(0, u32::max);
            largest = last.iter().map(alone).fold(largest, u32::max);
            if kernel > 1 {
                for (one, other) in by_channel(row.len(), kernel) {
                    largest = largest.max(pair(&row[one], &row[other]));
                }
            }
            largest
        };
        values.par_chunks(block).map(of_row).collect()
    } else {
        // Pairs of rows of a matrix, as many as a core works on at a time.
        let piece = rows.inner * (PIECE / rows.inner).max(2).next_multiple_of(2);
        let of_block = |block: &[T]| {
            let fold = |mut maxima: Vec<u32>, piece: &[T]| {
                for two in piece.chunks(2 * rows.inner) {
                    let (one, other) = two.split_at(rows.inner);
                    if other.is_empty() {
                        maxima
                            .iter_mut()
                            .zip(one)
                            .for_each(|(largest, one)| *largest = (*largest).max(alone(one)));
                    }
                    for ((largest, one), other) in maxima.iter_mut().zip(one).zip(other) {
                        *largest = (*largest).max(pair(one, other));
                    }
                }
                maxima
            };
            let zeros = || vec![0_u32; rows.inner];
            let merge = |mut maxima: Vec<u32>, other: Vec<u32>| {
                maxima
                    .iter_mut()
                    .zip(other)
                    .for_each(|(largest, other)| *largest = (*largest).max(other));
                maxima
            };
            block.par_chunks(piece).fold(zeros, fold).reduce(zeros, merge)
        };
        values.par_chunks(block).flat_map_iter(of_block).collect()
    };
    if maxima.iter().any(|bits| *bits >= INFINITE) {
        return Err(NotFinite);
    }
    Ok(maxima.into_iter().map(f32::from_bits).collect())
}

/// Brings the larger of two neighbours nearer to zero where their sum exceeds [`PAIR_MAX`].
pub fn limit_pairs(values: &mut [i8], shape: &[usize], operator: Operator) {
    let rows = operator.rows(shape);
    let kernel = kernel(operator, shape);
    let limited = |one: i8, other: i8| {
        let excess = (i16::from(one) + i16::from(other)).abs() - PAIR_MAX;
        if excess <= 0 {
            (one, other)
        } else if one.unsigned_abs() >= other.unsigned_abs() {
            (one - one.signum() * excess as i8, other)
        } else {
            (one, other - other.signum() * excess as i8)
        }
    };
    let of_block = |block: &mut [i8]| {
        for two in block.chunks_mut(2 * rows.inner) {
            let (ones, others) = two.split_at_mut(rows.inner.min(two.len()));
            for (one, other) in ones.iter_mut().zip(others) {
                (*one, *other) = limited(*one, *other);
            }
        }
        if kernel > 1 {
            for (one, other) in by_channel(block.len(), kernel) {
                (block[one], block[other]) = limited(block[one], block[other]);
            }
        }
    };
    // No piece parts two neighbours, nor are any of two blocks.
    let block = rows.length * rows.inner;
    let piece = if kernel > 1 {
        block
    } else {
        (2 * rows.inner).max(1) * (PIECE / (2 * rows.inner).max(1)).max(1)
    };
    if !values.is_empty() {
        values
            .par_chunks_mut(block)
            .for_each(|block| block.par_chunks_mut(piece).for_each(of_block));
    }
}

/// The scale under which `magnitude` is the integer `largest`.
#[must_use]
pub fn scale_of(magnitude: f32, largest: f32) -> f32 {
    let scale = magnitude / largest;
    // A channel of zeros (or of numbers too small for a scale) stays zero under any scale.
    if scale < f32::MIN_POSITIVE { 1.0 } else { scale }
}

/// The integers of `values` under given `scales`, one for each of the channels that hold `inner` values in a row.
#[must_use]
pub fn with_scales<T: Float>(values: &[T], scales: &[f32], inner: usize, largest: f32) -> Vec<i8> {
    let mut integers = vec![0_i8; values.len()];
    if values.is_empty() {
        return integers;
    }
    if scales.len() == 1 {
        let pieces = integers.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE));
        pieces.for_each(|(integers, values)| round_all(values, scales[0], largest, integers));
    } else if inner == 1 {
        let rows = integers.par_chunks_mut(scales.len()).zip(values.par_chunks(scales.len()));
        rows.for_each(|(integers, values)| {
            for ((integer, value), scale) in integers.iter_mut().zip(values).zip(scales) {
                *integer = round(value.get() / *scale, largest);
            }
        });
    } else {
        let runs = integers.par_chunks_mut(inner).zip(values.par_chunks(inner)).enumerate();
        runs.for_each(|(run, (integers, values))| round_all(values, scales[run % scales.len()], largest, integers));
    }
    integers
}

fn round_all<T: Float>(values: &[T], scale: f32, largest: f32, integers: &mut [i8]) {
    for (integer, value) in integers.iter_mut().zip(values) {
        *integer = round(value.get() / scale, largest);
    }
}

/// Half to even. From 1.5 times 2^23 on, a float has no fraction, and the lowest byte of its bits is the integer above that: an addition
/// rounds many values at once where a conversion would take them one by one.
fn round(value: f32, largest: f32) -> i8 {
    const WHOLE: f32 = 12_582_912.0;
    (value.max(-largest).min(largest) + WHOLE).to_bits() as i8
}

/// The largest magnitude within each channel.
fn largest_magnitudes<T: Float>(values: &[T], channels: usize, inner: usize) -> Result<Vec<f32>, NotFinite> {
    const INFINITE: u32 = f32::INFINITY.to_bits();
    // The bits of floats without a sign are in the order of the floats, NaN and infinity last.
    let magnitude = |value: &T| value.get().to_bits() & !(1 << 31);
    let largest_of = |run: &[T]| run.iter().map(magnitude).fold(0, u32::max);
    let block = channels * inner;
    let maxima: Vec<u32> = if values.is_empty() {
        vec![0; channels]
    } else if channels == 1 {
        vec![values.par_chunks(PIECE).map(largest_of).reduce(|| 0, u32::max)]
    } else if values.len() == block {
        values.par_chunks(inner).map(largest_of).collect()
    } else {
        let merge = |mut maxima: Vec<u32>, other: &[u32]| {
            maxima
                .iter_mut()
                .zip(other)
                .for_each(|(largest, other)| *largest = (*largest).max(*other));
            maxima
        };
        let fold = |mut maxima: Vec<u32>, block: &[T]| {
            if inner == 1 {
                for (largest, value) in maxima.iter_mut().zip(block) {
                    *largest = (*largest).max(magnitude(value));
                }
            } else {
                for (largest, run) in maxima.iter_mut().zip(block.chunks_exact(inner)) {
                    *largest = (*largest).max(largest_of(run));
                }
            }
            maxima
        };
        let partial = values.par_chunks_exact(block).fold(|| vec![0; channels], fold);
        partial.reduce(|| vec![0; channels], |a, b| merge(a, &b))
    };
    if maxima.iter().any(|bits| *bits >= INFINITE) {
        return Err(NotFinite);
    }
    Ok(maxima.into_iter().map(f32::from_bits).collect())
}

/// A matrix of `rows` times `columns` with its axes exchanged.
#[must_use]
pub fn transposed(values: &[i8], rows: usize, columns: usize) -> Vec<i8> {
    /// Side of a square whose rows and columns lie in the cache together.
    const TILE: usize = 64;
    let mut result = vec![0_i8; values.len()];
    if values.is_empty() {
        return result;
    }
    result.par_chunks_mut(TILE * rows).enumerate().for_each(|(strip, result)| {
        let first = strip * TILE;
        for row in 0..rows {
            let source = &values[row * columns + first..row * columns + (first + TILE).min(columns)];
            for (column, value) in source.iter().enumerate() {
                result[column * rows + row] = *value;
            }
        }
    });
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_weight_comes_back_within_half_its_channels_scale(
            values in proptest::collection::vec(-1e3_f32..1e3, 24),
            axis in prop_oneof![Just(None), (0_usize..3).prop_map(Some)],
            largest in prop_oneof![Just(WEIGHT_MAX), Just(7.0)],
        ) {
            let shape = [2, 3, 4];
            let quantized = quantize(&values, &shape, axis, largest).unwrap();
            let channel = |index: usize| axis.map_or(0, |axis| index / shape[axis + 1..].iter().product::<usize>() % shape[axis]);
            for (index, value) in values.iter().enumerate() {
                let mates = values.iter().enumerate().filter(|(other, _)| channel(*other) == channel(index));
                let scale = mates.map(|(_, value)| value.abs()).fold(0.0, f32::max) / largest;
                prop_assert_eq!(quantized.scales[channel(index)], scale);
                prop_assert_eq!(f32::from(quantized.values[index]), (value / scale).round_ties_even().clamp(-largest, largest));
            }
        }

        #[test]
        fn neighbours_in_a_product_never_add_up_to_more_than_sixteen_bits_hold(
            values in proptest::collection::vec(prop_oneof![-1.0_f32..1.0, Just(1.0)], 90),
            (operator, shape, axis) in prop_oneof![
                Just((Operator::MatMul, vec![2, 5, 9], Some(2))),
                Just((Operator::MatMul, vec![2, 5, 9], None)),
                Just((Operator::MatMul, vec![15, 6], Some(1))),
                Just((Operator::Gemm { transposed: true }, vec![6, 15], Some(0))),
                Just((Operator::Gemm { transposed: false }, vec![15, 6], Some(1))),
                Just((Operator::Conv, vec![3, 5, 3, 2], Some(0))),
                Just((Operator::Conv, vec![5, 6, 3, 1], None)),
            ],
            trained in proptest::collection::vec(-127_i8..=127, 90),
        ) {
            let quantized = quantize_product(&values, &shape, axis, operator).unwrap();
            let inner = axis.map_or(90, |axis| shape[axis + 1..].iter().product());
            for (index, value) in values.iter().enumerate() {
                let scale = quantized.scales[index / inner % quantized.scales.len()];
                let back = f32::from(quantized.values[index]) * scale;
                // What one scale for all cuts off comes nearer to zero.
                let is_cut = axis.is_none() && back * value >= 0.0 && back.abs() < value.abs();
                prop_assert!((back - value).abs() <= 0.5001 * scale || is_cut, "{} for {}", back, value);
            }
            let mut limited = trained.clone();
            limit_pairs(&mut limited, &shape, operator);
            for (limited, trained) in limited.iter().zip(&trained) {
                prop_assert!(limited.unsigned_abs() <= trained.unsigned_abs() && limited.signum() * trained.signum() >= 0);
            }
            let rows = operator.rows(&shape);
            for values in [&quantized.values, &limited] {
                for row in 0..rows.outer * rows.inner {
                    let first = row / rows.inner * rows.length * rows.inner + row % rows.inner;
                    let row: Vec<i8> = (0..rows.length).map(|place| values[first + place * rows.inner]).collect();
                    let kernel = if operator == Operator::Conv { rows.length / shape[1] } else { 1 };
                    let by_channel: Vec<i8> = (0..kernel)
                        .flat_map(|place| row.iter().copied().skip(place).step_by(kernel))
                        .collect();
                    for pair in row.chunks(2).chain(by_channel.chunks(2)) {
                        prop_assert!(pair.iter().map(|value| i32::from(*value) * 255).sum::<i32>().abs() <= 32767, "{:?}", pair);
                    }
                }
            }
        }

        #[test]
        fn rounding_is_half_to_even(value in prop_oneof![-200.0_f32..200.0, (-255_i16..255).prop_map(|half| f32::from(half) / 2.0)]) {
            prop_assert_eq!(f32::from(round(value, 127.0)), value.clamp(-127.0, 127.0).round_ties_even());
        }
    }

    /// Of a tensor whose values are mostly small, as trained ones are.
    #[test]
    fn one_scale_for_all_is_that_of_least_error() {
        let mut state = 1_u64;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let shape = [400, 400];
        let mut values: Vec<f32> = (0..400 * 400).map(|_| next() * next() * next()).collect();
        values[70] = 3.0;
        let error = |scale: f32| {
            let integers = product_with_scales(&values, &shape, None, Operator::MatMul, &[scale]);
            let errors = integers.iter().zip(&values);
            errors
                .map(|(integer, value)| f64::from(f32::from(*integer) * scale - value).powi(2))
                .sum::<f64>()
        };
        let scale = quantize_product(&values, &shape, None, Operator::MatMul).unwrap().scales[0];
        let plain = 3.0 / WEIGHT_MAX;
        let least = (1..=60).map(|part| error(plain * part as f32 / 60.0)).fold(f64::INFINITY, f64::min);
        assert!(error(scale) < 1.02 * least, "{} by {scale}, not {least}", error(scale));
        assert!(
            error(scale) < error(plain) / 1.5,
            "{}, by the largest value {}",
            error(scale),
            error(plain)
        );
    }

    #[test]
    fn zero_stays_zero_and_a_channel_of_zeros_does_no_harm() {
        let quantized = quantize(&[0.0, 0.0, 1.0, 0.0], &[2, 2], Some(0), WEIGHT_MAX).unwrap();
        assert_eq!(quantized.values, [0, 0, 127, 0]);
        assert_eq!(quantized.scales, [1.0, 1.0 / 127.0]);
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_the_channels_lie() {
        for axis in [None, Some(0), Some(1), Some(2)] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![1.0; 24];
                values[17] = value;
                assert_eq!(quantize(&values, &[2, 3, 4], axis, WEIGHT_MAX), Err(NotFinite), "{axis:?}");
            }
        }
    }

    #[test]
    fn rows_become_columns() {
        assert_eq!(transposed(&[1, 2, 3, 4, 5, 6], 2, 3), [1, 4, 2, 5, 3, 6]);
        let wide: Vec<i8> = (0..3 * 100).map(|index| (index % 127) as i8).collect();
        let back = transposed(&transposed(&wide, 3, 100), 100, 3);
        assert_eq!(back, wide);
    }
}
