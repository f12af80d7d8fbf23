//! The optimiser on real models, within the default budget: on those that tests run on, and on those that no technique was tuned on.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{images, models, onnxruntime, progress, workspace};

/// A model with its samples, by the names of their files.
struct Model {
    model: &'static str,
    /// What it is made of.
    what: &'static str,
    calibration: &'static str,
    /// Where it is the same file, the samples are divided.
    evaluation: &'static str,
}

/// Models that come with the repository.
const DIGITS: [Model; 2] = [
    Model {
        model: "digits-v1.onnx",
        what: "classifier of pictures: two convolutions, dense layers",
        calibration: "digits-training.npz",
        evaluation: "digits-heldout.npz",
    },
    Model {
        model: "digits-v2.onnx",
        what: "the same, wider",
        calibration: "digits-training.npz",
        evaluation: "digits-heldout.npz",
    },
];

/// Models that tests run on.
const TESTED: [Model; 4] = [
    Model {
        model: "minilm.onnx",
        what: "sentence encoder: a transformer",
        calibration: "calibration.npz",
        evaluation: "evaluation.npz",
    },
    of(
        "magika.onnx",
        "classifier of files: one convolution, dense layers",
        "magika-inputs.npz",
    ),
    of(
        "recogniser.onnx",
        "ddddocr, recogniser of print: convolutions, LSTM",
        "recogniser-inputs.npz",
    ),
    of("detector.onnx", "ddddocr, detector of print: convolutions", "detector-inputs.npz"),
];

/// Models that no technique was tuned on.
const HELD_OUT: [Model; 6] = [
    of(
        "rapidocr-detector.onnx",
        "text detector: depthwise convolutions, `ConvTranspose`, opset 12",
        "rapidocr-detector-inputs.npz",
    ),
    of(
        "rapidocr-recogniser.onnx",
        "text recogniser: convolutions and attention, opset 12",
        "rapidocr-recogniser-inputs.npz",
    ),
    of(
        "rapidocr-classifier.onnx",
        "picture classifier: MobileNetV3, opset 11",
        "rapidocr-classifier-inputs.npz",
    ),
    of(
        "silero-voice.onnx",
        "voice detector: all of it within the branches of an `If`",
        "silero-voice-inputs.npz",
    ),
    of(
        "silero-voice-16k.onnx",
        "the same for one rate: convolutions and an `LSTM`, three `If`",
        "silero-voice-16k-inputs.npz",
    ),
    of(
        "silero-voice-sequence.onnx",
        "the same over a sequence",
        "silero-voice-sequence-inputs.npz",
    ),
];

const fn of(model: &'static str, what: &'static str, samples: &'static str) -> Model {
    Model {
        model,
        what,
        calibration: samples,
        evaluation: samples,
    }
}

/// Which models.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Tested,
    HeldOut,
}

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How models are quantised, as `plimsoll-optimizer optimize --quantize`.
    #[arg(long, default_value = "int8")]
    quantize: String,
    /// Threads that an inference may use. Default: as many as there are.
    #[arg(long)]
    threads: Option<u32>,
    /// Only the models whose names hold this.
    #[arg(long)]
    only: Option<String>,
}

/// Runs it.
///
/// # Errors
/// Where a model cannot be had, or the program cannot be built or started.
pub(super) fn run(which: Which, arguments: &Arguments) -> Result<()> {
    let sets: Vec<(PathBuf, &[Model])> = match which {
        Which::Tested => vec![
            (workspace::root().join("tests/models/digits"), &DIGITS),
            (models::fetch(&models::TESTED)?, &TESTED),
        ],
        Which::HeldOut => vec![(models::fetch(&models::HELD_OUT)?, &HELD_OUT)],
    };
    let optimizer = images::programs(&["plimsoll-optimizer"])?
        .into_iter()
        .next()
        .context("one program was asked for")?;
    let library = onnxruntime::Library::Cpu.path()?;
    let mut rows = Vec::new();
    for (folder, models) in &sets {
        for model in *models {
            let name = model.model.trim_end_matches(".onnx");
            if arguments.only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
                continue;
            }
            let said = progress::phase(name, |_| optimize(&optimizer, &library, folder, model, arguments))?;
            rows.push(format!("| {name} | {} | {said} |", model.what));
        }
    }
    println!(
        "\n| model | what it is | file, bytes | pulled, bytes | accuracy | least fidelity | latency | ratio | budget |\n|---|---|---|---|---|---|---|---|---|"
    );
    println!("{}", rows.join("\n"));
    Ok(())
}

