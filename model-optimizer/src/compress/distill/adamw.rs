//! Gradient descent: AdamW, and how its step size falls.

use candle_core::{Result, Tensor};

use super::parameters::Parameters;

/// How much of the mean gradient of the step before is kept.
const MOMENTUM: f64 = 0.9;
/// How much of the mean squared gradient of the step before is kept.
const SQUARE_MOMENTUM: f64 = 0.999;
/// Keeps the division from zero.
const EPSILON: f64 = 1e-8;
/// How much of a weight is taken off at each step, times the step size.
const DECAY: f64 = 0.01;

/// AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2) with the constants of
/// `torch.optim.AdamW`; biases, norms and tables do not decay, and what is masked does not move.
pub(super) struct AdamW {
    /// The mean and the mean squared gradient of each parameter.
    moments: Vec<Option<(Tensor, Tensor)>>,
    steps: i32,
}

impl AdamW {
    /// For `count` parameters.
    pub(super) fn new(count: usize) -> Self {
        Self {
            moments: vec![None; count],
            steps: 0,
        }
    }

    /// Takes a step of size `rate` against `gradients`, one for each parameter that has one.
    pub(super) fn step(&mut self, parameters: &Parameters, gradients: &[Option<Tensor>], rate: f64) -> Result<()> {
        self.steps += 1;
        let unbiased = 1.0 - MOMENTUM.powi(self.steps);
        let unbiased_square = 1.0 - SQUARE_MOMENTUM.powi(self.steps);
        for (((var, mask, decays), gradient), moments) in parameters.trained().zip(gradients).zip(&mut self.moments) {
            let Some(gradient) = gradient else { continue };
            let (mean, square) = match moments.take() {
                Some((mean, square)) => (
                    ((mean * MOMENTUM)? + (gradient * (1.0 - MOMENTUM))?)?,
                    ((square * SQUARE_MOMENTUM)? + (gradient.sqr()? * (1.0 - SQUARE_MOMENTUM))?)?,
                ),
                None => ((gradient * (1.0 - MOMENTUM))?, (gradient.sqr()? * (1.0 - SQUARE_MOMENTUM))?),
            };
            let deviation = ((&square / unbiased_square)?.sqrt()? + EPSILON)?;
            let change = ((&mean / unbiased)?.div(&deviation)? * rate)?;
            let value = var.as_tensor().detach();
            let kept = if decays { (value * (1.0 - rate * DECAY))? } else { value };
            let mut value = (kept - change)?;
            if let Some(mask) = mask {
                value = value.mul(mask)?;
            }
            var.set(&value)?;
            *moments = Some((mean, square));
        }
        Ok(())
    }
}
