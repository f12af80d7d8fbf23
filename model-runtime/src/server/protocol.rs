//! The Open Inference Protocol V2 over HTTP (KServe, "Open Inference Protocol", `inference_rest.md`).
//!
//! JSON tensors of every datatype. The binary tensor extension is refused by name.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Request, State as Shared};
use axum::http::header::{CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::{State, metrics};

mod error;
mod infer;
mod request;
mod response;

use error::Refusal;

/// Routes of the protocol, and `/metrics` where `with_metrics`.
pub(super) fn router(state: Arc<State>, with_metrics: bool) -> Router {
    let mut router = Router::new()
        .route("/v2", get(server))
        .route("/v2/", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{name}", get(model))
        .route("/v2/models/{name}/ready", get(model_ready))
        .route("/v2/models/{name}/infer", post(infer::infer))
        .route("/v2/models/{name}/versions/{version}", get(model))
        .route("/v2/models/{name}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{name}/versions/{version}/infer", post(infer::infer));
    if with_metrics {
        router = router.route("/metrics", get(scrape));
    }
    finish(router, state)
}

/// `/metrics` alone, for an address of its own.
pub(super) fn metrics_router(state: Arc<State>) -> Router {
    finish(Router::new().route("/metrics", get(scrape)), state)
}

fn finish(router: Router<Arc<State>>, state: Arc<State>) -> Router {
    let closing = middleware::from_fn_with_state(Arc::clone(&state), close_while_draining);
    router
        .fallback(|| async { Refusal::new(StatusCode::NOT_FOUND, "there is nothing at this path; see /v2") })
        .method_not_allowed_fallback(|| async { Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method") })
        .layer(closing)
        .with_state(state)
}

/// Clients that keep connections open move on with their next request instead of meeting a closed one.
async fn close_while_draining(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if state.is_draining() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
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
        let config = &state.config;
        if self.name != config.name {
            let text = format!("there is no model `{}`; this server has `{}`", self.name, config.name);
            return Err(Refusal::new(StatusCode::NOT_FOUND, text));
        }
        match &self.version {
            Some(version) if *version != config.version => {
                let text = format!("model `{}` has no version `{version}`; it has `{}`", config.name, config.version);
                Err(Refusal::new(StatusCode::NOT_FOUND, text))
            }
            _ => Ok(()),
        }
    }
}

async fn server() -> impl IntoResponse {
    Json(json!({"name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION"), "extensions": []}))
}

async fn live() -> impl IntoResponse {
    Json(json!({"live": true}))
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
    let platform = format!("{}_onnx", model.kind().to_string().to_lowercase());
    let config = &state.config;
    let (inputs, outputs) = (model.inputs(), model.outputs());
    Ok(Json(
        json!({"name": config.name, "versions": [config.version], "platform": platform, "inputs": inputs, "outputs": outputs}),
    ))
}

async fn scrape(Shared(state): Shared<Arc<State>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], state.metrics.text())
}
