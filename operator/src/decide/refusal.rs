//! Fields of the API whose machinery is not there yet: refused in words, never ignored.

use plimsoll_crds::{Fallback, ModelDeploymentSpec, Strategy};
use plimsoll_package::recipe::ModelFormat;

/// What the spec asks for that this version does not do, as a sentence with the way out.
#[must_use]
pub fn refuse(spec: &ModelDeploymentSpec) -> Option<String> {
    let field = source(spec).or_else(|| serving(spec))?;
    Some(format!("{} is not supported by this version; {}", field.0, field.1))
}

type Refused = (&'static str, &'static str);

fn source(spec: &ModelDeploymentSpec) -> Option<Refused> {
    let source = &spec.source;
    if source.format.is_some_and(|format| format != ModelFormat::Onnx) {
        return Some(("spec.source.format other than Onnx", "export the model to ONNX and name that file"));
    }
    if source.verify.is_some() {
        return Some(("spec.source.verify", "remove it and pin the content with spec.source.digest"));
    }
    source
        .poll_interval
        .as_ref()
        .map(|_| ("spec.source.pollInterval", "remove it and change spec.source.uri for each version"))
}

fn serving(spec: &ModelDeploymentSpec) -> Option<Refused> {
    if spec.runtime.as_ref().is_some_and(|runtime| runtime.batching.is_some()) {
        return Some(("spec.runtime.batching", "remove it"));
    }
    if let Some(accelerator) = &spec.accelerator {
        if accelerator.device_class.is_some() {
            return Some((
                "spec.accelerator.deviceClass",
                "name the extended resource in spec.accelerator.resource",
            ));
        }
        if accelerator.fallback == Some(Fallback::Cpu) {
            return Some(("spec.accelerator.fallback: CPU", "remove spec.accelerator to serve on CPUs"));
        }
    }
    if spec.autoscaling.is_some() {
        return Some((
            "spec.autoscaling",
            "set spec.replicas, or point a HorizontalPodAutoscaler at this object's scale subresource",
        ));
    }
    if spec.route.is_some() {
        return Some(("spec.route", "write an HTTPRoute to the Service that carries the model's name"));
    }
    let rollout = spec.rollout.as_ref()?;
    if rollout.strategy.is_some_and(|strategy| strategy != Strategy::Rolling) {
        return Some(("spec.rollout.strategy other than Rolling", "use Rolling"));
    }
    if rollout.analysis.is_some() {
        return Some(("spec.rollout.analysis", "remove it"));
    }
    (rollout.automatic_rollback == Some(true))
        .then_some(("spec.rollout.automaticRollback", "remove it; apply the older manifest to go back"))
}
