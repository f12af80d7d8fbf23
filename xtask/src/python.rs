//! The machine's Python, with the parts that Debian keeps in packages of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::{debian, progress, workspace};

/// A part of Python: what is said to it to see whether it is there, and its package.
struct Part {
    code: &'static str,
    package: &'static str,
}

const PIP: Part = Part {
    code: "import pip",
    package: "python3-pip",
};
/// A virtual environment has a pip of its own, which `ensurepip` puts there.
const VENV: Part = Part {
    code: "import venv, ensurepip",
    package: "python3-venv",
};

/// A call of Python with pip.
///
/// # Errors
/// Where one of the two is missing and cannot be installed.
pub(crate) fn with_pip() -> Result<Command> {
    ensure(&PIP)
}

/// A call of Python that can make virtual environments.
///
/// # Errors
/// Where Python or that part of it is missing and cannot be installed.
pub(crate) fn with_venv() -> Result<Command> {
    ensure(&VENV)
}

/// The interpreter of the virtual environment of that name in the user's cache, with what the file `requirements` lists, and nothing that
/// it does not list, installed into it unless it is there. What pip says goes to the file `log`.
///
/// # Errors
/// Without Python, and where a package cannot be had.
pub(crate) fn environment(name: &str, requirements: &Path, log: &Path) -> Result<PathBuf> {
    let environment = workspace::cache().join("venvs").join(name);
    let python = environment.join("bin/python");
    let mark = environment.join("requirements.txt");
    let wanted = fs::read(requirements).with_context(|| format!("cannot read {}", requirements.display()))?;
    if fs::read(&mark).ok().as_ref() == Some(&wanted) {
        return Ok(python);
    }
    progress::phase(&format!("installing the Python packages of {name}"), |bar| {
        let mut create = with_venv()?;
        create.args(["-m", "venv", "--clear"]).arg(&environment);
        progress::run_logged(&mut create, log, bar).context("cannot make a virtual environment")?;
        let mut install = Command::new(&python);
        install
            .args(["-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--requirement"])
            .arg(requirements);
        progress::run_logged(&mut install, log, bar)?;
        Ok(fs::write(&mark, &wanted)?)
    })?;
    Ok(python)
}

fn ensure(part: &Part) -> Result<Command> {
    let program = Path::new("python3");
    if !has(program, part.code) {
        debian::install(&["python3", part.package]).with_context(|| format!("this needs Python 3 with `{}`", part.code))?;
    }
    Ok(Command::new(program))
}

fn has(program: &Path, code: &str) -> bool {
    let mut command = Command::new(program);
    command
        .args(["-c", code])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_missing_is_noticed() {
        let python = Path::new("python3");
        assert!(has(python, "import sys"));
        assert!(!has(python, "import plimsoll_has_no_such_module"));
        assert!(!has(Path::new("/no/such/python"), "import sys"));
    }
}
