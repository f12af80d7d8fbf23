//! The commands that people type.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cluster::{Namespace, digits_spec, kubectl, text};

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

#[test]
fn nothing_is_written_where_nothing_changed() {
    let namespace = Namespace::new("no-op");
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    namespace.wait_settled();
    let (budgets, touched) = (namespace.watch("poddisruptionbudgets"), "plimsoll.dev/e2e-touched");
    let others = |name: &str| name != "PodDisruptionBudget/digits";
    let begun = Instant::now();
    let mut before = namespace.versions();
    // A minute, in which the operator passes over the model again and again: each time its object was touched, and one child is missing.
    // That the child comes back proves that the pass took place.
    while begun.elapsed() < Duration::from_secs(60) {
        let touch = format!("{touched}={}", begun.elapsed().as_millis());
        let version = namespace.kubectl(&[
            "annotate",
            "--overwrite",
            "md/digits",
            &touch,
            "-o",
            "jsonpath={.metadata.resourceVersion}",
        ]);
        before.insert("ModelDeployment/digits".into(), version);
        let gone = text(&budgets.now()[0]["metadata"]["uid"]).to_owned();
        namespace.kubectl(&["delete", "poddisruptionbudget", "digits"]);
        budgets.until("the missing child is back", |budgets| {
            budgets.iter().any(|budget| budget["metadata"]["uid"] != *gone).then_some(())
        });
        std::thread::sleep(Duration::from_secs(4));
        let mut now = namespace.versions();
        before.retain(|name, _| others(name));
        now.retain(|name, _| others(name));
        assert_eq!(now, before, "after {:?}", begun.elapsed());
    }
    assert!(before.len() >= 8, "of each kind something: {before:?}");
}
