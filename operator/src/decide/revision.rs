//! Revisions: which one is asked for, their numbers, and the history.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use kube::{Resource as _, ResourceExt as _};
use plimsoll_crds::{
    MODEL_LABEL, ModelDeployment, ModelDeploymentSpec, ModelRevision, ModelRevisionSpec, REVISION_LABEL, RevisionTemplate,
};

use super::optimization::Optimization;
use crate::observe::Observed;
use crate::settings::Settings;

/// Revisions that are kept where the spec does not say.
const HISTORY_LIMIT: i32 = 10;

/// A revision as the rollout sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// Its name.
    pub name: String,
    /// Its number.
    pub number: i64,
    /// The digest that it serves, once it is known.
    pub artifact: Option<String>,
    /// Replicas that its Deployment asks for; `None` without a Deployment.
    pub replicas: Option<i32>,
    /// Its pods, ready or not.
    pub pods: i32,
    /// Its pods that are ready.
    pub ready: i32,
}

/// The revision that the spec asks for and, where it has to be written, the object to write: it does not exist yet, or it is an older one that
/// comes back (an undo), which then takes the next number as a ReplicaSet does.
#[must_use]
pub fn desired(model: &ModelDeployment, observed: &Observed, settings: &Settings) -> (Option<ModelRevision>, Option<ModelRevision>) {
    let template = model.spec.revision_template();
    let name = format!("{}-{}", model.name_any(), template.hash());
    let existing = observed.revisions.iter().find(|revision| revision.name_any() == name);
    let highest_of_others = observed
        .revisions
        .iter()
        .filter(|revision| revision.name_any() != name)
        .map(|revision| number(revision))
        .max();
    match existing {
        Some(existing) if number(existing) > highest_of_others.unwrap_or(0) => (Some(ModelRevision::clone(existing)), None),
        Some(existing) => {
            let mut renumbered = ModelRevision::clone(existing);
            renumbered
                .labels_mut()
                .insert(REVISION_LABEL.into(), (highest_of_others.unwrap_or(0) + 1).to_string());
            (Some(renumbered.clone()), Some(renumbered))
        }
        None => {
            let spec = ModelRevisionSpec {
                runtime_image: runtime_image(&template, settings).clone(),
                template,
                optimizer_image: settings.optimizer_image.clone(),
                toolchain: settings.toolchain.clone(),
            };
            let mut revision = ModelRevision::new(&name, spec);
            revision.metadata.namespace = model.namespace();
            revision.metadata.owner_references = Some(model.controller_owner_ref(&()).into_iter().collect());
            revision.labels_mut().insert(MODEL_LABEL.into(), model.name_any());
            revision
                .labels_mut()
                .insert(REVISION_LABEL.into(), (highest_of_others.unwrap_or(0) + 1).to_string());
            revision
                .labels_mut()
                .insert("app.kubernetes.io/managed-by".into(), "plimsoll".into());
            (Some(revision.clone()), Some(revision))
        }
    }
}

/// The runtime's image: the one that the model names, or the one for its device.
fn runtime_image<'a>(template: &'a RevisionTemplate, settings: &'a Settings) -> &'a String {
    let named = template.runtime.as_ref().and_then(|runtime| runtime.image.as_ref());
    let cuda = || {
        let resource = template.accelerator.as_ref()?.resource.as_deref()?;
        settings.cuda_runtime_image.as_ref().filter(|_| resource.starts_with("nvidia.com/"))
    };
    named.or_else(cuda).unwrap_or(&settings.runtime_image)
}

/// The revision of the highest number: the one that was asked for last.
#[must_use]
pub fn newest(observed: &Observed) -> Option<ModelRevision> {
    observed
        .revisions
        .iter()
        .max_by_key(|revision| number(revision))
        .map(|revision| ModelRevision::clone(revision))
}

/// A revision's number; 0 where its label is missing.
#[must_use]
pub fn number(revision: &ModelRevision) -> i64 {
    revision
        .labels()
        .get(REVISION_LABEL)
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// All revisions, the desired one among them though it may not be written yet, by number.
#[must_use]
pub fn all(desired: Option<&ModelRevision>, optimization: Option<&Optimization>, observed: &Observed) -> Vec<Revision> {
    let desired_name = desired.map(|desired| desired.name_any());
    let mut revisions: Vec<Revision> = observed
        .revisions
        .iter()
        .filter(|revision| Some(revision.name_any()) != desired_name)
        .map(|revision| {
            summarize(
                revision,
                revision.status.as_ref().and_then(|status| status.artifact.clone()),
                observed,
            )
        })
        .collect();
    if let Some(desired) = desired {
        let artifact = match optimization {
            Some(Optimization::Done { artifact, .. }) => Some(artifact.clone()),
            _ => None,
        };
        revisions.push(summarize(desired, artifact, observed));
    }
    revisions.sort_by_key(|revision| revision.number);
    revisions
}

fn summarize(revision: &ModelRevision, artifact: Option<String>, observed: &Observed) -> Revision {
    let name = revision.name_any();
    let deployment = observed.deployments.iter().find(|deployment| deployment.name_any() == name);
    let count = |of: fn(&Deployment) -> Option<i32>| deployment.and_then(|deployment| of(deployment)).unwrap_or(0);
    Revision {
        number: number(revision),
        artifact,
        replicas: deployment.map(|deployment| deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)),
        pods: count(|deployment| deployment.status.as_ref()?.replicas),
        ready: count(|deployment| deployment.status.as_ref()?.ready_replicas),
        name,
    }
}

/// The revisions that fall out of the history: the oldest beyond the limit, never one that is asked for or has pods.
#[must_use]
pub fn beyond_history(revisions: &[Revision], planned: &BTreeMap<String, i32>, spec: &ModelDeploymentSpec) -> Vec<String> {
    let limit = usize::try_from(spec.revision_history_limit.unwrap_or(HISTORY_LIMIT)).unwrap_or(0);
    let newest = revisions.last().map(|revision| revision.name.as_str());
    let retired: Vec<&Revision> = revisions
        .iter()
        .filter(|revision| {
            Some(revision.name.as_str()) != newest
                && revision.pods == 0
                && revision.replicas.unwrap_or(0) == 0
                && planned.get(&revision.name).copied().unwrap_or(0) == 0
        })
        .collect();
    retired[..retired.len().saturating_sub(limit)]
        .iter()
        .map(|revision| revision.name.clone())
        .collect()
}
