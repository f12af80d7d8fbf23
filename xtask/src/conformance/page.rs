//! The page of the documentation that the results are.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result};

use super::outcome::{OUTCOMES, Outcome};
use super::{COLUMNS, Row, source};
use crate::onnxruntime::Library;
use crate::workspace;

/// The page, in Markdown.
///
/// # Errors
/// Where a version that it names cannot be read.
pub(super) fn render(rows: &[Row]) -> Result<String> {
    let versions: [String; COLUMNS.len()] = [
        format!("tract {}", locked("tract-onnx")?),
        format!("ONNX Runtime {}", Library::Cpu.version()?),
        format!("ONNX Runtime {} on CUDA", Library::Gpu.version()?),
        format!("ONNX Runtime {} on OpenVINO", Library::OpenVino.version()?),
    ];
    let mut page = format!(
        "# ONNX conformance\n\n\
         The {} node tests of ONNX's backend suite (`onnx` {} from PyPI), each a model of one operator with recorded outputs, run by the \
         runtime's own engines: loaded, checked and run as a request is. A case passes where every output has the recorded type and shape and \
         every value is within the suite's tolerance. `cargo xtask conformance` runs them and writes this page; `cargo xtask test` fails where \
         a case stops passing on the processor. `cargo xtask conformance --device cuda` measures the column of the GPU, on a machine that has \
         one, and `--device openvino` that of OpenVINO, on an x86_64 processor.\n\n",
        rows.len(),
        suite_version()?,
    );
    let _ = writeln!(
        page,
        "| what came of a case | {} | |\n|---|{}---|",
        versions.join(" | "),
        "--:|".repeat(COLUMNS.len())
    );
    for (outcome, name, meaning) in OUTCOMES {
        let counts = columns().map(|column| rows.iter().filter(|row| row.outcomes[column] == outcome).count());
        if counts != [0; COLUMNS.len()] {
            let counts = counts.map(|count| count.to_string()).join(" | ");
            let _ = writeln!(page, "| {name} | {counts} | {meaning} |");
        }
    }
    page.push_str(NOTES);
    let _ = writeln!(
        page,
        "\n## By operator\n\n| operator | cases | {} |\n|---|--:|{}",
        versions.join(" | "),
        "---|".repeat(COLUMNS.len())
    );
    let mut operators: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        operators.entry(&row.operator).or_default().push(row);
    }
    for (operator, rows) in &operators {
        let cells = columns().map(|column| cell(rows, column));
        let _ = writeln!(page, "| {operator} | {} | {} |", rows.len(), cells.join(" | "));
    }
    page.push_str("\n## Other outputs than recorded\n\n");
    for (column, version) in versions.iter().enumerate() {
        let differs = rows.iter().filter(|row| row.outcomes[column] == Outcome::Differs);
        let names: Vec<String> = differs.map(|row| format!("`{}`", row.case)).collect();
        let _ = writeln!(
            page,
            "- {version}: {}",
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        );
    }
    Ok(page)
}

fn columns() -> [usize; COLUMNS.len()] {
    std::array::from_fn(|column| column)
}

/// What the counts alone do not say.
const NOTES: &str = "\n\
    A model that an engine refuses is refused when it is loaded or proven, before anything is served: with `--engine auto` the other engine \
    serves it. A package is served only by an engine that gives the outputs that the optimiser recorded, so that a case under `differs` is \
    refused as well. Cases of random operators (`Bernoulli`, `Dropout` in training) record one draw of another generator, which no engine \
    gives; those of `DFT` and `STFT` record zeros, to which sums in single precision do not come within the suite's 1e-7. \
    ONNX Runtime's package for GPUs is a version behind: most of what it refuses at load is of an opset that it does not know yet, or of a \
    type for which its provider for CUDA has no kernel. That for OpenVINO is eight behind; [openvino.md](openvino.md) says what comes out \
    otherwise there.\n";

/// What came of an operator's cases: `all`, or how many passed and why the others did not.
fn cell(rows: &[&Row], column: usize) -> String {
    let count = |outcome| rows.iter().filter(|row| row.outcomes[column] == outcome).count();
    let passed = count(Outcome::Passed);
    if passed == rows.len() {
        return "all".to_owned();
    }
    let others = OUTCOMES.iter().skip(1).filter_map(|(outcome, name, _)| match count(*outcome) {
        0 => None,
        count if count == rows.len() => Some((*name).to_owned()),
        count => Some(format!("{count} {name}")),
    });
    let others: Vec<String> = others.collect();
    match passed {
        0 => format!("none: {}", others.join(", ")),
        passed => format!("{passed}; {}", others.join(", ")),
    }
}

/// The version of a crate in `Cargo.lock`.
fn locked(name: &str) -> Result<String> {
    let lock = fs::read_to_string(workspace::root().join("Cargo.lock"))?;
    let mut lines = lock.lines().skip_while(|line| *line != format!("name = \"{name}\""));
    let version = lines.nth(1).and_then(|line| line.strip_prefix("version = \"")?.strip_suffix('"'));
    Ok(version.with_context(|| format!("Cargo.lock names no {name}"))?.to_owned())
}

fn suite_version() -> Result<String> {
    let requirements = fs::read_to_string(source().join("requirements.txt"))?;
    let version = requirements
        .lines()
        .find_map(|line| line.strip_prefix("onnx==")?.split_whitespace().next());
    Ok(version.context("the requirements name no onnx")?.to_owned())
}
