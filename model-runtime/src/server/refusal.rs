//! What a client is told when its request is refused, whichever protocol it speaks.

use std::borrow::Cow;

use crate::engine::EngineError;

/// Why a request is refused: the label of the metric of failures, and what each protocol makes its status of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::IntoStaticStr)]
pub(crate) enum Reason {
    /// The request is not what the protocol or the model takes.
    InvalidArgument,
    /// No such model, version or path.
    NotFound,
    /// The path takes another method.
    MethodNotAllowed,
    /// The message is larger than the bound.
    TooLarge,
    /// The body is encoded in a way that is not understood.
    UnsupportedEncoding,
    /// No token, or one that is not known.
    Unauthenticated,
    /// The body did not arrive in time.
    BodyTimeout,
    /// More requests than the server takes on.
    Overloaded,
    /// The model is loading.
    Unavailable,
    /// No answer in the time that was given.
    DeadlineExceeded,
    /// The engine failed.
    Internal,
}

impl Reason {
    /// Whether the server is at fault, and not the request.
    pub(crate) fn is_the_servers(self) -> bool {
        matches!(self, Self::Unavailable | Self::DeadlineExceeded | Self::Internal)
    }
}

/// A reason and its words.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) text: Cow<'static, str>,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, text: impl Into<Cow<'static, str>>) -> Self {
        Self { reason, text: text.into() }
    }

    pub(crate) fn invalid(text: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Reason::InvalidArgument, text)
    }

    pub(crate) fn loading() -> Self {
        Self::new(Reason::Unavailable, "the model is loading")
    }

    pub(crate) fn too_large(body_bytes_max: usize) -> Self {
        Self::new(
            Reason::TooLarge,
            format!("the body is larger than the {body_bytes_max} bytes that this server takes"),
        )
    }

    pub(crate) fn overloaded(what: &str) -> Self {
        Self::new(
            Reason::Overloaded,
            format!("the server has as {what} as it takes on; try again in a second"),
        )
    }
}

impl From<EngineError> for Refusal {
    fn from(error: EngineError) -> Self {
        let reason = match error {
            EngineError::Input(_) => Reason::InvalidArgument,
            _ => Reason::Internal,
        };
        Self::new(reason, error.to_string())
    }
}
