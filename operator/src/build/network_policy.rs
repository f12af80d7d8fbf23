//! The NetworkPolicies of a model: nobody reaches the Jobs; the runtimes are reached on their three ports and reach nobody.

use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use plimsoll_crds::{MODEL_LABEL, ModelDeployment};

use super::deployment::{GRPC_PORT, HTTP_PORT, METRICS_PORT};
use super::metadata::{Component, labels, metadata};
use crate::settings::Settings;

/// The NetworkPolicies of `model`.
#[must_use]
pub fn network_policies(model: &ModelDeployment, settings: &Settings) -> [NetworkPolicy; 2] {
    let ports = [HTTP_PORT, GRPC_PORT, METRICS_PORT].map(|port| NetworkPolicyPort {
        port: Some(IntOrString::Int(port)),
        protocol: Some("TCP".into()),
        end_port: None,
    });
    let ingress = vec![NetworkPolicyIngressRule {
        ports: Some(ports.to_vec()),
        from: None,
    }];
    // With image volumes the kubelet pulls, and a serving pod has nobody to talk to.
    let serving = if settings.image_volumes {
        vec!["Ingress", "Egress"]
    } else {
        vec!["Ingress"]
    };
    [
        policy(model, Component::Runtime, Some(ingress), &serving),
        policy(model, Component::Optimizer, None, &["Ingress"]),
    ]
}

fn policy(model: &ModelDeployment, component: Component, ingress: Option<Vec<NetworkPolicyIngressRule>>, types: &[&str]) -> NetworkPolicy {
    let name = model.name_any();
    let role: &str = component.into();
    NetworkPolicy {
        metadata: metadata(format!("{name}-{role}"), model, labels(&name, component)),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector {
                match_labels: Some(
                    [
                        (MODEL_LABEL.to_owned(), name),
                        ("app.kubernetes.io/component".to_owned(), role.to_owned()),
                    ]
                    .into(),
                ),
                ..LabelSelector::default()
            }),
            ingress,
            policy_types: Some(types.iter().map(|kind| (*kind).to_owned()).collect()),
            ..NetworkPolicySpec::default()
        }),
    }
}
