//! The commands that people type.

use serde_json::{Value, json};

use crate::cluster::{Namespace, SYSTEM, digits_spec, kubectl};

#[test]
fn get_answers_at_a_glance_and_scale_scales() {
    let namespace = Namespace::new("glance");
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    let table = namespace.kubectl(&["get", "md"]);
    let (head, row) = table.split_once('\n').unwrap();
    assert_eq!(
        head.split_whitespace().collect::<Vec<_>>(),
        ["NAME", "READY", "REVISION", "SIZE", "ACCURACY", "REPLICAS", "ENGINE", "AGE"]
    );
    for part in ["digits", "True", "281Ki -> ", "98.4% -> ", "1/1"] {
        assert!(row.contains(part), "`{part}` is not in\n{table}");
    }
    let wide = namespace.kubectl(&["get", "md", "-o", "wide"]);
    assert!(
        wide.contains("ENDPOINT") && wide.contains("http://digits.e2e-glance.svc/v2/models/digits") && wide.contains("Serving"),
        "{wide}"
    );
    let revisions = namespace.kubectl(&["get", "mr"]);
    assert!(revisions.contains("Serving") && revisions.contains("sha256:"), "{revisions}");

    namespace.kubectl(&["scale", "md/digits", "--replicas=2"]);
    namespace.wait_until("digits", "two replicas are ready", |md| md["status"]["readiness"] == "2/2");
    let scale: Value = serde_json::from_str(&kubectl(&[
        "get",
        "--raw",
        "/apis/plimsoll.dev/v1alpha1/namespaces/e2e-glance/modeldeployments/digits/scale",
    ]))
    .unwrap();
    assert_eq!((&scale["spec"]["replicas"], &scale["status"]["replicas"]), (&json!(2), &json!(2)));
    let selector = scale["status"]["selector"].as_str().unwrap().to_owned();
    assert_eq!(
        namespace.items(&["pods", "-l", &selector]).len(),
        2,
        "an autoscaler finds the pods by {selector}"
    );
    assert_eq!(namespace.items(&["mr"]).len(), 1, "scaling makes no revision");
}

/// The resource versions of all that the operator writes.
fn versions(namespace: &Namespace) -> Vec<(String, String)> {
    let kinds = "md,mr,jobs,deployments,services,poddisruptionbudgets,networkpolicies";
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let items = namespace.items(&[kinds]);
    items
        .iter()
        .map(|item| {
            (
                format!("{}/{}", text(&item["kind"]), text(&item["metadata"]["name"])),
                text(&item["metadata"]["resourceVersion"]),
            )
        })
        .collect()
}

#[test]
fn nothing_is_written_where_nothing_changed_nor_after_the_operator_restarts() {
    let namespace = Namespace::alone("no-op");
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    // The Job's own controller finishes its bookkeeping a moment after the model serves.
    namespace.kubectl(&["wait", "--for=condition=complete", "job", "--all", "--timeout=60s"]);
    std::thread::sleep(std::time::Duration::from_secs(3));
    let before = versions(&namespace);
    std::thread::sleep(std::time::Duration::from_secs(60));
    assert_eq!(versions(&namespace), before, "within a minute");
    kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/plimsoll-operator"]);
    kubectl(&["-n", SYSTEM, "rollout", "status", "deployment/plimsoll-operator", "--timeout=120s"]);
    std::thread::sleep(std::time::Duration::from_secs(8));
    assert_eq!(versions(&namespace), before, "after a restart of the operator");
}
