//! Refusals as gRPC has them: a status, and when to come back.

use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::server::refusal::{Reason, Refusal};

/// When a client is to try again that was refused for want of room or for the time being.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What the clients' own retries go by (gRFC A6, "Pushback").
const RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";

impl Reason {
    fn code(self) -> Code {
        match self {
            Self::InvalidArgument => Code::InvalidArgument,
            Self::Unauthenticated => Code::Unauthenticated,
            Self::NotFound => Code::NotFound,
            Self::MethodNotAllowed | Self::UnsupportedEncoding => Code::Unimplemented,
            Self::TooLarge | Self::Overloaded => Code::ResourceExhausted,
            Self::Unavailable => Code::Unavailable,
            Self::BodyTimeout | Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Internal => Code::Internal,
        }
    }
}

impl From<&Refusal> for Status {
    fn from(refusal: &Refusal) -> Self {
        let code = refusal.reason.code();
        let text = refusal.text.as_ref();
        if !matches!(refusal.reason, Reason::Overloaded | Reason::Unavailable) {
            return Self::new(code, text);
        }
        let mut status = Self::with_error_details(code, text, ErrorDetails::with_retry_info(Some(RETRY_AFTER)));
        let pushback = MetadataValue::from(RETRY_AFTER.as_millis() as u64);
        status.metadata_mut().insert(RETRY_PUSHBACK, pushback);
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_says_when_to_come_back() {
        let status = Status::from(&Refusal::overloaded("many requests"));
        assert_eq!(status.code(), Code::ResourceExhausted);
        let retry = status.get_details_retry_info().unwrap();
        assert_eq!(retry.retry_delay, Some(RETRY_AFTER));
        assert_eq!(status.metadata().get(RETRY_PUSHBACK).unwrap(), "1000");
        // A larger message does not fit the next time either.
        let status = Status::from(&Refusal::too_large(5));
        assert_eq!((status.code(), status.metadata().len()), (Code::ResourceExhausted, 0));
    }
}
