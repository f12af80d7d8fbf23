//! `spec.runtime`: how the model is served.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, Toleration, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use plimsoll_package::manifest::Engine;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// How the model is served.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Runtime {
    /// The inference engine. The optimisation measures on it alone. Default: Auto, the one that measured fastest during optimisation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineChoice>,

    /// Joining of concurrent requests into one inference. Default: up to 32 samples, where they wait anyway and batches have measured faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batching: Option<Batching>,

    /// Requests and limits of the serving container, without the accelerator, which `spec.accelerator` adds. Default: requests of 100m CPU
    /// and 128Mi memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// The runtime's image. Default: the operator's at the time when the revision is made, which stays with the revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,

    /// Additions to the serving pods. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodOverlay>,
}

/// The inference engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display)]
#[schemars(description = "")]
pub enum EngineChoice {
    /// The one that measured fastest during optimisation.
    #[default]
    Auto,
    /// tract, in pure Rust.
    Tract,
    /// ONNX Runtime.
    OnnxRuntime,
}

impl EngineChoice {
    /// The engine that will serve, where that does not depend on what is measured.
    #[must_use]
    pub fn settled(self) -> Option<Engine> {
        match self {
            Self::Auto => None,
            Self::Tract => Some(Engine::Tract),
            Self::OnnxRuntime => Some(Engine::OnnxRuntime),
        }
    }
}

/// Joining of concurrent requests into one inference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Batching {
    /// Most samples of one inference, 1 to 4096. 1 turns batching off.
    #[schemars(range(min = 1, max = 4096))]
    pub max_size: u32,

    /// Longest time that a request waits for others to share its batch, in milliseconds, 0 to 1000. Default: 0, join only what already waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub max_delay_ms: Option<u32>,
}

/// Compute resources of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What the scheduler sets aside, such as `cpu: 500m`, `memory: 1Gi`. At most 8. Default: the limits, or what is named where these resources
    /// are asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 8))]
    pub requests: BTreeMap<String, Amount>,

    /// What the container may use at most. At most 8. Default: no limit.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 8))]
    pub limits: BTreeMap<String, Amount>,
}

/// A Kubernetes quantity, written as a number or a string: `1`, `"500m"`, `"2Gi"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Amount {
    /// A whole number.
    Number(i64),
    /// A number with a unit.
    Text(String),
}

impl From<&Amount> for Quantity {
    fn from(amount: &Amount) -> Self {
        match amount {
            Amount::Number(number) => Self(number.to_string()),
            Amount::Text(text) => Self(text.clone()),
        }
    }
}

impl JsonSchema for Amount {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "pattern": "^[0-9]{1,18}(\\.[0-9]{1,9})?(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][0-9]{1,2})?$",
            "maxLength": 32,
        })
    }
}

/// Additions to the serving pods, limited to what cannot weaken them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.labels) || self.labels.all(key, !key.startsWith('plimsoll.dev/') && !key.startsWith('app.kubernetes.io/'))",
     "message": "labels under plimsoll.dev/ and app.kubernetes.io/ are the operator's; choose other keys"},
    {"rule": "!has(self.env) || self.env.all(variable, !variable.name.startsWith('PLIMSOLL_') && variable.name != 'ORT_DYLIB_PATH' && !variable.name.startsWith('LD_'))",
     "message": "env must not set PLIMSOLL_*, ORT_DYLIB_PATH or LD_*; these are the runtime's own"},
]))]
#[serde(rename_all = "camelCase")]
pub struct PodOverlay {
    /// More labels. At most 16. Default: none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub labels: BTreeMap<String, LabelValue>,

    /// More tolerations. At most 16. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub tolerations: Vec<Toleration>,

    /// Affinity. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,

    /// Topology spread. At most 8. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,

    /// Name of a PriorityClass. Default: the cluster's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,

    /// More environment variables, of plain values, each name once. At most 64. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]), length(max = 64))]
    pub env: Vec<EnvironmentVariable>,
}

/// The value of a label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct LabelValue(#[schemars(length(max = 63))] pub String);

/// An environment variable of a plain value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnvironmentVariable {
    /// The variable's name.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// Its value.
    #[schemars(length(max = 4096))]
    pub value: String,
}
