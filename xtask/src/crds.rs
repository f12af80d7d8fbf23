//! `cargo xtask crds`: the CRDs' YAML from the Rust types.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::workspace;

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
    for (path, yaml) in &stale()? {
        fs::create_dir_all(path.parent().context("a file lies in a folder")?)?;
        fs::write(path, yaml)?;
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
    let output = workspace::cargo()
        .args(["run", "--quiet", "--package", "plimsoll-crds", "--example", "yaml"])
        .output()?;
    if !output.status.success() {
        bail!("cannot generate the CRDs:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let documents: Vec<Document> = serde_json::from_slice(&output.stdout)?;
    // The chart carries a copy, for Helm reads nothing outside of the chart's folder.
    let folders = ["crds/yaml", "charts/plimsoll/files/crds"];
    let files = documents
        .iter()
        .flat_map(|document| folders.map(|folder| (workspace::root().join(folder).join(&document.file), document.yaml.clone())));
    Ok(files
        .filter(|(path, yaml)| fs::read_to_string(path).ok().as_ref() != Some(yaml))
        .collect())
}
