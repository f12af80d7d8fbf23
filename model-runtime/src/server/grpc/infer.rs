//! `ModelInfer` and `ModelStreamInfer`: admitted, read, run, answered.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State as Shared;
use axum::http::HeaderMap;
use axum::response::Response;
use futures::StreamExt as _;
use futures::stream;
use tokio::time::{Instant, timeout_at};

use super::frame::{self, Messages, Sent};
use super::message;
use super::{Grpc, reply, stopping};
use crate::server::State;
use crate::server::encoding::Encoding;
use crate::server::inference::{Admission, COPIED_AS_ONE, off_thread};
use crate::server::refusal::{Reason, Refusal};
use crate::server::scheduler::Client;
use crate::server::trace::{Method, Span, Stage};

/// Most requests of one stream that are at work at one time; more are read when the first of them is answered.
const STREAM_REQUESTS_MAX: usize = 16;

/// `ModelInfer`.
pub(super) async fn infer(Shared(grpc): Shared<Grpc>, Extension(client): Extension<Client>, headers: HeaderMap, body: Body) -> Response {
    let started = Instant::now();
    let encoding = reply::encoding(&headers);
    let span = grpc.state.begin(Method::Grpc("ModelInfer"), &headers, started);
    let answer = async {
        let timeout = timeout(&headers)?;
        // Before the message is read, so that a flood takes no memory.
        let admission = admit(&grpc.state, started, timeout)?;
        let mut messages = messages(&grpc.state, &headers, body)?;
        let only = span.within(Stage::Receive, only(&mut messages, admission)).await?;
        let answer = answer(&grpc.state, only, client, &span).await?;
        compressed(answer, encoding).await
    };
    let answer = answer.await;
    grpc.state.answered(span, answer.as_ref().err());
    reply::one(answer, encoding)
}

/// `ModelStreamInfer`: requests are answered in their order, several of them at work at one time.
pub(super) async fn stream(Shared(grpc): Shared<Grpc>, Extension(client): Extension<Client>, headers: HeaderMap, body: Body) -> Response {
    let encoding = reply::encoding(&headers);
    let opened = timeout(&headers).and_then(|timeout| Ok((timeout, messages(&grpc.state, &headers, body)?)));
    let (timeout, messages) = match opened {
        Ok(opened) => opened,
        Err(refusal) => return reply::refused(refusal),
    };
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let calls = stream::unfold(Some((grpc.clone(), messages)), move |reader| async move {
        let (mut grpc, mut messages) = reader?;
        let next = next(&mut grpc, &mut messages, deadline).await;
        let reader = matches!(next, Next::Call(..)).then_some((grpc, messages));
        Some((next, reader))
    });
    let answers = calls.map(move |next| {
        let state = Arc::clone(&grpc.state);
        // Each request of the stream continues the trace that its headers name.
        let next = match next {
            Next::Call(started, call) => Ok((state.begin(Method::Grpc("ModelStreamInfer"), &headers, started), call)),
            Next::End(end) => Err(end),
        };
        async move {
            match next {
                Err(end) => Err(end),
                Ok((span, call)) => {
                    let answer = match call {
                        Ok(call) => answer(&state, call, client, &span).await,
                        Err(refusal) => Err(refusal),
                    };
                    state.answered(span, answer.as_ref().err());
                    let frame = message::in_stream(answer);
                    compressed(frame, encoding).await.map_err(Err)
                }
            }
        }
    });
    reply::many(answers.buffered(STREAM_REQUESTS_MAX), encoding)
}

/// What comes next on a stream.
enum Next {
    /// A request, since when it is here; or why it is not served, which ends nothing.
    Call(Instant, Result<Call, Refusal>),
    /// The client has sent its last, or nothing more can be read.
    End(Result<(), Refusal>),
}

/// A request that is admitted.
struct Call {
    admission: Admission,
    sent: Sent,
}

async fn next(grpc: &mut Grpc, messages: &mut Messages, deadline: Option<Instant>) -> Next {
    let end = |refusal| Next::End(Err(refusal));
    let prefix = tokio::select! {
        prefix = messages.prefix() => prefix,
        _ = grpc.stopped.wait_for(|&stopped| stopped) => return end(stopping()),
    };
    let prefix = match prefix {
        Ok(Some(prefix)) => prefix,
        Ok(None) => return Next::End(Ok(())),
        Err(refusal) => return end(refusal),
    };
    let started = Instant::now();
    let left = deadline.map(|deadline| deadline.saturating_duration_since(started));
    let admitted = admit(&grpc.state, started, left).and_then(|mut admission| {
        admission.hold(prefix.length)?;
        Ok(admission)
    });
    match admitted {
        Ok(admission) => {
            let sent = timeout_at(admission.deadline, messages.message(prefix)).await;
            match sent.map_err(|_| admission.late_body()).flatten() {
                Ok(sent) => Next::Call(started, Ok(Call { admission, sent })),
                // Where the next message begins is not known any more.
                Err(refusal) => end(refusal),
            }
        }
        Err(refusal) => {
            let patience = started + grpc.state.config.limits.request_timeout;
            match timeout_at(patience, messages.skip(prefix)).await {
                Ok(Ok(())) => Next::Call(started, Err(refusal)),
                _ => end(refusal),
            }
        }
    }
}

