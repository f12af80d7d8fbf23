//! The operator's metrics, in Prometheus' text format.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ModelLabels {
    namespace: String,
    name: String,
    reason: String,
}

/// The operator's metrics.
pub struct Metrics {
    registry: Registry,
    reconciles: Family<ResultLabel, Counter>,
    duration: Histogram,
    leader: Gauge,
    models: Family<ModelLabels, Gauge>,
    /// The labels under which each model is in `models`, by namespace and name.
    standing: Mutex<HashMap<(String, String), ModelLabels>>,
    jobs: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("plimsoll_operator");
        let metrics = Self {
            reconciles: Family::default(),
            duration: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            leader: Gauge::default(),
            models: Family::default(),
            standing: Mutex::default(),
            jobs: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("reconciles", "Passes over a ModelDeployment, by result", metrics.reconciles.clone());
        registry.register_with_unit(
            "reconcile_duration",
            "Time of a pass over a ModelDeployment",
            Unit::Seconds,
            metrics.duration.clone(),
        );
        registry.register("leader", "1 where this process leads", metrics.leader.clone());
        registry.register(
            "model",
            "1 for each ModelDeployment, with the reason of its Ready condition",
            metrics.models.clone(),
        );
        registry.register("optimization_jobs", "Optimisation Jobs that were started", metrics.jobs.clone());
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// Counts a pass; `error` is the name of the error's variant.
    pub fn reconciled(&self, took: Duration, error: Option<&'static str>) {
        self.reconciles
            .get_or_create(&ResultLabel {
                result: error.unwrap_or("ok").to_owned(),
            })
            .inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// Counts a Job.
    pub fn job_started(&self) {
        self.jobs.inc();
    }

    /// Says whether this process leads.
    pub fn set_leader(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// Says where a model stands; an earlier reason of it is forgotten.
    pub fn set_model(&self, namespace: &str, name: &str, reason: &str) {
        let labels = ModelLabels {
            namespace: namespace.into(),
            name: name.into(),
            reason: reason.into(),
        };
        self.models.get_or_create(&labels).set(1);
        let old = self.standing().insert((namespace.into(), name.into()), labels.clone());
        if let Some(old) = old.filter(|old| *old != labels) {
            self.models.remove(&old);
        }
    }

    /// Forgets a model that is gone.
    pub fn forget_model(&self, namespace: &str, name: &str) {
        if let Some(labels) = self.standing().remove(&(namespace.to_owned(), name.to_owned())) {
            self.models.remove(&labels);
        }
    }

    fn standing(&self) -> MutexGuard<'_, HashMap<(String, String), ModelLabels>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it as text.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_has_one_reason_at_a_time_and_none_once_it_is_gone() {
        let metrics = Metrics::default();
        let shown = || {
            let text = metrics.encode();
            let lines = text.lines().filter(|line| line.starts_with("plimsoll_operator_model{"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        metrics.set_model("n", "m", "Optimizing");
        metrics.set_model("n", "m", "Serving");
        metrics.set_model("n", "m", "Serving");
        assert_eq!(shown(), [r#"plimsoll_operator_model{namespace="n",name="m",reason="Serving"} 1"#]);
        metrics.forget_model("n", "m");
        assert!(shown().is_empty(), "{:?}", shown());
    }
}
