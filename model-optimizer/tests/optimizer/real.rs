//! Models that nobody here made, on pictures, texts and files: each within its budget and much smaller. How fast they are is for the benchmark: a
//! machine that runs other tests meanwhile says nothing of it.

use plimsoll_package::report::{Report, Verdict};

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
