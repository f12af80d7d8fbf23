//! The operator's metrics, in Prometheus' text format.

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
    pub fn set_model(&self, namespace: &str, name: &str, old: Option<&str>, reason: &str) {
        let labels = |reason: &str| ModelLabels {
            namespace: namespace.into(),
            name: name.into(),
            reason: reason.into(),
        };
        if let Some(old) = old.filter(|old| *old != reason) {
            self.models.remove(&labels(old));
        }
        self.models.get_or_create(&labels(reason)).set(1);
    }

    /// Forgets a model that is going, whose last reason was `reason`.
    pub fn forget_model(&self, namespace: &str, name: &str, reason: &str) {
        self.models.remove(&ModelLabels {
            namespace: namespace.into(),
            name: name.into(),
            reason: reason.into(),
        });
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
