//! `oci://HOST/REPOSITORY:TAG` and `@DIGEST`: an artifact or image that holds one file.

use std::path::Path;

use plimsoll_package::registry::{Access, Credentials, Progress, Registry};

use super::{Content, Limits};
use crate::failure::{Failure, of_source};
use crate::progress::Activity;

/// Which files of an artifact are meant.
#[derive(Clone, Copy)]
pub(super) enum Wanted<'a> {
    /// The model or dataset that it holds.
    Content,
    /// The model, and its companions beside it.
    ContentAndCompanions,
    /// The file of this name.
    Named(&'a str),
}

/// Fetches what is wanted of an artifact; a connection that breaks off is taken up where it was.
pub(super) async fn fetch(
    what: &str,
    reference: &str,
    wanted: Wanted<'_>,
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
    let (name, companions) = match wanted {
        Wanted::Content => (None, false),
        Wanted::ContentAndCompanions => (None, true),
        Wanted::Named(name) => (Some(name), false),
    };
    let fetched = registry
        .fetch_artifact(reference, name, companions, destination, limits.size_max, &progress)
        .await;
    fetched.map_err(failed).map(|fetched| Content {
        digest: fetched.digest,
        size: fetched.size,
    })
}
