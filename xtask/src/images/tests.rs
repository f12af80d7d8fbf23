//! Images of a small program of this machine: what matters of an image does not depend on what it runs.

use std::io::Read as _;

use super::*;

const NOON: &str = "2026-01-01T12:00:00Z";

fn revision(commit: &str) -> revision::Revision {
    revision::Revision {
        commit: commit.to_owned(),
        created: NOON.to_owned(),
    }
}

fn image(output: &Path, commit: &str) -> Built {
    assemble(
        specification("operator").unwrap(),
        Path::new("/bin/true"),
        &revision(commit),
        output,
    )
    .unwrap()
}

/// The files of an archive by name.
fn files(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in tar::Archive::new(bytes).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut contents = Vec::new();
        entry.read_to_end(&mut contents).unwrap();
        found.insert(entry.path().unwrap().to_string_lossy().into_owned(), contents);
    }
    found
}

#[test]
fn the_same_input_gives_the_same_archive_byte_for_byte() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bytes = |folder: &tempfile::TempDir| fs::read(image(folder.path(), "c0ffee").path).unwrap();
    assert_eq!(bytes(&one), bytes(&other));
}

#[test]
fn another_commit_is_another_image_with_the_same_layers() {
    let folder = tempfile::tempdir().unwrap();
    let one = image(folder.path(), "c0ffee");
    let one = (one.digest, layers(&one.path));
    let other = image(folder.path(), "decade");
    assert_ne!(one.0, other.digest);
    assert_eq!(one.1, layers(&other.path));
}

fn layers(path: &Path) -> Vec<String> {
    let blobs = files(&fs::read(path).unwrap());
    let digest = archive::digest_of(path).unwrap().replace(':', "/");
    let manifest: serde_json::Value = serde_json::from_slice(&blobs[&format!("blobs/{digest}")]).unwrap();
    manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_fresh_archive_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let modified = |built: &Built| fs::metadata(&built.path).unwrap().modified().unwrap();
    let first = modified(&image(folder.path(), "c0ffee"));
    assert_eq!(modified(&image(folder.path(), "c0ffee")), first);
    assert_ne!(modified(&image(folder.path(), "decade")), first);
}

#[test]
fn an_archive_is_a_complete_oci_layout_whose_digests_hold() {
    let folder = tempfile::tempdir().unwrap();
    let built = image(folder.path(), "c0ffee");
    let files = files(&fs::read(&built.path).unwrap());
    for (name, contents) in &files {
        if let Some(digest) = name.strip_prefix("blobs/sha256/") {
            assert_eq!(layer::digest(contents), format!("sha256:{digest}"));
        }
    }
    let index: serde_json::Value = serde_json::from_slice(&files["index.json"]).unwrap();
    assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], built.reference);
    let blob = |descriptor: &serde_json::Value| {
        let digest = descriptor["digest"].as_str().unwrap();
        let bytes = &files[&format!("blobs/{}", digest.replace(':', "/"))];
        assert_eq!(descriptor["size"].as_u64().unwrap(), bytes.len() as u64);
        bytes.clone()
    };
    let manifest: serde_json::Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
    assert_eq!(config["config"]["User"], "65532:65532");
    assert_eq!(config["config"]["Entrypoint"][0], "/usr/bin/true");
    let label = |name: &str| &config["config"]["Labels"][format!("org.opencontainers.image.{name}")];
    assert_eq!(*label("revision"), "c0ffee");
    assert_eq!(*label("version"), env!("CARGO_PKG_VERSION"));
    let mut paths = Vec::new();
    for (descriptor, diff_id) in manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .zip(config["rootfs"]["diff_ids"].as_array().unwrap())
    {
        let mut unpacked = Vec::new();
        flate2::read::GzDecoder::new(&blob(descriptor)[..])
            .read_to_end(&mut unpacked)
            .unwrap();
        assert_eq!(layer::digest(&unpacked), diff_id.as_str().unwrap());
        paths.extend(self::files(&unpacked).into_keys());
    }
    for expected in ["etc/passwd", "etc/ssl/certs/ca-certificates.crt", "tmp", "usr/bin/true"] {
        assert!(
            paths.iter().any(|path| path.trim_end_matches('/') == expected),
            "{expected} is missing from {paths:?}"
        );
    }
    assert!(
        paths.iter().any(|path| path.contains("libc.so")),
        "the C library is missing from {paths:?}"
    );
    assert!(
        !paths.iter().any(|path| path.ends_with("/sh") || path.ends_with("bash")),
        "there is a shell in {paths:?}"
    );
}

#[test]
fn the_dockerfiles_say_what_the_archives_do() {
    for specification in &SPECIFICATIONS {
        let Program::Package { name, onnxruntime } = specification.program else {
            continue;
        };
        let path = workspace::root().join("images").join(specification.name).join("Dockerfile");
        let file = fs::read_to_string(path).unwrap();
        for line in [
            "USER 65532:65532".to_owned(),
            format!("ENTRYPOINT [\"/usr/bin/{name}\"]"),
            format!("ARG VERSION={}", env!("CARGO_PKG_VERSION")),
        ] {
            assert!(
                file.lines().any(|found| found == line),
                "{}: its Dockerfile has no `{line}`",
                specification.name
            );
        }
        // When it was built, only whoever builds it knows.
        for label in labels(specification, &revision("c0ffee"))
            .keys()
            .filter(|label| !label.ends_with(".created"))
        {
            assert!(
                file.contains(&format!("{label}=")),
                "{}: its Dockerfile has no {label}",
                specification.name
            );
        }
        assert_eq!(file.contains("ORT_DYLIB_PATH="), onnxruntime.is_some(), "{}", specification.name);
        let on_gpu = onnxruntime == Some(Library::Gpu);
        assert_eq!(file.contains("PLIMSOLL_DEVICE=cuda:0"), on_gpu, "{}", specification.name);
        for library in filesystem::CUDA_LIBRARIES.iter().chain(&filesystem::PROVIDERS) {
            assert_eq!(file.contains(library), on_gpu, "{}: {library}", specification.name);
        }
    }
}

#[test]
fn every_reference_carries_the_version_but_the_tests_own() {
    let version = env!("CARGO_PKG_VERSION");
    for (name, reference) in references() {
        let tag = if name == "fixture-server" { "test" } else { version };
        assert_eq!(reference, format!("ghcr.io/plimsoll-dev/{name}:{tag}"));
    }
    assert!(build(&["sidecar"]).unwrap_err().to_string().contains("operator, optimizer"));
}

#[test]
fn an_image_over_its_limit_is_an_error_with_both_sizes_but_not_for_debugging() {
    let folder = tempfile::tempdir().unwrap();
    let mut built = image(folder.path(), "c0ffee");
    built.limit_bytes = Some(1_500_000);
    built.record.unpacked_bytes = 2_340_000;
    let built = [built];
    let error = within_limits(&built, Profile::Release).unwrap_err().to_string();
    assert!(
        error.contains("/operator:") && error.ends_with(" is 2.3 MB of at most 1.5"),
        "{error}"
    );
    assert!(within_limits(&built, Profile::Dev).is_ok());
}
