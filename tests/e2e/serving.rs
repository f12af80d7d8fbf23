//! The main job: one manifest, and a compressed model answers.

use serde_json::{Value, json};

use crate::cluster::{Namespace, condition, digits_spec, fixture, push, story};
use crate::traffic::{ask, get, infer};

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
        assert_eq!(condition(&md, kind)["status"], status, "{kind}\n{}", story(&namespace.name));
    }

    // What Git owns is not written to: of the model, the operator manages the status alone, under one name.
    let managed = namespace.get(&["md", "digits", "--show-managed-fields"])["metadata"]["managedFields"].clone();
    let is_ours = |entry: &&Value| entry["manager"].as_str().is_some_and(|manager| manager.contains("plimsoll"));
    let ours: Vec<&Value> = managed.as_array().unwrap().iter().filter(is_ours).collect();
    assert!(
        !ours.is_empty()
            && ours
                .iter()
                .all(|entry| entry["manager"] == "plimsoll" && entry["subresource"] == "status"),
        "{ours:?}"
    );

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
    for reason in ["Optimizing", "RollingOut", "Serving"] {
        namespace.wait_event(reason);
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

/// The tokens that magika reads of a file: its first and its last bytes without the white space around them, 256 where there is none.
fn tokens(content: &[u8]) -> Vec<u32> {
    const PER_END: usize = 1024;
    const BLOCK_BYTES: usize = 4096;
    const PADDING: u32 = 256;
    // Python's `strip` takes the vertical tab for white space, too.
    let is_blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0x0b;
    let (mut first, mut last) = (
        &content[..content.len().min(BLOCK_BYTES)],
        &content[content.len().saturating_sub(BLOCK_BYTES)..],
    );
    let begin = |piece: &[u8]| piece.iter().position(|byte| !is_blank(byte)).unwrap_or(piece.len());
    let end = |piece: &[u8]| piece.iter().rposition(|byte| !is_blank(byte)).map_or(0, |last| last + 1);
    if content.len() <= BLOCK_BYTES {
        let whole = &content[begin(content)..end(content).max(begin(content))];
        (first, last) = (whole, whole);
    }
    let first = &first[begin(first)..];
    let last = &last[..end(last)];
    let first = &first[..first.len().min(PER_END)];
    let last = &last[last.len().saturating_sub(PER_END)..];
    let pad = |length: usize| std::iter::repeat_n(PADDING, PER_END - length);
    let head = first.iter().map(|byte| u32::from(*byte)).chain(pad(first.len()));
    let tail = pad(last.len()).chain(last.iter().map(|byte| u32::from(*byte)));
    head.chain(tail).collect()
}

/// The name that magika, served at `address`, gives to the type of a file, and how sure it is.
fn file_type(address: &str, model: &str, labels: &[String], content: &[u8]) -> (String, f64) {
    let tokens = tokens(content);
    let input = json!({ "name": "bytes", "datatype": "INT32", "shape": [1, tokens.len()], "data": tokens });
    let answer = ask(address, model, &json!([input])).unwrap();
    let scores: Vec<f64> = answer[0]["data"]
        .as_array()
        .expect("scores")
        .iter()
        .filter_map(Value::as_f64)
        .collect();
    assert_eq!((scores.len(), &answer[0]["name"]), (labels.len(), &json!("target_label")));
    let best = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap();
    (labels[best].clone(), scores[best])
}

#[test]
fn a_model_that_nobody_here_made_answers_as_its_original_does() {
    let namespace = Namespace::new("magika");
    let model = std::env::var("PLIMSOLL_MAGIKA").expect("set by cargo xtask test");
    let inputs = std::path::Path::new(&model).with_file_name("magika-inputs.npz");
    let source = push(model.as_ref(), "e2e/magika:v1");
    let calibration = push(&inputs, "e2e/magika-inputs:v1");
    // What Google published, served as it is, and what we made of it.
    namespace.apply_model("original", &json!({ "source": { "uri": source } }));
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
    namespace.wait_ready("original");
    namespace.wait_ready("magika");
    let revisions = namespace.items(&["mr", "-l", "plimsoll.dev/model=magika"]);
    let status = &revisions[0]["status"];
    let fidelity: f64 = status["fidelity"].as_str().unwrap().parse().unwrap();
    assert!(fidelity >= 0.999, "{fidelity}");
    assert!(status["sizeAfter"].as_i64().unwrap() <= 1 << 20, "{}", status["size"]);
    assert!(status["sizeBefore"].as_i64().unwrap() > 3 << 20, "{}", status["size"]);

    let labels = std::fs::read_to_string(std::path::Path::new(&model).with_file_name("magika-labels.txt")).unwrap();
    let labels: Vec<String> = labels.lines().map(str::to_owned).collect();
    let (original, compressed) = (namespace.address("original"), namespace.address("magika"));
    for (path, name) in [
        ("e2e/serving.rs", "rust"),
        ("models/magika/fetch.py", "python"),
        ("cluster/main.go", "go"),
        ("../charts/plimsoll/values.yaml", "yaml"),
        ("../Cargo.toml", "toml"),
        ("../LICENSE", "txt"),
        ("models/digits/digits-v1.onnx", "onnx"),
        ("models/digits/digits-heldout.npz", "npz"),
    ] {
        let content = std::fs::read(fixture(path)).unwrap();
        let (before, sure_before) = file_type(&original, "original", &labels, &content);
        let (after, sure_after) = file_type(&compressed, "magika", &labels, &content);
        assert_eq!(
            (before.as_str(), after.as_str()),
            (name, name),
            "{path}: {sure_before} and {sure_after}"
        );
        assert!((sure_before - sure_after).abs() < 0.05, "{path}: {sure_before} and {sure_after}");
    }
}
