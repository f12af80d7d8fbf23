//! Where pods land, and what is said where they cannot.

use serde_json::{Value, json};

use crate::cluster::{Namespace, condition, digits_spec, eventually, kubectl, text};

/// A node that offers devices but lacks the label that says so; nothing runs on it.
struct Decoy;

impl Decoy {
    const NAME: &str = "e2e-decoy";

    fn join() -> Self {
        kubectl(&["delete", "node", Self::NAME, "--ignore-not-found"]);
        // The taint of nodes with devices keeps away what asks for none.
        crate::cluster::apply(&json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": Self::NAME, "labels": { "kubernetes.io/hostname": Self::NAME } },
            "spec": { "taints": [{ "key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule" }] },
        }));
        let decoy = Self;
        let now = kubectl(&["get", "node", Self::NAME, "-o", "jsonpath={.metadata.creationTimestamp}"]);
        let room = json!({ "cpu": "64", "memory": "256Gi", "pods": "100", "nvidia.com/gpu": "8" });
        let ready =
            json!({ "type": "Ready", "status": "True", "reason": "Pretended", "lastHeartbeatTime": now, "lastTransitionTime": now });
        let status = json!({ "status": { "capacity": room, "allocatable": room, "conditions": [ready] } });
        let patch = status.to_string();
        kubectl(&["patch", "node", Self::NAME, "--subresource=status", "--type=merge", "-p", &patch]);
        // Until the node controller has read it, the node counts as not ready.
        eventually("the decoy is ready", || {
            kubectl(&["get", "node", Self::NAME, "-o", "jsonpath={.spec.taints[*].key}"]) == "nvidia.com/gpu"
        });
        decoy
    }
}

impl Drop for Decoy {
    fn drop(&mut self) {
        kubectl(&["delete", "node", Self::NAME, "--wait=false"]);
    }
}

#[test]
fn pods_land_on_the_node_with_the_label_and_get_a_device_each() {
    let namespace = Namespace::new("landing");
    let _decoy = Decoy::join();
    let mut spec = digits_spec("v1");
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu" });
    spec["replicas"] = json!(2);
    namespace.apply_model("digits", &spec);
    namespace.wait_ready("digits");
    let pods = namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"]);
    assert_eq!(pods.len(), 2);
    for pod in &pods {
        assert_eq!(pod["spec"]["nodeSelector"], json!({ "nvidia.com/gpu.present": "true" }));
        let resources = &pod["spec"]["containers"][0]["resources"];
        assert_eq!(
            (&resources["limits"]["nvidia.com/gpu"], &resources["requests"]["nvidia.com/gpu"]),
            (&json!("1"), &json!("1"))
        );
        let node: Value = serde_json::from_str(&kubectl(&["get", "node", text(&pod["spec"]["nodeName"]), "-o", "json"])).unwrap();
        assert_eq!(
            node["metadata"]["labels"]["nvidia.com/gpu.present"], "true",
            "{}",
            node["metadata"]["name"]
        );
        let allocatable: u32 = text(&node["status"]["allocatable"]["nvidia.com/gpu"]).parse().unwrap();
        assert!(allocatable >= 2, "{allocatable}");
        assert_eq!(pod["status"]["phase"], "Running");
    }
}

#[test]
fn pods_wait_in_words_where_no_node_has_the_label() {
    let namespace = Namespace::new("nowhere");
    let mut spec = digits_spec("v1");
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu", "nodeLabels": { "nvidia.com/gpu.product": "H900" } });
    namespace.apply_model("digits", &spec);
    let md = namespace.wait_reason("digits", "Unschedulable");
    let ready = condition(&md, "Ready");
    let pod = &namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"])[0];
    assert_eq!(pod["status"]["phase"], "Pending");
    assert!(pod["spec"]["nodeName"].is_null(), "{}", pod["spec"]["nodeName"]);
    for words in [
        "nodes are available",
        "didn't match Pod's node affinity/selector",
        text(&pod["metadata"]["name"]),
    ] {
        assert!(text(&ready["message"]).contains(words), "`{words}` is not in: {ready}");
    }
    for (kind, status) in [
        ("Ready", "False"),
        ("Available", "False"),
        ("Reconciling", "True"),
        ("Stalled", "False"),
        ("Optimized", "True"),
    ] {
        assert_eq!(condition(&md, kind)["status"], status, "{kind}");
    }
    let row = namespace.kubectl(&["get", "md", "digits", "--no-headers"]);
    assert!(row.contains("False") && row.contains("0/1"), "{row}");

    // The way out: a label that a node has.
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu" });
    namespace.apply_model("digits", &spec);
    namespace.wait_ready("digits");
    let pods = namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"]);
    let ready = |pod: &&Value| pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null();
    assert_eq!(pods.iter().filter(ready).count(), 1);
}

#[test]
fn more_devices_than_there_are_leave_the_rest_pending() {
    let namespace = Namespace::new("scarce");
    let mut spec = digits_spec("v1");
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu", "count": 16 });
    namespace.apply_model("digits", &spec);
    let md = namespace.wait_reason("digits", "Unschedulable");
    assert!(
        text(&condition(&md, "Ready")["message"]).contains("Insufficient nvidia.com/gpu"),
        "{}",
        condition(&md, "Ready")
    );
}
