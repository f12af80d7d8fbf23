//! ONNX Runtime's shared library, from its wheel on PyPI: version and digest are pinned in `xtask/onnxruntime.txt`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::progress::{self, Gauge};
use crate::{python, workspace};

const REQUIREMENTS: &str = include_str!("../onnxruntime.txt");

/// The library for this machine's processor, installed into the user's cache unless it is there: `libonnxruntime.so`, beside its
/// `LICENSE` and `ThirdPartyNotices.txt`.
///
/// # Errors
/// On another system than Linux on x86_64 or aarch64, without Python and pip, and where the wheel cannot be had.
pub(crate) fn library() -> Result<PathBuf> {
    let version = pinned_version()?;
    let folder = workspace::cache().join("onnxruntime").join(version);
    let library = folder.join("libonnxruntime.so");
    if library.is_file() {
        return Ok(library);
    }
    if !cfg!(target_os = "linux") || !matches!(std::env::consts::ARCH, "x86_64" | "aarch64") {
        bail!("ONNX Runtime is pinned for Linux on x86_64 and aarch64 alone; elsewhere install it and set ORT_DYLIB_PATH");
    }
    let parent = folder.parent().context("a folder in the cache has a parent")?;
    fs::create_dir_all(parent)?;
    let scratch = tempfile::tempdir_in(parent)?;
    progress::phase(&format!("ONNX Runtime {version}"), |bar| {
        let requirements = scratch.path().join("onnxruntime.txt");
        fs::write(&requirements, REQUIREMENTS)?;
        let platform = format!("manylinux_2_28_{}", std::env::consts::ARCH);
        let mut download = python::with_pip()?;
        download.args([
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
        ]);
        // The library is the same in the wheels of every Python, so one is pinned whatever runs here.
        download.args([
            "--python-version",
            "3.11",
            "--implementation",
            "cp",
            "--abi",
            "cp311",
            "--platform",
            &platform,
        ]);
        download.arg("--requirement").arg(&requirements).arg("--dest").arg(scratch.path());
        // pip unpacks in the temporary folder; unbuffered, it says at once how much that will be.
        let unfinished = scratch.path().join("unfinished");
        fs::create_dir(&unfinished)?;
        download.env("TMPDIR", &unfinished).env("PYTHONUNBUFFERED", "1");
        progress::run_gauged(&mut download, &parent.join("download.log"), bar, &Gauge::Download(&unfinished))
            .context("cannot download ONNX Runtime with `python3 -m pip`")?;
        let wheel = file_like(scratch.path(), "onnxruntime-", ".whl")?;
        let unpacked = scratch.path().join("wheel");
        let mut unpack = Command::new("python3");
        unpack.args(["-m", "zipfile", "-e"]).arg(wheel).arg(&unpacked);
        progress::run_logged(&mut unpack, &parent.join("unpack.log"), bar)?;
        let ready = scratch.path().join("ready");
        fs::create_dir(&ready)?;
        fs::rename(
            file_like(&unpacked.join("onnxruntime/capi"), "libonnxruntime.so.", "")?,
            ready.join("libonnxruntime.so"),
        )?;
        for notice in ["LICENSE", "ThirdPartyNotices.txt"] {
            fs::rename(unpacked.join("onnxruntime").join(notice), ready.join(notice))?;
        }
        // In one step, so that an interrupted run leaves nothing half done; another run may have come first.
        match fs::rename(&ready, &folder) {
            Err(error) if !library.is_file() => Err(error).with_context(|| format!("cannot write {}", folder.display())),
            _ => Ok(()),
        }
    })?;
    Ok(library)
}

/// The version that is pinned.
///
/// # Errors
/// Where `xtask/onnxruntime.txt` names none.
pub(crate) fn pinned_version() -> Result<&'static str> {
    version(REQUIREMENTS).context("xtask/onnxruntime.txt names no version")
}

fn version(requirements: &str) -> Option<&str> {
    let pin = requirements.lines().find_map(|line| line.strip_prefix("onnxruntime=="))?;
    pin.split_whitespace().next()
}

fn file_like(folder: &Path, prefix: &str, suffix: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) && name.ends_with(suffix) {
            return Ok(entry.path());
        }
    }
    bail!("{} holds no {prefix}*{suffix}", folder.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_names_a_version() {
        assert!(version(REQUIREMENTS).is_some_and(|version| version.split('.').count() == 3));
        assert_eq!(version("# onnxruntime==1\n"), None);
    }
}
