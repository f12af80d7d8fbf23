//! Debian's packages, installed where they are missing.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::progress::{phase, run_logged};
use crate::workspace;

/// Whether this is Debian, or a system made of it.
pub(crate) fn is_here() -> bool {
    Path::new("/etc/debian_version").exists() && workspace::find_program("apt-get").is_some()
}

/// Installs `packages`, of which nothing is there yet.
///
/// # Errors
/// Where this is not Debian or the user is not root: then what is missing, in one sentence. Where apt-get fails: the end of its log.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let names = packages.join(" ");
    if !is_here() {
        bail!("these are missing, and only on Debian are they installed for you: {names}");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("these are missing, and only root can install them: `apt-get install {names}`");
    }
    let log = workspace::cache().join("apt.log");
    phase(&format!("installing {}", packages.join(", ")), |bar| {
        let apt = |arguments: &[&str]| {
            let mut command = Command::new("apt-get");
            command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments);
            command
        };
        run_logged(&mut apt(&["update", "--quiet"]), &log, bar)?;
        let mut install = apt(&["install", "--yes", "--quiet", "--no-install-recommends"]);
        run_logged(install.args(packages), &log, bar)
    })
}
