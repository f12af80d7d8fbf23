//! Sources of models and datasets: one file a scheme.

use std::path::{Path, PathBuf};

use plimsoll_package::companion;
use plimsoll_package::digest::Digest;
use plimsoll_package::registry::Credentials;

use crate::failure::{Failure, FailureReason, disk, failure};
use crate::progress::Activity;

mod file;
mod http;
mod oci;

/// What was fetched.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Content {
    /// Its SHA-256.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
}

/// What fetching is held to.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most bytes of one model or dataset.
    pub size_max: u64,
    /// Hosts that are spoken to in plain HTTP.
    pub plain_http_hosts: Vec<String>,
    /// A PEM file with more roots.
    pub extra_ca: Option<PathBuf>,
    /// The folder of mounted volume claims.
    pub claims: PathBuf,
    /// How often a broken connection is taken up again without getting anywhere in between.
    pub retries: usize,
}

/// Fetches `uri`, which the user knows as `what` (`model`, `evaluation data`), into `destination`.
///
/// # Errors
/// By [`FailureReason`]: unreachable may pass, all else is final.
pub async fn fetch(
    what: &str,
    uri: &str,
    credentials: Credentials,
    limits: &Limits,
    destination: &Path,
    activity: Activity,
) -> Result<Content, Failure> {
    fetch_file(what, uri, None, credentials, limits, destination, activity).await
}

/// Fetches the model `uri` into `destination`, and its companions (see [`plimsoll_package::companion`]) beside it, where its source is a folder
/// or an artifact of several files. Those of an earlier attempt go first.
///
/// # Errors
/// As [`fetch`].
pub async fn fetch_model(
    uri: &str,
    credentials: Credentials,
    limits: &Limits,
    destination: &Path,
    activity: Activity,
) -> Result<Content, Failure> {
    let what = "model";
    for name in companions(destination) {
        let file = destination.with_file_name(name);
        std::fs::remove_file(&file).map_err(disk("write", &file))?;
    }
    if let Some(reference) = uri.strip_prefix("oci://") {
        return oci::fetch(
            what,
            reference,
            oci::Wanted::ContentAndCompanions,
            credentials,
            limits,
            destination,
            activity,
        )
        .await;
    }
    let content = fetch(what, uri, credentials, limits, destination, activity).await?;
    let size_max = limits.size_max.saturating_sub(content.size);
    let path = match uri.split_once("://") {
        None => Some(PathBuf::from(uri)),
        Some(("file", path)) => Some(PathBuf::from(path)),
        Some(("pvc", path)) => {
            file::path_of_claim(what, path, limits)?;
            Some(limits.claims.join(path))
        }
        Some(_) => None,
    };
    if let Some(path) = path {
        file::copy_companions(&path, destination, size_max)?;
    }
    Ok(content)
}

/// The companions that were fetched beside the model at `path`.
#[must_use]
pub fn companions(path: &Path) -> Vec<&'static str> {
    companion::PATHS
        .into_iter()
        .filter(|name| path.with_file_name(name).is_file())
        .collect()
}

/// Fetches the file `name` that lies beside `uri`: in the same folder, or in the same artifact.
///
/// # Errors
/// As [`fetch`].
pub async fn fetch_beside(
    uri: &str,
    name: &str,
    credentials: Credentials,
    limits: &Limits,
    destination: &Path,
    activity: Activity,
) -> Result<Content, Failure> {
    let what = "model's external data";
    if uri.starts_with("oci://") {
        return fetch_file(what, uri, Some(name), credentials, limits, destination, activity).await;
    }
    // A query is the model's own, such as a signature of its address.
    let path = if uri.starts_with("http") {
        uri.split(['?', '#']).next().unwrap_or(uri)
    } else {
        uri
    };
    let folder = path.rfind('/').map_or("", |end| &path[..=end]);
    let local = path.strip_prefix("file://").or_else(|| (!path.contains("://")).then_some(path));
    if let Some(model) = local.map(Path::new) {
        file::check_beside(what, model, &model.with_file_name(name))?;
    }
    fetch_file(what, &format!("{folder}{name}"), None, credentials, limits, destination, activity).await
}

async fn fetch_file(
    what: &str,
    uri: &str,
    name: Option<&str>,
    credentials: Credentials,
    limits: &Limits,
    destination: &Path,
    activity: Activity,
) -> Result<Content, Failure> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return file::copy(what, Path::new(uri), destination, limits.size_max);
    };
    match scheme {
        "https" | "http" => http::download(what, uri, credentials, limits, destination, &activity).await,
        "oci" => {
            oci::fetch(
                what,
                rest,
                name.map_or(oci::Wanted::Content, oci::Wanted::Named),
                credentials,
                limits,
                destination,
                activity,
            )
            .await
        }
        "pvc" => file::copy_from_claim(what, rest, limits, destination),
        "file" => file::copy(what, Path::new(rest), destination, limits.size_max),
        _ => Err(failure(
            FailureReason::Unsupported,
            format!(
                "cannot fetch the {what} {uri}: this version reads https://, http:// (to allowed hosts), oci:// and pvc://, not {scheme}://"
            ),
        )),
    }
}

/// That something is larger than the limit.
fn too_large(what: &str, uri: &str, size: Option<u64>, size_max: u64) -> Failure {
    let has = size.map_or_else(|| "has more bytes than that".to_owned(), |size| format!("has {size} bytes"));
    failure(
        FailureReason::SourceTooLarge,
        format!("the {what} {uri} {has}; the limit is {size_max} bytes (the operator's maxFetchSize)"),
    )
}
