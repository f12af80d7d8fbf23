//! Models that are given sentences and pictures, by the files that lie beside them.

use serde_json::{Value, json};

use crate::cluster::{Namespace, fixture, push_files};
use crate::traffic::{get, post, send};

fn expected(folder: &str) -> Value {
    let path = fixture(&format!("../model-runtime/tests/models/{folder}/expected.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn assert_close(found: &Value, expected: &Value) {
    let (found, expected) = (found.as_array().unwrap(), expected.as_array().unwrap());
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found.as_f64().unwrap() - expected.as_f64().unwrap()).abs() < 1e-4,
            "{found} {expected}"
        );
    }
}

#[test]
fn a_sentence_is_embedded_by_a_model_that_came_with_its_tokenizer() {
    let namespace = Namespace::new("sentences");
    let folder = fixture("../model-runtime/tests/models/sentences");
    let files = [
        "sentences.onnx",
        "config.json",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "1_Pooling/config.json",
    ];
    let source = push_files(&folder, &files, "e2e/sentences:v1");
    namespace.apply_model("sentences", &json!({ "source": { "uri": source } }));
    namespace.wait_ready("sentences");

    let (address, expected) = (namespace.address("sentences"), expected("sentences"));
    let body = json!({ "inputs": [{ "name": "text", "datatype": "BYTES", "shape": [1], "data": [expected["texts"][0]] }] });
    let (status, answer) = post(&format!("{address}/v2/models/sentences/infer"), &body);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["outputs"][0]["name"], "sentence_embedding");
    assert_close(&answer["outputs"][0]["data"], &expected["sentence_embedding"][0]);

    let (status, answer) = post(
        &format!("{address}/v1/embeddings"),
        &json!({ "model": "sentences", "input": expected["texts"][2] }),
    );
    assert_eq!(status, 200, "{answer}");
    assert_close(&answer["data"][0]["embedding"], &expected["sentence_embedding"][2]);
}

#[test]
fn a_picture_is_classified_by_a_model_that_came_with_its_specification() {
    let namespace = Namespace::new("pictures");
    let folder = fixture("../model-runtime/tests/models/pictures");
    let files = ["pictures.onnx", "config.json", "preprocessor_config.json"];
    let source = push_files(&folder, &files, "e2e/pictures:v1");
    namespace.apply_model("pictures", &json!({ "source": { "uri": source } }));
    namespace.wait_ready("pictures");

    let address = namespace.address("pictures");
    let (_, metadata) = get(&format!("{address}/v2/models/pictures"));
    assert!(
        metadata["inputs"].as_array().unwrap().iter().any(|input| input["name"] == "image"),
        "{metadata}"
    );
    let png = std::fs::read(folder.join("picture.png")).unwrap();
    let (status, answer) = send(&format!("{address}/v2/models/pictures/infer"), "image/png", &png);
    assert_eq!(status, 200, "{answer}");
    let expected = expected("pictures");
    let case = expected["cases"].as_array().unwrap().iter();
    let case = case
        .clone()
        .find(|case| case["specification"] == "vit" && case["picture"] == "picture.png")
        .unwrap();
    let pixels = answer["outputs"]
        .as_array()
        .unwrap()
        .iter()
        .find(|output| output["name"] == "pixels")
        .unwrap();
    assert_close(&pixels["data"], &case["values"]);
}
