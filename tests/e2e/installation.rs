//! Other ways to install: one namespace only, without image volumes, with a registry of one's own.

use serde_json::json;

use crate::cluster::{Namespace, REGISTRY, digits_spec, fixture, helm, kubectl};
use crate::traffic::infer;

#[test]
fn one_namespace_without_image_volumes_and_with_an_own_registry_serves_too() {
    // The cluster-wide operator must not work on this namespace as well, so it stands aside for the test.
    let namespace = Namespace::alone("namespaced");
    let chart = fixture("../charts/plimsoll");
    let chart = chart.to_str().unwrap();
    let _aside = Aside::stand();
    let repository = format!("{REGISTRY}/plimsoll/namespaced");
    let arguments = [
        "upgrade",
        "--install",
        "narrow",
        chart,
        "-n",
        &namespace.name,
        "--wait",
        "--timeout",
        "120s",
        "--set",
        "crds.install=false",
        "--set",
        &format!("watchNamespaces={{{}}}", namespace.name),
        "--set",
        "models.imageVolumes=never",
        "--set",
        "registry.internal.enabled=false",
        "--set",
        &format!("registry.external.repository={repository}"),
        "--set",
        "registry.external.plainHttp=true",
        "--set",
        "operator.replicas=1",
    ];
    helm(&arguments);
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    let pod = &namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"])[0];
    assert_eq!(pod["spec"]["initContainers"][0]["name"], "pull");
    assert_eq!(pod["spec"]["volumes"][0]["emptyDir"], json!({}));
    infer(&namespace.address("digits"), "digits").unwrap();
    let roles = kubectl(&["get", "clusterroles", "-o", "name"]);
    assert!(
        !roles.contains("narrow"),
        "an operator of one namespace needs no ClusterRole: {roles}"
    );
    helm(&["uninstall", "narrow", "-n", &namespace.name, "--wait"]);
}

/// The operator of the whole cluster while it stands aside; it comes back whatever becomes of the test.
struct Aside;

impl Aside {
    fn stand() -> Self {
        scale("0");
        Self
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        scale("2");
        let system = crate::cluster::SYSTEM;
        kubectl(&["-n", system, "rollout", "status", "deployment/plimsoll-operator", "--timeout=120s"]);
    }
}

fn scale(replicas: &str) {
    let system = crate::cluster::SYSTEM;
    kubectl(&["-n", system, "scale", "deployment/plimsoll-operator", "--replicas", replicas]);
}
