//! What needs no container: the API's rules, what the operator makes of a model and what it refuses, and the commands that people type. No model
//! here is ever optimised: its source is nowhere.

use std::path::Path;

use serde_json::{Value, json};

use crate::cluster::{Namespace, apply, condition, fixture, kubectl, try_apply};

/// A source that no name server knows.
const NOWHERE: &str = "https://models.invalid/digits.onnx";

fn spec() -> Value {
    json!({ "source": { "uri": NOWHERE }, "optimize": { "recipe": [{ "prune": { "amount": "30%" } }] } })
}

/// Waits until as many objects of a kind belong to `model`, and returns them.
fn wait_count(namespace: &Namespace, kind: &str, model: &str, count: usize) -> Vec<Value> {
    namespace.watch(kind).until(&format!("{count} {kind} are {model}'s"), |objects| {
        let is_of_model = |object: &&&Value| object["metadata"]["labels"]["plimsoll.dev/model"] == model;
        let of_model: Vec<Value> = objects.iter().filter(is_of_model).map(|object| (*object).clone()).collect();
        (of_model.len() == count).then_some(of_model)
    })
}

/// That `applied` is refused in the words that the first line of the fixture says.
fn assert_refused(path: &Path, fixture: &str, applied: &str) {
    let expected = fixture
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("# expect: "))
        .expect("the first line names the message");
    let refused = try_apply(applied).expect_err(&format!("{} was accepted", path.display()));
    assert!(
        refused.contains(expected),
        "{}: expected `{expected}` in\n{refused}",
        path.display()
    );
}

