//! `publish`: pushes the package.

use plimsoll_package::manifest::REPORT_FILE;
use plimsoll_package::registry::{Attempts, Credentials, RegistryError};
use plimsoll_package::report::{Report, Summary};

use super::Context;
use super::fetch::{Fetched, registry};
use crate::failure::{Failure, internal, of_publication};

/// Attempts at a registry that does not answer: a few seconds. The Job tries again after that.
const RETRIES: usize = 4;

/// Publishes, and returns the summary with the artifact's digest.
///
/// # Errors
/// Where the registry does not take the package.
pub fn run(context: &Context) -> Result<Summary, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime
        .map_err(|error| internal("cannot start", &error))?
        .block_on(publish(context))
}

async fn publish(context: &Context) -> Result<Summary, Failure> {
    let fetched: Fetched = context.read(super::fetch::RECORD)?;
    let report: Report = context.read(&format!("package/{REPORT_FILE}"))?;
    let inputs = &context.inputs;
    let failed = |error: RegistryError| of_publication(&error);
    let credentials = Credentials::read(&context.secrets.join("registry")).map_err(failed)?;
    let registry = registry(context, credentials).map_err(failed)?;
    let tags: Vec<&str> = std::iter::once(fetched.key.as_str()).chain(inputs.run_tag.as_deref()).collect();
    let _activity = context.console.activity("publishing", "bytes");
    let mut attempts = Attempts::new(RETRIES);
    loop {
        match registry
            .push(&context.package(), &inputs.repository, &tags, &inputs.annotations, &report.summary)
            .await
        {
            Ok(digest) => {
                context
                    .console
                    .info(&format!("published {}@{digest} as {}", inputs.repository, tags.join(", ")));
                return Ok(Summary {
                    artifact: Some(digest),
                    ..report.summary
                });
            }
            Err(error) if error.is_transient() => match attempts.next_delay(0) {
                Some(delay) => tokio::time::sleep(delay).await,
                None => return Err(failed(error)),
            },
            Err(error) => return Err(failed(error)),
        }
    }
}
