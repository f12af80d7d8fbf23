use std::path::{Path, PathBuf};

use serde_json::Value;

use super::*;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/sentences")
}

fn expected() -> Value {
    serde_json::from_slice(&std::fs::read(folder().join("expected.json")).unwrap()).unwrap()
}

fn companions() -> Companions {
    Companions::read(&folder().join("sentences.onnx"), None).unwrap()
}

fn spec(name: &str, datatype: Datatype, length: i64) -> TensorSpec {
    TensorSpec {
        name: name.into(),
        datatype,
        shape: vec![-1, length],
    }
}

fn specs(length: i64) -> [TensorSpec; 3] {
    ["input_ids", "attention_mask", "token_type_ids"].map(|name| spec(name, Datatype::Int64, length))
}

fn tokenizer(inputs: &[TensorSpec]) -> Tokenizer {
    Tokenizer::read(&companions(), inputs).unwrap().expect("there is a tokenizer.json")
}

fn batch(tokenizer: &Tokenizer, texts: &[&str]) -> Batch {
    let tokens: Vec<Tokens> = texts.iter().map(|text| tokenizer.tokenize(text, None, true).unwrap()).collect();
    tokenizer.batch(&tokens.iter().collect::<Vec<_>>())
}

/// The input's shape and values.
fn input(batch: &Batch, name: &str) -> (Vec<usize>, Vec<f64>) {
    let (_, tensor) = batch.inputs.iter().find(|(known, _)| known == name).unwrap();
    (tensor.shape().to_vec(), tensor.data().to_f64().unwrap())
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        value => vec![value.as_f64().unwrap()],
    }
}

#[test]
fn tokens_are_those_of_hugging_faces_own_tokenizer() {
    let expected = expected();
    let texts: Vec<&str> = expected["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap())
        .collect();
    let tokenizer = tokenizer(&specs(-1));
    let batch = batch(&tokenizer, &texts);
    assert_eq!(input(&batch, "input_ids"), (vec![5, 12], numbers(&expected["input_ids"])));
    assert_eq!(input(&batch, "attention_mask").1, numbers(&expected["attention_mask"]));
    assert_eq!(batch.mask.tokens() as f64, numbers(&expected["attention_mask"]).iter().sum::<f64>());
}

#[test]
fn a_pair_is_told_apart_by_its_types() {
    let expected = expected();
    let text = |index: usize| expected["pair"][index].as_str().unwrap();
    let tokenizer = tokenizer(&specs(-1));
    let pair = tokenizer.tokenize(text(0), Some(text(1)), true).unwrap();
    let batch = tokenizer.batch(&[&pair]);
    assert_eq!(input(&batch, "input_ids").1, numbers(&expected["pair_input_ids"]));
    assert_eq!(input(&batch, "token_type_ids").1, numbers(&expected["pair_token_type_ids"]));
}

#[test]
fn texts_are_padded_to_the_longest_whatever_the_file_pads_to() {
    let batch = batch(&tokenizer(&specs(-1)), &["cat", "the cat slept"]);
    let (shape, mask) = input(&batch, "attention_mask");
    assert_eq!((shape, mask), (vec![2, 5], vec![1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]));
}

#[test]
fn a_model_of_one_length_gets_that_length() {
    let tokenizer = tokenizer(&specs(7));
    let batch = batch(&tokenizer, &["cat", "the ship sat under water while the dog slept"]);
    let (shape, mask) = input(&batch, "attention_mask");
    assert_eq!(
        (shape, mask[..7].iter().sum::<f64>(), mask[7..].iter().sum::<f64>()),
        (vec![2, 7], 3.0, 7.0)
    );
}

#[test]
fn a_text_that_is_too_long_is_cut_off_or_refused_as_is_asked() {
    let tokenizer = tokenizer(&specs(-1));
    let long = "the ".repeat(30);
    assert_eq!(tokenizer.tokenize(&long, None, true).unwrap().count(), 12);
    assert_eq!(
        tokenizer.tokenize(&long, None, false).unwrap_err(),
        "it has more than the 12 tokens that the model takes"
    );
    assert_eq!(tokenizer.tokenize("the cat slept", None, false).unwrap().count(), 5);
    let huge = "a".repeat(TEXT_BYTES_MAX + 1);
    assert_eq!(
        tokenizer.tokenize(&huge, None, true).unwrap_err(),
        "it has 1048577 bytes, the most are 1048576"
    );
}

#[test]
fn tokens_of_the_clients_own_are_checked() {
    let tokenizer = tokenizer(&specs(-1));
    assert_eq!(tokenizer.take(vec![2, 5, 3]).unwrap().count(), 3);
    assert_eq!(tokenizer.take(vec![2, 5000]).unwrap_err(), "the model has no token 5000");
    assert_eq!(
        tokenizer.take(vec![1; 13]).unwrap_err(),
        "it has more than the 12 tokens that the model takes"
    );
}

#[test]
fn inputs_are_filled_in_the_type_that_the_model_takes() {
    let inputs = [spec("input_ids", Datatype::Int32, -1), spec("position", Datatype::Fp32, -1)];
    let tokenizer = tokenizer(&inputs);
    let batch = batch(&tokenizer, &["cat"]);
    assert_eq!(batch.inputs.len(), 1);
    assert_eq!(batch.inputs[0].1.datatype(), Datatype::Int32);
    assert!(tokenizer.fills("input_ids") && !tokenizer.fills("position"));
    assert!(!tokenizer.pads(), "the model is not told what is padding");
}

#[test]
fn a_tokenizer_that_does_not_fit_the_model_is_named() {
    let read = |inputs: &[TensorSpec]| Tokenizer::read(&companions(), inputs).err().unwrap();
    assert_eq!(
        read(&[spec("x", Datatype::Int64, -1)]),
        "tokenizer.json: the model has no input `input_ids` for its tokens"
    );
    assert_eq!(
        read(&[spec("input_ids", Datatype::Fp32, -1)]),
        "tokenizer.json: input `input_ids` takes FP32 of shape [-1, -1], tokens are INT64 or INT32 of shape [texts, tokens]"
    );
    let broken = Tokenizer::read(&[("tokenizer.json", "{}")].into(), &specs(-1)).err().unwrap();
    assert!(broken.starts_with("tokenizer.json: "), "{broken}");
    assert!(Tokenizer::read(&Companions::default(), &specs(-1)).unwrap().is_none());
}

#[test]
fn the_bound_of_tokens_is_the_smallest_that_the_files_state() {
    let stated = |files: Companions| stated_tokens_max(&files);
    let bert = ("config.json", r#"{"model_type": "bert", "max_position_embeddings": 512}"#);
    let roberta = (
        "config.json",
        r#"{"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}"#,
    );
    let unknown = ("tokenizer_config.json", r#"{"model_max_length": 1000000000000000019884624838656}"#);
    let sentence = ("sentence_bert_config.json", r#"{"max_seq_length": 256}"#);
    assert_eq!(stated(Companions::default()), Ok(None));
    assert_eq!(stated([bert].into()), Ok(Some(512)));
    assert_eq!(stated([roberta, unknown].into()), Ok(Some(512)));
    assert_eq!(
        stated([bert, ("tokenizer_config.json", r#"{"model_max_length": 128}"#)].into()),
        Ok(Some(128))
    );
    assert_eq!(stated([bert, unknown, sentence].into()), Ok(Some(256)));
}
