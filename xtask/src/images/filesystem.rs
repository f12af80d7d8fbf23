//! What lies in an image beside its program: the C library, certificates, the user, ONNX Runtime.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::layer::{Layer, USER_ID};
use crate::{debian, workspace};

/// Where ONNX Runtime's library lies in an image; the value of `ORT_DYLIB_PATH`.
pub(crate) const ONNXRUNTIME: &str = "/usr/lib/onnxruntime/libonnxruntime.so";

/// Where NVIDIA's libraries lie in an image.
pub(crate) const CUDA: &str = "/usr/lib/cuda";

/// Where the trusted roots lie in an image.
pub(crate) const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// What lies beside ONNX Runtime's library for GPUs; TensorRT's provider needs more than the image has.
pub(super) const PROVIDERS: [&str; 2] = ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"];

/// What the provider for CUDA loads beside the driver's own `libcuda.so.1`.
pub(super) const CUDA_LIBRARIES: [&str; 6] = [
    "libcublas.so.13",
    "libcublasLt.so.13",
    "libcudart.so.13",
    "libcurand.so.10",
    "libnvrtc-builtins.so.13.0",
    "libnvrtc.so.13",
];

/// Debian's certificates, which are Mozilla's, one file each.
const MOZILLA: &str = "/usr/share/ca-certificates/mozilla";

/// The shared libraries, the loader among them, that a program or library needs to start.
///
/// # Errors
/// Where `ldd` is not there, or a library that is needed is not.
pub(crate) fn libraries(binary: &Path) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd")
        .arg(binary)
        .env("LC_ALL", "C")
        .output()
        .context("cannot run `ldd`, which is part of glibc")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            error.contains("not a dynamic executable"),
            "ldd {}: {}",
            binary.display(),
            error.trim()
        );
        return Ok(BTreeSet::new());
    }
    parse_ldd(&text).with_context(|| format!("cannot resolve the libraries of {}", binary.display()))
}

/// Reads `name => /path (address)` and `/loader (address)`; the kernel's own vdso has no path.
fn parse_ldd(text: &str) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for line in text.lines().map(str::trim) {
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        if path.starts_with("not found") {
            bail!("`{line}`");
        }
        if path.starts_with('/') {
            found.insert(PathBuf::from(path.split(" (").next().unwrap_or(path)));
        }
    }
    Ok(found)
}

/// Adds libraries where the loader looks for them. `/lib` and `/lib64` are links into `/usr`, as in Debian.
///
/// # Errors
/// Where a library cannot be read.
pub(crate) fn add_libraries<'a>(layer: &mut Layer, libraries: impl IntoIterator<Item = &'a PathBuf>) -> Result<()> {
    for library in libraries {
        let path = library.to_string_lossy();
        let merged = if path.starts_with("/lib") {
            format!("usr{path}")
        } else {
            path.trim_start_matches('/').to_owned()
        };
        layer.copy(library, &merged, 0o755)?;
    }
    Ok(())
}

/// The layer beneath every program: what it links, the user, name resolution and the trusted roots. No shell.
///
/// # Errors
/// Where a library or the trusted roots cannot be read.
pub(crate) fn base(libraries: &BTreeSet<PathBuf>) -> Result<Layer> {
    let mut layer = Layer::default();
    for folder in ["lib", "lib64"] {
        layer.folder(&format!("usr/{folder}"), 0o755, false);
        layer.link(folder, &format!("usr/{folder}"));
    }
    add_libraries(&mut layer, libraries)?;
    let user = USER_ID;
    layer.file(
        "etc/passwd",
        0o644,
        format!("root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:{user}:{user}:nonroot:/home/nonroot:/sbin/nologin\n"),
    );
    layer.file("etc/group", 0o644, format!("root:x:0:\nnonroot:x:{user}:\n"));
    layer.file("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n");
    layer.folder("home/nonroot", 0o700, true);
    layer.folder("tmp", 0o1777, false);
    layer.file(CERTIFICATES.trim_start_matches('/'), 0o644, certificates()?);
    for (source, name) in [("LICENSE", "copyright"), ("NOTICE", "NOTICE")] {
        let source = workspace::root().join(source);
        if source.is_file() {
            layer.copy(&source, &format!("usr/share/doc/plimsoll/{name}"), 0o644)?;
        }
    }
    if !libraries.is_empty() {
        add_copyrights(&mut layer, &["libc6", "libgcc-s1"])?;
    }
    Ok(layer)
}

