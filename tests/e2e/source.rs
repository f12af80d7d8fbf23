//! Sources, and how they misbehave.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use serde_json::json;

use crate::cluster::{Namespace, apply, condition, digest, digits_spec, file_server, fixture, kubectl, text};
use crate::traffic::infer;

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
    infer(&namespace.address("m"), "m").unwrap();
}

#[test]
fn a_model_and_its_data_are_read_from_a_volume() {
    let namespace = Namespace::new("volume");
    apply(&json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": "models", "namespace": namespace.name },
        "spec": { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1Gi" } } },
    }));
    namespace.kubectl(&["wait", "pvc/models", "--for=jsonpath={.status.phase}=Bound", "--timeout=60s"]);
    // The cluster's volumes are folders of this machine.
    let volume = text(&namespace.get(&["pvc", "models"])["spec"]["volumeName"]).to_owned();
    let folder = PathBuf::from(kubectl(&["get", "pv", &volume, "-o", "jsonpath={.spec.local.path}"]));
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(folder.join("digits")).unwrap();
    for file in ["digits-v1.onnx", "digits-heldout.npz"] {
        std::fs::copy(fixture("models/digits").join(file), folder.join("digits").join(file)).unwrap();
    }
    std::os::unix::fs::symlink("/dev/null", folder.join("leaves.onnx")).unwrap();

    let mut spec = digits_spec("v1");
    spec["source"]["uri"] = json!("pvc://models/digits/digits-v1.onnx");
    spec["optimize"]["evaluation"]["dataset"]["uri"] = json!("pvc://models/digits/digits-heldout.npz");
    namespace.apply_model("m", &spec);
    namespace.apply_model("missing", &json!({ "source": { "uri": "pvc://models/digits/absent.onnx" } }));
    namespace.apply_model("leaves", &json!({ "source": { "uri": "pvc://models/leaves.onnx" } }));
    namespace.apply_model("unclaimed", &json!({ "source": { "uri": "pvc://nobody/digits.onnx" } }));
    namespace.wait_ready("m");
    let revisions = namespace.items(&["mr", "-l", "plimsoll.dev/model=m"]);
    let status = &revisions[0]["status"];
    assert_eq!(status["sourceDigest"], digest(&fixture("models/digits/digits-v1.onnx")));
    assert!(text(&status["accuracy"]).starts_with("98.4% -> "), "{status}");
    infer(&namespace.address("m"), "m").unwrap();
    let jobs = namespace.items(&["jobs", "-l", "plimsoll.dev/model=m"]);
    for container in jobs[0]["spec"]["template"]["spec"]["containers"].as_array().unwrap() {
        let mounts = container["volumeMounts"].as_array().unwrap();
        let claim = mounts.iter().find(|mount| mount["mountPath"] == "/pvc/models");
        assert_eq!(
            claim.is_some(),
            container["name"] == "fetch",
            "only the step that reads it mounts it"
        );
        assert!(claim.is_none_or(|claim| claim["readOnly"] == true));
    }
    for (model, words) in [
        ("missing", "pvc://models/digits/absent.onnx"),
        ("leaves", "is a link that leaves its volume"),
    ] {
        let md = namespace.wait_reason(model, "SourceRefused");
        let stalled = condition(&md, "Stalled");
        assert!(
            stalled["status"] == "True" && text(&stalled["message"]).contains(words),
            "{stalled}"
        );
    }
    let md = namespace.wait_reason("unclaimed", "Unschedulable");
    assert!(
        text(&condition(&md, "Ready")["message"]).contains("\"nobody\" not found"),
        "{}",
        condition(&md, "Ready")
    );
}

#[test]
fn a_source_larger_than_the_limit_is_cut_off() {
    let namespace = Namespace::new("too-large");
    let host = file_server(&namespace, &[("digits.onnx", &fixture("models/digits/digits-v1.onnx"))], 1);
    namespace.apply_model("m", &json!({ "source": { "uri": format!("{host}/endless?bytes=5000000000") } }));
    let md = namespace.wait_reason("m", "SourceTooLarge");
    let message = condition(&md, "Stalled")["message"].as_str().unwrap().to_owned();
    assert!(message.contains("67108864 bytes") && message.contains("maxFetchSize"), "{message}");
    let revision = &namespace.items(&["mr"])[0];
    assert_eq!(
        (&revision["status"]["phase"], &revision["status"]["artifact"]),
        (&json!("Failed"), &json!(null))
    );
    assert!(
        namespace.items(&["deployments", "-l", "plimsoll.dev/model=m"]).is_empty(),
        "nothing is served"
    );
}

#[test]
fn a_source_that_says_no_is_not_asked_again() {
    let namespace = Namespace::new("refused");
    let host = file_server(&namespace, &[("digits.onnx", &fixture("models/digits/digits-v1.onnx"))], 1);
    namespace.apply_model("m", &json!({ "source": { "uri": format!("{host}/status/403") } }));
    let md = namespace.wait_reason("m", "SourceRefused");
    assert_eq!(condition(&md, "Stalled")["status"], "True");
    assert!(condition(&md, "Stalled")["message"].as_str().unwrap().contains("403"));
    namespace.kubectl(&["wait", "--for=condition=failed", "job", "--all", "--timeout=60s"]);
    assert_eq!(namespace.items(&["jobs"]).len(), 1);
    let log = namespace.kubectl(&["logs", "deployment/fixtures"]);
    assert_eq!(log.matches("/status/403").count(), 1, "{log}");
}

#[test]
fn a_job_that_takes_longer_than_its_deadline_is_stalled_and_not_tried_again() {
    let namespace = Namespace::new("deadline");
    let host = file_server(&namespace, &[("digits.onnx", &fixture("models/digits/digits-v1.onnx"))], 1);
    let source = json!({ "uri": format!("{host}/slow?seconds=120&path=digits.onnx") });
    namespace.apply_model("m", &json!({ "source": source, "optimize": { "job": { "deadline": "5s" } } }));
    let stalled = condition(&namespace.wait_reason("m", "DeadlineExceeded"), "Stalled");
    assert_eq!(stalled["status"], "True", "{stalled}");
    assert!(
        stalled["message"].as_str().unwrap().contains("spec.optimize.job.deadline"),
        "{stalled}"
    );
    assert_eq!(namespace.items(&["jobs"]).len(), 1);
}

#[test]
fn a_connection_that_breaks_is_resumed() {
    let namespace = Namespace::new("resumed");
    let model = fixture("models/digits/digits-v1.onnx");
    let host = file_server(&namespace, &[("digits.onnx", &model)], 1);
    namespace.apply_model(
        "m",
        // Not pinned: of a content that another test had optimised, nothing would be fetched.
        &json!({ "source": { "uri": format!("{host}/fail?path=digits.onnx&times=2") } }),
    );
    namespace.wait_ready("m");
    assert_eq!(namespace.items(&["mr"])[0]["status"]["sourceDigest"], digest(&model));
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
