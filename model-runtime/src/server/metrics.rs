//! Metrics in the OpenMetrics text form, `plimsoll_runtime_<name>_<unit>`.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::engine::Device;

use super::Config;
use super::drift::{Summary, Verdict};
use super::model::Model;
use super::refusal::Reason;
use super::sampling::Sampled;
use super::scheduler::Answer;
use super::shadow::Comparison;

mod gpu;

/// Content type of the text form.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineLabels {
    engine: String,
    fallback: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    name: String,
    version: String,
    source_digest: String,
    toolchain: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct SpanLabels {
    pub(super) result: &'static str,
}

/// What became of samples.
#[derive(Debug, Clone, Default)]
pub(super) struct SampleMetrics(Family<ResultLabels, Counter>);

impl SampleMetrics {
    /// Counts samples.
    pub(super) fn count(&self, became: Sampled, samples: u64) {
        self.0.get_or_create(&ResultLabels { result: became.into() }).inc_by(samples);
    }

    #[cfg(test)]
    pub(super) fn get(&self, became: Sampled) -> u64 {
        self.0.get_or_create(&ResultLabels { result: became.into() }).get()
    }
}

/// What comparisons with another revision show.
#[derive(Debug, Clone)]
pub(super) struct ShadowMetrics {
    requests: Family<ResultLabels, Counter>,
    difference: Histogram,
    duration: Histogram,
}

