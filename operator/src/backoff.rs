//! How long a model waits after a pass that failed: longer with each failure in a row, up to a limit, and not in step with other models.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use kube::runtime::reflector::ObjectRef;
use plimsoll_crds::ModelDeployment;

/// Each wait is twice the one before, from half a second to two and a half minutes, and as much again at most by chance.
const WAITS: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(500))
    .with_factor(2.0)
    .with_max_delay(Duration::from_secs(150))
    .without_max_times()
    .with_jitter();

/// The waits of the models whose last pass failed.
#[derive(Debug, Default)]
pub struct Backoffs(Mutex<HashMap<ObjectRef<ModelDeployment>, ExponentialBackoff>>);

impl Backoffs {
    /// How long to wait after a further failure of `model`.
    pub fn failed(&self, model: ObjectRef<ModelDeployment>) -> Duration {
        let mut waits = self.waits();
        // The sequence has no end.
        waits.entry(model).or_insert_with(|| WAITS.build()).next().unwrap_or_default()
    }

    /// Begins anew with `model`, whose pass succeeded or which is gone.
    pub fn reset(&self, model: &ObjectRef<ModelDeployment>) {
        self.waits().remove(model);
    }

    fn waits(&self) -> MutexGuard<'_, HashMap<ObjectRef<ModelDeployment>, ExponentialBackoff>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str) -> ObjectRef<ModelDeployment> {
        ObjectRef::new(name).within("n")
    }

    #[test]
    fn waits_double_up_to_a_limit_and_differ_by_chance() {
        let waits = |seed| WAITS.with_jitter_seed(seed).build().take(20).collect::<Vec<_>>();
        let (one, other) = (waits(1), waits(2));
        assert_ne!(one, other);
        for wait in [one, other] {
            for (attempt, wait) in wait.iter().enumerate() {
                let least = Duration::from_millis(500 << attempt).min(Duration::from_secs(150));
                assert!(
                    *wait >= least && *wait < least * 2,
                    "attempt {attempt}: {wait:?}, {least:?} at least"
                );
            }
            assert!(wait[19] > wait[5]);
        }
    }

    #[test]
    fn each_model_has_its_own_waits_until_it_succeeds() {
        let backoffs = Backoffs::default();
        let second = Duration::from_secs(1);
        assert!(backoffs.failed(model("a")) < second);
        for _ in 0..5 {
            backoffs.failed(model("a"));
        }
        assert!(backoffs.failed(model("a")) > 16 * second);
        assert!(backoffs.failed(model("b")) < second, "the failures of one are not another's");
        backoffs.reset(&model("a"));
        assert!(backoffs.failed(model("a")) < second);
    }
}
