//! The optimiser on models that no technique was tuned on: what it makes of each within the default budget.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{images, models, onnxruntime, progress};

/// The models, with what they are made of.
const MODELS: [(&str, &str); 6] = [
    (
        "rapidocr-detector",
        "text detector: depthwise convolutions, `ConvTranspose`, opset 12",
    ),
    ("rapidocr-recogniser", "text recogniser: convolutions and attention, opset 12"),
    ("rapidocr-classifier", "picture classifier: MobileNetV3, opset 11"),
    ("silero-voice", "voice detector: all of it within the branches of an `If`"),
    ("silero-voice-16k", "the same for one rate: convolutions and an `LSTM`, three `If`"),
    ("silero-voice-sequence", "the same over a sequence"),
];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How models are quantised, as `plimsoll-optimizer optimize --quantize`.
    #[arg(long, default_value = "int8")]
    quantize: String,
}

/// Runs it.
///
/// # Errors
/// Where a model cannot be had, or the program cannot be built or started.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let folder = models::fetch(&models::HELD_OUT)?;
    let optimizer = images::programs(&["plimsoll-optimizer"])?
        .into_iter()
        .next()
        .context("one program was asked for")?;
    let library = onnxruntime::library()?;
    let mut rows = Vec::new();
    for (name, what) in MODELS {
        let said = progress::phase(name, |_| optimize(&optimizer, &library, &folder, name, &arguments.quantize))?;
        rows.push(format!("| {name} | {what} | {said} |"));
    }
    println!("\n| model | what it is | file | pulled | least fidelity | latency | budget |\n|---|---|---|---|---|---|---|");
    println!("{}", rows.join("\n"));
    Ok(())
}

/// What is to be said of a model.
fn optimize(optimizer: &Path, library: &Path, folder: &Path, name: &str, scheme: &str) -> Result<String> {
    let scratch = tempfile::tempdir()?;
    let samples = folder.join(format!("{name}-inputs.npz"));
    let mut command = Command::new(optimizer);
    command
        .arg("optimize")
        .arg(folder.join(format!("{name}.onnx")))
        .args(["--quantize", scheme, "--json", "--output"])
        .arg(scratch.path().join("package"))
        .arg("--calibration")
        .arg(&samples)
        .arg("--evaluation")
        .arg(&samples)
        .env("ORT_DYLIB_PATH", library);
    let output = command.output().context("cannot start the optimiser")?;
    let report = match serde_json::from_slice::<Value>(&output.stdout) {
        Ok(report) => report,
        // What cannot be compressed is said in one line.
        Err(_) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let line = said.lines().last().unwrap_or_default();
            ensure!(!line.is_empty(), "the optimiser says nothing of {name}");
            return Ok(format!("- | - | - | - | {}", line.trim_start_matches("error: ")));
        }
    };
    fs::remove_dir_all(scratch.path().join("package")).ok();
    Ok(row(&report))
}

/// The cells of a report: size of the file and of what is pulled, fidelity, latency, and what the gate says.
fn row(report: &Value) -> String {
    let summary = &report["summary"];
    let number = |field: &str| summary[field].as_f64().unwrap_or(f64::NAN);
    let smaller = |before: &str, after: &str| format!("{:.2}x smaller", number(before) / number(after));
    let engines = report["engines"].as_array().map(Vec::as_slice).unwrap_or_default();
    let chosen = engines.iter().find(|measured| measured["engine"] == summary["engine"]);
    let ratio = chosen.map(|measured| &measured["latencyRatio"]);
    let latency = ratio.map_or_else(
        || "-".to_owned(),
        |ratio| {
            let of = |field: &str| ratio[field].as_f64().unwrap_or(f64::NAN);
            format!("x {:.2} ({:.2} to {:.2})", of("median"), of("p10"), of("p90"))
        },
    );
    let verdict = match report["gate"]["verdict"].as_str() {
        Some("WithinBudget") => "within".to_owned(),
        _ => {
            let limits = report["gate"]["limits"].as_array().map(Vec::as_slice).unwrap_or_default();
            let why = limits.iter().find_map(|limit| limit["message"].as_str());
            format!("refused: {}", why.unwrap_or("no limit says why"))
        }
    };
    format!(
        "{} | {} | {:.5} | {latency} | {verdict}",
        smaller("sizeBefore", "sizeAfter"),
        smaller("sizeLayerBefore", "sizeLayerAfter"),
        number("fidelity"),
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
            "engines": [{"engine": "Tract", "latencyRatio": {"median": 0.9, "p10": 0.8, "p90": 1.0}}],
            "gate": {"verdict": "WithinBudget", "limits": []},
        });
        assert_eq!(
            row(&report),
            "4.00x smaller | 5.00x smaller | 0.99870 | x 0.90 (0.80 to 1.00) | within"
        );
        report["gate"] = serde_json::json!({"verdict": "BudgetExceeded", "limits": [{"message": "output `y` is lost"}]});
        assert!(row(&report).ends_with("| refused: output `y` is lost"));
    }
}
