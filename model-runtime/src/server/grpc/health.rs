//! `grpc.health.v1`: the server as a whole, and the service of the protocol, serve while new traffic should come.

use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::HeaderMap;
use axum::response::Response;
use futures::stream;

use super::proto::health::health_check_response::ServingStatus;
use super::proto::health::{HealthCheckRequest, HealthCheckResponse};
use super::{Grpc, SERVICE, ask, frame, reply, stopping};
use crate::server::refusal::{Reason, Refusal};

/// How the server is.
fn standing(ready: bool) -> ServingStatus {
    if ready { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn is_known(asked: &HealthCheckRequest) -> bool {
    asked.service.is_empty() || asked.service == SERVICE
}

pub(super) async fn check(grpc: Grpc, asked: HealthCheckRequest) -> Result<HealthCheckResponse, Refusal> {
    if !is_known(&asked) {
        return Err(Refusal::new(Reason::NotFound, format!("there is no service `{}`", asked.service)));
    }
    let status = standing(*grpc.ready.borrow()).into();
    Ok(HealthCheckResponse { status })
}

/// Tells how the server is, at once and whenever that changes, until it stops.
pub(super) async fn watch(Shared(grpc): Shared<Grpc>, headers: HeaderMap, body: Body) -> Response {
    let asked: HealthCheckRequest = match ask(&grpc, &headers, body).await {
        Ok(asked) => asked,
        Err(refusal) => return reply::refused(refusal),
    };
    let known = is_known(&asked);
    let told = stream::unfold(Some((grpc, None)), move |watching| async move {
        let (mut grpc, last) = watching?;
        loop {
            let ready = *grpc.ready.borrow_and_update();
            let status = if known { standing(ready) } else { ServingStatus::ServiceUnknown };
            if last != Some(status) {
                let answer = HealthCheckResponse { status: status.into() };
                return Some((Ok(frame::frame(&answer, 0).into()), Some((grpc, Some(status)))));
            }
            let changed = tokio::select! {
                changed = grpc.ready.changed() => changed.is_ok(),
                _ = grpc.stopped.wait_for(|&stopped| stopped) => false,
            };
            if !changed {
                return Some((Err(Err(stopping())), None));
            }
        }
    });
    reply::many(told, None)
}
