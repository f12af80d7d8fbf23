//! What the optimiser refuses. The reason is stable, the message says what to do, and what serves goes on serving.

use serde_json::{Value, json};

use crate::cluster::{Namespace, condition, digits_spec, fixture, push, try_apply};
use crate::traffic::infer;

#[test]
fn a_revision_that_the_operator_made_cannot_be_edited() {
    let namespace = Namespace::new("immutable");
    namespace.apply_model("digits", &digits_spec("v1"));
    let made = |revisions: &[&Value]| revisions.first().map(|revision| (*revision).clone());
    let mut revision = namespace.watch("mr").until("there is a revision", made);
    revision["spec"]["source"]["uri"] = json!("oci://elsewhere.example/m:v1");
    let metadata = revision["metadata"].as_object_mut().unwrap();
    // As from a file that somebody kept.
    for field in ["managedFields", "resourceVersion", "uid", "creationTimestamp", "generation"] {
        metadata.remove(field);
    }
    let refused = try_apply(&revision.to_string()).expect_err("an edit of a revision");
    assert!(
        refused.contains("a ModelRevision's spec never changes; change the ModelDeployment, which makes a new revision"),
        "{refused}"
    );
}

#[test]
fn a_result_outside_of_the_budget_is_never_served() {
    let namespace = Namespace::new("budget");
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    let serving = namespace.get(&["md", "digits"])["status"]["artifact"].clone();

    let mut greedy = digits_spec("v1");
    greedy["optimize"]["recipe"][0]["prune"]["amount"] = json!("97%");
    namespace.apply_model("digits", &greedy);
    let md = namespace.wait_reason("digits", "BudgetExceeded");
    let message = condition(&md, "Stalled")["message"].as_str().unwrap().to_owned();
    assert_measured(&message);
    assert_eq!(condition(&md, "Stalled")["status"], "True");
    assert_eq!(condition(&md, "Available")["status"], "True");
    assert_eq!((&md["status"]["artifact"], &md["status"]["revision"]), (&serving, &json!(1)));
    infer(&namespace.address("digits"), "digits").unwrap();
    let failed = namespace
        .items(&["mr"])
        .into_iter()
        .find(|mr| mr["status"]["phase"] == "Failed")
        .expect("a failed revision");
    assert_eq!(failed["metadata"]["labels"]["plimsoll.dev/revision"], "2");

    // And the way out is an ordinary one: the spec that was good.
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    assert_eq!(namespace.get(&["md", "digits"])["status"]["artifact"], serving);
}

/// Asserts that a message of a lost budget has figures that agree: `... fell by 12.34 points (98.4% -> 86.1% on 450 samples), maxAccuracyDrop
/// allows 1.00 ...`.
fn assert_measured(message: &str) {
    let between = |from: &str, to: &str| -> f64 {
        let rest = message.split_once(from).unwrap_or_else(|| panic!("no `{from}` in: {message}")).1;
        let number = rest.split_once(to).unwrap_or_else(|| panic!("no `{to}` in: {message}")).0;
        number
            .trim()
            .parse()
            .unwrap_or_else(|_| panic!("`{number}` is no number in: {message}"))
    };
    let (drop, before, after) = (
        between("fell by ", " points"),
        between("points (", "% ->"),
        between("% -> ", "% on 450 samples)"),
    );
    assert_eq!(before, 98.4, "{message}");
    assert!((before - after - drop).abs() < 0.11 && drop > 1.0, "{message}");
    assert!(message.contains("maxAccuracyDrop allows 1.00"), "{message}");
}

fn stalls(name: &str, spec: &Value, reason: &str, says: &[&str]) {
    let namespace = Namespace::new(name);
    namespace.apply_model("m", spec);
    let md = namespace.wait_reason("m", reason);
    let message = condition(&md, "Stalled")["message"].as_str().unwrap().to_owned();
    assert_eq!(condition(&md, "Stalled")["status"], "True", "{message}");
    for part in says {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    namespace.kubectl(&["wait", "--for=condition=failed", "job", "--all", "--timeout=60s"]);
    let pods = namespace.items(&["pods", "-l", "app.kubernetes.io/component=optimizer"]);
    assert_eq!(pods.len(), 1, "what cannot get better is not tried again");
    assert_eq!(namespace.items(&["jobs"]).len(), 1, "nor by another Job");
    let table = namespace.kubectl(&["get", "md", "m"]);
    assert!(table.lines().nth(1).unwrap().contains("False"), "{table}");
    assert_eq!(namespace.wait_event(reason)["type"], "Warning", "an Event tells of it, too");
}

#[test]
fn a_model_with_an_operator_that_no_engine_runs_names_it() {
    let file = fixture("models/unsupported/custom-operator.onnx");
    stalls(
        "operator",
        &json!({ "source": { "uri": push(&file, "e2e/unsupported:v1") } }),
        "UnsupportedOperator",
        &["Murmurate", "com.example.birds"],
    );
}

#[test]
fn a_file_that_is_no_model_is_named_for_what_it_is() {
    let file = fixture("models/unsupported/not-a-model.onnx");
    stalls(
        "no-model",
        &json!({ "source": { "uri": push(&file, "e2e/html:v1") } }),
        "UnreadableModel",
        &["web page"],
    );
}

#[test]
fn a_content_that_is_not_the_pinned_one_is_refused_with_both_digests() {
    let mut spec = digits_spec("v1");
    let other = format!("sha256:{}", "0".repeat(64));
    spec["source"]["digest"] = json!(other);
    let real = crate::cluster::digest(&fixture("models/digits/digits-v1.onnx"));
    stalls("digest", &spec, "DigestMismatch", &[&other, &real]);
}
