//! The Open Inference Protocol V2 over gRPC (`inference.proto`), with health (`grpc.health.v1`) and reflection beside it.
//!
//! The methods are routed and read here and not in code that tonic generates: see [`frame`].

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
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use prost::Message;
use tokio::sync::watch;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::State;
use super::refusal::{Reason, Refusal};
use frame::Messages;

mod describe;
pub(super) mod frame;
mod infer;
pub(super) mod message;
#[allow(clippy::all, missing_docs, unreachable_pub)]
pub(super) mod proto;
mod reply;
mod status;

/// The service of the protocol.
const SERVICE: &str = "inference.GRPCInferenceService";

/// `inference.proto` as protoc describes it, for reflection.
const DESCRIPTORS: &[u8] = include_bytes!("grpc/inference.binpb");

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
    /// Turns true when no more requests are to be read.
    stopped: watch::Receiver<bool>,
}

/// What `grpc.health.v1` says.
pub(super) struct Health(HealthReporter);

impl Health {
    /// Says whether new traffic should come.
    pub(super) async fn set(&self, ready: bool) {
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        // The server as a whole, and its service.
        for name in ["", SERVICE] {
            self.0.set_service_status(name, status).await;
        }
    }
}

/// Routes of the protocol, of health and of reflection. Streams end when `stopped` turns true.
pub(super) async fn router(state: Arc<State>, stopped: watch::Receiver<bool>) -> (Router, Health) {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reporter = Health(reporter);
    reporter.set(false).await;
    let grpc = Grpc { state, stopped };
    let method = |name: &str| format!("/{SERVICE}/{name}");
    let beside = Router::new().merge(reflection()).merge(route(health));
    let beside = beside.layer(middleware::from_fn_with_state(grpc.clone(), until_stopped));
    let router = Router::new()
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
        .with_state(grpc.clone())
        .merge(beside)
        .fallback(unimplemented)
        .method_not_allowed_fallback(unimplemented)
        .layer(middleware::from_fn_with_state(Arc::clone(&grpc.state), authenticate))
        .layer(middleware::from_fn(grpc_alone));
    (router, reporter)
}

fn reflection() -> Router {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    match (builder().build_v1(), builder().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => route(v1).merge(route(v1alpha)),
        // The descriptors are the same in every run, and a test reads them.
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "there is no reflection");
            Router::new()
        }
    }
}

/// The methods of a service that tonic made.
fn route<S>(service: S) -> Router
where
    S: tower_service::Service<Request, Response = axum::http::Response<tonic::body::Body>, Error = std::convert::Infallible>,
    S: NamedService + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    Router::new().route_service(&format!("/{}/{{method}}", S::NAME), service)
}

/// A method that asks something and is answered by `answer`.
fn question<Q, A, F>(answer: fn(Arc<State>, Q) -> F) -> MethodRouter<Grpc>
where
    Q: Message + Default + 'static,
    A: Message + 'static,
    F: Future<Output = Result<A, Refusal>> + Send + 'static,
{
    post(move |Shared(grpc): Shared<Grpc>, headers: HeaderMap, body: Body| async move {
        let patience = grpc.state.config.limits.request_timeout;
        let answered = async {
            let mut messages = Messages::new(&headers, body, QUESTION_BYTES_MAX)?;
            let sent = messages.only(|_| Ok(())).await?.decompressed_here(QUESTION_BYTES_MAX)?;
            let question = Q::decode(sent).map_err(|error| Refusal::invalid(format!("the message is not of the method: {error}")))?;
            answer(grpc.state, question).await
        };
        let late = |_| {
            Refusal::new(
                Reason::BodyTimeout,
                format!("there was no answer within {} s", patience.as_secs_f64()),
            )
        };
        let answered = tokio::time::timeout(patience, answered).await.map_err(late).flatten();
        reply::one(answered.map(|answer| frame::frame(&answer, 0).into()), None)
    })
}

async fn unimplemented() -> Response {
    reply::refused(&Refusal::new(Reason::MethodNotAllowed, "this server has no such method"))
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
    if let Some(tokens) = state.tokens.as_ref().filter(|_| !is_probe) {
        if let Err(refusal) = tokens.check(request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes)) {
            return reply::refused(&refusal);
        }
    }
    next.run(request).await
}

/// Ends streams that nobody else ends, as those that watch health, so that they do not hold up the server's end.
async fn until_stopped(Shared(grpc): Shared<Grpc>, request: Request, next: Next) -> Response {
    let body = |body: Body| {
        let frames = stream::unfold(Some((body, grpc.stopped)), |going| async {
            let (mut body, mut stopped) = going?;
            let frame = tokio::select! {
                frame = body.frame() => Some(frame?),
                _ = stopped.wait_for(|&stopped| stopped) => None,
            };
            Some(match frame {
                Some(frame) => (frame, Some((body, stopped))),
                None => (Ok(Frame::trailers(reply::trailers(&Err(stopping())))), None),
            })
        });
        Body::new(StreamBody::new(frames))
    };
    next.run(request).await.map(body)
}
