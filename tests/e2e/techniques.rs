//! Each technique through the operator, from the manifest to an answer.

use serde_json::{Value, json};

use crate::cluster::{Namespace, digits_spec, file_of_artifact, fixture, push, training};
use crate::traffic::infer;

/// What is applied to digits, and how much smaller its file and what is pulled of it must get.
fn recipes(training: &str) -> Vec<(&'static str, Value, f64, f64)> {
    let distill = |mut fields: Value| {
        fields["data"] = json!({ "uri": training });
        json!({ "distill": fields })
    };
    let prune = |fields: Value| json!({ "prune": fields });
    let quantize = |fields: Value| json!({ "quantize": fields });
    vec![
        (
            "channels",
            json!([prune(json!({ "amount": "10%", "structure": "Channels" }))]),
            1.1,
            1.1,
        ),
        (
            "feed-forward",
            json!([prune(json!({ "amount": "20%", "structure": "FeedForward" }))]),
            1.2,
            1.2,
        ),
        (
            "two-of-four",
            json!([
                prune(json!({ "pattern": "2:4", "structure": "SemiStructured", "criterion": "SparseGpt" })),
                quantize(json!({ "scheme": "Int8Weights" })),
                distill(json!({ "epochs": 4 })),
            ]),
            3.5,
            5.0,
        ),
        ("wanda", json!([prune(json!({ "amount": "20%", "criterion": "Wanda" }))]), 0.9, 1.1),
        (
            "by-layer",
            json!([prune(json!({ "amount": "30%", "scope": "PerLayer" }))]),
            0.9,
            1.2,
        ),
        ("dynamic", json!([quantize(json!({ "scheme": "Int8Dynamic" }))]), 3.0, 3.0),
        (
            "static",
            json!([quantize(
                json!({ "scheme": "Int8Static", "range": "Entropy", "smooth": "0.5", "biasCorrection": true })
            )]),
            3.0,
            3.0,
        ),
        (
            "four-bits",
            json!([quantize(json!({ "scheme": "Int4", "rounding": "Gptq" }))]),
            4.5,
            4.5,
        ),
        ("eight-bit-blocks", json!([quantize(json!({ "scheme": "Int8Blocks" }))]), 2.5, 2.5),
        ("half", json!([quantize(json!({ "scheme": "Float16" }))]), 1.8, 1.8),
        (
            "distilled",
            json!([
                prune(json!({ "amount": "50%" })),
                quantize(json!({ "scheme": "Int8" })),
                distill(json!({ "epochs": 2, "hiddenStates": {} })),
            ]),
            3.5,
            5.0,
        ),
        (
            "gradual",
            json!([distill(json!({ "epochs": 3, "pruneTo": "50%", "learningRate": "0.001" }))]),
            0.9,
            1.5,
        ),
    ]
}

#[test]
fn each_technique_goes_the_whole_way() {
    let namespace = Namespace::new("techniques");
    let training = training();
    let recipes = recipes(&training);
    for (name, recipe, ..) in &recipes {
        let mut spec = digits_spec("v1");
        spec["replicas"] = json!(1);
        spec["optimize"]["recipe"] = recipe.clone();
        spec["optimize"]["calibration"] = json!({ "uri": training });
        spec["optimize"]["budget"] = json!({ "maxAccuracyDrop": "3%", "maxClassAccuracyDrop": "30%" });
        namespace.apply_model(name, &spec);
    }
    for (name, _, smaller, less) in &recipes {
        namespace.wait_ready(name);
        let revisions = namespace.items(&["mr", "-l", &format!("plimsoll.dev/model={name}")]);
        let status = &revisions[0]["status"];
        let (before, after) = (status["sizeBefore"].as_f64().unwrap(), status["sizeAfter"].as_f64().unwrap());
        assert!(before / after >= *smaller, "{name}: {before} -> {after}");
        let pulled = |field: &str| status[field].as_f64().unwrap();
        let (before, after) = (pulled("sizeLayerBefore"), pulled("sizeLayerAfter"));
        assert!(before / after >= *less, "{name}: {}", status["pulled"]);
        for field in ["accuracy", "fidelity", "sparsity", "latency", "engine", "toolchain"] {
            let said = status[field].as_str().unwrap_or_default();
            assert!(!said.is_empty(), "{name}: no {field} in {status}");
        }
        assert_eq!(status["metric"], "Accuracy", "{name}");
        let logits = infer(&namespace.address(name), name).unwrap();
        let answer = (0..10).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        assert_eq!(answer, 7, "{name}: {logits:?}");
    }
}

#[test]
fn attention_heads_go_the_whole_way() {
    let namespace = Namespace::new("heads");
    let source = push(&fixture("models/attention/attention.onnx"), "e2e/attention:v1");
    let prune = json!({ "amount": "25%", "structure": "Heads" });
    let spec = json!({
        "source": { "uri": source },
        "optimize": { "recipe": [{ "prune": prune }] },
        "replicas": 1,
    });
    namespace.apply_model("attention", &spec);
    namespace.wait_ready("attention");
    let revisions = namespace.items(&["mr", "-l", "plimsoll.dev/model=attention"]);
    let status = &revisions[0]["status"];
    let (before, after) = (status["sizeBefore"].as_f64().unwrap(), status["sizeAfter"].as_f64().unwrap());
    // One head of four, of four matrices that hold a third of the model.
    assert!(before / after >= 1.08, "{}", status["size"]);
    let fidelity: f64 = status["fidelity"].as_str().unwrap().parse().unwrap();
    assert!(fidelity >= 0.99, "{fidelity}");
}

#[test]
fn a_search_goes_the_whole_way() {
    let namespace = Namespace::new("search");
    let mut spec = digits_spec("v1");
    spec["replicas"] = json!(1);
    spec["optimize"].as_object_mut().unwrap().remove("recipe");
    spec["optimize"]["search"] = json!({ "techniques": ["Prune", "Quantize"], "maxDuration": "2m" });
    spec["optimize"]["budget"] = json!({ "maxAccuracyDrop": "1%" });
    namespace.apply_model("found", &spec);
    namespace.wait_ready("found");
    let revisions = namespace.items(&["mr", "-l", "plimsoll.dev/model=found"]);
    let status = &revisions[0]["status"];
    let pod = &namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"])[0];
    let reference = pod["spec"]["volumes"][0]["image"]["reference"].as_str().expect("an image volume");
    let page = file_of_artifact(reference, "model/report.html");
    for words in ["Within the budget", "Front", "dense1"] {
        assert!(page.contains(words), "`{words}` is not on the page of {} bytes", page.len());
    }
    let (before, after) = (status["sizeBefore"].as_f64().unwrap(), status["sizeAfter"].as_f64().unwrap());
    assert!(before / after >= 3.5, "{before} -> {after}");
    let logits = infer(&namespace.address("found"), "found").unwrap();
    let answer = (0..10).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
    assert_eq!(answer, 7, "{logits:?}");
}
