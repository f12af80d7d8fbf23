//! What changes in the course of training.

use std::f64::consts::PI;

/// The step size at `step` of `steps`: it falls from `rate` to 0 along half a cosine (Loshchilov and Hutter 2017, "SGDR", equation 5,
/// without restarts).
pub(super) fn rate(rate: f64, step: usize, steps: usize) -> f64 {
    rate * 0.5 * (1.0 + (PI * step as f64 / steps.max(1) as f64).cos())
}

/// Gradual pruning along a cubic curve.
///
/// Zhu and Gupta 2017, "To prune, or not to prune", equation 1, as `PolynomialDecay` of TensorFlow's model optimisation with its power
/// of 3.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pruning {
    /// The share of zeros before, `0.0..=1.0`.
    pub(super) from: f64,
    /// The share of zeros in the end.
    pub(super) to: f64,
    /// The step at which it is reached, 1 or more.
    pub(super) steps: usize,
}

impl Pruning {
    /// The share of zeros after `step` steps.
    pub(super) fn share(&self, step: usize) -> f64 {
        let left = 1.0 - (step as f64 / self.steps as f64).min(1.0);
        self.to + (self.from - self.to) * left.powi(3)
    }

    /// Whether weights are to be pruned after `step` steps: a hundred times in all, and at the end.
    pub(super) fn is_due(&self, step: usize) -> bool {
        step == self.steps || (step < self.steps && step.is_multiple_of((self.steps / 100).max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_that_of_polynomial_decay() {
        // tfmot.sparsity.keras.PolynomialDecay(initial_sparsity=0.5, final_sparsity=0.8, begin_step=0, end_step=1000, power=3):
        // final + (initial - final) * (1 - step / 1000) ** 3.
        let pruning = Pruning {
            from: 0.5,
            to: 0.8,
            steps: 1000,
        };
        for (step, share) in [
            (0, 0.5),
            (1, 0.500_899_100_3),
            (100, 0.581_3),
            (250, 0.673_437_5),
            (500, 0.762_5),
            (900, 0.799_7),
            (1000, 0.8),
            (5000, 0.8),
        ] {
            assert!((pruning.share(step) - share).abs() < 1e-9, "{step}: {}", pruning.share(step));
        }
        assert_eq!((1..=1000).filter(|step| pruning.is_due(*step)).count(), 100);
        let short = Pruning { steps: 7, ..pruning };
        assert_eq!(
            (1..=20).filter(|step| short.is_due(*step)).collect::<Vec<_>>(),
            [1, 2, 3, 4, 5, 6, 7]
        );
    }

    #[test]
    fn the_step_size_falls_from_all_to_nothing() {
        assert_eq!(rate(0.1, 0, 10), 0.1);
        assert!((rate(0.1, 5, 10) - 0.05).abs() < 1e-12);
        assert!(rate(0.1, 10, 10).abs() < 1e-12);
    }
}
