//! The machine's Python, with the parts that Debian keeps in packages of their own.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::debian;

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
