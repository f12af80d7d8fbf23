//! The real models that tests run on, from packages on PyPI: what the scripts in `tests/models` make of them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::{progress, python, workspace};

/// A set of models: its folder in the user's cache, and what each script of `tests/models` writes into it.
pub(crate) struct Set {
    folder: &'static str,
    scripts: &'static [(&'static str, &'static [&'static str])],
}

/// What tests run on.
pub(crate) const TESTED: Set = Set {
    folder: "models",
    scripts: &[
        ("magika/fetch.py", &["magika.onnx", "magika-inputs.npz"]),
        (
            "minilm/export.py",
            &[
                "minilm.onnx",
                "minilm-companions/tokenizer.json",
                "calibration.npz",
                "evaluation.npz",
            ],
        ),
        (
            "ddddocr/fetch.py",
            &["recogniser.onnx", "recogniser-inputs.npz", "detector.onnx", "detector-inputs.npz"],
        ),
    ],
};

/// What no technique was tuned on.
pub(crate) const HELD_OUT: Set = Set {
    folder: "heldout",
    scripts: &[(
        "heldout/fetch.py",
        &["rapidocr-detector.onnx", "silero-voice.onnx", "silero-voice-sequence-inputs.npz"],
    )],
};

/// The folder of the set's models and their samples in the user's cache; what is not there is fetched.
///
/// # Errors
/// Without Python, and where a package cannot be had.
pub(crate) fn fetch(set: &Set) -> Result<PathBuf> {
    let folder = workspace::cache().join(set.folder);
    let missing: Vec<&str> = set
        .scripts
        .iter()
        .filter(|(_, files)| !files.iter().all(|file| folder.join(file).is_file()))
        .map(|(script, _)| *script)
        .collect();
    if missing.is_empty() {
        return Ok(folder);
    }
    fs::create_dir_all(&folder)?;
    let log = workspace::cache().join("models.log");
    let scripts = workspace::root().join("tests/models");
    let python = python::environment("models", &scripts.join("requirements.txt"), &log)?;
    progress::phase(&format!("fetching real models ({})", set.folder), |bar| {
        for script in &missing {
            // Beside their place, so that an interrupted run leaves no half of a file there.
            let scratch = tempfile::tempdir_in(workspace::cache())?;
            let mut run = Command::new(&python);
            run.arg(scripts.join(script)).arg(scratch.path());
            progress::run_logged(&mut run, &log, bar)?;
            for entry in fs::read_dir(scratch.path())? {
                let entry = entry?;
                fs::rename(entry.path(), folder.join(entry.file_name()))?;
            }
        }
        Ok(())
    })?;
    Ok(folder)
}
