//! The Open Inference Protocol V2 over gRPC (`proto/inference.proto`), with health and reflection beside it.
//!
//! gRPC is a few conventions on top of HTTP/2 ("gRPC over HTTP2"): a path for each method, messages behind their length, a status in the
//! trailers. They are kept here, and not by a library, so that a call is admitted before its message is read, and so that what is
//! decompressed has a bound.

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State as Shared};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodRouter, post};
use prost::Message;
use tokio::sync::watch;

use super::State;
use super::refusal::{Reason, Refusal};
use frame::Messages;

mod describe;
pub(super) mod frame;
mod health;
mod infer;
pub(super) mod message;
pub(super) mod proto;
mod reflection;
mod reply;
mod status;

/// The service of the protocol.
pub(super) const SERVICE: &str = "inference.GRPCInferenceService";

/// Largest request of a method that only asks something.
const QUESTION_BYTES_MAX: usize = 16 << 10;

/// Methods that are open to all.
const PROBES: [&str; 4] = [
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/inference.GRPCInferenceService/ModelReady",
];

/// What the methods share.
#[derive(Clone)]
struct Grpc {
    state: Arc<State>,
    /// Whether new traffic should come.
    ready: watch::Receiver<bool>,
    /// Turns true when no more requests are to be read.
    stopped: watch::Receiver<bool>,
}

/// Routes of the protocol, of health and of reflection. Streams end when `stopped` turns true.
pub(super) fn router(state: Arc<State>, ready: watch::Receiver<bool>, stopped: watch::Receiver<bool>) -> Router {
    let guard = middleware::from_fn_with_state(Arc::clone(&state), authenticate);
    let method = |name: &str| format!("/{SERVICE}/{name}");
    Router::new()
        .route(&method("ServerLive"), question(describe::live))
        .route(&method("ServerReady"), question(describe::ready))
        .route(&method("ModelReady"), question(describe::model_ready))
        .route(&method("ServerMetadata"), question(describe::server))
        .route(&method("ModelMetadata"), question(describe::model))
        .route(&method("ModelConfig"), question(describe::configuration))
        .route(&method("ModelStatistics"), question(describe::statistics))
        .route(&method("RepositoryIndex"), question(describe::index))
        .route(&method("ModelInfer"), post(infer::infer))
        .route(&method("ModelStreamInfer"), post(infer::stream))
        .route("/grpc.health.v1.Health/Check", question(health::check))
        .route("/grpc.health.v1.Health/Watch", post(health::watch))
        .route(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            post(reflection::stream),
        )
        .route(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            post(reflection::stream),
        )
        .fallback(unimplemented)
        .method_not_allowed_fallback(unimplemented)
        .layer(guard)
        .layer(middleware::from_fn(grpc_alone))
        .with_state(Grpc { state, ready, stopped })
}

/// A method that asks something and is answered by `answer`.
fn question<Q, A, F>(answer: fn(Grpc, Q) -> F) -> MethodRouter<Grpc>
where
    Q: Message + Default + 'static,
    A: Message + 'static,
    F: Future<Output = Result<A, Refusal>> + Send + 'static,
{
    post(move |Shared(grpc): Shared<Grpc>, headers: HeaderMap, body: Body| async move {
        let answered = match ask(&grpc, &headers, body).await {
            Ok(question) => answer(grpc, question).await,
            Err(refusal) => Err(refusal),
        };
        reply::one(answered.map(|answer| frame::frame(&answer, 0).into()), None)
    })
}

/// What a call asks.
async fn ask<Q: Message + Default>(grpc: &Grpc, headers: &HeaderMap, body: Body) -> Result<Q, Refusal> {
    let patience = grpc.state.config.limits.request_timeout;
    let mut messages = Messages::new(headers, body, QUESTION_BYTES_MAX)?;
    let sent = tokio::time::timeout(patience, messages.only(|_| Ok(()))).await;
    let late = |_| {
        Refusal::new(
            Reason::BodyTimeout,
            format!("the body did not arrive within {} s", patience.as_secs_f64()),
        )
    };
    let message = sent.map_err(late)??.decompressed_here(QUESTION_BYTES_MAX)?;
    Q::decode(message).map_err(|error| Refusal::invalid(format!("the message is not of the method: {error}")))
}

async fn unimplemented() -> Response {
    reply::refused(Refusal::new(Reason::MethodNotAllowed, "this server has no such method"))
}

/// What streams are told when the server stops.
fn stopping() -> Refusal {
    Refusal::new(Reason::Unavailable, "the server is stopping")
}

/// Refuses what is not gRPC ("gRPC over HTTP2", Requests).
async fn grpc_alone(request: Request, next: Next) -> Response {
    let kind = request.headers().get(CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return next.run(request).await;
    }
    (StatusCode::UNSUPPORTED_MEDIA_TYPE, "this address speaks gRPC\n").into_response()
}

/// Asks for a token, but of probes: the kubelet has none.
async fn authenticate(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let is_probe = PROBES.iter().any(|probe| request.uri().path().starts_with(probe));
    if let Some(tokens) = state.tokens.as_ref().filter(|_| !is_probe)
        && let Err(refusal) = tokens.check(request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes))
    {
        return reply::refused(refusal);
    }
    next.run(request).await
}
