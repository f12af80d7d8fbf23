//! Programs that run to their end, with what they took.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{python, workspace};

/// What one run of a program took.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Run {
    /// Wall time in seconds.
    pub seconds: f64,
    /// Most memory that was resident at once, in bytes; pages of mapped files count.
    pub peak_bytes: u64,
    status: i32,
}

/// What several runs took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Took {
    /// Median of the wall times, in seconds.
    pub seconds: f64,
    /// Most memory that was resident in any run, in bytes.
    pub peak_bytes: u64,
}

impl Took {
    /// Of one run or more.
    pub(super) fn of(runs: &[Run]) -> Self {
        Self {
            seconds: median(runs.iter().map(|run| run.seconds).collect()),
            peak_bytes: runs.iter().map(|run| run.peak_bytes).max().unwrap_or_default(),
        }
    }
}

/// The median; NaN of nothing.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => (values[count / 2 - 1] + values[count / 2]) / 2.0,
    }
}

/// Python with the peers, and the scripts that call them.
pub(super) struct Peers {
    python: PathBuf,
    folder: PathBuf,
    log: PathBuf,
}

impl Peers {
    /// Installs the peers of `tests/FOLDER/requirements.txt` into a virtual environment of the user's cache, unless they are there. What
    /// programs say goes to the file `log`.
    pub(super) fn install(folder: &str, log: &Path) -> Result<Self> {
        let name = folder.replace('/', "-");
        let folder = workspace::root().join("tests").join(folder);
        let python = python::environment(&name, &folder.join("requirements.txt"), log)?;
        Ok(Self {
            python,
            folder,
            log: log.to_owned(),
        })
    }

    /// The environment's interpreter.
    pub(super) fn python(&self) -> &Path {
        &self.python
    }

    /// `peer.py TASK`.
    pub(super) fn task(&self, task: &str) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(self.folder.join("peer.py")).arg(task);
        command
    }

    /// Runs a Python script of the project's tests.
    pub(super) fn script(&self, script: &str) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(workspace::root().join("tests").join(script));
        command
    }

    /// Runs `command` to its end; `Err` where it fails, with the end of what it said.
    pub(super) fn measure(&self, command: &Command) -> Result<Run> {
        let mut measured = Command::new(&self.python);
        measured
            .arg(self.folder.join("measure.py"))
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => measured.env(name, value),
                None => measured.env_remove(name),
            };
        }
        let output = measured.stderr(File::create(&self.log)?).output().context("cannot start Python")?;
        let run: Run = serde_json::from_slice(&output.stdout).with_context(|| self.said())?;
        if run.status == 0 {
            Ok(run)
        } else {
            bail!("{:?} failed with status {}: {}", command.get_program(), run.status, self.said())
        }
    }

    /// Runs `command` and returns what it prints.
    pub(super) fn ask(&self, command: &mut Command) -> Result<String> {
        let output = command
            .stderr(File::create(&self.log)?)
            .output()
            .context("cannot start a program")?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        } else {
            bail!("{:?} failed with {}: {}", command.get_program(), output.status, self.said())
        }
    }

    /// Whether `python` can import `module`.
    pub(super) fn has(python: &str, module: &str) -> bool {
        let mut command = Command::new(python);
        command.args(["-c", &format!("import {module}")]);
        command.output().is_ok_and(|output| output.status.success())
    }

    /// The last lines that a program said.
    fn said(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let mut lines: Vec<&str> = text.lines().rev().take(5).collect();
        lines.reverse();
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }
}
