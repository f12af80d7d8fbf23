//! Sentences and pictures as they are, instead of the model's own tensors.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::client::{Answer, Connection, get, post};
use crate::fetched::real_model;
use crate::process::Server;

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models").join(path)
}

fn expected(folder: &str) -> Value {
    serde_json::from_slice(&std::fs::read(file(folder).join("expected.json")).unwrap()).unwrap()
}

fn sentences(engine: &str) -> Server {
    Server::ready(&file("sentences/sentences.onnx"), &["--engine", engine])
}

fn infer(server: &Server, name: &str, body: &Value) -> Answer {
    post(server.http, &format!("/v2/models/{name}/infer"), body)
}

fn texts(texts: &Value, parameters: Value) -> Value {
    let count = texts.as_array().unwrap().len();
    json!({
        "parameters": parameters,
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [count], "data": texts}],
    })
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        value => vec![value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))],
    }
}

/// The only output of an answer: its name, shape and values.
fn output(answer: &Answer) -> (String, Value, Vec<f64>) {
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    assert_eq!(answer["outputs"].as_array().unwrap().len(), 1, "{answer}");
    let output = &answer["outputs"][0];
    (
        output["name"].as_str().unwrap().to_owned(),
        output["shape"].clone(),
        numbers(&output["data"]),
    )
}

fn assert_close(found: &[f64], expected: &Value, what: &str) {
    let expected = numbers(expected);
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() < 1e-5,
            "{what}: value {index} is {found}, expected {expected}"
        );
    }
}

#[test]
fn sentences_become_embeddings_as_sentence_transformers_makes_them() {
    let expected = expected("sentences");
    for engine in ["tract", "onnxruntime"] {
        let server = sentences(engine);
        let (name, shape, values) = output(&infer(&server, "sentences", &texts(&expected["texts"], json!({}))));
        assert_eq!((name.as_str(), shape), ("sentence_embedding", json!([5, 8])));
        assert_close(&values, &expected["sentence_embedding"], engine);

        for (parameters, name, field) in [
            (json!({"normalize": false}), "sentence_embedding", "mean"),
            (json!({"pooling": "cls", "normalize": false}), "sentence_embedding", "cls"),
            (
                json!({"pooling": "none", "normalize": false}),
                "last_hidden_state",
                "last_hidden_state",
            ),
        ] {
            let (found, _, values) = output(&infer(&server, "sentences", &texts(&expected["texts"], parameters)));
            assert_eq!(found, name);
            if field == "last_hidden_state" {
                // What stands at padding is nobody's.
                let mask = numbers(&expected["attention_mask"]);
                let masked =
                    |values: &[f64]| -> Vec<f64> { values.iter().zip(mask.iter().flat_map(|m| [m; 8])).map(|(v, m)| v * m).collect() };
                let expected = json!(masked(&numbers(&expected[field])));
                assert_close(&masked(&values), &expected, engine);
            } else {
                assert_close(&values, &expected[field], engine);
            }
        }
    }
}

#[test]
fn the_models_own_tensors_and_a_pair_of_texts_are_taken_too() {
    let expected = expected("sentences");
    let server = sentences("onnxruntime");
    let tensor = |name: &str, field: &str| json!({"name": name, "datatype": "INT64", "shape": [5, 12], "data": expected[field]});
    let types = json!({"name": "token_type_ids", "datatype": "INT64", "shape": [5, 12], "data": vec![0; 60]});
    let raw = json!([tensor("input_ids", "input_ids"), tensor("attention_mask", "attention_mask"), types]);
    // Tensors are given as they are unless something is asked for.
    let (name, shape, _) = output(&infer(&server, "sentences", &json!({"inputs": raw})));
    assert_eq!((name.as_str(), shape), ("last_hidden_state", json!([5, 12, 8])));
    let asked = json!({"inputs": raw, "parameters": {"pooling": "mean", "normalize": true}});
    let (name, _, values) = output(&infer(&server, "sentences", &asked));
    assert_eq!(name, "sentence_embedding");
    assert_close(&values, &expected["sentence_embedding"], "raw");

    let text = |name: &str, index: usize| json!({"name": name, "datatype": "BYTES", "shape": [1], "data": [expected["pair"][index]]});
    let pair = json!({"inputs": [text("text_pair", 1), text("text", 0)]});
    let (_, _, values) = output(&infer(&server, "sentences", &pair));
    assert_close(&values, &expected["pair_sentence_embedding"], "pair");
}

