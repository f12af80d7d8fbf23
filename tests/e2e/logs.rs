//! What the operator writes for those who run it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::cluster::{Namespace, SYSTEM, apply, digits_spec, eventually, kubectl, text};
use crate::operator::{leader, operators, wait_up};

/// The lines of the operator's pods, each as text and as JSON.
fn lines() -> Vec<(String, Value)> {
    let logs = operators();
    let logs = logs.iter().map(|pod| kubectl(&["-n", SYSTEM, "logs", pod]));
    let lines: Vec<String> = logs.flat_map(|log| log.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
    let parse = |line: String| {
        let parsed = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        (line, parsed)
    };
    lines.into_iter().map(parse).collect()
}

/// Those of a pass over `model`.
fn of_model<'a>(lines: &'a [(String, Value)], namespace: &str, model: &str) -> Vec<&'a Value> {
    let names = |fields: &Value| fields["namespace"] == namespace && fields["model"] == model;
    let is_of = |line: &&Value| names(line) || names(&line["span"]);
    lines.iter().map(|(_, line)| line).filter(is_of).collect()
}

#[test]
fn the_operator_logs_json_in_which_the_lines_of_a_pass_share_a_trace() {
    let namespace = Namespace::new("logs");
    wait_up();
    namespace.apply_model("digits", &digits_spec("v1"));
    // Its Service is somebody else's: passes over it fail.
    let service = json!({ "name": "taken", "namespace": namespace.name });
    apply(&json!({ "apiVersion": "v1", "kind": "Service", "metadata": service, "spec": { "ports": [{ "port": 80 }] } }));
    namespace.apply_model("taken", &digits_spec("v1"));
    namespace.wait_ready("digits");
    let told = |events: &[&Value]| events.iter().any(|event| event["reason"] == "NameTaken").then_some(());
    namespace.watch("events").until("an Event says that the name is taken", told);
    // What came of a pass is told first and logged then.
    let mut lines = lines();
    eventually("a failed pass is logged", || {
        lines = self::lines();
        let of_model = of_model(&lines, &namespace.name, "taken");
        of_model
            .iter()
            .any(|line| line["message"] == "a pass failed" && line["level"] == "WARN")
    });

    let levels = BTreeSet::from(["ERROR", "WARN", "INFO", "DEBUG", "TRACE"]);
    for (line, parsed) in &lines {
        let timestamp = text(&parsed["timestamp"]);
        assert!(
            timestamp.len() >= 20 && timestamp.as_bytes()[10] == b'T' && timestamp.ends_with('Z'),
            "no time: {line}"
        );
        assert!(levels.contains(text(&parsed["level"])), "no level: {line}");
        assert!(!text(&parsed["message"]).is_empty(), "no message: {line}");
        // Of a key that stands there twice a reader gets one value, and the rest is lost.
        assert_eq!(parsed.to_string().len(), line.len(), "a key is there twice: {line}");
    }
    let leading = lines.iter().filter(|(_, line)| line["message"] == "leading");
    assert!(
        leading.clone().any(|(_, line)| line["identity"] == *leader()),
        "the leader says that it leads"
    );

    let mut passes: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for model in ["digits", "taken"] {
        let lines = of_model(&lines, &namespace.name, model);
        assert!(!lines.is_empty(), "nothing is logged of {model}");
        for line in lines {
            let trace = text(&line["span"]["trace_id"]);
            assert!(
                trace.len() == 32 && trace.bytes().all(|byte| byte.is_ascii_hexdigit()),
                "no trace: {line}"
            );
            passes.entry(trace).or_default().push(line);
        }
    }
    // The pass that starts the Job says so, and says where the model stands.
    let start = passes.values().find(|lines| {
        lines
            .iter()
            .any(|line| text(&line["message"]).ends_with("an optimisation") && line["span"]["model"] == "digits")
    });
    let start = start.expect("a pass started the Job");
    assert!(
        start.iter().any(|line| line["reason"] == "Optimizing"),
        "in the same trace: {start:?}"
    );
    assert!(
        !start.iter().any(|line| line["reason"] == "Serving"),
        "another pass has another trace: {start:?}"
    );
}
