//! The report as its readers meet it: `report.json` by its published schema, `report.html` beside it.

use std::fs;
use std::path::Path;

use plimsoll_package::manifest::Manifest;
use plimsoll_package::report::{Report, Verdict, exit_code};
use serde_json::Value;

use super::{model, program};

/// Optimises the digits as `recipe` says, and gives the exit code.
fn optimize(package: &Path, recipe: &str, flags: &[&str]) -> u8 {
    let file = package.with_extension("yaml");
    fs::write(&file, recipe).unwrap();
    let status = program()
        .arg("optimize")
        .arg(model("digits/digits-v1.onnx"))
        .arg("--output")
        .arg(package)
        .arg("--recipe")
        .arg(file)
        .args(flags)
        .output()
        .unwrap()
        .status;
    status.code().unwrap() as u8
}

fn report(package: &Path) -> (Report, Value) {
    let json = fs::read(package.join("report.json")).unwrap();
    (serde_json::from_slice(&json).unwrap(), serde_json::from_slice(&json).unwrap())
}

fn page(package: &Path) -> String {
    fs::read_to_string(package.join("report.html")).unwrap()
}

/// A recipe that uses all that the digits have: labels, classes, pruning and quantisation.
fn recipe(budget: &str) -> String {
    let data = model("digits/digits-heldout.npz");
    format!(
        "recipe:\n- prune: {{amount: \"50%\"}}\n- quantize: {{scheme: Int8Weights}}\nevaluation:\n  dataset: {{uri: {}}}\nbudget: {budget}\n",
        data.display()
    )
}

/// Why `value` is not what `schema` describes (JSON Schema 2020-12, of its keywords those that the report's schema has); nothing else than
/// what it describes may be there.
fn differences(value: &Value, schema: &Value, root: &Value, place: &str) -> Vec<String> {
    if let Some(name) = schema["$ref"].as_str() {
        let definition = root
            .pointer(name.trim_start_matches('#'))
            .unwrap_or_else(|| panic!("{name} is not defined"));
        return differences(value, definition, root, place);
    }
    let alternatives = schema["anyOf"].as_array().or(schema["oneOf"].as_array());
    if let Some(alternatives) = alternatives {
        let all: Vec<Vec<String>> = alternatives.iter().map(|schema| differences(value, schema, root, place)).collect();
        return if all.iter().any(Vec::is_empty) { vec![] } else { all.concat() };
    }
    let mut found = Vec::new();
    let mut differs = |why: String| found.push(format!("{place}: {why}"));
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("{place}: the type {other}"),
    };
    let is_typed = match &schema["type"] {
        Value::String(kind) => is(kind),
        Value::Array(kinds) => kinds.iter().any(|kind| is(kind.as_str().unwrap())),
        _ => true,
    };
    if !is_typed {
        differs(format!("{value} is no {}", schema["type"]));
    }
    if schema["enum"].as_array().is_some_and(|allowed| !allowed.contains(value)) || schema.get("const").is_some_and(|only| only != value) {
        differs(format!("{value} is not allowed"));
    }
    for field in schema["required"].as_array().into_iter().flatten() {
        if value.get(field.as_str().unwrap()).is_none() {
            differs(format!("{field} is missing"));
        }
    }
    for (field, value) in value.as_object().into_iter().flatten() {
        let described = schema["properties"]
            .get(field)
            .or_else(|| schema.get("additionalProperties").filter(|schema| schema.is_object()));
        match described {
            Some(schema) => found.extend(differences(value, schema, root, &format!("{place}/{field}"))),
            None => found.push(format!("{place}: {field} is unknown")),
        }
    }
    for (index, value) in value.as_array().into_iter().flatten().enumerate() {
        found.extend(differences(value, &schema["items"], root, &format!("{place}/{index}")));
    }
    found
}

