//! Models that nobody here made, on pictures, texts and files: each within its budget and much smaller. How fast they are is for the benchmark: a
//! machine that runs other tests meanwhile says nothing of it.

use plimsoll_optimizer::compress::quantize::qdq;
use plimsoll_package::report::{Report, Verdict, exit_code};

use super::{program, real_model};

/// The report of `MODEL --quantize int8`, calibrated and judged on real samples, within the default budget.
fn quantized(model: &str, calibration: &str, evaluation: &str) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let mut command = program();
    command
        .arg("optimize")
        .arg(real_model(model))
        .arg("--output")
        .arg(folder.path().join("package"));
    command.arg("--calibration").arg(real_model(calibration));
    command.arg("--evaluation").arg(real_model(evaluation));
    let output = command.args(["--quantize", "int8", "--json"]).output().unwrap();
    assert!(output.status.success(), "{model}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn check(model: &str, calibration: &str, evaluation: &str) {
    let report = quantized(model, calibration, evaluation);
    let summary = &report.summary;
    let smaller = |before: u64, after: u64| before as f64 / after as f64;
    let file = smaller(summary.size_before, summary.size_after);
    assert!(file >= 3.5, "{model}: {file:.2} times smaller");
    let pulled = smaller(summary.size_layer_before.unwrap(), summary.size_layer_after.unwrap());
    assert!(pulled >= 3.5, "{model}: {pulled:.2} times less to pull");
    assert_eq!(report.gate.verdict, Verdict::WithinBudget, "{model}");
    assert!(
        report
            .gate
            .limits
            .iter()
            .any(|limit| limit.of.starts_with("output") && limit.default),
        "{model}"
    );
    let chosen = report.engines.iter().find(|measured| measured.engine == summary.engine).unwrap();
    assert!(
        chosen.latency_ratio.is_some_and(|ratio| ratio.median > 0.0),
        "{model}: its latency is measured"
    );
}

#[test]
fn a_classifier_of_files() {
    check("magika.onnx", "magika-inputs.npz", "magika-inputs.npz");
}

#[test]
fn a_sentence_encoder() {
    check("minilm.onnx", "calibration.npz", "evaluation.npz");
}

#[test]
fn a_recogniser_of_print() {
    check("recogniser.onnx", "recogniser-inputs.npz", "recogniser-inputs.npz");
}

#[test]
fn a_detector_of_print() {
    check("detector.onnx", "detector-inputs.npz", "detector-inputs.npz");
}

/// The detector by `quantize`, an entry of a recipe in YAML's flow style, within the default budget: its exit code and report.
fn detector(quantize: &str) -> (u8, Report) {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.yaml");
    std::fs::write(&recipe, format!("recipe:\n- quantize: {quantize}\n")).unwrap();
    let samples = real_model("detector-inputs.npz");
    let mut command = program();
    command
        .arg("optimize")
        .arg(real_model("detector.onnx"))
        .arg("--recipe")
        .arg(&recipe);
    command.arg("--calibration").arg(&samples).arg("--evaluation").arg(&samples);
    let output = command
        .arg("--output")
        .arg(folder.path().join("package"))
        .arg("--json")
        .output()
        .unwrap();
    let code = output.status.code().unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    (u8::try_from(code).unwrap(), report)
}

#[test]
fn a_detector_in_integers_keeps_every_slice_and_one_that_loses_its_scores_is_refused() {
    let (code, report) = detector("{scheme: Int8Static}");
    assert_eq!((code, report.gate.verdict), (0, Verdict::WithinBudget));
    let smaller = report.summary.size_before as f64 / report.summary.size_after as f64;
    assert!(smaller >= 3.5, "{smaller:.2} times smaller");
    let least = report.outputs[0].worst_slices[0].cosine;
    assert!(least >= 0.9, "{least}");

    // Boxes and scores, which lie side by side in one output, get one scale together.
    let operators = qdq::supported().join(", ");
    let (code, report) = detector(&format!("{{scheme: Int8Static, range: Entropy, operators: [{operators}]}}"));
    assert_eq!((code, report.gate.verdict), (exit_code::BUDGET_EXCEEDED, Verdict::BudgetExceeded));
    let whole = &report.gate.limits[0];
    assert!(whole.passed && whole.of == "output output", "{whole:?}");
    // The index of axis 2 is what a box is said to hold: four places, whether it holds anything, and whether that is print.
    let lost = report.gate.limits.iter().find(|limit| !limit.passed).unwrap();
    assert_eq!(lost.of, "output output, index 4 of axis 2");
}
