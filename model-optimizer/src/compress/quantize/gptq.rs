//! GPTQ: weights are rounded one column after another, and those that come later make up for the error.

use std::collections::HashMap;

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::DenseSolveCore as _;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};
use plimsoll_runtime::onnx::ModelProto;
use rayon::prelude::*;

use super::blocks::{Grid, Quantized};
use crate::calibration::Calibration;
use crate::failure::Failure;

/// Share of the mean diagonal that is added to the diagonal, so that the Hessian can be inverted.
const DAMPING: f64 = 0.01;
/// Columns whose errors are passed on to the later ones together.
const COLUMNS: usize = 128;
/// Rows that a thread works on at once.
const ROWS: usize = 16;

/// Columns of a Hessian that a thread works on at once.
const PANEL: usize = 96;

/// The second derivative of a product's squared error by its weights, `2 X X^T` over the mean sample.
#[derive(Debug, Clone)]
pub struct Hessian {
    features: usize,
    /// Column after column.
    sum: Vec<f32>,
    count: usize,
}

impl Hessian {
    /// Of no sample yet, for a product of that many inner `features`.
    #[must_use]
    pub fn new(features: usize) -> Self {
        Self {
            features,
            sum: vec![0.0; features * features],
            count: 0,
        }
    }

    /// The inner dimension of the product.
    #[must_use]
    pub fn features(&self) -> usize {
        self.features
    }

    /// Adds rows of activations; values that are not finite make the result useless, so such rows are left out.
    pub fn add(&mut self, activations: &[f32]) {
        let features = self.features();
        let finite: Vec<f32>;
        let all_finite = activations.iter().all(|value| value.is_finite());
        let rows = if all_finite {
            activations
        } else {
            let kept = activations
                .chunks_exact(features)
                .filter(|row| row.iter().all(|value| value.is_finite()));
            finite = kept.flatten().copied().collect();
            &finite
        };
        let count = rows.len() / features;
        if count == 0 {
            return;
        }
        let samples = MatRef::from_row_major_slice(&rows[..count * features], count, features);
        self.sum.par_chunks_mut(PANEL * features).enumerate().for_each(|(index, panel)| {
            let width = panel.len() / features;
            let columns = samples.subcols(index * PANEL, width);
            let panel = MatMut::from_column_major_slice_mut(panel, features, width);
            matmul(panel, Accum::Add, samples.transpose(), columns, 1.0, Par::Seq);
        });
        self.count += count;
    }

    /// The upper factor `U` of the damped Hessian's inverse, `H^-1 = U^T U`, row after row; `None` where it is not positive definite.
    fn inverse_factor(&self) -> Option<Vec<f32>> {
        let features = self.features();
        let scale = 2.0 / self.count.max(1) as f64;
        let mut hessian = Mat::from_fn(features, features, |row, column| {
            scale * f64::from(self.sum[column * features + row])
        });
        let mean = (0..features).map(|index| hessian[(index, index)]).sum::<f64>() / features as f64;
        for index in 0..features {
            // An input that is always zero has no error to make up for.
            if hessian[(index, index)] == 0.0 {
                hessian[(index, index)] = 1.0;
            }
            hessian[(index, index)] += DAMPING * mean;
        }
        let inverse = hessian.llt(Side::Lower).ok()?.inverse();
        let factor = inverse.llt(Side::Lower).ok()?;
        let lower = factor.L();
        let upper =
            (0..features).flat_map(|row| (0..features).map(move |column| if column < row { 0.0 } else { lower[(column, row)] as f32 }));
        Some(upper.collect())
    }
}

/// The Hessians of the products that read `inputs`, in one pass over the calibration data.
pub(super) fn hessians(model: &ModelProto, calibration: &Calibration, inputs: Vec<String>) -> Result<HashMap<String, Hessian>, Failure> {
    let mut names = inputs;
    names.sort();
    names.dedup();
    let mut hessians: HashMap<String, Hessian> = HashMap::new();
    calibration.observe(model, &names, |tensors| {
        for (name, tensor) in names.iter().zip(tensors) {
            if let (Some(values), Some(&features)) = (tensor.as_f32(), tensor.shape().last()) {
                let hessian = hessians.entry(name.clone()).or_insert_with(|| Hessian::new(features));
                if hessian.features() == features {
                    hessian.add(values);
                }
            }
        }
        Ok(())
    })?;
    Ok(hessians)
}