#[test]
fn a_report_follows_its_published_schema() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/report.schema.json");
    let schema: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(schema["$id"].is_string() && schema["$schema"].is_string() && schema["title"].is_string());
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    assert_eq!(
        optimize(&package, &recipe("{maxAccuracyDrop: \"2%\", maxLatency: 10s}"), &[]),
        exit_code::DONE
    );
    let (_, mut json) = report(&package);
    assert_eq!(differences(&json, &schema, &schema, ""), Vec::<String>::new());
    // And it says so where one does not.
    json["summary"].as_object_mut().unwrap().remove("sizeAfter");
    json["gate"]["verdict"] = "Perhaps".into();
    json["layers"][0]["before"]["distribution"]["low"] = "-1".into();
    json["unheardOf"] = 1.into();
    let found = differences(&json, &schema, &schema, "");
    assert!(found.contains(&"/summary: \"sizeAfter\" is missing".to_owned()), "{found:?}");
    assert!(
        found.contains(&"/layers/0/before/distribution/low: \"-1\" is no \"number\"".to_owned()),
        "{found:?}"
    );
    assert!(found.contains(&": unheardOf is unknown".to_owned()), "{found:?}");
    assert!(found.iter().any(|why| why.starts_with("/gate/verdict")), "{found:?}");
}

#[test]
fn the_page_lies_beside_the_report_whatever_the_verdict() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    assert_eq!(optimize(&package, &recipe("{maxAccuracyDrop: \"2%\"}"), &[]), exit_code::DONE);
    let manifest = Manifest::read(&package).unwrap();
    manifest.verify(&package).unwrap();
    let within = page(&package);
    assert_eq!(manifest.files["report.html"].size, within.len() as u64);
    for words in [
        "✓ Within the budget",
        "accuracy, 450 samples",
        "Classes",
        "Distributions of weights",
        "maxAccuracyDrop: 2%",
    ] {
        assert!(within.contains(words), "{words} is missing:\n{within}");
    }
    assert_eq!(optimize(&package, &recipe("{maxSize: 10Ki}"), &[]), exit_code::BUDGET_EXCEEDED);
    let exceeded = page(&package);
    assert!(
        exceeded.contains("✗ Outside of the budget") && exceeded.contains("maxSize allows 10Ki"),
        "{exceeded}"
    );
    assert_eq!(
        optimize(&package, "recipe: [{quantize: {scheme: Int8}}]", &["--no-gate"]),
        exit_code::DONE
    );
    let bare = page(&package);
    assert!(
        bare.contains("? Not measured") && !bare.contains("Distributions of weights"),
        "{bare}"
    );
    assert_eq!(report(&package).0.gate.verdict, Verdict::NotGated);
    Manifest::read(&package).unwrap().verify(&package).unwrap();
}

#[test]
fn what_became_of_each_weight_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    assert_eq!(optimize(&package, &recipe("{maxAccuracyDrop: \"2%\"}"), &[]), exit_code::DONE);
    let layers = report(&package).0.layers;
    assert!(layers.len() >= 3, "{layers:?}");
    let (mut zeros, mut values) = (0.0, 0.0);
    for layer in &layers {
        let after = layer.after.as_ref().unwrap();
        let count = layer.before.shape.iter().product::<u64>() as f64;
        zeros += after.sparsity * count;
        values += count;
        assert!(after.element_type == "FLOAT" || after.bytes < layer.before.bytes / 2, "{layer:?}");
        let (was, is) = (layer.before.distribution.as_ref().unwrap(), after.distribution.as_ref().unwrap());
        assert_eq!((was.low, was.high, was.counts.len()), (is.low, is.high, 64));
        assert_eq!(
            [&was.counts, &is.counts].map(|counts| counts.iter().sum::<u64>() as f64),
            [count; 2]
        );
    }
    assert!((zeros / values) >= 0.5, "half of the weights are pruned: {}", zeros / values);
    assert!(layers.is_sorted_by(|a, b| a.before.bytes >= b.before.bytes));
    assert_eq!(
        optimize(&package, "recipe: [{prune: {amount: \"50%\"}}]", &["--no-gate"]),
        exit_code::DONE
    );
    let layers = report(&package).0.layers;
    assert!(layers.iter().all(|layer| layer.before.distribution.is_none()));
    assert!(layers.iter().any(|layer| layer.after.as_ref().unwrap().sparsity > 0.5));
}
