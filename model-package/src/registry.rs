//! The way of a package to and from an OCI registry.
//!
//! A package is pushed as an image whose layers are tar archives that hold `model/...`, so that a kubelet mounts it as an image volume;
//! they are plain but where compression pays. Layers stream in both directions: no file is ever held in memory.

mod artifact;
mod attempts;
mod credentials;
mod error;
mod layer;
mod packing;
mod tls;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::read::GzDecoder;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol, current_platform_resolver};
use oci_client::manifest::{
    IMAGE_CONFIG_MEDIA_TYPE, IMAGE_LAYER_GZIP_MEDIA_TYPE, IMAGE_LAYER_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
    OciDescriptor, OciImageManifest,
};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use serde::Serialize;

use crate::digest::Digest;
use crate::report::{SUMMARY_ANNOTATION, Summary};

pub use artifact::{FetchedFile, Progress};
pub use attempts::Attempts;
pub use credentials::Credentials;
pub use error::{Problem, RegistryError};
pub use layer::{LAYER_BYTES_MAX, layer_size};
pub use tls::{install_crypto_provider, trusted_roots};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest silence of a registry in the middle of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest that [`Registry::lookup`] takes altogether.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// How registries are reached: who we are to them, which of them speak plain HTTP, and whom we trust.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Who we are.
    pub credentials: Credentials,
    /// Registries (`HOST[:PORT]`) that are spoken to in plain HTTP; all others in TLS.
    pub plain_http_hosts: Vec<String>,
    /// A PEM file with roots to trust beside the system's.
    pub extra_ca: Option<PathBuf>,
}

/// A client of OCI registries. Cloning is cheap and shares connections and tokens.
#[derive(Clone)]
pub struct Registry {
    tls: Client,
    /// Absent where no host may be spoken to so.
    plain_http: Option<Client>,
    plain_http_hosts: Vec<String>,
    credentials: Credentials,
    retries: usize,
}

/// An artifact that is in a registry.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Digest of its manifest.
    pub digest: Digest,
    /// What its optimisation measured, with [`Summary::artifact`] set; absent where the manifest carries none that this program reads.
    pub summary: Option<Summary>,
}

impl Registry {
    /// A client that opens no connection yet.
    ///
    /// # Errors
    /// Where the extra roots cannot be read.
    pub fn new(access: Access) -> Result<Self, RegistryError> {
        tls::install_crypto_provider();
        let roots = tls::trusted_roots(access.extra_ca.as_deref())?;
        let plain_http = if access.plain_http_hosts.is_empty() {
            None
        } else {
            Some(client(ClientProtocol::Http, &roots)?)
        };
        let tls = client(ClientProtocol::Https, &roots)?;
        Ok(Self {
            tls,
            plain_http,
            plain_http_hosts: access.plain_http_hosts,
            credentials: access.credentials,
            retries: 0,
        })
    }

    /// The same client, which takes up again what it fetches, where it broke off, until `retries` further attempts in a row got nowhere.
    #[must_use]
    pub fn with_retries(self, retries: usize) -> Self {
        Self { retries, ..self }
    }

    /// The client for the registry of `image`.
    fn client(&self, image: &Reference) -> &Client {
        let plain_http = self
            .plain_http
            .as_ref()
            .filter(|_| names_host(&self.plain_http_hosts, image.resolve_registry()));
        plain_http.unwrap_or(&self.tls)
    }

