//! The PodDisruptionBudget of a model: a drained node takes one serving pod at a time.

use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use plimsoll_crds::{MODEL_LABEL, ModelDeployment};

use super::metadata::{Component, labels, metadata};

/// The PodDisruptionBudget of `model`.
#[must_use]
pub fn disruption_budget(model: &ModelDeployment) -> PodDisruptionBudget {
    let name = model.name_any();
    PodDisruptionBudget {
        metadata: metadata(name.clone(), model, labels(&name, Component::Runtime)),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            // A pod that is not ready protects nobody, and must not hold up a drain.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            selector: Some(LabelSelector {
                match_labels: Some(
                    [
                        (MODEL_LABEL.to_owned(), name),
                        ("app.kubernetes.io/component".to_owned(), "runtime".to_owned()),
                    ]
                    .into(),
                ),
                ..LabelSelector::default()
            }),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}