/// The one message of a call, within its time.
async fn only(messages: &mut Messages, mut admission: Admission) -> Result<Call, Refusal> {
    let deadline = admission.deadline;
    let read = timeout_at(deadline, messages.only(|length| admission.hold(length))).await;
    let sent = read.map_err(|_| admission.late_body()).flatten()?;
    Ok(Call { admission, sent })
}

fn messages(state: &State, headers: &HeaderMap, body: Body) -> Result<Messages, Refusal> {
    Messages::new(headers, body, state.config.limits.body_bytes_max)
}

fn admit(state: &Arc<State>, started: Instant, timeout: Option<Duration>) -> Result<Admission, Refusal> {
    let mut admission = Admission::new(state, started)?;
    if let Some(timeout) = timeout {
        admission.deadline = admission.deadline.min(started + timeout);
    }
    Ok(admission)
}

/// The answer of one request, as a frame.
async fn answer(state: &Arc<State>, call: Call, client: Client, span: &Span) -> Result<Vec<u8>, Refusal> {
    let (message, mut admission) = call.sent.decompressed(state.config.limits.body_bytes_max, call.admission).await?;
    let reader = Arc::clone(state);
    let parse = off_thread(message.len(), move || {
        let (bytes, bytes_max) = (message::typed_bytes(&message), reader.config.limits.body_bytes_max);
        if bytes > bytes_max {
            return Err(Refusal::too_large(bytes_max));
        }
        admission.hold(bytes)?;
        Ok((message::parse(message, &reader.config)?, admission))
    });
    let ((mut request, form), admission) = span.within(Stage::Parse, parse).await??;
    let id = request.id.take().unwrap_or_default();
    let outputs = admission.infer(request, client, span).await?;
    let bytes: usize = outputs.iter().map(|output| output.tensor.data().byte_count()).sum();
    let writer = Arc::clone(state);
    let write = move || message::write(&writer.config.name, &writer.config.version, id, outputs, form);
    span.within(Stage::Serialize, off_thread(bytes / COPIED_AS_ONE, write)).await
}

async fn compressed(frame: Vec<u8>, encoding: Option<Encoding>) -> Result<Bytes, Refusal> {
    let Some(encoding) = encoding else { return Ok(frame.into()) };
    let compressed = off_thread(frame.len(), move || frame::compress(&frame, encoding)).await?;
    let failed = |error| Refusal::new(Reason::Internal, format!("the answer cannot be compressed: {error}"));
    Ok(compressed.map_err(failed)?.into())
}

/// How long the client waits ("gRPC over HTTP2", Timeout): up to eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Refusal> {
    let Some(written) = headers.get("grpc-timeout") else {
        return Ok(None);
    };
    let parse = || {
        let (digits, unit) = written.to_str().ok()?.split_at_checked(written.len().checked_sub(1)?)?;
        let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
        Some(match unit {
            "H" => Duration::from_secs(count * 3600),
            "M" => Duration::from_secs(count * 60),
            "S" => Duration::from_secs(count),
            "m" => Duration::from_millis(count),
            "u" => Duration::from_micros(count),
            "n" => Duration::from_nanos(count),
            _ => return None,
        })
    };
    let invalid = || {
        Refusal::invalid(format!(
            "grpc-timeout is {written:?}; it takes up to eight digits and one of H, M, S, m, u, n"
        ))
    };
    parse().map(Some).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn timeouts_are_read_in_every_unit() {
        let read = |value: &str| {
            let headers = HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), HeaderValue::from_str(value).unwrap())]);
            timeout(&headers).map_err(|refusal| refusal.text.into_owned())
        };
        assert_eq!(timeout(&HeaderMap::new()).unwrap(), None);
        for (written, seconds) in [("2H", 7200.0), ("3M", 180.0), ("4S", 4.0), ("5m", 5e-3), ("6u", 6e-6), ("7n", 7e-9)] {
            assert_eq!(read(written), Ok(Some(Duration::from_secs_f64(seconds))), "{written}");
        }
        assert_eq!(read("99999999H"), Ok(Some(Duration::from_secs(99_999_999 * 3600))));
        for written in ["", "S", "5", "123456789S", "-1S", "1x"] {
            assert!(read(written).unwrap_err().contains("takes up to eight digits"), "{written}");
        }
    }
}