    /// The artifact that `reference` (`HOST/REPOSITORY:TAG` or `@DIGEST`) names; `None` where there is none. One request of the
    /// manifest, at most 5 s.
    ///
    /// # Errors
    /// Where the registry cannot be reached, refuses, or answers with what is no manifest.
    pub async fn lookup(&self, reference: &str) -> Result<Option<Found>, RegistryError> {
        let manifest = self.manifest(reference);
        let (manifest, digest) = match tokio::time::timeout(LOOKUP_TIMEOUT, manifest).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) if error.problem == Problem::NotFound => return Ok(None),
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let waited = format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs());
                return Err(RegistryError::new(reference, Problem::Unreachable, waited));
            }
        };
        let annotation = manifest
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(SUMMARY_ANNOTATION));
        let summary = annotation.and_then(|json| serde_json::from_str::<Summary>(json).ok());
        let summary = summary.map(|summary| Summary {
            artifact: Some(digest.clone()),
            ..summary
        });
        Ok(Some(Found { digest, summary }))
    }

    /// Pushes the package in `dir` to `repository` under every one of `tags`, with `summary` and `annotations` on its manifest, and
    /// returns its digest.
    ///
    /// Blobs that the registry holds are not sent again. The same files with the same annotations give the same digest, whatever
    /// their times and owners.
    ///
    /// # Errors
    /// Where a file cannot be read, or the registry cannot be reached or does not take the image.
    pub async fn push(
        &self,
        dir: &Path,
        repository: &str,
        tags: &[&str],
        annotations: &BTreeMap<String, String>,
        summary: &Summary,
    ) -> Result<Digest, RegistryError> {
        let reference = repository.to_owned();
        let image = self.authorised(&reference).await?;
        let package = dir.to_owned();
        // Reading and hashing gigabytes must not hold up the runtime's other tasks.
        let layers = tokio::task::spawn_blocking(move || layer::plan(&package)).await;
        let layers = layers
            .map_err(std::io::Error::other)
            .flatten()
            .map_err(|source| RegistryError::from_io(&reference, &source))?;

        let config = image_config(layers.iter().map(|layer| &layer.diff_id));
        let mut descriptors = Vec::with_capacity(layers.len());
        for layer in layers {
            descriptors.push(descriptor(layer.media_type(), &layer.digest, layer.size));
            self.push_layer(&image, &reference, layer).await?;
        }
        let failed = |source| RegistryError::from_client(&reference, source);
        let config_digest = Digest::of(&config);
        if !self
            .client(&image)
            .blob_exists(&image, config_digest.as_str())
            .await
            .map_err(failed)?
        {
            self.client(&image)
                .push_blob(&image, config.clone(), config_digest.as_str())
                .await
                .map_err(failed)?;
        }

        // The digest is of the manifest that carries the summary, so the summary cannot hold it.
        let summary = Summary {
            artifact: None,
            reused: false,
            ..summary.clone()
        };
        let mut annotations = annotations.clone();
        annotations.insert(
            SUMMARY_ANNOTATION.into(),
            serde_json::to_string(&summary).map_err(|e| invalid(&reference, &e))?,
        );
        let manifest = OciImageManifest {
            media_type: Some(OCI_IMAGE_MEDIA_TYPE.into()),
            config: descriptor(IMAGE_CONFIG_MEDIA_TYPE, &config_digest, config.len() as u64),
            layers: descriptors,
            annotations: Some(annotations),
            ..OciImageManifest::default()
        };
        let body = serde_json::to_vec(&manifest).map_err(|e| invalid(&reference, &e))?;
        let digest = Digest::of(&body);
        for tag in tags {
            self.put_manifest(&format!("{repository}:{tag}"), body.clone()).await?;
        }
        Ok(digest)
    }

    /// Gives the image that `repository` holds under `digest` another tag.
    ///
    /// # Errors
    /// Where the registry cannot be reached, refuses or does not have it.
    pub async fn tag(&self, repository: &str, digest: &Digest, tag: &str) -> Result<(), RegistryError> {
        let (body, _) = self.raw_manifest(&format!("{repository}@{digest}")).await?;
        self.put_manifest(&format!("{repository}:{tag}"), body.to_vec()).await
    }

    async fn put_manifest(&self, reference: &str, body: Vec<u8>) -> Result<(), RegistryError> {
        let image = self.authorised(reference).await?;
        let media_type = reqwest::header::HeaderValue::from_static(OCI_IMAGE_MEDIA_TYPE);
        let pushed = self.client(&image).push_manifest_raw(&image, body, media_type).await;
        pushed.map(drop).map_err(|source| RegistryError::from_client(reference, source))
    }

    async fn push_layer(&self, image: &Reference, reference: &str, layer: layer::Layer) -> Result<(), RegistryError> {
        let failed = |source| RegistryError::from_client(reference, source);
        let digest = layer.digest.to_string();
        if self.client(image).blob_exists(image, &digest).await.map_err(failed)? {
            return Ok(());
        }
        let size = layer.size;
        self.client(image)
            .push_blob_stream(image, layer.into_stream(), &digest, Some(size))
            .await
            .map_err(failed)?;
        Ok(())
    }

    /// Pulls the package that `reference` (by tag or digest) names into the folder `dir`, which is made where it is missing, and
    /// returns the digest of its manifest.
    ///
    /// Every layer is checked against its digest before its files appear in `dir`; an entry outside of `model/`, a link or a
    /// device is refused.
    ///
    /// # Errors
    /// Where the registry cannot be reached, refuses or does not have it, where it is no package, or where `dir` cannot be written.
    pub async fn pull(&self, reference: &str, dir: &Path) -> Result<Digest, RegistryError> {
        let image = self.authorised(reference).await?;
        let (manifest, digest) = self.manifest(reference).await?;
        let to_disk = |source| RegistryError::from_io(reference, &source);
        tokio::fs::create_dir_all(dir).await.map_err(to_disk)?;
        // In `dir` itself, which may be a mount: a rename must not cross file systems.
        let staging = tempfile::Builder::new().prefix(".pull-").tempdir_in(dir).map_err(to_disk)?;
        for layer in &manifest.layers {
            let packed = layer.media_type == IMAGE_LAYER_GZIP_MEDIA_TYPE;
            if !packed && layer.media_type != IMAGE_LAYER_MEDIA_TYPE {
                return Err(invalid(
                    reference,
                    &format!("layer {} is {}, not a package's tar archive", layer.digest, layer.media_type),
                ));
            }
            let target = staging.path().to_owned();
            self.read_blob(&image, reference, layer, &Progress::default(), move |reader| {
                if packed {
                    layer::unpack(&mut GzDecoder::new(reader), &target)
                } else {
                    layer::unpack(reader, &target)
                }
            })
            .await?;
        }
        layer::move_up(staging.path(), dir).map_err(to_disk)?;
        Ok(digest)
    }

    /// The reference parsed, with the credentials for its registry handed to the client.
    async fn authorised(&self, reference: &str) -> Result<Reference, RegistryError> {
        let image: Reference = reference
            .parse()
            .map_err(|error: oci_client::ParseError| invalid(reference, &error))?;
        let auth = self.credentials.for_registry(image.registry());
        self.client(&image).store_auth_if_needed(image.resolve_registry(), &auth).await;
        Ok(image)
    }

    async fn manifest(&self, reference: &str) -> Result<(OciImageManifest, Digest), RegistryError> {
        let (body, digest) = self.raw_manifest(reference).await?;
        let manifest = serde_json::from_slice(&body).map_err(|_| invalid(reference, &"what lies there is no image manifest"))?;
        Ok((manifest, digest.try_into().map_err(|error| invalid(reference, &error))?))
    }

    async fn raw_manifest(&self, reference: &str) -> Result<(bytes::Bytes, String), RegistryError> {
        let image = self.authorised(reference).await?;
        // The client was given the credentials above and keeps the first it was given.
        let pulled = self
            .client(&image)
            .pull_manifest_raw(&image, &RegistryAuth::Anonymous, &[OCI_IMAGE_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE])
            .await;
        pulled.map_err(|source| RegistryError::from_client(reference, source))
    }
}

