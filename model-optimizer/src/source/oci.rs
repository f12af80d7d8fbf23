//! `oci://HOST/REPOSITORY:TAG` and `@DIGEST`: an artifact or image that holds one file.

use std::path::Path;

use plimsoll_package::registry::{Access, Credentials, Progress, Registry};

use super::{Content, Limits};
use crate::failure::{Failure, of_source};
use crate::progress::Activity;

/// Fetches the file that the artifact holds, or of several the one called `name`; a connection that breaks off is taken up where it was.
pub(super) async fn fetch(
    what: &str,
    reference: &str,
    name: Option<&str>,
    credentials: Credentials,
    limits: &Limits,
    destination: &Path,
    activity: Activity,
) -> Result<Content, Failure> {
    let access = Access {
        credentials,
        plain_http_hosts: limits.plain_http_hosts.clone(),
        extra_ca: limits.extra_ca.clone(),
    };
    let failed = |error| of_source(what, &error);
    let registry = Registry::new(access).map_err(failed)?.with_retries(limits.retries);
    let progress = Progress::new(move |done, total| activity.report(done, total));
    let fetched = registry
        .fetch_artifact(reference, name, destination, limits.size_max, &progress)
        .await;
    fetched.map_err(failed).map(|fetched| Content {
        digest: fetched.digest,
        size: fetched.size,
    })
}
