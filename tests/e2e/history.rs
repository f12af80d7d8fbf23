//! Revisions: the next one under load, undo, and the history.

use serde_json::json;

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
    namespace.wait_until("digits", "only two revisions are left", |_| namespace.items(&["mr"]).len() == 2);
    namespace.wait_until("digits", "only two Deployments are left", |_| {
        namespace.items(&["deployments"]).len() == 2
    });
}

#[test]
fn a_revisions_spec_cannot_be_edited() {
    let namespace = Namespace::new("immutable");
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    let mut revision = namespace.items(&["mr"])[0].clone();
    revision["spec"]["source"]["uri"] = json!("oci://elsewhere.example/m:v1");
    revision["metadata"]["managedFields"] = json!(null);
    let refused = crate::cluster::try_apply(&revision.to_string()).expect_err("an edit of a revision");
    assert!(
        refused.contains("a ModelRevision's spec never changes; change the ModelDeployment, which makes a new revision"),
        "{refused}"
    );
}
