//! Revisions: the next one under load, undo, and the history.

use serde_json::{Value, json};

use crate::cluster::{Namespace, digits_spec};
use crate::traffic::Load;

#[test]
fn a_second_revision_and_its_undo_lose_no_request() {
    let namespace = Namespace::new("revisions");
    let mut spec = digits_spec("v1");
    spec["replicas"] = json!(2);
    namespace.apply_model("digits", &spec);
    namespace.wait_ready("digits");
    let first = namespace.get(&["md", "digits"]);
    assert_eq!(
        (&first["status"]["revision"], &first["status"]["readiness"]),
        (&json!(1), &json!("2/2"))
    );

    let load = Load::start(&namespace.address("digits"), "digits");
    let mut next = digits_spec("v2");
    next["replicas"] = json!(2);
    namespace.apply_model("digits", &next);
    namespace.wait_ready("digits");
    let during_rollout = load.answered();
    assert!(
        during_rollout > 20,
        "only {during_rollout} requests went through during the rollout"
    );
    let second = namespace.get(&["md", "digits"]);
    assert_eq!(second["status"]["revision"], 2);
    assert_ne!(second["status"]["artifact"], first["status"]["artifact"]);

    // Undo is the older manifest again: no Job, the same artifact, the next number.
    let jobs_before = namespace.items(&["jobs"]).len();
    namespace.apply_model("digits", &spec);
    namespace.wait_ready("digits");
    let third = namespace.get(&["md", "digits"]);
    assert_eq!(third["status"]["revision"], 3);
    assert_eq!(third["status"]["artifact"], first["status"]["artifact"]);
    assert_eq!(third["status"]["servingRevision"], first["status"]["servingRevision"]);
    assert_eq!(namespace.items(&["jobs"]).len(), jobs_before, "an undo needs no Job");
    assert!(load.answered() > during_rollout + 20, "the load went on during the undo");
    load.expect_no_failure();

    let mut numbers: Vec<String> = namespace
        .items(&["mr"])
        .iter()
        .map(|mr| mr["metadata"]["labels"]["plimsoll.dev/revision"].as_str().unwrap().to_owned())
        .collect();
    numbers.sort();
    assert_eq!(numbers, ["2", "3"]);
}

#[test]
fn revisions_beyond_the_history_limit_go_with_all_that_they_own() {
    let namespace = Namespace::new("history");
    for engine in ["Tract", "OnnxRuntime", "Auto"] {
        let mut spec = digits_spec("v1");
        spec["runtime"] = json!({ "engine": engine });
        spec["revisionHistoryLimit"] = json!(1);
        namespace.apply_model("digits", &spec);
        namespace.wait_ready("digits");
    }
    for kind in ["mr", "deployments"] {
        let two = |objects: &[&Value]| (objects.len() == 2).then_some(());
        namespace.watch(kind).until(&format!("only two {kind} are left"), two);
    }
}
