//! What the optimiser refuses. The reason is stable, the message says what to do, and what serves goes on serving.

use serde_json::{Value, json};

use crate::cluster::{Namespace, condition, digits_spec, fixture, push};
use crate::traffic::infer;

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
    assert!(
        message.contains("maxAccuracyDrop") && message.contains('%') && message.contains("98.4"),
        "{message}"
    );
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

fn stalls(name: &str, spec: &Value, reason: &str, says: &[&str]) {
    let namespace = Namespace::new(name);
    namespace.apply_model("m", spec);
    let md = namespace.wait_reason("m", reason);
    let message = condition(&md, "Stalled")["message"].as_str().unwrap().to_owned();
    assert_eq!(condition(&md, "Stalled")["status"], "True", "{message}");
    for part in says {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    let pods = namespace.items(&["pods", "-l", "app.kubernetes.io/component=optimizer"]);
    assert_eq!(pods.len(), 1, "what cannot get better is not tried again");
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
