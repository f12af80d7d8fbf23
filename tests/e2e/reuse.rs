//! Artifacts are of contents: the same content in the same way is optimised once, and a tag that moved is a new one.

use serde_json::json;

use crate::cluster::{Namespace, digest, digits_spec, fixture, pinned_spec, push};

#[test]
fn a_pinned_model_that_was_optimised_before_needs_no_job() {
    let namespace = Namespace::new("pinned");
    namespace.apply_model("digits", &pinned_spec("v1"));
    namespace.wait_ready("digits");
    let artifact = namespace.get(&["md", "digits"])["status"]["artifact"].clone();
    namespace.kubectl(&["delete", "md", "digits", "--cascade=foreground"]);
    namespace.apply_model("digits", &pinned_spec("v1"));
    namespace.wait_ready("digits");
    assert_eq!(namespace.get(&["md", "digits"])["status"]["artifact"], artifact);
    assert!(namespace.items(&["jobs"]).is_empty(), "no Job runs where the artifact is there");
    assert_eq!(namespace.items(&["mr"])[0]["status"]["reused"], true);

    // Another ModelDeployment of the same content shares it.
    namespace.apply_model("copy", &pinned_spec("v1"));
    namespace.wait_ready("copy");
    assert_eq!(namespace.get(&["md", "copy"])["status"]["artifact"], artifact);
    assert!(namespace.items(&["jobs"]).is_empty());
}

#[test]
fn a_tag_is_resolved_first_and_never_serves_what_it_pointed_to_before() {
    let namespace = Namespace::new("moved");
    let source = push(&fixture("models/digits/digits-v1.onnx"), "e2e/moving:latest");
    let spec = || {
        let mut spec = digits_spec("v1");
        spec["source"]["uri"] = json!(source);
        spec
    };
    namespace.apply_model("digits", &spec());
    namespace.wait_ready("digits");
    let first = namespace.items(&["mr"])[0]["status"].clone();
    assert_eq!(first["sourceDigest"], digest(&fixture("models/digits/digits-v1.onnx")));
    let first_job = namespace.items(&["jobs"])[0].clone();

    namespace.kubectl(&["delete", "md", "digits", "--cascade=foreground"]);
    namespace.apply_model("digits", &spec());
    namespace.wait_ready("digits");
    let again = namespace.items(&["mr"])[0]["status"].clone();
    assert_eq!((&again["artifact"], &again["reused"]), (&first["artifact"], &json!(true)));
    let job = namespace.items(&["jobs"]);
    assert_eq!(job.len(), 1, "a Job resolves the tag each time");
    assert_ne!(job[0]["metadata"]["uid"], first_job["metadata"]["uid"]);

    namespace.kubectl(&["delete", "md", "digits", "--cascade=foreground"]);
    push(&fixture("models/digits/digits-v2.onnx"), "e2e/moving:latest");
    namespace.apply_model("digits", &spec());
    namespace.wait_ready("digits");
    let moved = namespace.items(&["mr"])[0]["status"].clone();
    assert_eq!(moved["sourceDigest"], digest(&fixture("models/digits/digits-v2.onnx")));
    assert_ne!(moved["artifact"], first["artifact"]);
}
