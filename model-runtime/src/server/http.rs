//! The Open Inference Protocol V2 over HTTP (KServe, "Open Inference Protocol", `inference_rest.md`).
//!
//! JSON tensors of every datatype, and Triton's extensions for binary tensors, classification, statistics, model configuration and the
//! model repository's index.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Request, State as Shared};
use axum::http::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::listener::Serve;
use super::refusal::{Reason, Refusal};
use super::scheduler::Client;
use super::{State, metrics, signature};

mod error;
mod infer;
mod json;
mod openai;
mod openapi;
mod page;
pub(super) mod request;
pub(super) mod response;

/// The protocol, and `/metrics` where `with_metrics`.
pub(super) fn protocol(state: &Arc<State>, with_metrics: bool) -> Protocol {
    Protocol {
        state: Arc::clone(state),
        router: router(Arc::clone(state), with_metrics),
    }
}

/// Answers what the protocol has. Inferences of the model go past the router, which would take as long as a small one's tensors to be read.
pub(super) struct Protocol {
    state: Arc<State>,
    router: Router,
}

impl Serve for Protocol {
    fn serve(&self, client: Client, request: axum::http::Request<Incoming>) -> BoxFuture<'static, Response> {
        if request.method() != Method::POST || !self.state.config.is_inference(request.uri().path()) {
            return self.router.serve(client, request);
        }
        let state = Arc::clone(&self.state);
        async move {
            let mut response = match forbid(&state, request.uri().path(), request.headers()) {
                Some(refused) => refused,
                None => infer::infer(&state, Ok(()), client, request.map(Body::new)).await,
            };
            close_if_draining(&state, &mut response);
            response
        }
        .boxed()
    }
}

/// Routes of the protocol, and `/metrics` where `with_metrics`.
pub(super) fn router(state: Arc<State>, with_metrics: bool) -> Router {
    let mut router = Router::new()
        .route("/v2", get(server))
        .route("/v2/", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .merge(page::routes())
        .route("/v2/openapi.json", get(openapi::document))
        .route("/v2/repository/index", post(index))
        .route("/v2/models", get(models))
        .route("/v2/models/stats", get(statistics_of_all))
        .route("/v2/models/{name}", get(model))
        .route("/v2/models/{name}/config", get(configuration))
        .route("/v2/models/{name}/stats", get(statistics))
        .route("/v2/models/{name}/drift", get(drift))
        .route("/v2/models/{name}/ready", get(model_ready))
        .route("/v2/models/{name}/infer", post(infer))
        .route("/v2/models/{name}/versions/{version}/config", get(configuration))
        .route("/v2/models/{name}/versions/{version}/stats", get(statistics))
        .route("/v2/models/{name}/versions/{version}/drift", get(drift))
        .route("/v2/models/{name}/versions/{version}", get(model))
        .route("/v2/models/{name}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{name}/versions/{version}/infer", post(infer));
    router = router
        .route("/v1/embeddings", post(openai::embeddings))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{name}", get(openai::model));
    if with_metrics {
        router = router.route("/metrics", get(scrape));
    }
    finish(router, state, true)
}

/// `/metrics` alone, for an address of its own.
pub(super) fn metrics_router(state: Arc<State>) -> Router {
    finish(Router::new().route("/metrics", get(scrape)), state, false)
}

fn finish(router: Router<Arc<State>>, state: Arc<State>, guarded: bool) -> Router {
    let guarded = guarded && state.tokens.is_some();
    let guard = middleware::from_fn_with_state(Arc::clone(&state), authenticate);
    let router = if guarded { router.layer(guard) } else { router };
    let closing = middleware::from_fn_with_state(Arc::clone(&state), close_while_draining);
    router
        .fallback(|| async { Refusal::new(Reason::NotFound, "there is nothing at this path; see /v2") })
        .method_not_allowed_fallback(|| async { Refusal::new(Reason::MethodNotAllowed, "this path takes another method") })
        .layer(closing)
        .with_state(state)
}

/// Asks for a token.
async fn authenticate(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    match forbid(&state, request.uri().path(), request.headers()) {
        Some(refused) => refused,
        None => next.run(request).await,
    }
}

/// What a request is told that has no token where one is asked for. Probes need none: the kubelet has none.
fn forbid(state: &State, path: &str, headers: &HeaderMap) -> Option<Response> {
    let tokens = state.tokens.as_ref()?;
    let is_probe = path.starts_with("/v2/health/") || (path.starts_with("/v2/models/") && path.ends_with("/ready"));
    let given = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let refusal = if is_probe { return None } else { tokens.check(given).err()? };
    let is_openais = path.starts_with("/v1/");
    Some(if is_openais {
        openai::Fault::from(refusal).into_response()
    } else {
        refusal.into_response()
    })
}

async fn close_while_draining(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    close_if_draining(&state, &mut response);
    response
}

/// Clients that keep connections open move on with their next request instead of meeting a closed one.
fn close_if_draining(state: &State, response: &mut Response) {
    if state.is_draining() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

async fn infer(
    Shared(state): Shared<Arc<State>>,
    Path(target): Path<Target>,
    Extension(client): Extension<Client>,
    request: Request,
) -> Response {
    infer::infer(&state, target.check(&state), client, request).await
}

/// A body of JSON.
struct Json(Value);

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        ([(CONTENT_TYPE, "application/json")], self.0.to_string()).into_response()
    }
}