#[test]
fn every_rule_of_the_api_says_what_to_write_instead() {
    let _namespace = Namespace::new("rules");
    let mut checked = 0;
    for entry in std::fs::read_dir(fixture("fixtures/invalid")).unwrap() {
        let path = entry.unwrap().path();
        let manifest = std::fs::read_to_string(&path).unwrap();
        assert_refused(&path, &manifest, &manifest);
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
fn every_rule_of_change_says_what_to_do_instead() {
    let namespace = Namespace::new("changes");
    let mut checked = 0;
    for entry in std::fs::read_dir(fixture("fixtures/update")).unwrap() {
        let path = entry.unwrap().path();
        let manifest = std::fs::read_to_string(&path).unwrap();
        let documents: Vec<Value> = manifest
            .split("\n---\n")
            .map(|document| {
                let mut object: Value = serde_yaml_ng::from_str(document).expect("YAML");
                object["metadata"]["namespace"] = json!(namespace.name);
                object
            })
            .collect();
        let [first, second] = &documents[..] else {
            panic!("{} holds no two documents", path.display())
        };
        apply(first);
        assert_refused(&path, &manifest, &second.to_string());
        checked += 1;
    }
    assert!(checked > 0, "no fixture");
}

#[test]
fn a_field_whose_machinery_is_not_there_is_refused_in_words() {
    let namespace = Namespace::new("unsupported-field");
    let mut unsupported = spec();
    unsupported["autoscaling"] = json!({ "maxReplicas": 3 });
    namespace.apply_model("digits", &unsupported);
    let md = namespace.wait_reason("digits", "Unsupported");
    assert_eq!(condition(&md, "Stalled")["status"], "True");
    let message = condition(&md, "Stalled")["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("spec.autoscaling is not supported by this version; set spec.replicas"),
        "{message}"
    );
    assert!(namespace.items(&["mr,jobs"]).is_empty());

    // The way out is the one that the message names.
    namespace.kubectl(&[
        "patch",
        "md",
        "digits",
        "--type=json",
        "-p",
        r#"[{"op":"remove","path":"/spec/autoscaling"}]"#,
    ]);
    wait_count(&namespace, "mr", "digits", 1);
}

#[test]
fn no_field_of_a_later_version_is_silently_ignored() {
    let namespace = Namespace::new("later");
    let manifest = std::fs::read_to_string(fixture("fixtures/valid/later.yaml")).unwrap();
    let later: Value = serde_yaml_ng::from_str(&manifest).unwrap();
    let groups = later["spec"].as_object().expect("a spec");
    for (group, fields) in groups.iter().filter(|(group, _)| *group != "optimize") {
        let mut one = spec();
        match one[group].as_object_mut() {
            Some(present) => present.extend(fields.as_object().expect("fields").clone()),
            None => one[group] = fields.clone(),
        }
        namespace.apply_model(&group.to_lowercase(), &one);
        let md = namespace.wait_reason(&group.to_lowercase(), "Unsupported");
        let message = condition(&md, "Stalled")["message"].as_str().unwrap().to_owned();
        assert!(message.contains(&format!("spec.{group}")), "{message}");
    }
    assert!(namespace.items(&["mr,jobs"]).is_empty());
}

#[test]
fn a_model_gets_one_revision_and_one_job_of_five_steps_without_a_token() {
    let namespace = Namespace::new("one-job");
    namespace.apply_model("digits", &spec());
    let revision = &wait_count(&namespace, "mr", "digits", 1)[0];
    let job = &wait_count(&namespace, "jobs", "digits", 1)[0];
    let md = namespace.get(&["md", "digits"]);
    assert_eq!(revision["metadata"]["labels"]["plimsoll.dev/revision"], "1");
    assert_eq!(revision["metadata"]["ownerReferences"][0]["uid"], md["metadata"]["uid"]);
    assert_eq!(revision["spec"]["source"]["uri"], NOWHERE);
    assert_eq!(job["metadata"]["ownerReferences"][0]["uid"], revision["metadata"]["uid"]);
    let pod = &job["spec"]["template"]["spec"];
    let steps: Vec<&str> = pod["containers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|container| container["name"].as_str().unwrap())
        .collect();
    assert_eq!(steps, ["fetch", "convert", "compress", "evaluate", "publish"]);
    assert_eq!(pod["automountServiceAccountToken"], false);
    // The namespace enforces the restricted profile: a pod that breaks it is never made.
    wait_count(&namespace, "pods", "digits", 1);
    namespace.wait_event("Optimizing");
}

#[test]
fn a_change_of_what_is_served_makes_a_revision_and_scaling_makes_none() {
    let namespace = Namespace::new("numbers");
    namespace.apply_model("digits", &spec());
    wait_count(&namespace, "mr", "digits", 1);
    namespace.kubectl(&["scale", "md/digits", "--replicas=3"]);
    let scale: Value = serde_json::from_str(&kubectl(&[
        "get",
        "--raw",
        "/apis/plimsoll.dev/v1alpha1/namespaces/e2e-numbers/modeldeployments/digits/scale",
    ]))
    .unwrap();
    assert_eq!(scale["spec"]["replicas"], 3);
    namespace.wait_until("digits", "the operator has seen it", |md| {
        md["status"]["observedGeneration"] == md["metadata"]["generation"]
    });
    assert_eq!(namespace.items(&["mr"]).len(), 1, "scaling makes no revision");

    let mut next = spec();
    next["optimize"]["recipe"][0]["prune"]["amount"] = json!("40%");
    namespace.apply_model("digits", &next);
    let mut numbers: Vec<String> = wait_count(&namespace, "mr", "digits", 2)
        .iter()
        .map(|revision| revision["metadata"]["labels"]["plimsoll.dev/revision"].as_str().unwrap().to_owned())
        .collect();
    numbers.sort();
    assert_eq!(numbers, ["1", "2"]);
}

#[test]
fn a_paused_model_gets_no_revision_until_it_goes_on() {
    let namespace = Namespace::new("paused");
    let mut paused = spec();
    paused["paused"] = json!(true);
    namespace.apply_model("digits", &paused);
    namespace.wait_reason("digits", "Paused");
    assert!(namespace.items(&["mr,jobs"]).is_empty());
    namespace.kubectl(&["patch", "md", "digits", "--type=merge", "-p", r#"{"spec":{"paused":false}}"#]);
    wait_count(&namespace, "jobs", "digits", 1);
}

#[test]
fn a_deleted_model_takes_its_revision_and_job_with_it() {
    let namespace = Namespace::new("gone");
    namespace.apply_model("digits", &spec());
    wait_count(&namespace, "jobs", "digits", 1);
    namespace.kubectl(&["delete", "md", "digits"]);
    for kind in ["mr", "jobs", "pods", "services", "poddisruptionbudgets", "networkpolicies"] {
        wait_count(&namespace, kind, "digits", 0);
    }
}

#[test]
fn get_lists_a_model_by_its_short_name_and_columns() {
    let namespace = Namespace::new("columns");
    namespace.apply_model("digits", &spec());
    wait_count(&namespace, "mr", "digits", 1);
    for (kind, columns) in [
        (
            "md",
            &["NAME", "READY", "REVISION", "SIZE", "ACCURACY", "REPLICAS", "ENGINE", "AGE"][..],
        ),
        ("mr", &["NAME", "MODEL", "REVISION", "PHASE", "ARTIFACT", "AGE"]),
    ] {
        let table = namespace.kubectl(&["get", kind]);
        let (head, row) = table.split_once('\n').unwrap();
        assert_eq!(head.split_whitespace().collect::<Vec<_>>(), columns);
        assert!(row.starts_with("digits"), "{table}");
    }
}

#[test]
fn kubectl_explain_tells_what_a_field_means() {
    let _namespace = Namespace::new("explain");
    let text = kubectl(&["explain", "md.spec.optimize.budget.maxAccuracyDrop"]);
    assert!(text.contains("Most that the metric may fall"), "{text}");
    let text = kubectl(&["explain", "modeldeployment.spec.rollout.maxSurge"]);
    assert!(text.contains("Pods above the desired number"), "{text}");
    assert!(kubectl(&["explain", "mr.status"]).contains("artifact"));
}