/// ONNX Runtime, with the libraries that it needs beyond those of the base.
///
/// # Errors
/// Where a library cannot be read.
pub(crate) fn onnxruntime(library: &Path, base: &BTreeSet<PathBuf>) -> Result<Layer> {
    let mut layer = Layer::default();
    layer.copy(library, ONNXRUNTIME.trim_start_matches('/'), 0o755)?;
    for provider in PROVIDERS {
        let (source, place) = (library.with_file_name(provider), Path::new(ONNXRUNTIME).with_file_name(provider));
        if source.is_file() {
            layer.copy(&source, place.to_string_lossy().trim_start_matches('/'), 0o755)?;
        }
    }
    add_libraries(&mut layer, libraries(library)?.difference(base))?;
    add_copyrights(&mut layer, &["libstdc++6"])?;
    let folder = library.parent().unwrap_or(Path::new("/"));
    for name in ["LICENSE", "ThirdPartyNotices.txt"] {
        // The wheel keeps them one level above the folder of the library.
        for source in [folder.join(name), folder.join("..").join(name)] {
            if source.is_file() {
                layer.copy(&source, &format!("usr/share/doc/onnxruntime/{name}"), 0o644)?;
                break;
            }
        }
    }
    Ok(layer)
}

/// NVIDIA's libraries, from where [`crate::onnxruntime::cuda`] has them.
///
/// # Errors
/// Where a library cannot be read.
pub(crate) fn cuda(folder: &Path) -> Result<Layer> {
    let mut layer = Layer::default();
    let place = CUDA.trim_start_matches('/');
    for name in CUDA_LIBRARIES {
        layer.copy(&folder.join("cu13/lib").join(name), &format!("{place}/{name}"), 0o755)?;
    }
    let packages = folder.parent().unwrap_or(Path::new("/"));
    for entry in fs::read_dir(packages).with_context(|| format!("cannot list {}", packages.display()))? {
        let entry = entry?;
        let (name, licence) = (entry.file_name(), entry.path().join("licenses/License.txt"));
        if name.to_string_lossy().starts_with("nvidia_") && licence.is_file() {
            layer.copy(&licence, &format!("usr/share/doc/{}/License.txt", name.to_string_lossy()), 0o644)?;
        }
    }
    Ok(layer)
}

/// Debian's copyright files of the packages that libraries were taken from, where this machine has them.
fn add_copyrights(layer: &mut Layer, packages: &[&str]) -> Result<()> {
    for package in packages {
        let source = PathBuf::from(format!("/usr/share/doc/{package}/copyright"));
        if source.is_file() {
            layer.copy(&source, &format!("usr/share/doc/{package}/copyright"), 0o644)?;
        }
    }
    Ok(())
}

/// The trusted roots in one file: Debian's, sorted by name, which an administrator's additions to this machine do not touch.
fn certificates() -> Result<Vec<u8>> {
    if !Path::new(MOZILLA).is_dir() {
        debian::install(&["ca-certificates"])?;
    }
    let mut files: Vec<PathBuf> = fs::read_dir(MOZILLA)
        .with_context(|| format!("no trusted roots in {MOZILLA}: install Debian's package ca-certificates"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "crt"))
        .collect();
    files.sort();
    ensure!(
        !files.is_empty(),
        "{MOZILLA} holds no certificate: install Debian's package ca-certificates"
    );
    let mut bundle = Vec::new();
    for file in files {
        bundle.extend(fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
        if bundle.last() != Some(&b'\n') {
            bundle.push(b'\n');
        }
    }
    Ok(bundle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_gives_the_loader_and_the_libraries_but_not_the_vdso() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f7c)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f7d)\n";
        let found = parse_ldd(text).unwrap();
        assert_eq!(
            found,
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libm.so.6"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2")
            ]
            .into()
        );
    }

    #[test]
    fn a_missing_library_is_named() {
        let error = parse_ldd("\tlibstdc++.so.6 => not found\n").unwrap_err();
        assert!(error.to_string().contains("libstdc++.so.6"), "{error}");
    }

    #[test]
    fn the_trusted_roots_are_certificates() {
        let bundle = String::from_utf8(certificates().unwrap()).unwrap();
        assert!(bundle.matches("-----BEGIN CERTIFICATE-----").count() > 50);
        assert!(bundle.ends_with("-----END CERTIFICATE-----\n"));
    }
}
