//! The second derivative of a product's squared error by its weights, which second-order techniques invert.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::DenseSolveCore as _;
use faer::{Accum, Mat, MatRef, Par, Side};

/// Share of the mean diagonal that is added to the diagonal, so that the Hessian can be inverted.
const DAMPING: f64 = 0.01;

/// `2 X^T X` over the mean sample, of activations `X` with a row for each sample.
#[derive(Debug, Clone)]
pub struct Hessian {
    sum: Mat<f32>,
    count: usize,
}

impl Hessian {
    /// Of no sample yet, for a product of that many inner `features`.
    #[must_use]
    pub fn new(features: usize) -> Self {
        Self {
            sum: Mat::zeros(features, features),
            count: 0,
        }
    }

    /// The inner dimension of the product.
    #[must_use]
    pub fn features(&self) -> usize {
        self.sum.nrows()
    }

    /// Whether an input was zero in every sample.
    #[must_use]
    pub fn is_dead(&self, feature: usize) -> bool {
        self.sum[(feature, feature)] == 0.0
    }

    /// Adds rows of activations, each of as many as there are features, all of them finite.
    pub fn add(&mut self, rows: &[f32]) {
        let features = self.features();
        let count = rows.len() / features;
        if count > 0 {
            let samples = MatRef::from_row_major_slice(rows, count, features);
            matmul(&mut self.sum, Accum::Add, samples.transpose(), samples, 1.0, Par::Seq);
            self.count += count;
        }
    }

    /// The upper factor `U` of the damped Hessian's inverse, `H^-1 = U^T U`, row after row; `None` where it is not positive definite.
    /// A dead input counts as one of variance 1/2.
    #[must_use]
    pub fn inverse_factor(&self) -> Option<Vec<f32>> {
        let features = self.features();
        let scale = 2.0 / self.count.max(1) as f64;
        let mut hessian = Mat::from_fn(features, features, |row, column| scale * f64::from(self.sum[(row, column)]));
        let mean = (0..features).map(|index| hessian[(index, index)]).sum::<f64>() / features as f64;
        for index in 0..features {
            if self.is_dead(index) {
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