/// Whether `hosts` (`HOST[:PORT]`) name the registry `HOST[:PORT]`; an entry without a port names every port.
fn names_host(hosts: &[String], registry: &str) -> bool {
    let without_port = registry
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()))
        .map(|(host, _)| host);
    hosts.iter().any(|host| host == registry || Some(host.as_str()) == without_port)
}

fn client(protocol: ClientProtocol, roots: &[Vec<u8>]) -> Result<Client, RegistryError> {
    let certificate = |data: &Vec<u8>| Certificate {
        encoding: CertificateEncoding::Der,
        data: data.clone(),
    };
    let config = ClientConfig {
        protocol,
        tls_certs_only: roots.iter().map(certificate).collect(),
        // One request a blob: the form that every registry takes, and half the round trips of chunks.
        use_monolithic_push: true,
        connect_timeout: Some(CONNECT_TIMEOUT),
        read_timeout: Some(READ_TIMEOUT),
        // An artifact of data may be in an index of one entry, which is for no platform.
        platform_resolver: Some(Box::new(|entries| {
            let only = || entries.first().filter(|_| entries.len() == 1).map(|entry| entry.digest.clone());
            current_platform_resolver(entries).or_else(only)
        })),
        user_agent: concat!("plimsoll/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    };
    Client::try_from(config).map_err(|source| RegistryError::from_client("the registry client", source))
}

fn invalid(reference: &str, what: &dyn std::fmt::Display) -> RegistryError {
    RegistryError::new(reference, Problem::Invalid, what.to_string())
}

fn descriptor(media_type: &str, digest: &Digest, size: u64) -> OciDescriptor {
    OciDescriptor {
        media_type: media_type.into(),
        digest: digest.to_string(),
        size: i64::try_from(size).unwrap_or(i64::MAX),
        ..OciDescriptor::default()
    }
}

/// The image configuration: a package holds nothing that runs, but containerd takes only an image of its own platform.
fn image_config<'a>(diff_ids: impl Iterator<Item = &'a Digest>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Config<'a> {
        architecture: &'a str,
        os: &'a str,
        config: BTreeMap<String, String>,
        rootfs: RootFs<'a>,
    }
    #[derive(Serialize)]
    struct RootFs<'a> {
        r#type: &'a str,
        diff_ids: Vec<&'a Digest>,
    }
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let rootfs = RootFs {
        r#type: "layers",
        diff_ids: diff_ids.collect(),
    };
    let config = Config {
        architecture,
        os: "linux",
        config: BTreeMap::new(),
        rootfs,
    };
    serde_json::to_vec(&config).expect("a tree of strings serialises")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_a_port_names_every_port() {
        let hosts = ["registry.example".to_owned(), "127.0.0.1:5000".to_owned()];
        assert!(names_host(&hosts, "registry.example") && names_host(&hosts, "registry.example:5000"));
        assert!(names_host(&hosts, "127.0.0.1:5000") && !names_host(&hosts, "127.0.0.1:5001") && !names_host(&hosts, "127.0.0.1"));
    }
}
