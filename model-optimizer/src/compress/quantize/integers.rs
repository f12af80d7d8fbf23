//! Weights as 8-bit integers around zero.

use rayon::prelude::*;

/// Largest quantised weight.
pub const WEIGHT_MAX: f32 = 127.0;
/// Values that share a scale but have no other order are worked on in pieces of this many.
pub(super) const PIECE: usize = 1 << 15;

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
        fn rounding_is_half_to_even(value in prop_oneof![-200.0_f32..200.0, (-255_i16..255).prop_map(|half| f32::from(half) / 2.0)]) {
            prop_assert_eq!(f32::from(round(value, 127.0)), value.clamp(-127.0, 127.0).round_ties_even());
        }
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
