//! How many pods shall serve.

use plimsoll_crds::ModelDeploymentSpec;

/// The serving pods that the spec asks for.
#[must_use]
pub fn desired_replicas(spec: &ModelDeploymentSpec) -> i32 {
    spec.replicas.unwrap_or(1).max(0)
}
