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

    /// What tfmot says at some steps; `tests/parity/tfmot_schedule.py` records it.
    #[derive(serde::Deserialize)]
    struct Case {
        initial: f64,
        #[serde(rename = "final")]
        last: f64,
        end_step: usize,
        frequency: usize,
        steps: Vec<usize>,
        prunes: Vec<bool>,
        sparsity: Vec<f64>,
    }

    #[test]
    fn the_share_is_that_of_polynomial_decay() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../../tests/parity/tfmot_schedule.json")).unwrap();
        assert!(cases.len() >= 4);
        for case in cases {
            let pruning = Pruning {
                from: case.initial,
                to: case.last,
                steps: case.end_step,
            };
            assert_eq!(case.frequency, (case.end_step / 100).max(1), "it prunes as often as we do");
            for ((step, prunes), sparsity) in case.steps.into_iter().zip(case.prunes).zip(case.sparsity) {
                let share = pruning.share(step);
                assert!((share - sparsity).abs() < 2e-7, "{step}: {share}, not {sparsity}");
                // At step 0 nothing has been trained.
                assert_eq!(pruning.is_due(step) || step == 0, prunes, "{step} of {}", case.end_step);
            }
            assert_eq!(pruning.share(5 * case.end_step), case.last);
        }
    }

    #[test]
    fn it_prunes_a_hundred_times_and_at_the_end() {
        let due = |steps: usize| {
            let pruning = Pruning { from: 0.5, to: 0.8, steps };
            (1..=2 * steps).filter(|step| pruning.is_due(*step)).collect::<Vec<_>>()
        };
        assert_eq!(due(1000).len(), 100);
        assert_eq!(due(7), [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(due(250).last(), Some(&250));
        assert_eq!(due(333).last(), Some(&333));
    }

    #[test]
    fn the_step_size_falls_from_all_to_nothing() {
        assert_eq!(rate(0.1, 0, 10), 0.1);
        assert!((rate(0.1, 5, 10) - 0.05).abs() < 1e-12);
        assert!(rate(0.1, 10, 10).abs() < 1e-12);
    }
}
