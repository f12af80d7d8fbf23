//! `POST /v2/models/NAME/infer`: admitted, read, run, answered.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, VARY};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use http_body_util::BodyExt as _;
use tokio::time::{Instant, timeout_at};

use super::{request, response};
use crate::engine::Tensor;
use crate::server::State;
use crate::server::encoding::Encoding;
use crate::server::inference::{Admission, COPIED_AS_ONE, InferRequest, Output, off_thread};
use crate::server::refusal::{Reason, Refusal};
use crate::server::scheduler::Client;
use crate::server::trace::{Method, Span, Stage};

const METHOD: Method = Method::Http("/v2/models/{name}/infer");

/// Length of the JSON before the binary tensors (Triton, "Binary Tensor Data Extension").
const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Answers a request, which names the model that is served or is refused.
pub(super) async fn infer(state: &Arc<State>, named: Result<(), Refusal>, client: Client, request: Request) -> Response {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let span = state.begin(METHOD, &parts.headers, started);
    let answer = match named {
        Ok(()) => answer(state, client, &parts.headers, body, started, &span).await,
        Err(refusal) => Err(refusal),
    };
    state.answered(span, answer.as_ref().err());
    answer.unwrap_or_else(IntoResponse::into_response)
}

async fn answer(
    state: &Arc<State>,
    client: Client,
    headers: &HeaderMap,
    body: Body,
    started: Instant,
    span: &Span,
) -> Result<Response, Refusal> {
    let json_length = json_length(headers)?;
    let received = span.within(Stage::Receive, receive(state, headers, body, started));
    let (body, admission) = received.await?;
    let (request, binary) = if json_length == Some(0) || is_image(headers) {
        (raw(state, &body)?, false)
    } else {
        let parse = off_thread(body.len(), move || request::parse(&body, json_length));
        let parsed = span.within(Stage::Parse, parse).await?;
        parsed.map_err(Refusal::invalid)?
    };
    let id = request.id.clone();
    let outputs = admission.infer(request, client, span).await?;
    span.within(Stage::Serialize, write(state, headers, id, outputs, binary)).await
}

/// The answer, compressed as the client asks for.
async fn write(
    state: &Arc<State>,
    headers: &HeaderMap,
    id: Option<String>,
    outputs: Vec<Output>,
    binary: bool,
) -> Result<Response, Refusal> {
    let cost = |output: &Output| match (output.tensor.data().byte_count(), output.binary.unwrap_or(binary)) {
        (bytes, true) => bytes / COPIED_AS_ONE,
        (bytes, false) => bytes,
    };
    let bytes = outputs.iter().map(cost).sum();
    let writer = Arc::clone(state);
    let written = off_thread(bytes, move || {
        let config = &writer.config;
        response::write(&config.name, &config.version, id.as_deref(), &outputs, binary)
    });
    let written = written.await?.map_err(|error| Refusal::new(Reason::Internal, error.to_string()))?;
    let mut answer = HeaderMap::new();
    let kind = match written.json_length {
        Some(length) => {
            answer.insert(JSON_LENGTH, length.into());
            "application/octet-stream"
        }
        None => "application/json",
    };
    answer.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    let body = match Encoding::of_answer(headers, written.body.len()) {
        None => written.body,
        Some(encoding) => {
            answer.insert(CONTENT_ENCODING, encoding.name());
            answer.insert(VARY, HeaderValue::from_static("accept-encoding"));
            let compressed = off_thread(usize::MAX, move || encoding.compress(&written.body)).await?;
            compressed.map_err(|error| Refusal::new(Reason::Internal, format!("the answer cannot be compressed: {error}")))?
        }
    };
    Ok((answer, body).into_response())
}

/// Takes a request on and reads its body, decompressed.
///
/// # Errors
/// Where the server takes on no more, or the body is too large, comes too late, or breaks off.
pub(super) async fn receive(state: &Arc<State>, headers: &HeaderMap, body: Body, started: Instant) -> Result<(Bytes, Admission), Refusal> {
    let limits = &state.config.limits;
    let encoding = Encoding::of_request(headers, &CONTENT_ENCODING)?;
    let declared = declared_length(headers, limits.body_bytes_max)?;
    // Before the body is read, so that a flood takes no memory.
    let mut admission = Admission::new(state, started)?;
    admission.hold(declared)?;
    let deadline = admission.deadline;
    let body = timeout_at(deadline, read(body, limits.body_bytes_max, &mut admission)).await;
    let body = body.map_err(|_| admission.late_body())??;
    match encoding {
        None => Ok((body, admission)),
        Some(encoding) => encoding.decompress_admitted(body, limits.body_bytes_max, admission).await,
    }
}

/// Whether the body is an encoded image, by its type.
fn is_image(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"image/"))
}

/// A request whose body is an image or a text alone (Triton, "Raw Binary Request").
fn raw(state: &State, body: &[u8]) -> Result<InferRequest, Refusal> {
    let model = state.model().ok_or_else(Refusal::loading)?;
    let name = model.preprocessing.raw_input();
    let name =
        name.ok_or_else(|| Refusal::invalid("the model takes neither an image nor a text as the whole body; send a request in JSON"))?;
    let tensor = Tensor::new(vec![1], vec![body.to_vec()]).map_err(|error| Refusal::new(Reason::Internal, error.to_string()))?;
    Ok(InferRequest {
        inputs: vec![(name.to_owned(), tensor)],
        ..InferRequest::default()
    })
}

fn json_length(headers: &HeaderMap) -> Result<Option<usize>, Refusal> {
    let Some(value) = headers.get(JSON_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|length| length.parse().ok());
    let invalid = || Refusal::invalid(format!("Inference-Header-Content-Length is {value:?}, which is no number of bytes"));
    length.map(Some).ok_or_else(invalid)
}

/// The length of the body as the client states it, 0 where it does not.
fn declared_length(headers: &HeaderMap, body_bytes_max: usize) -> Result<usize, Refusal> {
    let length = headers
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    match length {
        None => Ok(0),
        Some(length) if length > body_bytes_max as u64 => Err(Refusal::too_large(body_bytes_max)),
        Some(length) => Ok(usize::try_from(length).unwrap_or(usize::MAX)),
    }
}

/// Reads the body; its memory is taken as it comes.
async fn read(mut body: Body, bytes_max: usize, admission: &mut Admission) -> Result<Bytes, Refusal> {
    let mut whole = Bytes::new();
    let mut parts = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Refusal::invalid(format!("the body broke off: {error}")))?;
        let Ok(part) = frame.into_data() else { continue };
        let length = whole.len() + parts.len() + part.len();
        if length > bytes_max {
            return Err(Refusal::too_large(bytes_max));
        }
        admission.hold(length)?;
        if length == part.len() {
            // Most bodies come in one part, which needs no copy.
            whole = part;
            continue;
        }
        parts.extend_from_slice(&std::mem::take(&mut whole));
        parts.extend_from_slice(&part);
    }
    Ok(if parts.is_empty() { whole } else { parts.freeze() })
}
