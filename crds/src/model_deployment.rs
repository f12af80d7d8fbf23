//! ModelDeployment: what a user writes.
#![allow(clippy::duplicated_attributes, reason = "each printer column repeats the keys of the others")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Accelerator, Autoscaling, Optimize, RevisionTemplate, Rollout, Route, Runtime, Source};

/// A model, the budget within which it may be compressed, and how it is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "plimsoll.dev",
    version = "v1alpha1",
    kind = "ModelDeployment",
    plural = "modeldeployments",
    shortname = "md",
    category = "plimsoll",
    namespaced,
    status = "ModelDeploymentStatus",
    derive = "PartialEq",
    doc = "A model, the budget within which it may be compressed, and how it is served. Each change of source, optimize, runtime or accelerator makes a ModelRevision; applying an older state again undoes it.",
    scale(spec_replicas_path = ".spec.replicas", status_replicas_path = ".status.replicas", label_selector_path = ".status.selector"),
    validation = Rule::new("self.metadata.name.size() <= 40").message("a ModelDeployment's name has at most 40 characters, for its revisions and pods carry it with a suffix; choose a shorter name"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Whether this generation serves"),
    printcolumn(name = "Revision", type_ = "integer", json_path = ".status.revision", description = "Number of the revision in service"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.size", description = "Size of the model before and after"),
    printcolumn(name = "Accuracy", type_ = "string", json_path = ".status.accuracy", description = "The metric before and after"),
    printcolumn(name = "Replicas", type_ = "string", json_path = ".status.readiness", description = "Ready and desired replicas"),
    printcolumn(name = "Engine", type_ = "string", json_path = ".status.engine", description = "The engine that serves"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", description = "Where it stands", priority = 1),
    printcolumn(name = "Fidelity", type_ = "string", json_path = ".status.fidelity", description = "Least fidelity of any output to the original model", priority = 1),
    printcolumn(name = "Endpoint", type_ = "string", json_path = ".status.endpoint", description = "Address inside of the cluster", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!(has(self.replicas) && has(self.autoscaling))",
     "message": "set either replicas (a fixed number) or autoscaling (a range), not both"},
]))]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentSpec {
    /// Where the original model lies.
    pub source: Source,

    /// How the model is made smaller and faster, and what that may cost. When left out, the model is checked and packaged as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimize: Option<Optimize>,

    /// How the model is served. When left out, the defaults of its fields hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Runtime>,

    /// The devices that each serving pod needs. When left out, the model is served on CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,

    /// Serving pods, 0 to 1000. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: Option<i32>,

    /// Replicas that follow the load, instead of a fixed number. When left out, `replicas` holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,

    /// How traffic moves from one revision to the next. When left out, the defaults of its fields hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,

    /// The way in from outside of the cluster. When left out, there is a Service alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<Route>,

    /// Revisions kept besides the ones in use, 0 to 100. Default: 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub revision_history_limit: Option<i32>,

    /// Stops new revisions and rollouts; what serves goes on serving. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
}

impl ModelDeploymentSpec {
    /// The part of the spec whose change makes a revision.
    #[must_use]
    pub fn revision_template(&self) -> RevisionTemplate {
        RevisionTemplate {
            source: self.source.clone(),
            optimize: self.optimize.clone(),
            runtime: self.runtime.clone(),
            accelerator: self.accelerator.clone(),
        }
    }
}

/// Where a ModelDeployment stands.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentStatus {
    /// The generation that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Number of the revision in service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<i64>,

    /// Name of the ModelRevision in service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving_revision: Option<String>,

    /// Name of the ModelRevision that this generation asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_revision: Option<String>,

    /// Digest of the artifact in service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<String>,

    /// Serving pods of all revisions.
    #[serde(default)]
    pub replicas: i32,

    /// Serving pods of all revisions that are ready.
    #[serde(default)]
    pub ready_replicas: i32,

    /// Ready and desired replicas, `2/2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<String>,

    /// The serving pods' label selector, for autoscalers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,

    /// Size of the model before and after, `1.2Mi -> 310Ki`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,

    /// The metric before and after, `98.1% -> 97.9%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<String>,

    /// Least cosine similarity of any output to the original model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<String>,

    /// The engine that serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,

    /// Address inside of the cluster, speaking the Open Inference Protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,

    /// Ready, Reconciling, Stalled, Optimized, Available, RolledOut.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]), length(max = 16))]
    pub conditions: Vec<Condition>,
}
