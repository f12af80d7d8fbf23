//! What is refused: by the apiserver, by the operator, by the optimiser. The reason is stable, the message says what to do, and what serves
//! goes on serving.

use serde_json::{Value, json};

use crate::cluster::{Namespace, condition, digits_spec, fixture, push, try_apply};
use crate::traffic::infer;

#[test]
fn every_rule_of_the_api_says_what_to_write_instead() {
    let _namespace = Namespace::new("rules");
    let mut checked = 0;
    for entry in std::fs::read_dir(fixture("fixtures/invalid")).unwrap() {
        let path = entry.unwrap().path();
        let manifest = std::fs::read_to_string(&path).unwrap();
        let expected = manifest
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("# expect: "))
            .expect("the first line names the message");
        let refused = try_apply(&manifest).expect_err(&format!("{} was accepted", path.display()));
        assert!(
            refused.contains(expected),
            "{}: expected `{expected}` in\n{refused}",
            path.display()
        );
        checked += 1;
    }
    assert!(checked > 20, "only {checked} fixtures");
}

#[test]
fn the_valid_fixtures_are_accepted() {
    let namespace = Namespace::new("valid");
    for entry in std::fs::read_dir(fixture("fixtures/valid")).unwrap() {
        let path = entry.unwrap().path();
        namespace.kubectl(&["apply", "--dry-run=server", "-f", path.to_str().unwrap()]);
    }
}

#[test]
fn a_field_whose_machinery_is_not_there_is_refused_in_words() {
    let namespace = Namespace::new("unsupported-field");
    let mut spec = digits_spec("v1");
    spec["autoscaling"] = json!({ "maxReplicas": 3 });
    namespace.apply_model("digits", &spec);
    let md = namespace.wait_reason("digits", "Unsupported");
    assert_eq!(condition(&md, "Stalled")["status"], "True");
    let message = condition(&md, "Stalled")["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("spec.autoscaling is not supported by this version; set spec.replicas"),
        "{message}"
    );
    assert!(namespace.items(&["jobs"]).is_empty());
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
