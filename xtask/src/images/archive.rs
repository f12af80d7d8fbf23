//! An OCI image layout in one tar file, which `ctr images import`, `podman load`, `skopeo` and `crane` read.
//!
//! OCI image format specification 1.1: `image-layout.md`, `manifest.md`, `config.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tar::{Builder, EntryType, Header};

use super::layer::{Blob, digest};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// What a container of the image runs, and what the image says of itself.
#[derive(Clone, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Process {
    /// `uid:gid`.
    pub(crate) user: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) exposed_ports: BTreeMap<String, BTreeMap<String, String>>,
    /// `NAME=value`.
    pub(crate) env: Vec<String>,
    pub(crate) entrypoint: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) cmd: Vec<String>,
    pub(crate) working_dir: String,
    pub(crate) labels: BTreeMap<String, String>,
}

/// An image, ready to be written.
pub(crate) struct Image<'a> {
    /// `HOST/PATH:TAG`.
    pub(crate) reference: &'a str,
    /// RFC 3339.
    pub(crate) created: &'a str,
    pub(crate) process: Process,
    pub(crate) layers: Vec<Blob>,
}

#[derive(Serialize)]
struct Config<'a> {
    created: &'a str,
    architecture: &'a str,
    os: &'a str,
    config: &'a Process,
    rootfs: RootFilesystem,
}

#[derive(Serialize)]
struct RootFilesystem {
    r#type: &'static str,
    diff_ids: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u8,
    media_type: &'static str,
    config: Descriptor,
    layers: Vec<Descriptor>,
    annotations: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u8,
    media_type: String,
    manifests: Vec<Descriptor>,
}

/// The name that registries give to the architecture of this machine.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Writes `image` to `path` and returns the digest of its manifest. Equal images give equal files.
///
/// # Errors
/// Where the file cannot be written; nothing is then left at `path`.
pub(crate) fn write(image: &Image, path: &Path) -> Result<String> {
    let config = serde_json::to_vec(&Config {
        created: image.created,
        architecture: architecture(),
        os: "linux",
        config: &image.process,
        rootfs: RootFilesystem {
            r#type: "layers",
            diff_ids: image.layers.iter().map(|layer| layer.diff_id.clone()).collect(),
        },
    })?;
    let manifest = serde_json::to_vec(&Manifest {
        schema_version: 2,
        media_type: MANIFEST,
        config: descriptor(CONFIG, &config),
        layers: image
            .layers
            .iter()
            .map(|layer| Descriptor {
                media_type: LAYER.to_owned(),
                digest: layer.digest.clone(),
                size: layer.bytes.len() as u64,
                annotations: BTreeMap::new(),
            })
            .collect(),
        annotations: image.process.labels.clone(),
    })?;
    let mut entry = descriptor(MANIFEST, &manifest);
    let tag = image.reference.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    // containerd takes the whole reference from its own annotation; the standard one holds the tag for other tools.
    entry
        .annotations
        .insert("io.containerd.image.name".to_owned(), image.reference.to_owned());
    entry
        .annotations
        .insert("org.opencontainers.image.ref.name".to_owned(), tag.to_owned());
    let image_digest = entry.digest.clone();
    let index = serde_json::to_vec(&Index {
        schema_version: 2,
        media_type: INDEX.to_owned(),
        manifests: vec![entry],
    })?;

    let mut blobs: BTreeMap<String, &[u8]> = BTreeMap::new();
    for bytes in [&config, &manifest] {
        blobs.insert(digest(bytes), bytes);
    }
    for layer in &image.layers {
        blobs.insert(layer.digest.clone(), &layer.bytes);
    }

    let folder = path.parent().context("an archive lies in a folder")?;
    let temporary = tempfile::NamedTempFile::new_in(folder).with_context(|| format!("cannot write to {}", folder.display()))?;
    let mut archive = Builder::new(BufWriter::new(temporary));
    append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut archive, "index.json", &index)?;
    for (digest, bytes) in blobs {
        append(&mut archive, &format!("blobs/{}", digest.replace(':', "/")), bytes)?;
    }
    let mut writer = archive.into_inner()?;
    writer.flush()?;
    let temporary = writer.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    temporary
        .persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(image_digest)
}

/// The digest of the manifest of the image in an archive.
///
/// # Errors
/// Where the file is not an OCI archive of one image.
pub(crate) fn digest_of(path: &Path) -> Result<String> {
    let mut archive = tar::Archive::new(File::open(path).with_context(|| format!("cannot read {}", path.display()))?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if entry.path()?.as_os_str() == "index.json" {
            let mut text = Vec::new();
            entry.read_to_end(&mut text)?;
            let index: Index = serde_json::from_slice(&text)?;
            let first = index
                .manifests
                .into_iter()
                .next()
                .with_context(|| format!("{} holds no image", path.display()))?;
            return Ok(first.digest);
        }
    }
    anyhow::bail!("{} is not an OCI archive", path.display())
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest(bytes),
        size: bytes.len() as u64,
        annotations: BTreeMap::new(),
    }
}

fn append<W: std::io::Write>(archive: &mut Builder<W>, path: &str, bytes: &[u8]) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(bytes.len() as u64);
    archive.append_data(&mut header, path, bytes)?;
    Ok(())
}
