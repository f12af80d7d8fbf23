//! What goes into the cluster's registry, and what comes out of it: models and data in, the optimiser's report out.
//!
//! OCI distribution specification 1.1: "Pushing Blobs", "Pushing Manifests", "Pulling Blobs".

use std::fs;
use std::io::Read as _;

use anyhow::{Context as _, Result, bail};
use plimsoll_package::digest::Digest;
use plimsoll_package::report::Report;
use serde_json::{Value, json};

use super::gateway::Client;
use super::installation::SYSTEM_NAMESPACE;
use crate::workspace;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Where the operator of the chart has artifacts published.
const REPOSITORY: &str = "plimsoll/models";
/// The layer of a package that holds its JSON files is smaller; weights are looked for in none larger.
const REPORT_LAYER_BYTES_MAX: u64 = 4 << 20;

/// Each file of `tests/models/digits`, with its repository and tag in the cluster's registry.
const UPLOADS: [(&str, &str, &str); 3] = [
    ("digits-v1.onnx", "models/digits", "v1"),
    ("digits-v2.onnx", "models/digits", "v2"),
    ("digits-heldout.npz", "data/digits-heldout", "v1"),
];

/// The registry of the chart, reached through the API.
pub(super) struct Artifacts {
    client: Client,
}

impl Artifacts {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Puts the models and the held-out data in; what is there already stays.
    ///
    /// # Errors
    /// Where a file cannot be read or the registry does not take it.
    pub(super) fn upload_models(&self) -> Result<()> {
        for (name, repository, tag) in UPLOADS {
            let path = workspace::root().join("tests/models/digits").join(name);
            let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            self.upload(name, repository, tag, &content)
                .with_context(|| format!("cannot upload {name} as {repository}:{tag}"))?;
        }
        Ok(())
    }

    /// As ORAS does it: one layer that is the file itself, named by its title.
    fn upload(&self, name: &str, repository: &str, tag: &str, content: &[u8]) -> Result<()> {
        let config = b"{}";
        for blob in [&config[..], content] {
            self.upload_blob(repository, blob)?;
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": "application/vnd.plimsoll.file.v1",
            "config": {"mediaType": EMPTY, "digest": Digest::of(config).to_string(), "size": config.len()},
            "layers": [{
                "mediaType": "application/octet-stream",
                "digest": Digest::of(content).to_string(),
                "size": content.len(),
                "annotations": {"org.opencontainers.image.title": name},
            }],
        });
        let path = proxied(&format!("/v2/{repository}/manifests/{tag}"));
        self.client
            .put(&path, MANIFEST, manifest.to_string().as_bytes())?
            .expect_success()
            .map(drop)
    }

    fn upload_blob(&self, repository: &str, blob: &[u8]) -> Result<()> {
        let begun = self
            .client
            .post(
                &proxied(&format!("/v2/{repository}/blobs/uploads/")),
                "application/octet-stream",
                b"",
            )?
            .expect_success()?;
        let location = begun.location.context("the registry names no place to upload to")?;
        // The registry knows itself by another address than the one it is reached at here.
        let place = location
            .find("/v2/")
            .map(|start| &location[start..])
            .context("the registry names an odd place to upload to")?;
        let separator = if place.contains('?') { '&' } else { '?' };
        let path = proxied(&format!("{place}{separator}digest={}", Digest::of(blob)));
        self.client.put(&path, "application/octet-stream", blob)?.expect_success().map(drop)
    }

    /// The optimiser's report in the published package of `digest`.
    ///
    /// # Errors
    /// Where the registry does not have it.
    pub(super) fn report(&self, digest: &str) -> Result<Report> {
        let manifest = self
            .client
            .get(&proxied(&format!("/v2/{REPOSITORY}/manifests/{digest}")), MANIFEST)?
            .expect_success()?;
        let manifest: Value = serde_json::from_slice(&manifest.body).context("the package's manifest is no JSON")?;
        for layer in manifest["layers"].as_array().into_iter().flatten().rev() {
            let (Some(blob), Some(size)) = (layer["digest"].as_str(), layer["size"].as_u64()) else {
                continue;
            };
            if size > REPORT_LAYER_BYTES_MAX {
                continue;
            }
            let layer = self
                .client
                .get(&proxied(&format!("/v2/{REPOSITORY}/blobs/{blob}")), "*/*")?
                .expect_success()?;
            for entry in tar::Archive::new(&layer.body[..]).entries()? {
                let mut entry = entry?;
                if entry.path()?.ends_with("report.json") {
                    let mut json = Vec::new();
                    entry.read_to_end(&mut json)?;
                    return serde_json::from_slice(&json).context("the package's report does not parse");
                }
            }
        }
        bail!("the package {digest} holds no report")
    }
}

fn proxied(path: &str) -> String {
    format!("/api/v1/namespaces/{SYSTEM_NAMESPACE}/services/http:plimsoll-registry:registry/proxy{path}")
}