/// What is to be said of a model.
fn optimize(optimizer: &Path, library: &Path, folder: &Path, model: &Model, arguments: &Arguments) -> Result<String> {
    let scratch = tempfile::tempdir()?;
    let mut command = Command::new(optimizer);
    command
        .arg("optimize")
        .arg(folder.join(model.model))
        .args(["--quantize", &arguments.quantize, "--json", "--output"])
        .arg(scratch.path().join("package"))
        .arg("--calibration")
        .arg(folder.join(model.calibration))
        .arg("--evaluation")
        .arg(folder.join(model.evaluation))
        .env("ORT_DYLIB_PATH", library);
    if let Some(threads) = arguments.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    let output = command.output().context("cannot start the optimiser")?;
    // Which way of computing was taken, and why.
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    eprint!("{said}");
    match serde_json::from_slice::<Value>(&output.stdout) {
        Ok(report) => Ok(row(&report)),
        // What cannot be compressed is said in one line.
        Err(_) => {
            let line = said.lines().last().unwrap_or_default();
            ensure!(!line.is_empty(), "the optimiser says nothing of {}", model.model);
            Ok(format!("- | - | - | - | - | - | {}", line.trim_start_matches("error: ")))
        }
    }
}

/// The cells of a report: size of the file and of what is pulled, the metric, fidelity, latency, and what the gate says.
fn row(report: &Value) -> String {
    let summary = &report["summary"];
    let number = |field: &str| summary[field].as_f64().unwrap_or(f64::NAN);
    let smaller = |before: &str, after: &str| {
        let (before, after) = (number(before), number(after));
        format!("{before} -> {after}, {:.2}x smaller", before / after)
    };
    let metric = &summary["metric"];
    let accuracy = match (metric["name"].as_str(), metric["before"].as_f64(), metric["after"].as_f64()) {
        (Some(name), Some(before), Some(after)) if name != "Fidelity" => format!("{:.2} % -> {:.2} %", before * 100.0, after * 100.0),
        _ => "-".to_owned(),
    };
    let engines = report["engines"].as_array().map(Vec::as_slice).unwrap_or_default();
    let chosen = engines.iter().find(|measured| measured["engine"] == summary["engine"]);
    let field = |of: &str, field: &str| chosen.and_then(|measured| measured[of][field].as_f64());
    let latency = match (field("latency", "beforeUs"), field("latency", "afterUs")) {
        (Some(before), Some(after)) => format!("{before:.0} -> {after:.0} us, {}", summary["engine"].as_str().unwrap_or_default()),
        _ => "-".to_owned(),
    };
    let ratio = |name: &str| field("latencyRatio", name).unwrap_or(f64::NAN);
    let verdict = match report["gate"]["verdict"].as_str() {
        Some("WithinBudget") => "within".to_owned(),
        _ => {
            let limits = report["gate"]["limits"].as_array().map(Vec::as_slice).unwrap_or_default();
            let why = limits.iter().find_map(|limit| limit["message"].as_str());
            format!("refused: {}", why.unwrap_or("no limit says why"))
        }
    };
    format!(
        "{} | {} | {accuracy} | {:.5} | {latency} | x {:.2} ({:.2} to {:.2}) | {verdict}",
        smaller("sizeBefore", "sizeAfter"),
        smaller("sizeLayerBefore", "sizeLayerAfter"),
        number("fidelity"),
        ratio("median"),
        ratio("p10"),
        ratio("p90"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_tells_the_measured_and_why_a_model_was_refused() {
        let mut report = serde_json::json!({
            "summary": {
                "sizeBefore": 400, "sizeAfter": 100, "sizeLayerBefore": 300, "sizeLayerAfter": 60, "fidelity": 0.9987, "engine": "Tract",
            },
            "engines": [{
                "engine": "Tract",
                "latency": {"beforeUs": 10.0, "afterUs": 9.0},
                "latencyRatio": {"median": 0.9, "p10": 0.8, "p90": 1.0},
            }],
            "gate": {"verdict": "WithinBudget", "limits": []},
        });
        let sizes = "400 -> 100, 4.00x smaller | 300 -> 60, 5.00x smaller";
        assert_eq!(
            row(&report),
            format!("{sizes} | - | 0.99870 | 10 -> 9 us, Tract | x 0.90 (0.80 to 1.00) | within")
        );
        report["summary"]["metric"] = serde_json::json!({"name": "Accuracy", "before": 0.9844, "after": 0.98});
        report["gate"] = serde_json::json!({"verdict": "BudgetExceeded", "limits": [{"message": "output `y` is lost"}]});
        assert!(row(&report).contains("| 98.44 % -> 98.00 % |"));
        assert!(row(&report).ends_with("| refused: output `y` is lost"));
    }
}
