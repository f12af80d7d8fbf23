//! The programs that go into images, built so that neither the checkout's path nor the user's shows in them.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{progress, workspace};

/// How the programs are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Profile {
    /// Optimised, stripped, reproducible.
    Release,
    /// Quickly, with debug information and no limit on the size.
    Dev,
}

/// Programs that are compiled by one call. Cargo unifies the features of what one call builds, so the sets are fixed: a program is the
/// same whatever else was asked for. The operator stands alone, since it must not grow by what the engines need; the optimiser
/// contains the runtime.
const GROUPS: [&[&str]; 2] = [&["plimsoll-operator"], &["plimsoll-runtime", "plimsoll-optimizer"]];

/// Sets of packages that are compiled together, so that tests and images share what is compiled (see `GROUPS`).
pub(crate) const TEST_GROUPS: [&[&str]; 2] = [
    &["plimsoll-operator", "plimsoll-crds"],
    &["plimsoll-package", "plimsoll-runtime", "plimsoll-optimizer"],
];

/// Builds `packages` with what is built together with them, and returns the programs' paths in the order asked for.
///
/// # Errors
/// Where a package does not compile; the error ends with the compiler's last lines.
pub(crate) fn build(packages: &[&str], profile: Profile) -> Result<Vec<PathBuf>> {
    // Other flags than a plain `cargo build` has: in a folder of their own, the two do not undo each other's work.
    let target = match profile {
        Profile::Release => release_target(),
        Profile::Dev => workspace::target(),
    };
    for group in GROUPS.iter().filter(|group| group.iter().any(|package| packages.contains(package))) {
        let mut command = match profile {
            Profile::Release => release("build")?,
            Profile::Dev => {
                let mut command = workspace::cargo();
                command.arg("build");
                command
            }
        };
        command.args(["--locked", "--bins"]);
        for package in *group {
            command.args(["--package", package]);
        }
        let what = format!("compiling {}", group.join(", "));
        let log = target.join(format!("{}.log", group[0]));
        progress::phase(&what, |bar| progress::run_logged(&mut command, &log, bar))?;
    }
    let folder = target.join(if profile == Profile::Release { "release" } else { "debug" });
    Ok(packages.iter().map(|package| folder.join(package)).collect())
}

/// Builds an example of `package` as tests are, which build it too, and returns its path.
///
/// # Errors
/// As [`build`].
pub(crate) fn example(package: &str, name: &str) -> Result<PathBuf> {
    let group = TEST_GROUPS.iter().find(|group| group.contains(&package));
    let mut command = release("build")?;
    command.args(["--locked", "--example", name]);
    for package in *group.with_context(|| format!("{package} is in no set of packages"))? {
        command.args(["--package", package]);
    }
    let log = release_target().join(format!("{package}-{name}.log"));
    progress::phase(&format!("compiling the example {name}"), |bar| {
        progress::run_logged(&mut command, &log, bar)
    })?;
    Ok(release_target().join("release/examples").join(name))
}

/// `cargo VERB --release` with the flags and the target folder of the images' programs, so that tests share what was compiled for them.
///
/// # Errors
/// Where neither CARGO_HOME nor HOME is set.
pub(crate) fn release(verb: &str) -> Result<std::process::Command> {
    let target = release_target();
    let mut command = workspace::cargo();
    command
        .args([verb, "--release", "--target-dir"])
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(&target)?);
    Ok(command)
}

fn release_target() -> PathBuf {
    workspace::target().join("images")
}

/// Compiler flags that replace this machine's folders in panic messages, in the form of `CARGO_ENCODED_RUSTFLAGS`. The checkout's own is not
/// among them, since cargo names its files by relative paths: every checkout has the same flags, and they share what is compiled.
fn flags(target: &std::path::Path) -> Result<String> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let cargo = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .context("neither CARGO_HOME nor HOME is set")?;
    let replaced = [(cargo, "/cargo"), (target.to_path_buf(), "/target")];
    Ok(replaced
        .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
        .join("\u{1f}"))
}
