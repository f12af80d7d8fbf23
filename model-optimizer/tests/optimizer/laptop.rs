//! `plimsoll-optimizer optimize` on real models, with both engines.

use std::fs;
use std::path::Path;
use std::process::Output;

use plimsoll_package::manifest::{Engine as EngineKind, Manifest, Probe};
use plimsoll_package::report::{Report, exit_code};
use plimsoll_runtime::engine::{self, LoadOptions, probe};

use super::{model, onnxruntime, program};

fn optimize(source: &Path, output: &Path, flags: &[&str]) -> Output {
    program()
        .arg("optimize")
        .arg(source)
        .arg("--output")
        .arg(output)
        .args(flags)
        .output()
        .unwrap()
}

fn report(output: &Output) -> Report {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn heldout() -> String {
    model("digits/digits-heldout.npz").to_str().unwrap().to_owned()
}

/// Every engine that the report measured gives the probe's outputs.
fn check_package(package: &Path, report: &Report) {
    let manifest = Manifest::read(package).unwrap();
    manifest.verify(package).unwrap();
    let recorded = Probe::read(package).unwrap();
    assert_eq!(report.engines.len(), 2, "both engines were tried");
    for measured in report.engines.iter().filter(|measured| measured.latency.is_some()) {
        let options = LoadOptions {
            fold_dequantize: manifest.fold_dequantize,
            library: Some(onnxruntime()),
            ..LoadOptions::default()
        };
        let engine = engine::load(measured.engine, &package.join("model.onnx"), &options).unwrap();
        probe::check(&*engine, &recorded).unwrap_or_else(|error| panic!("{}: {error}", measured.engine));
    }
}

#[test]
fn digits_become_several_times_smaller_within_a_point_of_accuracy() {
    for scheme in ["int8", "int8-dynamic", "int8-weights"] {
        for name in ["digits/digits-v1.onnx", "digits/digits-v2.onnx"] {
            let dir = tempfile::tempdir().unwrap();
            let package = dir.path().join("package");
            let flags = [
                "--quantize",
                scheme,
                "--evaluation",
                &heldout(),
                "--metric",
                "accuracy",
                "--max-accuracy-drop",
                "1%",
                "--json",
            ];
            let report = report(&optimize(&model(name), &package, &flags));
            let ratio = report.summary.size_before as f64 / report.summary.size_after as f64;
            assert!(ratio >= 3.5, "{name} as {scheme} is {ratio:.2} times smaller");
            assert_eq!(report.classes.len(), 10);
            assert_eq!(report.classes.iter().map(|class| class.samples).sum::<u64>(), 450);
            let engines: Vec<EngineKind> = report
                .engines
                .iter()
                .filter(|measured| measured.latency.is_some())
                .map(|measured| measured.engine)
                .collect();
            assert_eq!(engines.len(), 2, "{name} as {scheme}: {:?}", report.engines);
            check_package(&package, &report);
        }
    }
}

#[test]
fn half_of_the_weights_go_when_half_shall_go() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let flags = ["--prune", "50%", "--evaluation", &heldout(), "--max-accuracy-drop", "1%", "--json"];
    let report = report(&optimize(&model("digits/digits-v1.onnx"), &package, &flags));
    assert!((report.summary.sparsity - 0.5).abs() < 0.001, "{}", report.summary.sparsity);
    check_package(&package, &report);
}

#[test]
fn a_model_without_data_is_judged_by_its_fidelity() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let flags = ["--quantize", "int8", "--json"];
    let first = report(&optimize(&model("digits/digits-v1.onnx"), &package, &flags));
    assert!(first.summary.metric.is_none());
    assert!(first.summary.fidelity.unwrap() >= 0.99);
    assert_eq!(first.outputs.len(), 1);
    assert!(first.outputs[0].sqnr_db.unwrap() > 15.0, "{:?}", first.outputs);
    let model_before = fs::read(package.join("model.onnx")).unwrap();
    let second = report(&optimize(&model("digits/digits-v1.onnx"), &package, &flags));
    assert_eq!(
        model_before,
        fs::read(package.join("model.onnx")).unwrap(),
        "the same inputs give the same model"
    );
    assert_eq!(
        first.summary.fidelity.map(|f| (f * 1e4).round()),
        second.summary.fidelity.map(|f| (f * 1e4).round())
    );
}

#[test]
fn a_person_reads_a_table_and_a_failure_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let output = optimize(
        &model("digits/digits-v1.onnx"),
        &package,
        &["--quantize", "int8", "--evaluation", &heldout()],
    );
    let table = String::from_utf8(output.stdout).unwrap();
    for words in [
        "281Ki",
        "accuracy (450 samples)",
        "98.4%",
        "latency, Tract",
        "latency, OnnxRuntime",
        "x smaller)",
    ] {
        assert!(table.contains(words), "{words} is missing:\n{table}");
    }

    let failed = optimize(
        &model("digits/digits-v1.onnx"),
        &dir.path().join("other"),
        &["--quantize", "int8", "--max-size", "10Ki"],
    );
    assert_eq!(failed.status.code(), Some(i32::from(exit_code::BUDGET_EXCEEDED)));
    let said = String::from_utf8(failed.stderr).unwrap();
    let last = said.lines().last().unwrap();
    assert!(
        last.starts_with("error: the model has") && last.contains("maxSize allows 10Ki"),
        "{last}"
    );
    assert!(
        !dir.path().join("other").exists(),
        "nothing is written that is outside of the budget"
    );

    fs::create_dir(dir.path().join("mine")).unwrap();
    fs::write(dir.path().join("mine/notes.txt"), "").unwrap();
    let refused = optimize(&model("digits/digits-v1.onnx"), &dir.path().join("mine"), &[]);
    assert_eq!(refused.status.code(), Some(i32::from(exit_code::USAGE)));
}

#[test]
fn a_recipe_is_the_yaml_of_spec_optimize() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.yaml");
    let text = format!(
        "recipe:\n- prune: {{amount: \"30%\", scope: PerLayer}}\n- quantize: {{scheme: Int8}}\nevaluation:\n  dataset: {{uri: \"{}\"}}\nbudget: {{maxAccuracyDrop: \"2%\"}}\n",
        heldout()
    );
    fs::write(&recipe, text).unwrap();
    let output = optimize(
        &model("digits/digits-v2.onnx"),
        &dir.path().join("package"),
        &["--recipe", recipe.to_str().unwrap(), "--json"],
    );
    let report = report(&output);
    assert_eq!(report.steps.len(), 2);
    assert!(report.summary.sparsity > 0.299);
}