#[test]
fn metadata_shows_what_may_be_given_and_metrics_count_its_tokens() {
    let server = sentences("tract");
    let metadata = get(server.http, "/v2/models/sentences").json();
    let names = |field: &str| {
        metadata[field]
            .as_array()
            .unwrap()
            .iter()
            .map(|tensor| tensor["name"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names("inputs"),
        ["input_ids", "attention_mask", "token_type_ids", "text", "text_pair"]
    );
    assert_eq!(metadata["inputs"][3], json!({"name": "text", "datatype": "BYTES", "shape": [-1]}));
    assert_eq!(names("outputs"), ["last_hidden_state", "sentence_embedding"]);

    let expected = expected("sentences");
    infer(&server, "sentences", &texts(&expected["texts"], json!({})));
    let tokens = numbers(&expected["attention_mask"]).iter().sum::<f64>();
    let line = format!("plimsoll_runtime_tokens_total {tokens}");
    let metrics = get(server.http, "/metrics").text;
    assert!(metrics.lines().any(|found| found == line), "no `{line}` in {metrics}");
}

#[test]
fn what_is_wrong_with_a_text_is_said() {
    let server = sentences("tract");
    let refuse = |body: Value| {
        let answer = infer(&server, "sentences", &body);
        assert_eq!(answer.status, 400, "{}", answer.text);
        answer.error()
    };
    let long = json!(["the cat", "the ".repeat(40)]);
    assert_eq!(
        refuse(texts(&long, json!({"truncate": false}))),
        "input `text`: text 1: it has more than the 12 tokens that the model takes"
    );
    assert!(refuse(texts(&json!(["a"]), json!({"pooling": "middle"}))).contains("unknown variant `middle`"));
    let number = json!({"inputs": [{"name": "text", "datatype": "FP32", "shape": [1], "data": [1]}]});
    assert_eq!(refuse(number), "input `text` takes BYTES, FP32 was given");
    let mut both = texts(&json!(["a"]), json!({}));
    let ids = json!({"name": "input_ids", "datatype": "INT64", "shape": [1, 1], "data": [1]});
    both["inputs"].as_array_mut().unwrap().push(ids);
    assert_eq!(refuse(both), "input `input_ids` is given, and input `text`, which it is made of");
    let mut image = texts(&json!(["a"]), json!({}));
    image["inputs"][0]["name"] = json!("image");
    assert_eq!(
        refuse(image),
        "input `image` is not taken: the model has no preprocessor_config.json beside it"
    );
    let pooled = json!({"inputs": texts(&json!(["a"]), json!({}))["inputs"], "outputs": [{"name": "sentence_embedding"}], "parameters": {"pooling": "none"}});
    assert_eq!(
        refuse(pooled),
        "output `sentence_embedding` is pooled, and neither the request's parameter `pooling` nor the model's files say how"
    );
}

fn picture(name: &str) -> Vec<u8> {
    std::fs::read(file("pictures").join(name)).unwrap()
}

/// POST of bytes, as `curl --data-binary @FILE` sends them.
fn send(address: SocketAddr, path: &str, headers: &str, body: &[u8]) -> Answer {
    let mut connection = Connection::open(address).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    );
    connection.write(head.as_bytes()).unwrap();
    connection.write(body).unwrap();
    connection.answer().unwrap()
}

#[test]
fn pictures_become_tensors_however_they_come() {
    let expected = expected("pictures");
    let case = expected["cases"].as_array().unwrap().iter();
    let values = |name: &str| {
        &case
            .clone()
            .find(|case| case["specification"] == "vit" && case["picture"] == name)
            .unwrap()["values"]
    };
    for engine in ["tract", "onnxruntime"] {
        let server = Server::ready(&file("pictures/pictures.onnx"), &["--engine", engine]);
        let metadata = get(server.http, "/v2/models/pictures").json();
        assert_eq!(metadata["inputs"][1], json!({"name": "image", "datatype": "BYTES", "shape": [-1]}));

        let pixels = json!([{"name": "pixels"}]);
        let data = json!([STANDARD.encode(picture("picture.png")), STANDARD.encode(picture("lossless.webp"))]);
        let body = json!({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": data}], "outputs": pixels});
        let (_, shape, found) = output(&infer(&server, "pictures", &body));
        assert_eq!(shape, json!([2, 3, 8, 8]));
        assert_close(&found[..192], values("picture.png"), engine);
        assert_close(&found[192..], values("lossless.webp"), engine);

        let path = "/v2/models/pictures/infer";
        for headers in ["content-type: image/png\r\n", "inference-header-content-length: 0\r\n"] {
            let answer = send(server.http, path, headers, &picture("picture.png"));
            assert_eq!(answer.status, 200, "{}", answer.text);
            let answer = answer.json();
            assert_close(&numbers(&answer["outputs"][1]["data"]), values("picture.png"), headers);
        }

        // The binary extension: a length of four bytes before each element.
        let png = picture("picture.png");
        let head = json!({
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": png.len() + 4}}],
            "outputs": [{"name": "logits", "parameters": {"classification": 2}}],
        });
        let mut body = head.to_string().into_bytes();
        let headers = format!("inference-header-content-length: {}\r\n", body.len());
        body.extend((png.len() as u32).to_le_bytes());
        body.extend(png);
        let answer = send(server.http, path, &headers, &body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        let classes = answer.json()["outputs"][0]["data"].clone();
        let classes: Vec<&str> = classes.as_array().unwrap().iter().map(|class| class.as_str().unwrap()).collect();
        assert!(classes[0].ends_with(":0:red") && classes[1].ends_with(":1:green"), "{classes:?}");
    }
}

#[test]
fn what_is_wrong_with_a_picture_is_said() {
    let server = Server::ready(&file("pictures/pictures.onnx"), &["--engine", "tract", "--max-body", "4500"]);
    let body = json!({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["cat.png"]}]});
    let answer = infer(&server, "pictures", &body);
    assert_eq!(answer.status, 400);
    assert_eq!(
        answer.error(),
        "input `image`: image 0: it is none of PNG, JPEG and WebP, nor base64 of one"
    );
    let picture = STANDARD.encode(picture("lossless.webp"));
    let body = json!({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [6], "data": vec![picture; 6]}]});
    let answer = infer(&server, "pictures", &body);
    assert_eq!(answer.status, 400, "{}", answer.text);
    let text = "input `image`: 6 images are more than the 4500 bytes that this server takes; send fewer at a time";
    assert_eq!(answer.error(), text);
}

