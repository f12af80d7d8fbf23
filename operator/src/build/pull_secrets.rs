//! What kubelets pull a pod's images with.

use k8s_openapi::api::core::v1::LocalObjectReference;

use crate::settings::Settings;

/// The pull secrets of a pod of the optimiser's or the runtime's image that also mounts images by `further`; `None` where there are none, so
/// that those of the namespace's ServiceAccount take their place.
#[must_use]
pub fn pull_secrets(settings: &Settings, further: Option<&String>) -> Option<Vec<LocalObjectReference>> {
    let mut names: Vec<&String> = settings.image_pull_secrets.iter().chain(further).collect();
    // A secret that serves both is named once: the list is keyed by name.
    names.sort_unstable();
    names.dedup();
    (!names.is_empty()).then(|| names.into_iter().map(|name| LocalObjectReference { name: name.clone() }).collect())
}
