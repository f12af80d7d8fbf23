//! What the operator was told at its start, resolved.

use plimsoll_package::units::Size;

/// What the operator was told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The repository as Jobs reach it, `HOST[:PORT]/PATH`.
    pub registry_push: String,
    /// The same repository as kubelets reach it.
    pub registry_pull: String,
    /// Name of the secret, in the model's namespace, that Jobs push with.
    pub registry_push_secret: Option<String>,
    /// Name of the secret, in the model's namespace, that kubelets pull with.
    pub registry_pull_secret: Option<String>,
    /// Hosts that are spoken to in plain HTTP, the registry's among them where it is one.
    pub plain_http_hosts: Vec<String>,
    /// Name of the ConfigMap, in the model's namespace, whose key `ca.crt` holds more root certificates for Jobs.
    pub extra_ca_config_map: Option<String>,
    /// The optimiser's image.
    pub optimizer_image: String,
    /// The runtime's image.
    pub runtime_image: String,
    /// The runtime's image that computes on NVIDIA's GPUs.
    pub cuda_runtime_image: Option<String>,
    /// Names of the secrets, in the model's namespace, that kubelets pull both with.
    pub image_pull_secrets: Vec<String>,
    /// Pull policy of both: `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: String,
    /// Whether the cluster mounts OCI images as volumes.
    pub image_volumes: bool,
    /// Largest source or dataset that a Job fetches.
    pub max_fetch_size: Size,
    /// Version of the optimiser that `optimizer_image` holds.
    pub toolchain: String,
}

#[cfg(test)]
impl Settings {
    pub(crate) fn fixture() -> Self {
        Self {
            registry_push: "registry.plimsoll-system.svc:5000/plimsoll/models".into(),
            registry_pull: "127.0.0.1:30500/plimsoll/models".into(),
            registry_push_secret: None,
            registry_pull_secret: None,
            plain_http_hosts: vec!["registry.plimsoll-system.svc:5000".into()],
            extra_ca_config_map: None,
            optimizer_image: "ghcr.io/plimsoll-dev/optimizer:0.1.0".into(),
            runtime_image: "ghcr.io/plimsoll-dev/runtime:0.1.0".into(),
            cuda_runtime_image: None,
            image_pull_secrets: vec![],
            image_pull_policy: "IfNotPresent".into(),
            image_volumes: true,
            max_fetch_size: "100Gi".parse().expect("a size"),
            toolchain: "0.1.0".into(),
        }
    }
}
