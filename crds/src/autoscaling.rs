//! `spec.autoscaling`: replicas that follow the load.

use plimsoll_package::units::Duration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Replicas that follow the load, instead of the fixed `spec.replicas`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.minReplicas) || self.minReplicas <= self.maxReplicas",
     "message": "minReplicas must not be greater than maxReplicas"},
    {"rule": "!has(self.scaleToZeroAfter) || (has(self.minReplicas) && self.minReplicas == 0)",
     "message": "scaleToZeroAfter needs minReplicas: 0"},
]))]
#[serde(rename_all = "camelCase")]
pub struct Autoscaling {
    /// Fewest replicas, 0 to 1000. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub min_replicas: Option<i32>,

    /// Most replicas, 1 to 1000.
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: i32,

    /// What is kept at which level; the metric that asks for most replicas wins. At most 4.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4))]
    pub metrics: Vec<MetricTarget>,

    /// How long without a request until the last replica goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_to_zero_after: Option<Duration>,
}

/// A metric and the level that it is kept at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MetricTarget {
    /// The metric, a mean over the replicas.
    pub metric: ScaleMetric,
    /// Its target: requests, percent of the CPU request, or milliseconds. 1 to 1000000.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub target: u32,
}

/// What replicas may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display)]
pub enum ScaleMetric {
    /// Requests in flight per replica.
    Concurrency,
    /// Requests a second per replica.
    RequestRate,
    /// CPU use, in percent of the request.
    Cpu,
    /// Milliseconds that a request waits before its inference.
    QueueTime,
}
