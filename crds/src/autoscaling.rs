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

    /// What is kept at which level; the metric that asks for most replicas wins. At most 4. When left out, nothing drives the replicas.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4))]
    pub metrics: Vec<MetricTarget>,

    /// How long without a request until the last replica goes. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_to_zero_after: Option<Duration>,

    /// How fast replicas are added and taken away, in the words of a HorizontalPodAutoscaler. Default: added at once, taken away once the
    /// load has been low for 300 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behavior: Option<ScalingBehavior>,
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

/// How fast replicas are added and taken away; its fields are those of a HorizontalPodAutoscaler's `behavior`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScalingBehavior {
    /// How replicas are added. Default: no stabilisation, and the greater of 4 pods and 100 percent in 15 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_up: Option<ScalingRules>,

    /// How replicas are taken away. Default: a stabilisation of 300 seconds, and 100 percent in 15 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_down: Option<ScalingRules>,
}

/// How fast replicas change in one direction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScalingRules {
    /// How far back recommendations count, of which the most cautious is followed, in seconds, 0 to 3600. Default: 0 for `scaleUp`, 300 for
    /// `scaleDown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub stabilization_window_seconds: Option<u32>,

    /// Which of the policies holds. Default: Max.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select_policy: Option<PolicySelection>,

    /// Limits of the change in a time. At most 8. Default: those that are named at `scaleUp` and `scaleDown`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub policies: Vec<ScalingPolicy>,
}

/// Which of several policies holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display)]
#[schemars(description = "")]
pub enum PolicySelection {
    /// The one that allows the greatest change.
    Max,
    /// The one that allows the smallest change.
    Min,
    /// None: replicas never change in this direction.
    Disabled,
}

/// The most that replicas may change in a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScalingPolicy {
    /// What `value` counts.
    #[serde(rename = "type")]
    pub type_: ScalingUnit,
    /// The change: pods, or percent of the current replicas. 1 to 100000.
    #[schemars(range(min = 1, max = 100_000))]
    pub value: u32,
    /// The time in which it may happen, in seconds, 1 to 1800.
    #[schemars(range(min = 1, max = 1800))]
    pub period_seconds: u32,
}

/// What a policy counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display)]
pub enum ScalingUnit {
    /// Pods.
    Pods,
    /// Percent of the current replicas.
    Percent,
}
