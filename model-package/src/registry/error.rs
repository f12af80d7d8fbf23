//! What can go wrong with a registry.

use std::error::Error;
use std::fmt::Write as _;
use std::io;

use oci_client::errors::{OciDistributionError, OciErrorCode};
use reqwest::StatusCode;

/// A registry did not give or take what was asked of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reference}: {message}")]
pub struct RegistryError {
    /// What it was about: a reference, or a file.
    pub reference: String,
    /// The kind of problem, which decides whether trying again may help.
    pub problem: Problem,
    /// What happened, in words.
    pub message: String,
}

/// The kinds of problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// The registry does not answer, answers with a server's error, or breaks off: may pass.
    Unreachable,
    /// The credentials are missing or not enough (401, 403).
    Refused,
    /// There is no such repository, tag or blob.
    NotFound,
    /// The content is not what its digest says.
    DigestMismatch,
    /// The content is larger than the limit.
    TooLarge,
    /// What was asked, given or found is no artifact of the expected form.
    Invalid,
    /// A file on this side cannot be read or written.
    Disk,
}

impl RegistryError {
    pub(super) fn new(reference: &str, problem: Problem, message: impl Into<String>) -> Self {
        Self {
            reference: reference.to_owned(),
            problem,
            message: message.into(),
        }
    }

    /// Whether trying again may succeed.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self.problem, Problem::Unreachable | Problem::Disk)
    }

    /// From a file's error, or from the error of a body that streamed.
    pub(super) fn from_io(reference: &str, source: &io::Error) -> Self {
        let inner = source.get_ref().map(|inner| inner as &(dyn Error + 'static));
        if let Some(error) = inner.and_then(|inner| inner.downcast_ref::<Self>()) {
            return error.clone();
        }
        if let Some(error) = inner.and_then(|inner| inner.downcast_ref::<oci_client::errors::DigestError>()) {
            return Self::new(reference, Problem::DigestMismatch, error.to_string());
        }
        if let Some(error) = inner.and_then(|inner| inner.downcast_ref::<reqwest::Error>()) {
            return Self::new(reference, Problem::Unreachable, chain(error));
        }
        let problem = match source.kind() {
            io::ErrorKind::FileTooLarge => Problem::TooLarge,
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => Problem::Invalid,
            _ => Problem::Disk,
        };
        Self::new(reference, problem, source.to_string())
    }

    pub(super) fn from_client(reference: &str, source: OciDistributionError) -> Self {
        let (problem, message) = match source {
            OciDistributionError::IoError(source) => return Self::from_io(reference, &source),
            OciDistributionError::RequestError(error) => match error.status() {
                Some(status) => (from_status(status.as_u16()), format!("the registry answers {status}")),
                None => (Problem::Unreachable, chain(&error)),
            },
            OciDistributionError::ServerError { code, message, .. } => {
                let status = StatusCode::from_u16(code).map_or_else(|_| code.to_string(), |status| status.to_string());
                let said = message.trim().chars().take(200).collect::<String>();
                let colon = if said.is_empty() { "" } else { ": " };
                (from_status(code), format!("the registry answers {status}{colon}{said}"))
            }
            OciDistributionError::RegistryError { envelope, .. } => {
                let problem = envelope.errors.first().map_or(Problem::Invalid, |error| from_code(&error.code));
                let said = envelope
                    .errors
                    .iter()
                    .map(|error| error.message.as_str())
                    .collect::<Vec<_>>()
                    .join("; ");
                (problem, format!("the registry answers: {said}"))
            }
            OciDistributionError::UnauthorizedError { .. } => (
                Problem::Refused,
                "the registry wants credentials, or others than these (401)".to_owned(),
            ),
            OciDistributionError::AuthenticationFailure(said) => (
                Problem::Refused,
                format!("the registry gives no token for these credentials: {said}"),
            ),
            OciDistributionError::ImageManifestNotFoundError(said) => (Problem::NotFound, said),
            OciDistributionError::DigestError(error) => (Problem::DigestMismatch, error.to_string()),
            error => (Problem::Invalid, error.to_string()),
        };
        Self::new(reference, problem, message)
    }
}

fn from_status(code: u16) -> Problem {
    match code {
        401 | 403 => Problem::Refused,
        404 | 410 => Problem::NotFound,
        408 | 429 | 500.. => Problem::Unreachable,
        _ => Problem::Invalid,
    }
}

fn from_code(code: &OciErrorCode) -> Problem {
    match code {
        OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown | OciErrorCode::NotFound | OciErrorCode::BlobUnknown => Problem::NotFound,
        OciErrorCode::Unauthorized | OciErrorCode::Denied => Problem::Refused,
        OciErrorCode::Toomanyrequests => Problem::Unreachable,
        OciErrorCode::DigestInvalid => Problem::DigestMismatch,
        _ => Problem::Invalid,
    }
}

/// The error with its causes, and with what to do where TLS met a server without it.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    if text.contains("InvalidContentType") {
        text.push_str("; if this host speaks plain HTTP, name it among the plain-HTTP hosts");
    }
    text
}
