//! Where pods land, and what is said where they cannot.

use serde_json::json;

use crate::cluster::{Namespace, condition, digits_spec};

#[test]
fn pods_wait_in_words_where_no_node_has_the_label() {
    let namespace = Namespace::new("nowhere");
    let mut spec = digits_spec("v1");
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu", "nodeLabels": { "nvidia.com/gpu.product": "H900" } });
    namespace.apply_model("digits", &spec);
    let md = namespace.wait_reason("digits", "Unschedulable");
    let message = condition(&md, "Ready")["message"].as_str().unwrap().to_owned();
    assert!(message.contains("nodes are available"), "{message}");
    let pod = &namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"])[0];
    assert_eq!(pod["status"]["phase"], "Pending");

    // The way out: a label that a node has.
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu" });
    namespace.apply_model("digits", &spec);
    namespace.wait_ready("digits");
    let pod = &namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"])[0];
    assert_eq!(pod["status"]["phase"], "Running");
}

#[test]
fn more_devices_than_there_are_leave_the_rest_pending() {
    let namespace = Namespace::new("scarce");
    let mut spec = digits_spec("v1");
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu", "count": 16 });
    namespace.apply_model("digits", &spec);
    let md = namespace.wait_reason("digits", "Unschedulable");
    assert!(
        condition(&md, "Ready")["message"].as_str().unwrap().contains("nvidia.com/gpu"),
        "{}",
        condition(&md, "Ready")
    );
}
