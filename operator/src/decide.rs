//! The decision: from what is desired and what is observed to what shall be, as a pure function.

pub mod optimization;
pub mod reason;
pub mod refusal;
pub mod revision;
pub mod rollout;
pub mod scaling;
pub mod status;

#[cfg(test)]
mod property;

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt as _;
use plimsoll_crds::{ModelDeployment, ModelDeploymentStatus, ModelRevision, ModelRevisionStatus};

use crate::observe::Observed;
use crate::settings::Settings;
use optimization::Optimization;
use reason::Reason;
use revision::Revision;

/// What shall be. What is not named is left as it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// A revision that shall exist, new or with a new number.
    pub revision: Option<ModelRevision>,
    /// A tag to ask the registry for, before anything else is decided.
    pub lookup: Option<String>,
    /// An optimisation Job that shall exist.
    pub job: Option<JobPlan>,
    /// Jobs that shall go.
    pub delete_jobs: Vec<String>,
    /// Replicas by revision; a revision that is not named has no Deployment yet and gets none.
    pub replicas: BTreeMap<String, i32>,
    /// The artifact of each revision in `replicas`.
    pub artifacts: BTreeMap<String, String>,
    /// Revisions that fall out of the history.
    pub delete_revisions: Vec<String>,
    /// The status of each revision.
    pub revision_status: BTreeMap<String, ModelRevisionStatus>,
    /// The model's status.
    pub status: ModelDeploymentStatus,
    /// News for people.
    pub events: Vec<Notice>,
    /// When to decide again though nothing changed.
    pub requeue_after: Option<Duration>,
}

/// An optimisation Job that shall exist.
#[derive(Debug, Clone, PartialEq)]
pub struct JobPlan {
    /// The Job's name.
    pub name: String,
    /// The revision that it works for.
    pub revision: ModelRevision,
    /// How many Jobs for this revision failed before it.
    pub attempt: u32,
}

/// An Event in the making.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The condition's reason.
    pub reason: Reason,
    /// The condition's message.
    pub message: String,
}

/// Decides what shall be for `model`.
#[must_use]
pub fn decide(model: &ModelDeployment, observed: &Observed, settings: &Settings, now: Timestamp) -> Plan {
    if model.metadata.deletion_timestamp.is_some() {
        // Everything is owned by the model; the garbage collector takes it.
        return Plan::default();
    }
    let refusal = refusal::refuse(&model.spec);
    let held = refusal.is_some() || model.spec.paused == Some(true);
    let (desired, numbered) = if held {
        (revision::newest(observed), None)
    } else {
        revision::desired(model, observed, settings)
    };

    let mut plan = Plan {
        revision: numbered,
        ..Plan::default()
    };
    let optimization = desired
        .as_ref()
        .map(|desired| optimization::optimization(desired, observed, settings, now));
    if let (Some(desired), Some(optimization)) = (&desired, &optimization) {
        plan.delete_jobs = optimization::superseded(desired, observed);
        match optimization {
            Optimization::Lookup { tag } => plan.lookup = Some(tag.clone()),
            Optimization::Start { attempt } if !held => {
                let name = optimization::job_name(desired, *attempt);
                plan.job = Some(JobPlan {
                    name,
                    revision: desired.clone(),
                    attempt: *attempt,
                });
            }
            Optimization::Waiting { until, .. } => {
                plan.requeue_after = Some(
                    Duration::try_from(until.duration_since(now))
                        .unwrap_or_default()
                        .max(Duration::from_millis(100)),
                );
            }
            _ => {}
        }
    }

    let revisions: Vec<Revision> = revision::all(desired.as_ref(), optimization.as_ref(), observed);
    let replicas = scaling::desired_replicas(&model.spec);
    plan.replicas = rollout::replicas(
        &revisions,
        desired.as_ref().map(|desired| desired.name_any()).as_deref(),
        replicas,
        model.spec.rollout.as_ref(),
    );
    plan.artifacts = revisions
        .iter()
        .filter_map(|revision| Some((revision.name.clone(), revision.artifact.clone()?)))
        .collect();
    plan.delete_revisions = revision::beyond_history(&revisions, &plan.replicas, &model.spec);

    let situation = status::Situation {
        model,
        observed,
        revisions: &revisions,
        desired: desired.as_ref(),
        optimization: optimization.as_ref(),
        refusal,
        replicas,
        planned: &plan.replicas,
        now,
    };
    plan.status = status::model_status(&situation);
    if situation.is_rolling_out() {
        let left = Duration::try_from(situation.deadline().duration_since(now)).unwrap_or_default();
        plan.requeue_after = Some(plan.requeue_after.map_or(left, |after| after.min(left)));
    }
    plan.revision_status = status::revision_statuses(&situation);
    plan.revision_status.retain(|name, _| !plan.delete_revisions.contains(name));
    plan.events = status::events(&situation, &plan.status);
    plan
}
