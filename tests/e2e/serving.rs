//! The main job: one manifest, and a compressed model answers.

use serde_json::json;

use crate::cluster::{Namespace, condition, digits_spec, fixture, push};
use crate::traffic::{get, infer};

#[test]
fn one_manifest_serves_a_compressed_model_on_the_node_with_the_gpu() {
    let namespace = Namespace::new("first");
    let mut spec = digits_spec("v1");
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu" });
    namespace.apply_model("digits", &spec);
    namespace.wait_for("digits", "condition=Ready");

    let md = namespace.get(&["md", "digits"]);
    let revision = &namespace.items(&["mr"])[0];
    let (before, after) = (
        revision["status"]["sizeBefore"].as_f64().unwrap(),
        revision["status"]["sizeAfter"].as_f64().unwrap(),
    );
    assert!(
        before / after >= 3.5,
        "{before} -> {after} is only {:.2} times smaller",
        before / after
    );
    assert!(revision["status"]["artifact"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(revision["status"]["phase"], "Serving");
    assert_eq!(md["status"]["artifact"], revision["status"]["artifact"]);
    assert_eq!(md["status"]["observedGeneration"], md["metadata"]["generation"]);
    for (kind, status) in [
        ("Ready", "True"),
        ("Reconciling", "False"),
        ("Stalled", "False"),
        ("Optimized", "True"),
        ("Available", "True"),
        ("RolledOut", "True"),
    ] {
        assert_eq!(condition(&md, kind)["status"], status, "{kind}\n{}", namespace.story("digits"));
    }

    let pod = &namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"])[0];
    assert_eq!(pod["spec"]["nodeSelector"]["nvidia.com/gpu.present"], "true");
    assert_eq!(pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "1");
    assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
    let reference = pod["spec"]["volumes"][0]["image"]["reference"].as_str().expect("an image volume");
    assert!(
        reference.ends_with(md["status"]["artifact"].as_str().unwrap()),
        "{reference} is not the artifact in status"
    );

    let logits = infer(&namespace.address("digits"), "digits").unwrap();
    let answer = (0..10).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
    assert_eq!(answer, 7, "{logits:?}");
}

#[test]
fn every_child_of_a_model_is_there_and_owned() {
    let namespace = Namespace::new("children");
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    let md = namespace.get(&["md", "digits"]);
    for (kind, count) in [("services", 1), ("poddisruptionbudgets", 1), ("networkpolicies", 2), ("mr", 1)] {
        let items = namespace.items(&[kind, "-l", "plimsoll.dev/model=digits"]);
        assert_eq!(items.len(), count, "{kind}");
        for item in items {
            assert_eq!(item["metadata"]["ownerReferences"][0]["uid"], md["metadata"]["uid"], "{kind}");
        }
    }
    let reasons: Vec<String> = namespace
        .items(&["events.events.k8s.io"])
        .iter()
        .filter(|event| event["regarding"]["kind"] == "ModelDeployment")
        .map(|event| event["reason"].as_str().unwrap().to_owned())
        .collect();
    for reason in ["Optimizing", "RollingOut", "Serving"] {
        assert!(reasons.iter().any(|seen| seen == reason), "no Event {reason} among {reasons:?}");
    }
}

#[test]
fn the_runtime_speaks_the_open_inference_protocol_and_names_what_is_wrong() {
    let namespace = Namespace::new("protocol");
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    let address = namespace.address("digits");
    assert_eq!(get(&format!("{address}/v2/health/ready")).0, 200);
    let (status, metadata) = get(&format!("{address}/v2/models/digits"));
    assert_eq!(
        (status, &metadata["inputs"][0]["name"], &metadata["inputs"][0]["datatype"]),
        (200, &json!("image"), &json!("FP32"))
    );
    assert_eq!(metadata["inputs"][0]["shape"], json!([-1, 1, 8, 8]));
    let (status, error) = get(&format!("{address}/v2/models/letters"));
    assert_eq!(status, 404);
    assert!(error["error"].as_str().unwrap().contains("letters"), "{error}");
}

#[test]
fn a_model_that_nobody_here_made_is_held_to_its_fidelity() {
    let namespace = Namespace::new("magika");
    let model = std::env::var("PLIMSOLL_MAGIKA").expect("set by cargo xtask test");
    let inputs = std::path::Path::new(&model).with_file_name("magika-inputs.npz");
    let source = push(model.as_ref(), "e2e/magika:v1");
    let calibration = push(&inputs, "e2e/magika-inputs:v1");
    namespace.apply_model(
        "magika",
        &json!({
            "source": { "uri": source },
            "optimize": {
                "recipe": [{ "quantize": { "scheme": "Int8" } }],
                "calibration": { "uri": calibration },
                "budget": { "minFidelity": "0.999", "maxSize": "1Mi" },
            },
        }),
    );
    namespace.wait_ready("magika");
    let status = &namespace.items(&["mr"])[0]["status"];
    let fidelity: f64 = status["fidelity"].as_str().unwrap().parse().unwrap();
    assert!(fidelity >= 0.999, "{fidelity}");
    assert!(status["sizeAfter"].as_i64().unwrap() <= 1 << 20, "{}", status["size"]);
    let (code, metadata) = get(&format!("{}/v2/models/magika", namespace.address("magika")));
    assert_eq!((code, &metadata["outputs"][0]["name"]), (200, &json!("target_label")));
    assert!(fixture("models/magika/fetch.py").exists());
}
