//! ONNX Runtime's shared libraries, from its wheels on PyPI: versions and digests are pinned in `xtask/onnxruntime*.txt`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::progress::{self, Gauge};
use crate::{python, workspace};

/// Which of ONNX Runtime's packages, by the device that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Library {
    /// The processor.
    #[default]
    Cpu,
    /// NVIDIA's GPUs; with the provider for TensorRT, too. It needs NVIDIA's libraries.
    #[value(name = "cuda")]
    Gpu,
    /// The processor with OpenVINO.
    #[value(name = "openvino")]
    OpenVino,
}

impl Library {
    fn package(self) -> &'static str {
        match self {
            Self::Cpu => "onnxruntime",
            Self::Gpu => "onnxruntime-gpu",
            Self::OpenVino => "onnxruntime-openvino",
        }
    }

    fn requirements(self) -> &'static str {
        match self {
            Self::Cpu => include_str!("../onnxruntime.txt"),
            Self::Gpu => include_str!("../onnxruntime-gpu.txt"),
            Self::OpenVino => include_str!("../onnxruntime-openvino.txt"),
        }
    }

    fn architectures(self) -> &'static [&'static str] {
        match self {
            Self::Cpu => &["x86_64", "aarch64"],
            Self::Gpu | Self::OpenVino => &["x86_64"],
        }
    }

    /// Whether the package is made for this system and processor.
    pub(crate) fn is_for_this_machine(self) -> bool {
        cfg!(target_os = "linux") && self.architectures().contains(&std::env::consts::ARCH)
    }

    /// The libraries that it loads from its own folder.
    fn companions(self) -> &'static [&'static str] {
        match self {
            Self::Cpu => &[],
            Self::Gpu => &[
                "libonnxruntime_providers_shared.so",
                "libonnxruntime_providers_cuda.so",
                "libonnxruntime_providers_tensorrt.so",
            ],
            Self::OpenVino => &[
                "libonnxruntime_providers_shared.so",
                "libonnxruntime_providers_openvino.so",
                "libopenvino.so.2541",
                "libopenvino_onnx_frontend.so.2541",
                "libopenvino_intel_cpu_plugin.so",
                "libtbb.so.12",
            ],
        }
    }

    /// The version that is pinned.
    ///
    /// # Errors
    /// Where the requirements name none.
    pub(crate) fn version(self) -> Result<&'static str> {
        version(self.package(), self.requirements()).with_context(|| format!("xtask/{}.txt names no version", self.package()))
    }

    /// The library for this machine's processor, installed into the user's cache unless it is there: `libonnxruntime.so`, beside its
    /// providers, its `LICENSE` and `ThirdPartyNotices.txt`.
    ///
    /// # Errors
    /// On another system or processor than the package is for, without Python and pip, and where the wheel cannot be had.
    pub(crate) fn path(self) -> Result<PathBuf> {
        let (package, version) = (self.package(), self.version()?);
        let folder = workspace::cache().join(package).join(version);
        let path = folder.join("libonnxruntime.so");
        if path.is_file() {
            return Ok(path);
        }
        if !self.is_for_this_machine() {
            bail!(
                "{package} is pinned for Linux on {} alone; elsewhere install it and set ORT_DYLIB_PATH",
                self.architectures().join(" and ")
            );
        }
        let parent = folder.parent().context("a folder in the cache has a parent")?;
        fs::create_dir_all(parent)?;
        let scratch = tempfile::tempdir_in(parent)?;
        progress::phase(&format!("{package} {version}"), |bar| {
            let requirements = scratch.path().join("requirements.txt");
            fs::write(&requirements, self.requirements())?;
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
                .context("cannot download it with `python3 -m pip`")?;
            let wheel = file_like(scratch.path(), "onnxruntime", ".whl")?;
            let unpacked = scratch.path().join("wheel");
            let mut unpack = Command::new("python3");
            unpack.args(["-m", "zipfile", "-e"]).arg(wheel).arg(&unpacked);
            progress::run_logged(&mut unpack, &parent.join("unpack.log"), bar)?;
            let ready = scratch.path().join("ready");
            fs::create_dir(&ready)?;
            let libraries = unpacked.join("onnxruntime/capi");
            fs::rename(file_like(&libraries, "libonnxruntime.so.", "")?, ready.join("libonnxruntime.so"))?;
            for name in self.companions() {
                fs::rename(libraries.join(name), ready.join(name)).with_context(|| format!("the wheel holds no {name}"))?;
            }
            for notice in ["LICENSE", "ThirdPartyNotices.txt"] {
                fs::rename(unpacked.join("onnxruntime").join(notice), ready.join(notice))?;
            }
            // In one step, so that an interrupted run leaves nothing half done; another run may have come first.
            match fs::rename(&ready, &folder) {
                Err(error) if !path.is_file() => Err(error).with_context(|| format!("cannot write {}", folder.display())),
                _ => Ok(()),
            }
        })?;
        Ok(path)
    }
}

/// The folder `nvidia` of the packages that hold NVIDIA's libraries, which [`Library::Gpu`] loads, installed into the user's cache unless
/// they are there; 850 MB.
///
/// # Errors
/// Without Python, and where a package cannot be had.
pub(crate) fn cuda() -> Result<PathBuf> {
    let requirements = workspace::root().join("xtask/cuda.txt");
    let python = python::environment("cuda", &requirements, &workspace::cache().join("cuda.log"))?;
    let libraries = python.parent().and_then(Path::parent).unwrap_or(Path::new("/")).join("lib");
    let version = file_like(&libraries, "python3", "")?;
    Ok(version.join("site-packages/nvidia"))
}

fn version<'a>(package: &str, requirements: &'a str) -> Option<&'a str> {
    let pin = requirements
        .lines()
        .find_map(|line| line.strip_prefix(package)?.strip_prefix("=="))?;
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
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn the_pins_name_versions() {
        for library in Library::value_variants() {
            assert_eq!(library.version().unwrap().split('.').count(), 3);
        }
        assert_eq!(version("onnxruntime", "# onnxruntime==1\nonnxruntime-gpu==2"), None);
    }
}
