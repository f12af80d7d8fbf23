//! The operator's own HTTP: health for the kubelet, metrics for Prometheus.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;

use crate::metrics::Metrics;

/// Serves `/healthz` and `/readyz` on `address` until the process ends. Ready means that the apiserver was reached; a replica that does
/// not lead is ready too.
///
/// # Errors
/// Where the address cannot be bound.
pub async fn serve_health(address: SocketAddr, ready: Arc<AtomicBool>) -> std::io::Result<()> {
    let router = Router::new().route("/healthz", get(|| async { "ok" })).route(
        "/readyz",
        get(move || async move {
            if ready.load(Ordering::Relaxed) {
                (StatusCode::OK, "ok")
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "starting")
            }
        }),
    );
    axum::serve(tokio::net::TcpListener::bind(address).await?, router).await
}

/// Serves `/metrics` on `address` until the process ends.
///
/// # Errors
/// Where the address cannot be bound.
pub async fn serve_metrics(address: SocketAddr, metrics: Arc<Metrics>) -> std::io::Result<()> {
    const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let router = Router::new().route(
        "/metrics",
        get(move || async move { ([(header::CONTENT_TYPE, TEXT)], metrics.encode()) }),
    );
    axum::serve(tokio::net::TcpListener::bind(address).await?, router).await
}
