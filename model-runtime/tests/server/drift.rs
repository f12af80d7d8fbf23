//! Drift, as a client and Prometheus see it.

use plimsoll_package::drift::{DRIFT_FILE, Distribution, Reference, Source, TensorReference};
use plimsoll_package::manifest::Engine;
use plimsoll_runtime::engine::{self, EngineKind, LoadOptions, Tensor};
use plimsoll_runtime::observation;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Connection, get};
use crate::process::{Server, model, package, seal};

/// Numbers between 0 and 1, spread evenly (Weyl 1916), the same at each run.
fn samples(count: usize, seed: usize) -> Vec<Vec<f64>> {
    let golden = 0.618_033_988_749_894_9;
    let value = |index: usize| ((index + seed * 10_007) as f64 * golden).fract();
    (0..count)
        .map(|row| (0..4).map(|column| value(row * 4 + column)).collect())
        .collect()
}

/// A package of `mlp` that was evaluated on such samples.
fn packaged() -> TempDir {
    let package = package("mlp", Engine::Tract);
    let engine = engine::load(EngineKind::Tract, &model("mlp"), &LoadOptions::default()).unwrap();
    let values: Vec<f64> = samples(400, 1).concat();
    let input = Tensor::new(vec![400, 4], values.iter().map(|value| *value as f32).collect::<Vec<_>>()).unwrap();
    let output = engine.run(&[input]).unwrap().remove(0);
    let mut classes = vec![0; 3];
    observation::classes(&output, usize::MAX, 0, |class| classes[class] += 1);
    let reference = Reference {
        schema_version: 1,
        from: Source::Evaluation,
        samples: 400,
        inputs: vec![TensorReference {
            name: "x".into(),
            values: Distribution::of(values),
            ..TensorReference::default()
        }],
        outputs: vec![TensorReference {
            name: "y".into(),
            values: Distribution::of(output.data().to_f64().unwrap()),
            classes: Some(classes),
            ..TensorReference::default()
        }],
    };
    std::fs::write(package.path().join(DRIFT_FILE), serde_json::to_vec(&reference).unwrap()).unwrap();
    seal(package.path(), "mlp", Engine::Tract);
    package
}

fn ask(server: &Server, samples: &[Vec<f64>], shift: f64) {
    let mut connection = Connection::open(server.http).unwrap();
    for sample in samples {
        let data: Vec<f64> = sample.iter().map(|value| value + shift).collect();
        let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}]});
        let answer = connection.send("POST", "/v2/models/mlp/infer", "", &body.to_string()).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
}

/// Asks about sample after sample until a hundred and more of them were looked at: of a faster client only some are.
fn ask_until_enough(server: &Server, shift: f64) -> Value {
    for round in 2..100 {
        ask(server, &samples(200, round), shift);
        let summary = get(server.http, "/v2/models/mlp/drift").json();
        if summary["rows"].as_u64().unwrap() >= 200 {
            return summary;
        }
    }
    panic!("of 19600 requests no 200 were looked at");
}

fn of<'a>(summary: &'a Value, name: &str, kind: &str) -> &'a Value {
    let tensors = summary["tensors"].as_array().unwrap();
    let found = tensors.iter().find(|tensor| tensor["name"] == name && tensor["kind"] == kind);
    found.unwrap_or_else(|| panic!("no {kind} of {name} in {summary}"))
}

#[test]
fn inputs_as_they_were_raise_nothing_and_shifted_ones_do() {
    let package = packaged();
    let server = Server::ready(package.path(), &["--name", "mlp"]);
    let empty = get(server.http, "/v2/models/mlp/drift").json();
    assert_eq!(
        (&empty["verdict"], &empty["window_s"], &empty["tensors"][0]["psi"]),
        (&json!("TooFew"), &json!(600.0), &Value::Null)
    );
    assert!(!get(server.http, "/metrics").text.contains("plimsoll_runtime_drift_psi{"));

    let summary = ask_until_enough(&server, 0.0);
    assert_eq!(summary["verdict"], "Stable", "{summary}");
    assert_eq!(summary["reference"], json!({"from": "Evaluation", "samples": 400}));
    assert!(of(&summary, "x", "values")["psi"].as_f64().unwrap() < 0.05, "{summary}");
    let metrics = get(server.http, "/metrics").text;
    let psi = metrics
        .lines()
        .find(|line| line.starts_with("plimsoll_runtime_drift_psi{") && line.contains("tensor=\"x\""));
    let psi = psi.unwrap_or_else(|| panic!("{metrics}"));
    assert!(psi.contains("model=\"mlp\",tensor=\"x\",side=\"input\",kind=\"values\"}"), "{psi}");
    assert!(psi.rsplit(' ').next().unwrap().parse::<f64>().unwrap() < 0.1, "{psi}");

    let server = Server::ready(package.path(), &["--name", "mlp", "--drift-window", "1h"]);
    let summary = ask_until_enough(&server, 3.0);
    let x = of(&summary, "x", "values");
    assert_eq!(
        (&x["verdict"], &x["ks"], &summary["verdict"]),
        (&json!("Significant"), &json!(1.0), &json!("Significant")),
        "{summary}"
    );
    assert_eq!(of(&summary, "y", "values")["verdict"], "Significant", "{summary}");
    let metrics = get(server.http, "/metrics").text;
    assert!(
        metrics.contains("plimsoll_runtime_drift_ks{model=\"mlp\",tensor=\"x\",side=\"input\",kind=\"values\"} 1.0"),
        "{metrics}"
    );
}

#[test]
fn what_is_older_than_the_window_is_forgotten() {
    let package = packaged();
    let server = Server::ready(package.path(), &["--name", "mlp", "--drift-window", "1s"]);
    ask(&server, &samples(50, 2), 0.0);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!(get(server.http, "/v2/models/mlp/drift").json()["rows"], 0);
}

#[test]
fn without_a_reference_it_is_told_what_to_do() {
    let package = package("mlp", Engine::Tract);
    let server = Server::ready(package.path(), &["--name", "mlp"]);
    let answer = get(server.http, "/v2/models/mlp/versions/1/drift");
    assert_eq!(answer.status, 404);
    assert!(
        answer.error().contains("optimise it with calibration or evaluation data"),
        "{}",
        answer.text
    );
    assert_eq!(get(server.http, "/v2/models/other/drift").status, 404);

    let package = packaged();
    let off = Server::ready(package.path(), &["--name", "mlp", "--drift-window", "0"]);
    assert!(get(off.http, "/v2/models/mlp/drift").error().contains("--drift-window"));

    std::fs::write(package.path().join(DRIFT_FILE), r#"{"schemaVersion": 2}"#).unwrap();
    seal(package.path(), "mlp", Engine::Tract);
    let newer = Server::ready(package.path(), &["--name", "mlp"]);
    let answer = get(newer.http, "/v2/models/mlp/drift");
    assert!(
        answer.status == 404 && answer.error().contains("drift.json is not valid"),
        "{}",
        answer.text
    );
}
