//! The whole way on a laptop: from a model to a package in a folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use comfy_table::Table;
use plimsoll_package::manifest::{MANIFEST_FILE, REPORT_FILE};
use plimsoll_package::recipe::Inputs;
use plimsoll_package::report::{Report, Summary};
use plimsoll_package::units::{display_percent, display_size};

use crate::failure::{Failure, FailureReason, disk, failure, internal};
use crate::progress::Console;
use crate::step::{self, Context, Step, chain};

/// Optimises as `inputs` say, writes the package to `output`, and returns its report.
///
/// # Errors
/// Whatever a step fails with, or where `output` is a folder that holds something else.
pub fn optimize(inputs: Inputs, output: &Path, threads: usize, extra_ca: Option<PathBuf>, console: &Console) -> Result<Report, Failure> {
    let occupied = fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !output.join(MANIFEST_FILE).is_file() {
        let message = format!(
            "{} is not empty and no package; name another folder with --output",
            output.display()
        );
        return Err(failure(FailureReason::InvalidInputs, message));
    }
    let work = tempfile::tempdir().map_err(|error| internal("cannot make a folder for the work", &error))?;
    let context = Context {
        inputs,
        work: work.path().to_owned(),
        secrets: work.path().join("secrets"),
        claims: work.path().join("claims"),
        extra_ca,
        threads,
        console: console.clone(),
    };
    for step in [Step::Fetch, Step::Convert, Step::Compress, Step::Evaluate] {
        let begun = Instant::now();
        let place = chain::Place::take(&context.work, step).map_err(disk("write", &context.work))?;
        step::run(step, &context)?;
        place.done(begun.elapsed(), false).map_err(disk("write", &context.work))?;
    }
    fs::create_dir_all(output).map_err(disk("make", output))?;
    for entry in fs::read_dir(context.package()).map_err(disk("read", &context.package()))? {
        let entry = entry.map_err(disk("read", &context.package()))?;
        fs::copy(entry.path(), output.join(entry.file_name())).map_err(disk("write", output))?;
    }
    context.read(&format!("package/{REPORT_FILE}"))
}

/// What a person wants to know of a report: before and after.
#[must_use]
pub fn table(report: &Report) -> Table {
    let Summary {
        size_before,
        size_after,
        sparsity,
        metric,
        fidelity,
        latency,
        engine,
        ..
    } = &report.summary;
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["", "before", "after"]);
    table.add_row([
        "size".to_owned(),
        display_size(*size_before),
        format!(
            "{} ({:.2}x smaller)",
            display_size(*size_after),
            *size_before as f64 / *size_after as f64
        ),
    ]);
    if let Some(metric) = metric {
        let name = format!("{} ({} samples)", metric.name.to_string().to_lowercase(), metric.samples);
        table.add_row([name, display_percent(metric.before), display_percent(metric.after)]);
    }
    if let Some(fidelity) = fidelity {
        table.add_row(["fidelity".to_owned(), "1".to_owned(), format!("{fidelity:.5}")]);
    }
    for measured in &report.engines {
        let name = format!(
            "latency, {}{}",
            measured.engine,
            if measured.engine == *engine { " (chosen)" } else { "" }
        );
        match (&measured.latency, &measured.refused) {
            (Some(latency), _) => table.add_row([name, display_us(latency.before_us), display_us(latency.after_us)]),
            (None, refused) => table.add_row([name, "-".to_owned(), refused.clone().unwrap_or_else(|| "-".to_owned())]),
        };
    }
    if latency.is_none() {
        table.add_row(["engine".to_owned(), String::new(), engine.to_string()]);
    }
    table.add_row(["zero weights".to_owned(), String::new(), display_percent(*sparsity)]);
    table
}

fn display_us(us: f64) -> String {
    if us < 1e3 {
        format!("{us:.0} us")
    } else {
        format!("{:.2} ms", us / 1e3)
    }
}
