//! The page for a person: what is served, what its optimisation cost, a form that tries it, and live latency.

use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::extract::State as Shared;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use plimsoll_package::manifest::{REPORT_FILE, REPORT_PAGE_FILE};

use crate::server::State;
use crate::server::refusal::{Reason, Refusal};

/// Nothing is loaded from elsewhere; the icon is within the page.
const POLICY: &str = "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// The report is one file with its style inside, and no script.
const REPORT_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'";

/// Routes of the page, and of the package's report.
pub(super) fn routes() -> Router<Arc<State>> {
    let file = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(CONTENT_TYPE, kind), (CONTENT_SECURITY_POLICY, POLICY)], text) })
    };
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("page/page.html")))
        .route("/page.css", file("text/css; charset=utf-8", include_str!("page/page.css")))
        .route("/page.js", file("text/javascript; charset=utf-8", include_str!("page/page.js")))
        .route("/report.html", get(report_page))
        .route("/report.json", get(report))
}

async fn report_page(Shared(state): Shared<Arc<State>>) -> Result<Response, Refusal> {
    of_package(&state.config.path, REPORT_PAGE_FILE, "text/html; charset=utf-8").await
}

async fn report(Shared(state): Shared<Arc<State>>) -> Result<Response, Refusal> {
    of_package(&state.config.path, REPORT_FILE, "application/json").await
}

async fn of_package(package: &Path, name: &str, kind: &'static str) -> Result<Response, Refusal> {
    let path = package.join(name);
    let missing = || {
        Refusal::new(
            Reason::NotFound,
            "the model came without a report: it is a bare file, or its package has none",
        )
    };
    if !package.is_dir() {
        return Err(missing());
    }
    let read = tokio::task::spawn_blocking(move || std::fs::read(path)).await;
    let bytes = read.ok().and_then(Result::ok).ok_or_else(missing)?;
    Ok(([(CONTENT_TYPE, kind), (CONTENT_SECURITY_POLICY, REPORT_POLICY)], bytes).into_response())
}
