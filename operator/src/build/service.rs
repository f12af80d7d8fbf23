//! The Service of a model: every ready pod of it, of whichever revision.

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use plimsoll_crds::{MODEL_LABEL, ModelDeployment};

use super::deployment::GRPC_PORT;
use super::metadata::{Component, labels, metadata};

/// The Service of `model`.
#[must_use]
pub fn service(model: &ModelDeployment) -> Service {
    let name = model.name_any();
    Service {
        metadata: metadata(name.clone(), model, labels(&name, Component::Runtime)),
        spec: Some(ServiceSpec {
            selector: Some(
                [
                    (MODEL_LABEL.to_owned(), name),
                    ("app.kubernetes.io/component".to_owned(), "runtime".to_owned()),
                ]
                .into(),
            ),
            ports: Some(vec![
                port("http", 80, "http"),
                // HTTP/2 without TLS, as Kubernetes names it.
                port("grpc", GRPC_PORT, "kubernetes.io/h2c"),
            ]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

fn port(name: &str, port: i32, protocol: &str) -> ServicePort {
    ServicePort {
        name: Some(name.into()),
        port,
        protocol: Some("TCP".into()),
        target_port: Some(IntOrString::String(name.into())),
        app_protocol: Some(protocol.into()),
        ..ServicePort::default()
    }
}