fn embed(server: &Server, body: &Value) -> Answer {
    post(server.http, "/v1/embeddings", body)
}

#[test]
fn openais_embeddings_are_the_models() {
    let expected = expected("sentences");
    let server = sentences("onnxruntime");
    // Of 12 tokens at most each.
    let texts: Vec<&Value> = expected["texts"].as_array().unwrap().iter().take(4).collect();
    let answer = embed(&server, &json!({"model": "sentences", "input": texts, "truncate": true}));
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("sentences")));
    let tokens: f64 = numbers(&expected["attention_mask"])[..48].iter().sum();
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": tokens as u64, "total_tokens": tokens as u64})
    );
    for index in 0..4 {
        let embedding = &answer["data"][index];
        assert_eq!((&embedding["object"], &embedding["index"]), (&json!("embedding"), &json!(index)));
        assert_close(&numbers(&embedding["embedding"]), &expected["sentence_embedding"][index], "float");
    }

    // Alone, in base64, and as tokens it is the same.
    let first: Vec<u64> = numbers(&expected["input_ids"][0])
        .into_iter()
        .map(|id| id as u64)
        .filter(|&id| id != 0)
        .collect();
    for input in [texts[0].clone(), json!(first), json!([first])] {
        let answer = embed(&server, &json!({"model": "sentences", "input": input, "encoding_format": "base64"}));
        assert_eq!(answer.status, 200, "{}", answer.text);
        let bytes = STANDARD.decode(answer.json()["data"][0]["embedding"].as_str().unwrap()).unwrap();
        let values: Vec<f64> = bytes
            .chunks(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into())
            .collect();
        assert_close(&values, &expected["sentence_embedding"][0], "base64");
    }
}

