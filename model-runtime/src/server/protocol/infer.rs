//! `POST /v2/models/NAME/infer`: admitted, read, run on an inference thread, answered.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State as Shared};
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tokio::time::{Instant, timeout_at};

use super::error::Refusal;
use super::request::{self, InferRequest};
use super::{Target, response};
use crate::engine::{self, Tensor};
use crate::server::metrics::Code;
use crate::server::model::Model;
use crate::server::{State, log, workers};

/// Bodies and answers of more bytes than this are parsed and written off the threads that serve connections.
const INLINE_BYTES_MAX: usize = 64 << 10;

pub(super) async fn infer(Shared(state): Shared<Arc<State>>, Path(target): Path<Target>, headers: HeaderMap, body: Body) -> Response {
    let started = Instant::now();
    let answer = answer(&state, &target, &headers, body, started).await;
    let took = started.elapsed();
    let (response, error) = match answer {
        Ok(body) => (([(CONTENT_TYPE, "application/json")], body).into_response(), None),
        Err(refusal) => {
            let text = refusal.text.clone();
            (refusal.into_response(), Some(text))
        }
    };
    let code = response.status().as_u16();
    state.metrics.requests.get_or_create(&Code { code }).inc();
    state.metrics.request_duration.observe(took.as_secs_f64());
    access_log(code, took, error.as_deref(), &headers);
    response
}

fn access_log(code: u16, took: Duration, error: Option<&str>, headers: &HeaderMap) {
    let trace = headers
        .get("traceparent")
        .and_then(|value| value.to_str().ok())
        .and_then(log::trace_id);
    let milliseconds = took.as_secs_f64() * 1e3;
    match code {
        200 => tracing::debug!(code, milliseconds, trace, "inference"),
        400..500 => tracing::info!(code, milliseconds, trace, error, "inference refused"),
        _ => tracing::warn!(code, milliseconds, trace, error, "inference failed"),
    }
}

async fn answer(state: &Arc<State>, target: &Target, headers: &HeaderMap, body: Body, started: Instant) -> Result<Vec<u8>, Refusal> {
    target.check(state)?;
    if state.model().is_none() {
        return Err(Refusal::loading());
    }
    let limits = &state.config.limits;
    check_headers(headers, limits.body_bytes_max)?;
    // Before the body is read, so that a flood takes no memory.
    let _permit = Arc::clone(&state.admission)
        .try_acquire_owned()
        .map_err(|_| Refusal::overloaded())?;
    let _in_flight = InFlight::new(state);
    let deadline = started + limits.request_timeout;

    let body = timeout_at(deadline, read(body, limits.body_bytes_max)).await;
    let body = body.map_err(|_| {
        Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            within("the body did not arrive", limits.request_timeout),
        )
    })??;
    let too_late = |_| Refusal::new(StatusCode::GATEWAY_TIMEOUT, within("there was no answer", limits.request_timeout));
    timeout_at(deadline, run(state, body)).await.map_err(too_late)?
}

fn within(what: &str, time: Duration) -> String {
    format!("{what} within {} s", time.as_secs_f64())
}

fn check_headers(headers: &HeaderMap, body_bytes_max: usize) -> Result<(), Refusal> {
    if headers.contains_key("inference-header-content-length") {
        let text = "binary tensors (Inference-Header-Content-Length) are not supported; send the tensors' data as JSON";
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text));
    }
    if headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(Refusal::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "compressed bodies are not supported",
        ));
    }
    let length = headers
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > body_bytes_max as u64) {
        Err(too_large(body_bytes_max))
    } else {
        Ok(())
    }
}

fn too_large(body_bytes_max: usize) -> Refusal {
    Refusal::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the body is larger than the {body_bytes_max} bytes that this server takes"),
    )
}

async fn read(body: Body, body_bytes_max: usize) -> Result<Bytes, Refusal> {
    match Limited::new(body, body_bytes_max).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large(body_bytes_max)),
        Err(error) => Err(Refusal::bad(format!("the body broke off: {error}"))),
    }
}

