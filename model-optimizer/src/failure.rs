//! How the optimiser fails: with the kind of failure that decides what happens next, and a sentence for whoever reads it.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use plimsoll_package::registry::{Problem, RegistryError};
pub use plimsoll_package::report::{Failure, FailureReason};

/// A failure without a measurement.
pub fn failure(reason: FailureReason, message: impl Into<String>) -> Failure {
    Failure {
        reason,
        message: message.into(),
        measured: None,
    }
}

/// A fault of the disk or of the optimiser itself, with its causes.
pub fn internal(attempt: &str, error: &dyn Error) -> Failure {
    failure(FailureReason::Internal, format!("{attempt}: {}", chain(error)))
}

/// An error of the disk at `path`.
pub fn disk<'a>(attempt: &'a str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Failure + 'a {
    move |error| failure(FailureReason::Internal, format!("cannot {attempt} {}: {error}", path.display()))
}

/// An error with its causes in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Many errors repeat their cause.
        let said = error.to_string();
        if !text.contains(&said) {
            let _ = write!(text, ": {said}");
        }
        cause = error.source();
    }
    text.replace('\n', " ")
}

/// What a registry's problem means for a source or dataset.
pub(crate) fn of_source(what: &str, error: &RegistryError) -> Failure {
    let reason = match error.problem {
        Problem::Unreachable => FailureReason::SourceUnreachable,
        Problem::Refused | Problem::NotFound | Problem::Invalid => FailureReason::SourceRefused,
        Problem::DigestMismatch => FailureReason::DigestMismatch,
        Problem::TooLarge => FailureReason::SourceTooLarge,
        Problem::Disk => FailureReason::Internal,
    };
    failure(reason, format!("cannot fetch the {what} {error}"))
}

/// What a registry's problem means for a publication.
pub(crate) fn of_publication(error: &RegistryError) -> Failure {
    failure(FailureReason::RegistryUnavailable, format!("cannot publish {error}"))
}
