//! Pulling a package, for a pod whose cluster mounts no image volumes.

use std::path::{Path, PathBuf};

use plimsoll_package::registry::{Access, Credentials, Registry, RegistryError};

/// The environment variable that names a PEM file with roots to trust beside the system's.
pub const EXTRA_CA_VARIABLE: &str = "PLIMSOLL_EXTRA_CA";

/// Pulls the package that `reference` names into `dir`, in plain HTTP where `plain_http`, with the credentials of the folder
/// `credentials` (`.dockerconfigjson`, or `username` and `password`, or `token`).
///
/// # Errors
/// Where the registry cannot be reached, refuses or does not have it, or `dir` cannot be written.
pub async fn pull(reference: &str, dir: &Path, plain_http: bool, credentials: Option<&Path>) -> Result<(), RegistryError> {
    let host = reference.split('/').next().unwrap_or_default().to_owned();
    let access = Access {
        credentials: credentials.map_or(Ok(Credentials::Anonymous), Credentials::read)?,
        plain_http_hosts: if plain_http { vec![host] } else { vec![] },
        extra_ca: std::env::var_os(EXTRA_CA_VARIABLE).map(PathBuf::from),
    };
    let digest = Registry::new(access)?.pull(reference, dir).await?;
    tracing::info!(reference, %digest, dir = %dir.display(), "pulled");
    Ok(())
}