/// Quantises `rows`, each of as many weights as the Hessian has features, in blocks of `block_size` that share a scale. The scale of a
/// block is taken when its first weight is reached, of the weights as they then are.
///
/// # Errors
/// In words, where the Hessian cannot be inverted.
///
/// Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1.
pub fn quantize(rows: &[f32], hessian: &Hessian, bits: u32, block_size: usize, asymmetric: bool) -> Result<Quantized, String> {
    let inputs = hessian.features();
    let factor = hessian
        .inverse_factor()
        .ok_or("its inputs on the calibration data are too large or too alike for GPTQ; use the rounding Nearest")?;
    let blocks = inputs.div_ceil(block_size);
    let mut quantized = Quantized {
        values: vec![0; rows.len() / inputs * blocks * block_size],
        scales: vec![0.0; rows.len() / inputs * blocks],
        zero_points: vec![0; rows.len() / inputs * blocks],
    };
    quantized
        .rows(blocks, block_size)
        .chunks(ROWS)
        .zip(rows.par_chunks(ROWS * inputs))
        .for_each(|(mut quantized, rows)| {
            let mut weights = rows.to_vec();
            let count = quantized.len();
            let mut grids = vec![Grid::of(&[], bits, asymmetric); count];
            let mut errors = vec![0.0_f32; count * COLUMNS];
            for begin in (0..inputs).step_by(COLUMNS) {
                let end = (begin + COLUMNS).min(inputs);
                for (row, (weights, quantized)) in weights.chunks_exact_mut(inputs).zip(&mut quantized).enumerate() {
                    for column in begin..end {
                        if column % block_size == 0 {
                            grids[row] = Grid::of(&weights[column..(column + block_size).min(inputs)], bits, asymmetric);
                            quantized.set(column / block_size, grids[row]);
                        }
                        let integer = grids[row].round(weights[column]);
                        quantized.values[column] = integer as u8;
                        let factors = &factor[column * inputs..][..inputs];
                        let error = (weights[column] - grids[row].value(integer)) / factors[column];
                        errors[row * COLUMNS + column - begin] = error;
                        // A scale looks ahead to the end of its block, which may lie beyond these columns.
                        for (weight, factor) in weights[column..end].iter_mut().zip(&factors[column..end]) {
                            *weight -= error * factor;
                        }
                    }
                }
                for (weights, errors) in weights.chunks_exact_mut(inputs).zip(errors.chunks_exact(COLUMNS)) {
                    for (column, error) in (begin..end).zip(errors) {
                        let factors = &factor[column * inputs + end..(column + 1) * inputs];
                        for (weight, factor) in weights[end..].iter_mut().zip(factors) {
                            *weight -= error * factor;
                        }
                    }
                }
            }
        });
    Ok(quantized)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::quantize::blocks::round_to_nearest;

    /// Numbers of a fixed sequence, in `-1.0..1.0`.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Activations of which neighbouring features go together.
    fn activations(samples: usize, features: usize) -> Vec<f32> {
        let noise = numbers(samples * (features + 1), 7);
        let sample = |row: usize| (0..features).map(move |column| (row, column));
        (0..samples)
            .flat_map(sample)
            .map(|(row, column)| noise[row * (features + 1) + column] + noise[row * (features + 1) + column + 1])
            .collect()
    }

    /// The inverse of a symmetric matrix by Gauss and Jordan.
    fn inverse(matrix: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let size = matrix.len();
        let mut rows: Vec<Vec<f64>> = matrix.to_vec();
        for (index, row) in rows.iter_mut().enumerate() {
            row.extend((0..size).map(|column| f64::from(u8::from(column == index))));
        }
        for pivot in 0..size {
            let divisor = rows[pivot][pivot];
            rows[pivot].iter_mut().for_each(|value| *value /= divisor);
            let pivot_row = rows[pivot].clone();
            for (index, row) in rows.iter_mut().enumerate().filter(|(index, _)| *index != pivot) {
                let factor = row[pivot];
                assert_ne!(index, pivot);
                row.iter_mut().zip(&pivot_row).for_each(|(value, pivot)| *value -= factor * pivot);
            }
        }
        rows.into_iter().map(|row| row[size..].to_vec()).collect()
    }

    /// Optimal brain quantisation in a fixed order, each step solved exactly: when a weight is rounded, the ones that are left move to
    /// where the squared error is least, by the inverse Hessian of those that are left (Frantar et al. 2022, equation 2).
    fn solved_exactly(row: &[f32], activations: &[f32], bits: u32, block_size: usize, asymmetric: bool) -> Vec<u8> {
        let size = row.len();
        let samples = activations.len() / size;
        let mut hessian = vec![vec![0.0_f64; size]; size];
        for sample in activations.chunks_exact(size) {
            for i in 0..size {
                for j in 0..size {
                    hessian[i][j] += 2.0 / samples as f64 * f64::from(sample[i]) * f64::from(sample[j]);
                }
            }
        }
        let mean = (0..size).map(|index| hessian[index][index]).sum::<f64>() / size as f64;
        (0..size).for_each(|index| hessian[index][index] += 0.01 * mean);
        let mut weights: Vec<f64> = row.iter().map(|weight| f64::from(*weight)).collect();
        let mut integers = Vec::new();
        let mut grid = Grid::of(&[], bits, asymmetric);
        for column in 0..size {
            if column % block_size == 0 {
                let block: Vec<f32> = weights[column..(column + block_size).min(size)]
                    .iter()
                    .map(|weight| *weight as f32)
                    .collect();
                grid = Grid::of(&block, bits, asymmetric);
            }
            let left: Vec<Vec<f64>> = hessian[column..].iter().map(|row| row[column..].to_vec()).collect();
            let inverse = inverse(&left);
            let integer = grid.round(weights[column] as f32);
            integers.push(integer as u8);
            let error = (weights[column] - f64::from(grid.value(integer))) / inverse[0][0];
            for (weight, factor) in weights[column..].iter_mut().zip(&inverse[0]) {
                *weight -= error * factor;
            }
        }
        integers
    }

    #[test]
    fn each_weight_is_rounded_as_the_formula_solved_exactly_says() {
        for (features, block_size, asymmetric) in [(12, 16, false), (40, 16, true), (150, 32, false)] {
            let activations = activations(3 * features, features);
            let mut hessian = Hessian::new(features);
            let (first, second) = activations.split_at(features * features);
            hessian.add(first);
            hessian.add(second);
            let rows = numbers(3 * features, 42);
            let quantized = quantize(&rows, &hessian, 4, block_size, asymmetric).unwrap();
            let padded = features.div_ceil(block_size) * block_size;
            for (row, integers) in rows.chunks_exact(features).zip(quantized.values.chunks_exact(padded)) {
                let exact = solved_exactly(row, &activations, 4, block_size, asymmetric);
                assert_eq!(integers[..features], exact, "{features} features");
            }
        }
    }

    #[test]
    fn the_error_of_the_product_is_smaller_than_that_of_rounding_to_the_nearest() {
        let features = 64;
        let activations = activations(500, features);
        let mut hessian = Hessian::new(features);
        hessian.add(&activations);
        let rows = numbers(8 * features, 3);
        let error = |quantized: &Quantized| -> f64 {
            let mut sum = 0.0;
            for sample in activations.chunks_exact(features) {
                for (row, weights) in rows.chunks_exact(features).enumerate() {
                    let products = weights.iter().zip(sample).enumerate().map(|(column, (weight, activation))| {
                        let index = row * features + column;
                        let block = index / 32;
                        let value =
                            (f32::from(quantized.values[index]) - f32::from(quantized.zero_points[block])) * quantized.scales[block];
                        f64::from((value - weight) * activation)
                    });
                    sum += products.sum::<f64>().powi(2);
                }
            }
            sum
        };
        let nearest = error(&round_to_nearest(&rows, features, 4, 32, false));
        let gptq = error(&quantize(&rows, &hessian, 4, 32, false).unwrap());
        assert!(gptq < 0.8 * nearest, "{gptq} is not well below {nearest}");
    }
}
