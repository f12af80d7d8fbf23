//! Sources that misbehave.

use std::time::Duration;

use serde_json::json;

use crate::cluster::{Namespace, condition, file_server, fixture};

#[test]
fn a_source_that_is_away_is_waited_for_and_served_once_it_is_back() {
    let namespace = Namespace::new("unreachable");
    let host = file_server(&namespace, &[("digits.onnx", &fixture("models/digits/digits-v1.onnx"))], 0);
    namespace.apply_model("m", &json!({ "source": { "uri": format!("{host}/digits.onnx") } }));
    let md = namespace.wait_reason("m", "SourceUnreachable");
    assert_eq!(condition(&md, "Stalled")["status"], "False", "it may pass");
    assert_eq!(condition(&md, "Reconciling")["status"], "True");
    assert!(
        condition(&md, "Ready")["message"]
            .as_str()
            .unwrap()
            .contains("fixtures.e2e-unreachable"),
        "{}",
        condition(&md, "Ready")
    );
    namespace.kubectl(&["scale", "deployment/fixtures", "--replicas=1"]);
    namespace.wait_ready("m");
}

#[test]
fn a_source_larger_than_the_limit_is_cut_off() {
    let namespace = Namespace::new("too-large");
    let host = file_server(&namespace, &[("digits.onnx", &fixture("models/digits/digits-v1.onnx"))], 1);
    namespace.apply_model("m", &json!({ "source": { "uri": format!("{host}/endless?bytes=5000000000") } }));
    let md = namespace.wait_reason("m", "SourceTooLarge");
    let message = condition(&md, "Stalled")["message"].as_str().unwrap().to_owned();
    assert!(message.contains("67108864 bytes") && message.contains("maxFetchSize"), "{message}");
}

#[test]
fn a_source_that_says_no_is_not_asked_again() {
    let namespace = Namespace::new("refused");
    let host = file_server(&namespace, &[("digits.onnx", &fixture("models/digits/digits-v1.onnx"))], 1);
    namespace.apply_model("m", &json!({ "source": { "uri": format!("{host}/status/403") } }));
    let md = namespace.wait_reason("m", "SourceRefused");
    assert_eq!(condition(&md, "Stalled")["status"], "True");
    assert!(condition(&md, "Stalled")["message"].as_str().unwrap().contains("403"));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(namespace.items(&["jobs"]).len(), 1);
}

#[test]
fn a_connection_that_breaks_is_resumed() {
    let namespace = Namespace::new("resumed");
    let model = fixture("models/digits/digits-v1.onnx");
    let host = file_server(&namespace, &[("digits.onnx", &model)], 1);
    namespace.apply_model(
        "m",
        &json!({ "source": { "uri": format!("{host}/fail?path=digits.onnx&times=2"), "digest": crate::cluster::digest(&model) } }),
    );
    namespace.wait_ready("m");
    let log = namespace.kubectl(&["logs", "deployment/fixtures"]);
    assert!(log.matches("/fail").count() >= 3, "{log}");
}

#[test]
fn plain_http_to_a_host_that_is_not_allowed_is_refused() {
    let namespace = Namespace::new("plain-http");
    namespace.apply_model("m", &json!({ "source": { "uri": "http://elsewhere.example/model.onnx" } }));
    let refused = crate::cluster::try_apply(
        &namespace
            .model("m", &json!({ "source": { "uri": "ftp://elsewhere.example/model.onnx" } }))
            .to_string(),
    );
    assert!(
        refused.unwrap_err().contains("uri must start with https://"),
        "the apiserver refuses other schemes"
    );
    let md = namespace.wait_until("m", "it is stalled", |md| condition(md, "Stalled")["status"] == "True");
    assert!(
        condition(&md, "Stalled")["message"].as_str().unwrap().contains("plain"),
        "{}",
        condition(&md, "Stalled")
    );
}
