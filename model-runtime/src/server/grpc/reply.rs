//! Answers on the wire: messages, and behind them how the call ended.

use std::convert::Infallible;
use std::future::ready;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use futures::{Stream, StreamExt as _};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;

use super::frame::{ACCEPT_ENCODING, ENCODING, ENCODINGS};
use super::status;
use crate::server::encoding::Encoding;
use crate::server::refusal::Refusal;

/// How the answer is to be compressed: as the request is, where the client reads that. A client that does not compress has no slow network
/// to save on.
pub(super) fn encoding(headers: &HeaderMap) -> Option<Encoding> {
    let encoding = Encoding::of_request(headers, &ENCODING).ok()??;
    let accepted = headers.get(ACCEPT_ENCODING)?.to_str().ok()?;
    accepted.split(',').any(|name| encoding.name() == name.trim()).then_some(encoding)
}

/// The answer of a call that has one message: its frame, and that all is well.
pub(super) fn one(frame: Result<Bytes, Refusal>, encoding: Option<Encoding>) -> Response {
    match frame {
        Ok(frame) => {
            let end = ready(Some(Ok(status::headers(&Ok(())))));
            response(Body::new(Full::new(frame).with_trailers(end)), encoding)
        }
        Err(refusal) => refused(refusal),
    }
}

/// The answer of a call that has many messages: their frames, up to how it ends.
pub(super) fn many(
    frames: impl Stream<Item = Result<Bytes, Result<(), Refusal>>> + Send + 'static,
    encoding: Option<Encoding>,
) -> Response {
    let frames = frames.map(|frame| {
        Ok::<_, Infallible>(match frame {
            Ok(frame) => Frame::data(frame),
            Err(end) => Frame::trailers(status::headers(&end)),
        })
    });
    response(Body::new(StreamBody::new(frames)), encoding)
}

/// The answer of a call that has no message.
pub(super) fn refused(refusal: Refusal) -> Response {
    let mut response = response(Body::empty(), None);
    response.headers_mut().extend(status::headers(&Err(refusal)));
    response
}

fn response(body: Body, encoding: Option<Encoding>) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(ACCEPT_ENCODING, ENCODINGS);
    if let Some(encoding) = encoding {
        headers.insert(ENCODING, encoding.name());
    }
    response
}