/// What sentence-transformers itself made of the same files: `tests/models/minilm/record.py` of the repository.
#[test]
fn minilm_gives_the_embeddings_of_sentence_transformers() {
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/minilm/expected.json");
    let expected: Value = serde_json::from_slice(&std::fs::read(recorded).unwrap()).unwrap();
    // As a hub has it: the model in a folder of its own, and beside that what belongs to it.
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("onnx/minilm.onnx");
    std::fs::create_dir(model.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(real_model("minilm.onnx"), &model).unwrap();
    let tokenizer = real_model("minilm-companions/tokenizer.json");
    for companion in std::fs::read_dir(tokenizer.parent().unwrap()).unwrap() {
        let companion = companion.unwrap();
        std::os::unix::fs::symlink(companion.path(), folder.path().join(companion.file_name())).unwrap();
    }
    let server = Server::ready(&model, &["--engine", "onnxruntime"]);
    let answer = embed(&server, &json!({"model": "minilm", "input": expected["texts"], "truncate": true}));
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    let tokens: u64 = expected["tokens"].as_array().unwrap().iter().filter_map(Value::as_u64).sum();
    assert_eq!(answer["usage"]["prompt_tokens"], tokens);
    let (_, shape, values) = output(&infer(&server, "minilm", &texts(&expected["texts"], json!({}))));
    assert_eq!(shape, json!([6, 384]));
    for (index, values) in values.chunks(384).enumerate() {
        let (text, expected) = (&expected["texts"][index], &expected["embeddings"][index]);
        assert_close(
            &numbers(&answer["data"][index]["embedding"]),
            expected,
            &format!("as OpenAI's: {text}"),
        );
        assert_close(values, expected, &format!("{text}"));
    }
}

#[test]
fn more_texts_than_one_batch_holds_come_back_in_their_order() {
    let expected = expected("sentences");
    let server = sentences("tract");
    let texts: Vec<&Value> = (0..100).map(|index| &expected["texts"][index * 7 % 4]).collect();
    let answer = embed(&server, &json!({"model": "sentences", "input": texts, "truncate": true}));
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    for index in 0..100 {
        assert_close(
            &numbers(&answer["data"][index]["embedding"]),
            &expected["sentence_embedding"][index * 7 % 4],
            "order",
        );
    }
}

#[test]
fn openais_errors_are_in_openais_form() {
    let server = sentences("tract");
    let refuse = |body: Value| {
        let answer = embed(&server, &body);
        (answer.status, answer.json()["error"].clone())
    };
    let error =
        |text: &str, field: Value, code: Value| json!({"message": text, "type": "invalid_request_error", "param": field, "code": code});
    let text = "there is no model `other`; this server has `sentences`";
    assert_eq!(
        refuse(json!({"model": "other", "input": "a"})),
        (404, error(text, json!("model"), json!("model_not_found")))
    );
    let text = "input 1: it has more than the 12 tokens that the model takes";
    let long = json!({"model": "sentences", "input": ["a", "the ".repeat(40)]});
    assert_eq!(refuse(long), (400, error(text, json!("input"), Value::Null)));
    let text = "`input` holds 0 texts, it takes 1 to 2048";
    assert_eq!(
        refuse(json!({"model": "sentences", "input": []})),
        (400, error(text, json!("input"), Value::Null))
    );
    let text = "`dimensions` is 4, the model's embeddings have 8";
    let asked = json!({"model": "sentences", "input": "a", "dimensions": 4});
    assert_eq!(refuse(asked), (400, error(text, json!("dimensions"), Value::Null)));
    let text = "input 0: the model has no token 70000";
    assert_eq!(refuse(json!({"model": "sentences", "input": [[70000]]})).1["message"], text);
    assert!(
        refuse(json!({"model": "sentences"})).1["message"]
            .as_str()
            .unwrap()
            .contains("missing field `input`")
    );

    let models = get(server.http, "/v1/models").json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("sentences")));
    assert_eq!(get(server.http, "/v1/models/sentences").json()["object"], "model");
    assert_eq!(get(server.http, "/v1/models/other").status, 404);
}

#[test]
fn a_model_without_embeddings_says_why_it_has_none() {
    let server = Server::ready(&file("pictures/pictures.onnx"), &["--engine", "tract"]);
    let answer = embed(&server, &json!({"model": "pictures", "input": "a"}));
    assert_eq!(answer.status, 400);
    let text = "model `pictures` gives no embeddings of texts: it has no tokenizer (tokenizer.json beside the model)";
    assert_eq!(answer.json()["error"]["message"], text);
    assert_eq!(get(server.http, "/v1/models").json(), json!({"object": "list", "data": []}));
}
