//! Refusals as gRPC has them: a status code, its text, and when to come back ("gRPC over HTTP2", Responses).

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use prost::Message;
use prost_types::{Any, Duration};

use crate::server::refusal::{Reason, Refusal};

/// The status code.
pub(super) const STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// The text, with what a header cannot hold escaped.
const TEXT: HeaderName = HeaderName::from_static("grpc-message");
/// A [`Details`] in Base64.
const DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
/// What the clients' own retries go by, in milliseconds (gRFC A6, "Pushback").
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// When a client is to try again that was refused for want of room or for the time being, in seconds.
const RETRY_SECONDS: i64 = 1;

/// A status code of gRPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::server) enum Code {
    Ok = 0,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    ResourceExhausted = 8,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct Details {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.rpc.RetryInfo`.
#[derive(Clone, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<Duration>,
}

impl Reason {
    pub(in crate::server) fn code(self) -> Code {
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

/// The headers that tell how a call ended.
pub(super) fn headers(end: &Result<(), Refusal>) -> HeaderMap {
    let code = end.as_ref().err().map_or(Code::Ok, |refusal| refusal.reason.code());
    let mut headers = HeaderMap::from_iter([(STATUS, HeaderValue::from(code as u16))]);
    let Err(refusal) = end else { return headers };
    let mut insert = |name: HeaderName, value: String| headers.extend(HeaderValue::try_from(value).ok().map(|value| (name, value)));
    insert(TEXT, escaped(&refusal.text));
    if matches!(refusal.reason, Reason::Overloaded | Reason::Unavailable) {
        let info = RetryInfo {
            retry_delay: Some(Duration {
                seconds: RETRY_SECONDS,
                nanos: 0,
            }),
        };
        let details = Details {
            code: code as i32,
            message: refusal.text.to_string(),
            details: vec![Any {
                type_url: "type.googleapis.com/google.rpc.RetryInfo".to_owned(),
                value: info.encode_to_vec(),
            }],
        };
        insert(DETAILS, STANDARD_NO_PAD.encode(details.encode_to_vec()));
        insert(PUSHBACK, (RETRY_SECONDS * 1000).to_string());
    }
    headers
}

/// The text with all but printable ASCII, and the escaping sign itself, as `%` and two digits.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_says_when_to_come_back() {
        let told = headers(&Err(Refusal::overloaded("many requests")));
        assert_eq!((&told[STATUS], &told[PUSHBACK]), (&HeaderValue::from(8), &HeaderValue::from(1000)));
        let details = Details::decode(&*STANDARD_NO_PAD.decode(&told[DETAILS]).unwrap()).unwrap();
        assert_eq!((details.code, details.message.as_bytes()), (8, told[TEXT].as_bytes()));
        let info = RetryInfo::decode(&*details.details[0].value).unwrap();
        assert_eq!(info.retry_delay.unwrap().seconds, 1);
        // A larger message does not fit the next time either.
        assert_eq!(headers(&Err(Refusal::too_large(5))).len(), 2);
        assert_eq!(headers(&Ok(())), HeaderMap::from_iter([(STATUS, HeaderValue::from(0))]));
    }

    #[test]
    fn texts_are_escaped() {
        let told = headers(&Err(Refusal::invalid("input `grüß`: 100%\n")));
        assert_eq!(told[TEXT], "input `gr%C3%BC%C3%9F`: 100%25%0A");
    }
}
