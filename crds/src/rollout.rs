//! `spec.rollout`: how traffic moves from one revision to the next.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use plimsoll_package::units::{Duration, Percentage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How traffic moves from one revision to the next.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.maxSurge) || !has(self.maxUnavailable) || !(string(self.maxSurge) in ['0', '0%'] && string(self.maxUnavailable) in ['0', '0%'])",
     "message": "maxSurge and maxUnavailable must not both be 0, or no pod could ever be replaced"},
    {"rule": "!has(self.maxSurge) || !(string(self.maxSurge) in ['0', '0%']) || has(self.maxUnavailable)",
     "message": "maxSurge: 0 needs maxUnavailable of at least 1, whose default is 0"},
    {"rule": "[has(self.maxSurge) ? string(self.maxSurge) : '1', has(self.maxUnavailable) ? string(self.maxUnavailable) : '0'].all(x, x.matches('^([0-9]{1,4}|[0-9]{1,2}%|100%)$'))",
     "message": "maxSurge and maxUnavailable are a number of pods, 0 to 9999, or a percentage from 0% to 100%"},
    {"rule": "!has(self.steps) || (has(self.strategy) && self.strategy == 'Canary')",
     "message": "steps belong to strategy: Canary"},
]))]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// The strategy. Default: Rolling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,

    /// Pods above the desired number during a rollout, over all revisions: a number or a percentage, rounded up. 0 where devices are
    /// scarce. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_surge: Option<IntOrString>,

    /// Pods below the desired number during a rollout, over all revisions: a number or a percentage, rounded down. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_unavailable: Option<IntOrString>,

    /// Longest time without progress, after which the rollout is `Stalled` with reason `ProgressDeadlineExceeded`, at least `"1s"`. The older
    /// revision serves on, and the rollout ends well should a pod become ready later. Default: `"10m"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Duration>,

    /// Goes back to the last good revision when the rollout fails. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub automatic_rollback: Option<bool>,

    /// The steps of a canary. At most 16. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub steps: Vec<RolloutStep>,

    /// What must hold for a step to pass. Default: nothing but that the pods are ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub analysis: Option<Analysis>,
}

/// How traffic moves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display)]
#[schemars(description = "")]
pub enum Strategy {
    /// Pod by pod; both revisions serve meanwhile.
    #[default]
    Rolling,
    /// By growing shares of traffic.
    Canary,
    /// The new revision is brought up whole, then takes all traffic at once.
    BlueGreen,
    /// The new revision gets copies of requests, whose answers are compared and dropped.
    Shadow,
    /// The old revision goes first; nothing serves meanwhile.
    Recreate,
}

/// One step of a canary; exactly one key is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.weight) != has(self.pause)",
     "message": "each step has exactly one key: weight or pause"},
]))]
#[serde(rename_all = "camelCase")]
pub struct RolloutStep {
    /// The share of traffic that the new revision gets, `"0%"` to `"100%"`. When left out, the step is a pause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Percentage>,
    /// How long to wait. When left out, the step is a weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Duration>,
}

/// What must hold for a step to pass.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Analysis {
    /// Largest share of failed requests, `"0%"` to `"100%"`. Default: not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_error_rate: Option<Percentage>,
    /// Largest 99th percentile of the latency. Default: not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_latency_p99: Option<Duration>,
}
