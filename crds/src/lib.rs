//! The Kubernetes API of Plimsoll, group `plimsoll.dev/v1alpha1`.
//!
//! [`ModelDeployment`] is to [`ModelRevision`] what a Deployment is to a ReplicaSet: the user writes the one, every change of what it
//! serves makes an immutable other. The documentation of each field becomes `kubectl explain`.

mod accelerator;
mod autoscaling;
mod condition;
mod model_deployment;
mod model_revision;
mod optimize;
mod rollout;
mod route;
mod runtime;
mod source;

pub use accelerator::{Accelerator, Fallback};
pub use autoscaling::{Autoscaling, MetricTarget, PolicySelection, ScaleMetric, ScalingBehavior, ScalingPolicy, ScalingRules, ScalingUnit};
pub use condition::ConditionType;
pub use model_deployment::{ModelDeployment, ModelDeploymentSpec, ModelDeploymentStatus};
pub use model_revision::{ModelRevision, ModelRevisionSpec, ModelRevisionStatus, RevisionPhase, RevisionTemplate};
pub use optimize::{JobSettings, Optimize};
pub use rollout::{Analysis, Rollout, RolloutStep, Strategy};
pub use route::{ParentReference, Route};
pub use runtime::{Amount, Batching, EngineChoice, EnvironmentVariable, LabelValue, PodOverlay, Resources, Runtime};
pub use source::{Source, Verify};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

/// The API group.
pub const GROUP: &str = "plimsoll.dev";

/// The label of every object that belongs to a ModelDeployment; its value is the ModelDeployment's name.
pub const MODEL_LABEL: &str = "plimsoll.dev/model";

/// The label of a ModelRevision that holds its number, and of the objects of a revision.
pub const REVISION_LABEL: &str = "plimsoll.dev/revision";

/// The label of the objects of a ModelRevision; its value is the ModelRevision's name.
pub const REVISION_NAME_LABEL: &str = "plimsoll.dev/revision-name";

/// The CustomResourceDefinitions as YAML, by file name.
#[must_use]
pub fn custom_resource_definitions() -> Vec<(&'static str, String)> {
    let yaml = |crd: CustomResourceDefinition| {
        let mut crd = serde_json::to_value(&crd).expect("a CRD is plain data");
        without_rust_formats(&mut crd);
        serde_yaml_ng::to_string(&crd).expect("a CRD is plain data")
    };
    vec![
        ("modeldeployments.yaml", yaml(ModelDeployment::crd())),
        ("modelrevisions.yaml", yaml(ModelRevision::crd())),
    ]
}

/// Drops the formats that schemars gives unsigned integers: the apiserver does not know them and warns at each apply.
fn without_rust_formats(schema: &mut serde_json::Value) {
    match schema {
        serde_json::Value::Object(object) => {
            if object
                .get("format")
                .is_some_and(|format| format.as_str().is_some_and(|format| format.starts_with("uint")))
            {
                object.remove("format");
            }
            object.values_mut().for_each(without_rust_formats);
        }
        serde_json::Value::Array(array) => array.iter_mut().for_each(without_rust_formats),
        _ => {}
    }
}