impl ShadowMetrics {
    /// Counts a comparison, its difference where there is one, and what it took.
    pub(super) fn compared(&self, comparison: Comparison, difference: Option<f64>, took: Duration) {
        self.requests.get_or_create(&ResultLabels { result: comparison.into() }).inc();
        if let Some(difference) = difference {
            self.difference.observe(difference);
            self.duration.observe(took.as_secs_f64());
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DriftLabels {
    model: String,
    tensor: String,
    side: &'static str,
    kind: &'static str,
}

/// How far what goes through the server is from the package's reference.
#[derive(Debug, Clone)]
pub(super) struct DriftMetrics {
    psi: Family<DriftLabels, Gauge<f64, AtomicU64>>,
    ks: Family<DriftLabels, Gauge<f64, AtomicU64>>,
    count: Family<DriftLabels, Gauge>,
}

impl DriftMetrics {
    /// Sets the distances; there is none where too little was seen to tell, so that no alarm is founded on that.
    pub(super) fn set(&self, model: &str, summary: &Summary) {
        for tensor in &summary.tensors {
            let labels = DriftLabels {
                model: model.to_owned(),
                tensor: tensor.name.to_owned(),
                side: tensor.side.into(),
                kind: tensor.kind.into(),
            };
            self.count
                .get_or_create(&labels)
                .set(i64::try_from(tensor.count).unwrap_or(i64::MAX));
            let is_founded = tensor.verdict != Verdict::TooFew;
            for (family, value) in [(&self.psi, tensor.psi), (&self.ks, tensor.ks)] {
                match value.filter(|_| is_founded) {
                    Some(value) => {
                        family.get_or_create(&labels).set(value);
                    }
                    None => {
                        family.remove(&labels);
                    }
                }
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    pub(super) drift: DriftMetrics,
    pub(super) samples: SampleMetrics,
    pub(super) shadow: ShadowMetrics,
    /// Of traces, by what came of them.
    pub(super) spans: Family<SpanLabels, Counter>,
    requests: Counter,
    failures: Family<FailureLabels, Counter>,
    request_duration: Histogram,
    inference_duration: Histogram,
    queue_duration: Histogram,
    batch_size: Histogram,
    /// Of texts, padding left out.
    pub(super) tokens: Counter,
    pub(super) in_flight: Gauge,
    pub(super) ready: Gauge,
    load_duration: Gauge<f64, AtomicU64>,
    engine: Family<EngineLabels, Gauge>,
    model: Family<ModelLabels, Gauge>,
}

/// Metrics that are exposed as they are made.
struct Exposed(Registry);

impl Exposed {
    fn of<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    fn in_seconds<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register_with_unit(name, help, Unit::Seconds, metric.clone());
        metric
    }

    fn durations(&mut self, name: &str, help: &str) -> Histogram {
        // 10 µs to 42 s.
        self.in_seconds(name, help, Histogram::new(exponential_buckets(1e-5, 2.0, 23)))
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut exposed = Exposed(Registry::with_prefix("plimsoll_runtime"));
        Self {
            requests: exposed.of("requests", "Inference requests answered, failed ones included", Counter::default()),
            failures: exposed.of("request_failures", "Inference requests that failed, by reason", Family::default()),
            batch_size: exposed.of(
                "batch_size",
                "Rows of the batches that the engine computed",
                Histogram::new(exponential_buckets(1.0, 2.0, 11)),
            ),
            request_duration: exposed.durations("request_duration", "From an inference request's headers to its answer"),
            inference_duration: exposed.durations("inference_duration", "What the engine took for a batch"),
            queue_duration: exposed.durations("queue_duration", "How long a request waited for an engine"),
            shadow: ShadowMetrics {
                requests: exposed.of(
                    "shadow_requests",
                    "Copies of requests for another revision, by what came of them",
                    Family::default(),
                ),
                difference: exposed.of(
                    "shadow_difference",
                    "Largest difference of the other revision's outputs, relative to the largest absolute value of ours",
                    Histogram::new([1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0]),
                ),
                duration: exposed.durations("shadow_duration", "What the other revision took to answer"),
            },
            spans: exposed.of("spans", "Spans of traces, by what came of them", Family::default()),
            samples: SampleMetrics(exposed.of(
                "samples",
                "Requests that were to be written by --sample-to, by what became of them",
                Family::default(),
            )),
            drift: DriftMetrics {
                psi: exposed.of(
                    "drift_psi",
                    "Population stability index against what the optimiser recorded, where enough was seen: from 0.1 moderate, from 0.25 significant",
                    Family::default(),
                ),
                ks: exposed.of(
                    "drift_ks",
                    "Kolmogorov-Smirnov statistic against what the optimiser recorded, 0 to 1, where enough was seen",
                    Family::default(),
                ),
                count: exposed.of("drift_count", "What was looked at within --drift-window", Family::default()),
            },
            in_flight: exposed.of(
                "requests_in_flight",
                "Inference requests taken on and not yet answered",
                Gauge::default(),
            ),
            tokens: exposed.of(
                "tokens",
                "Tokens of the texts that the model was given, padding left out",
                Counter::default(),
            ),
            ready: exposed.of("ready", "1 while new traffic should come", Gauge::default()),
            load_duration: exposed.in_seconds("load_duration", "From the start of the process to ready", Gauge::default()),
            engine: exposed.of(
                "engine_info",
                "The engine that serves, and whether it is not the preferred one",
                Family::default(),
            ),
            model: exposed.of("model_info", "The model that is served", Family::default()),
            registry: exposed.0,
        }
    }
}

impl Metrics {
    /// With those of the device, where it is one that can be asked.
    pub(super) fn of(device: Device) -> Self {
        let mut metrics = Self::default();
        if let Some(gpu) = gpu::Gpu::of(device) {
            metrics.registry.register_collector(Box::new(gpu));
        }
        metrics
    }

    /// Counts a request that is answered.
    pub(super) fn answered(&self, took: Duration, failure: Option<Reason>) {
        self.requests.inc();
        self.request_duration.observe(took.as_secs_f64());
        if let Some(reason) = failure {
            self.failures.get_or_create(&FailureLabels { reason: reason.into() }).inc();
        }
    }

    /// Counts what the engine did for a request.
    pub(super) fn computed(&self, answer: &Answer) {
        self.queue_duration.observe(answer.queued.as_secs_f64());
        if answer.first {
            self.inference_duration.observe(answer.computed.as_secs_f64());
            self.batch_size.observe(answer.rows as f64);
        }
    }

    pub(super) fn loaded(&self, model: &Model, config: &Config, seconds: f64) {
        let engine = EngineLabels {
            engine: model.kind().to_string(),
            fallback: model.fell_back.to_string(),
        };
        self.engine.get_or_create(&engine).set(1);
        let manifest = model.manifest.as_ref();
        let labels = ModelLabels {
            name: config.name.clone(),
            version: config.version.clone(),
            source_digest: manifest.map_or_else(String::new, |manifest| manifest.source_digest.to_string()),
            toolchain: manifest.map_or_else(String::new, |manifest| manifest.toolchain.clone()),
        };
        self.model.get_or_create(&labels).set(1);
        self.load_duration.set(seconds);
        self.ready.set(1);
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}
