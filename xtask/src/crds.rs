//! `cargo xtask crds`: the CRDs' YAML and the report's JSON schema from the Rust types.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::workspace;

/// The file of the report's schema.
const REPORT_SCHEMA: &str = "docs/report.schema.json";

/// Options of `cargo xtask crds`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Fails where a file is stale, instead of writing it.
    #[arg(long)]
    check: bool,
}

#[derive(Deserialize)]
struct Document {
    file: String,
    yaml: String,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check {
        return check();
    }
    for (path, text) in &stale()? {
        fs::create_dir_all(path.parent().context("a file lies in a folder")?)?;
        fs::write(path, text)?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

/// Fails where a file is stale.
pub(crate) fn check() -> Result<()> {
    match stale()?.first() {
        Some((path, _)) => bail!("{} is stale; run `cargo xtask crds`", path.display()),
        None => Ok(()),
    }
}

/// The files whose content differs from what the types say, with what they should hold.
fn stale() -> Result<Vec<(PathBuf, String)>> {
    let documents: Vec<Document> = serde_json::from_str(&printed("plimsoll-crds", "yaml", &[])?)?;
    // The chart carries a copy, for Helm reads nothing outside of the chart's folder.
    let folders = ["crds/yaml", "charts/plimsoll/files/crds"];
    let mut files: Vec<(PathBuf, String)> = documents
        .iter()
        .flat_map(|document| folders.map(|folder| (workspace::root().join(folder).join(&document.file), document.yaml.clone())))
        .collect();
    let schema = printed("plimsoll-package", "schema", &["--no-default-features", "--features", "schema"])?;
    files.push((workspace::root().join(REPORT_SCHEMA), schema));
    files.retain(|(path, text)| fs::read_to_string(path).ok().as_ref() != Some(text));
    Ok(files)
}

/// What an example of a package prints.
fn printed(package: &str, example: &str, flags: &[&str]) -> Result<String> {
    let output = workspace::cargo()
        .args(["run", "--quiet", "--package", package, "--example", example])
        .args(flags)
        .output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("the example {example} of {package} fails:\n{words}");
    }
    Ok(String::from_utf8(output.stdout)?)
}