async fn run(state: &Arc<State>, body: Bytes) -> Result<Vec<u8>, Refusal> {
    let length = body.len();
    let parsed = off_thread(length, move || request::parse(&body)).await?.map_err(Refusal::bad)?;
    let model = state.model().ok_or_else(Refusal::loading)?;
    let (id, inputs, wanted) = bind(model, parsed)?;
    let waiting = model.workers.submit(inputs).map_err(|refusal| match refusal {
        workers::Refusal::Full => Refusal::overloaded(),
        workers::Refusal::Stopped => Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the inference threads have stopped"),
    })?;
    let answer = waiting
        .await
        .map_err(|_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the inference thread died"))?;
    state.metrics.queue_duration.observe(answer.waited.as_secs_f64());
    state.metrics.inference_duration.observe(answer.ran.as_secs_f64());
    let mut outputs = answer.outputs?;
    if let Some(wanted) = &wanted {
        // An output may be asked for twice, so the tensors are copied only where the order differs from the model's.
        if !wanted.iter().copied().eq(0..outputs.len()) {
            outputs = wanted.iter().map(|&index| outputs[index].clone()).collect();
        }
    }
    let count: usize = outputs.iter().map(|output| output.data().len()).sum();
    let state = Arc::clone(state);
    let written = off_thread(count * 8, move || {
        let model = state.model().ok_or_else(Refusal::loading)?;
        let indices = wanted.unwrap_or_else(|| (0..outputs.len()).collect());
        let named = indices.iter().map(|&index| model.outputs()[index].name.as_str()).zip(&outputs);
        response::write(&state.config.name, &state.config.version, id.as_deref(), named)
            .map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
    });
    written.await?
}

type Bound = (Option<String>, Vec<Tensor>, Option<Vec<usize>>);

/// Puts the tensors into the model's order; each refusal names what is wrong.
fn bind(model: &Model, request: InferRequest) -> Result<Bound, Refusal> {
    let mut given = request.inputs;
    let mut inputs = Vec::with_capacity(given.len());
    for spec in model.inputs() {
        let Some(index) = given.iter().position(|(name, _)| *name == spec.name) else {
            return Err(Refusal::bad(format!(
                "input `{}` ({}, shape {:?}) is missing",
                spec.name, spec.datatype, spec.shape
            )));
        };
        let (_, tensor) = given.swap_remove(index);
        engine::check_one(spec, tensor.datatype(), tensor.shape()).map_err(|error| Refusal::bad(error.to_string()))?;
        inputs.push(tensor);
    }
    if let Some((name, _)) = given.first() {
        let known: Vec<&str> = model.inputs().iter().map(|spec| spec.name.as_str()).collect();
        let what = if known.contains(&name.as_str()) {
            "is given twice"
        } else {
            "is not the model's"
        };
        return Err(Refusal::bad(format!("input `{name}` {what}; it takes {}", known.join(", "))));
    }
    let position = |name: &String| {
        let index = model.outputs().iter().position(|spec| spec.name == *name);
        index.ok_or_else(|| {
            let known: Vec<&str> = model.outputs().iter().map(|spec| spec.name.as_str()).collect();
            Refusal::bad(format!("output `{name}` is not the model's; it gives {}", known.join(", ")))
        })
    };
    let wanted = request
        .outputs
        .map(|names| names.iter().map(position).collect::<Result<Vec<_>, _>>())
        .transpose()?;
    Ok((request.id, inputs, wanted))
}

async fn off_thread<T: Send + 'static>(bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    if bytes <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    let failed = |_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the request could not be processed");
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

/// Counts a request for as long as it lives, however it ends.
struct InFlight(Arc<State>);

impl InFlight {
    fn new(state: &Arc<State>) -> Self {
        state.metrics.in_flight.inc();
        Self(Arc::clone(state))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.metrics.in_flight.dec();
    }
}
