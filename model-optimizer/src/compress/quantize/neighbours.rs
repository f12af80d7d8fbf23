//! Weights of products in integers, of which two neighbours never add up to more than every processor can hold.

use rayon::prelude::*;

use super::integers::{self, Float, NotFinite, PIECE, Quantized, WEIGHT_MAX, scale_of};
use crate::graph::weight::{Operator, Rows};

/// Largest magnitude of the sum of two neighbours among the weights that a product in integers sums over. Processors without VNNI add the
/// products of such a pair with 8-bit activations in 16 bits, which hold 255 times 128 but not 255 times 254: the result would depend on
/// the processor that serves.
const PAIR_MAX: i16 = 128;

/// Quantises the weight of a product that is taken in integers, as [`integers::quantize`] does with integers of at most [`WEIGHT_MAX`], but so that
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
pub fn quantize<T: Float>(values: &[T], shape: &[usize], axis: Option<usize>, operator: Operator) -> Result<Quantized, NotFinite> {
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
        values: with_scales(values, shape, axis, operator, &scales),
        scales,
    })
}

/// The integers of the weight of a product in integers under given `scales`, one for each index of `axis`.
#[must_use]
pub fn with_scales<T: Float>(values: &[T], shape: &[usize], axis: Option<usize>, operator: Operator, scales: &[f32]) -> Vec<i8> {
    let inner = axis.map_or(values.len(), |axis| shape[axis + 1..].iter().product());
    let mut integers = integers::with_scales(values, scales, inner, WEIGHT_MAX);
    if axis.is_none() {
        limit(&mut integers, shape, operator);
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
pub fn limit(values: &mut [i8], shape: &[usize], operator: Operator) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
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
            let quantized = quantize(&values, &shape, axis, operator).unwrap();
            let inner = axis.map_or(90, |axis| shape[axis + 1..].iter().product());
            for (index, value) in values.iter().enumerate() {
                let scale = quantized.scales[index / inner % quantized.scales.len()];
                let back = f32::from(quantized.values[index]) * scale;
                // What one scale for all cuts off comes nearer to zero.
                let is_cut = axis.is_none() && back * value >= 0.0 && back.abs() < value.abs();
                prop_assert!((back - value).abs() <= 0.5001 * scale || is_cut, "{} for {}", back, value);
            }
            let mut limited = trained.clone();
            limit(&mut limited, &shape, operator);
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
            let integers = with_scales(&values, &shape, None, Operator::MatMul, &[scale]);
            let errors = integers.iter().zip(&values);
            errors
                .map(|(integer, value)| f64::from(f32::from(*integer) * scale - value).powi(2))
                .sum::<f64>()
        };
        let scale = quantize(&values, &shape, None, Operator::MatMul).unwrap().scales[0];
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
}