/// The parts of a model's path; the version may be left out.
#[derive(serde::Deserialize)]
struct Target {
    name: String,
    version: Option<String>,
}

impl Target {
    fn check(&self, state: &State) -> Result<(), Refusal> {
        state.config.check_target(&self.name, self.version.as_deref())
    }
}

async fn server() -> impl IntoResponse {
    Json(json!({"name": super::NAME, "version": super::VERSION, "extensions": super::EXTENSIONS}))
}

/// Live as long as no engine is stuck: a restart helps against nothing else.
async fn live(Shared(state): Shared<Arc<State>>) -> impl IntoResponse {
    let live = state.is_live();
    let status = if live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({"live": live})))
}

async fn ready(Shared(state): Shared<Arc<State>>) -> impl IntoResponse {
    state.settle().await;
    (readiness(&state), Json(json!({"ready": state.is_ready()})))
}

fn readiness(state: &State) -> StatusCode {
    if state.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

async fn model_ready(Shared(state): Shared<Arc<State>>, Path(target): Path<Target>) -> Result<impl IntoResponse, Refusal> {
    target.check(&state)?;
    state.settle().await;
    Ok((
        readiness(&state),
        Json(json!({"name": state.config.name, "ready": state.is_ready()})),
    ))
}

async fn model(Shared(state): Shared<Arc<State>>, Path(target): Path<Target>) -> Result<impl IntoResponse, Refusal> {
    target.check(&state)?;
    let model = state.model().ok_or_else(Refusal::loading)?;
    let platform = signature::platform(model.kind());
    let config = &state.config;
    let (inputs, outputs) = (model.described_inputs(), model.described_outputs());
    Ok(Json(
        json!({"name": config.name, "versions": [config.version], "platform": platform, "inputs": inputs, "outputs": outputs}),
    ))
}

async fn models(Shared(state): Shared<Arc<State>>) -> impl IntoResponse {
    Json(json!({"models": [state.config.name]}))
}

async fn index(Shared(state): Shared<Arc<State>>) -> impl IntoResponse {
    let (standing, reason) = state.standing();
    Json(json!([{"name": state.config.name, "version": state.config.version, "state": standing, "reason": reason}]))
}

async fn configuration(Shared(state): Shared<Arc<State>>, Path(target): Path<Target>) -> Result<impl IntoResponse, Refusal> {
    target.check(&state)?;
    let model = state.model().ok_or_else(Refusal::loading)?;
    Ok(Json(signature::configuration(&state.config, model)))
}

async fn statistics(Shared(state): Shared<Arc<State>>, Path(target): Path<Target>) -> Result<impl IntoResponse, Refusal> {
    target.check(&state)?;
    Ok(statistics_of_all(Shared(state)).await)
}

async fn statistics_of_all(Shared(state): Shared<Arc<State>>) -> Json {
    #[derive(serde::Serialize)]
    struct OfModel<'a> {
        name: &'a str,
        version: &'a str,
        #[serde(flatten)]
        statistics: super::statistics::Snapshot,
    }
    let config = &state.config;
    let of_model = OfModel {
        name: &config.name,
        version: &config.version,
        statistics: state.statistics.snapshot(),
    };
    Json(json!({"model_stats": [of_model]}))
}

async fn drift(Shared(state): Shared<Arc<State>>, Path(target): Path<Target>) -> Result<impl IntoResponse, Refusal> {
    #[derive(serde::Serialize)]
    struct OfModel<'a> {
        model_name: &'a str,
        model_version: &'a str,
        #[serde(flatten)]
        summary: super::drift::Summary<'a>,
    }
    target.check(&state)?;
    let model = state.model().ok_or_else(Refusal::loading)?;
    let drift = model.drift.as_ref().map_err(|why| Refusal::new(Reason::NotFound, why.clone()))?;
    Ok(Json(json!(OfModel {
        model_name: &state.config.name,
        model_version: &state.config.version,
        summary: drift.summary(),
    })))
}

async fn scrape(Shared(state): Shared<Arc<State>>) -> impl IntoResponse {
    if let Some(drift) = state.model().and_then(|model| model.drift.as_ref().ok()) {
        state.metrics.drift.set(&state.config.name, &drift.summary());
    }
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], state.metrics.text())
}
