//! What people are told: conditions, printer columns, events.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::ResourceExt as _;
use plimsoll_crds::{
    ConditionType, EngineChoice, MODEL_LABEL, ModelDeployment, ModelDeploymentStatus, ModelRevision, ModelRevisionStatus, RevisionPhase,
};
use plimsoll_package::report::Summary;
use plimsoll_package::units::{display_percent, display_size};

use super::optimization::{Optimization, Trouble, waiting};
use super::reason::Reason;
use super::revision::Revision;
use super::{Notice, rollout};
use crate::observe::Observed;

/// Longest message of a condition, in bytes (the API's limit is 32768; what is read at a prompt is shorter).
const MESSAGE_BYTES_MAX: usize = 2048;

/// How long a rollout may make no progress where the spec does not say; as of a Deployment.
const ROLLOUT_DEADLINE: Duration = Duration::from_secs(600);

/// The label that tells the pods of a Deployment from those of a Job.
const POD_TEMPLATE_HASH: &str = "pod-template-hash";

/// All that the status is made of.
pub struct Situation<'a> {
    /// The model.
    pub model: &'a ModelDeployment,
    /// What is observed of it.
    pub observed: &'a Observed,
    /// Its revisions by number.
    pub revisions: &'a [Revision],
    /// The revision that is asked for.
    pub desired: Option<&'a ModelRevision>,
    /// Where its optimisation stands.
    pub optimization: Option<&'a Optimization>,
    /// What the spec asks for that this version does not do.
    pub refusal: Option<String>,
    /// The serving pods that are asked for.
    pub replicas: i32,
    /// Replicas by revision as they are planned.
    pub planned: &'a BTreeMap<String, i32>,
    /// Now.
    pub now: Timestamp,
}

/// Where a model stands.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Standing {
    progress: Progress,
    reason: Reason,
    message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    Working,
    Stalled,
}

impl Standing {
    fn new(progress: Progress, reason: Reason, message: impl Into<String>) -> Self {
        Self {
            progress,
            reason,
            message: message.into(),
        }
    }

    fn stalled(trouble: &Trouble) -> Self {
        Self::new(Progress::Stalled, trouble.reason, &trouble.message)
    }

    fn working(trouble: &Trouble) -> Self {
        Self::new(Progress::Working, trouble.reason, &trouble.message)
    }
}

impl Situation<'_> {
    fn desired_revision(&self) -> Option<&Revision> {
        let name = self.desired?.name_any();
        self.revisions.iter().find(|revision| revision.name == name)
    }

    /// The whole summary, worst news first.
    fn standing(&self) -> Standing {
        if let Some(message) = &self.refusal {
            return Standing::new(Progress::Stalled, Reason::Unsupported, message);
        }
        if let Some(obstacle) = &self.observed.obstacle {
            return Standing::stalled(obstacle);
        }
        let (Some(optimization), Some(desired)) = (self.optimization, self.desired_revision()) else {
            return Standing::new(
                Progress::Working,
                Reason::Paused,
                "spec.paused is true and there is no revision yet; set it to false to make one",
            );
        };
        let standing = match optimization {
            Optimization::Failed(trouble) => return Standing::stalled(trouble),
            Optimization::Waiting { trouble, .. } => Standing::working(trouble),
            Optimization::Running {
                trouble: Some(trouble), ..
            } => Standing::working(trouble),
            Optimization::Running { job, trouble: None } => Standing::new(
                Progress::Working,
                Reason::Optimizing,
                format!("Job {job} is under way; follow it with kubectl logs job/{job} --all-containers -f"),
            ),
            Optimization::Lookup { .. } | Optimization::Start { .. } => Standing::new(
                Progress::Working,
                Reason::Optimizing,
                format!("revision {} is about to be optimised", desired.number),
            ),
            Optimization::Done { .. } => self.rollout(desired),
        };
        if self.model.spec.paused == Some(true) && standing.progress != Progress::Done {
            return Standing::new(
                Progress::Working,
                Reason::Paused,
                format!("spec.paused is true; {}", standing.message),
            );
        }
        standing
    }

    fn rollout(&self, desired: &Revision) -> Standing {
        let others: i32 = self
            .revisions
            .iter()
            .filter(|other| other.name != desired.name)
            .map(|other| other.pods)
            .sum();
        let complete =
            desired.replicas == Some(self.replicas) && desired.ready >= self.replicas && desired.pods == self.replicas && others == 0;
        if complete && self.replicas == 0 {
            return Standing::new(
                Progress::Done,
                Reason::ScaledToZero,
                format!("revision {} serves once spec.replicas is above 0", desired.number),
            );
        }
        if complete {
            let message = format!(
                "revision {} serves: {} of {} replicas answered a probe inference",
                desired.number, desired.ready, self.replicas
            );
            return Standing::new(Progress::Done, Reason::Serving, message);
        }
        let trouble = self.pod_trouble(&desired.name);
        if self.deadline() <= self.now {
            let cause = trouble.map_or_else(
                || format!("{} of {} replicas ready", desired.ready, self.replicas),
                |trouble| format!("{}: {}", trouble.reason, trouble.message),
            );
            let message = format!(
                "revision {} made no progress within spec.rollout.deadline; {cause}; what serves stays as it is, and the rollout goes on \
                 should a pod become ready",
                desired.number
            );
            return Standing::new(Progress::Stalled, Reason::ProgressDeadlineExceeded, message);
        }
        if let Some(trouble) = trouble {
            return Standing::working(&trouble);
        }
        let going = if others == 0 {
            String::new()
        } else {
            format!(", {others} of older revisions still there")
        };
        let message = format!(
            "revision {}: {} of {} replicas ready{going}",
            desired.number, desired.ready, self.replicas
        );
        Standing::new(Progress::Working, Reason::RollingOut, message)
    }

    /// Whether pods of the revision that is asked for are on their way.
    #[must_use]
    pub fn is_rolling_out(&self) -> bool {
        matches!(self.optimization, Some(Optimization::Done { .. })) && self.standing().progress == Progress::Working
    }

    /// When the rollout counts as failed: `spec.rollout.deadline` after it last got on, which it does when it begins, when the artifact is
    /// there, while pods are being made, and whenever one was made or became ready.
    #[must_use]
    pub fn deadline(&self) -> Timestamp {
        let rollout = self.model.spec.rollout.as_ref();
        let deadline = rollout.and_then(|rollout| rollout.deadline.as_ref()?.value().ok());
        let deadline = jiff::SignedDuration::try_from(deadline.unwrap_or(ROLLOUT_DEADLINE)).unwrap_or(jiff::SignedDuration::MAX);
        self.last_progress().checked_add(deadline).unwrap_or(Timestamp::MAX)
    }

    fn last_progress(&self) -> Timestamp {
        let since = |conditions: &[Condition], kind: ConditionType, status: &str| {
            let mut conditions = conditions.iter();
            let found = conditions.find(|condition| condition.type_ == kind.to_string() && condition.status == status)?;
            Some(found.last_transition_time.0)
        };
        let name = self.desired.map(|desired| desired.name_any());
        let began = since(
            self.model.status.as_ref().map_or(&[], |status| &status.conditions),
            ConditionType::RolledOut,
            "False",
        );
        let revision = self.observed.revisions.iter().find(|revision| Some(revision.name_any()) == name);
        let optimized = revision.and_then(|revision| since(&revision.status.as_ref()?.conditions, ConditionType::Optimized, "True"));
        let (Some(began), Some(optimized)) = (began, optimized) else {
            return self.now;
        };
        if self.pods_are_being_made() {
            return self.now;
        }
        let pods = self.observed.pods.iter().filter(|pod| pod.labels().contains_key(POD_TEMPLATE_HASH));
        let pods = pods.flat_map(|pod| {
            let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
            let ready = conditions.filter(|condition| condition.type_ == "Ready" && condition.status == "True");
            ready
                .filter_map(|condition| condition.last_transition_time.clone())
                .chain(pod.creation_timestamp())
        });
        pods.map(|time| time.0).fold(began.max(optimized), Timestamp::max)
    }

    /// Whether the Deployment of the revision that is asked for has still to make pods, and nothing keeps it from it.
    fn pods_are_being_made(&self) -> bool {
        let Some(desired) = self.desired_revision() else { return false };
        let deployment = self
            .observed
            .deployments
            .iter()
            .find(|deployment| deployment.name_any() == desired.name);
        let kept_from_it = deployment
            .and_then(|deployment| deployment.status.as_ref()?.conditions.as_ref())
            .is_some_and(|conditions| {
                conditions
                    .iter()
                    .any(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")
            });
        let planned = self.planned.get(&desired.name).copied();
        planned != desired.replicas || (desired.pods < planned.unwrap_or(0) && !kept_from_it)
    }

    /// Why a pod of `revision` does not get ready.
    fn pod_trouble(&self, revision: &str) -> Option<Trouble> {
        let pods = self.observed.pods.iter().filter(|pod| {
            pod.labels()
                .get(plimsoll_crds::REVISION_NAME_LABEL)
                .is_some_and(|name| name == revision)
        });
        pods.filter(|pod| pod.labels().contains_key(POD_TEMPLATE_HASH)).find_map(|pod| {
            let crashed = pod
                .status
                .iter()
                .flat_map(|status| status.container_statuses.iter().flatten())
                .find_map(|container| {
                    let last = container.last_state.as_ref()?.terminated.as_ref()?;
                    let said = last.message.as_deref().map_or_else(
                        || format!("it ended with exit code {}", last.exit_code),
                        |message| message.trim().to_owned(),
                    );
                    (!container.ready).then(|| Trouble {
                        reason: Reason::RuntimeFailed,
                        message: format!("pod {}: {said}", pod.name_any()),
                    })
                });
            crashed.or_else(|| waiting(pod))
        })
    }

    fn condition(
        &self,
        old: &[Condition],
        kind: ConditionType,
        status: bool,
        reason: Reason,
        message: &str,
        generation: Option<i64>,
    ) -> Condition {
        let status = if status { "True" } else { "False" };
        let kind = kind.to_string();
        // The time moves only with the status, or a no-op reconcile would write.
        let unchanged = old.iter().find(|condition| condition.type_ == kind && condition.status == status);
        Condition {
            last_transition_time: unchanged.map_or(Time(whole_seconds(self.now)), |condition| condition.last_transition_time.clone()),
            message: message[..message.floor_char_boundary(MESSAGE_BYTES_MAX)].to_owned(),
            observed_generation: generation,
            reason: reason.to_string(),
            status: status.to_owned(),
            type_: kind,
        }
    }
}

/// Kubernetes writes times of conditions in whole seconds; anything finer would differ from what is read back.
fn whole_seconds(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// The model's status.
#[must_use]
pub fn model_status(situation: &Situation) -> ModelDeploymentStatus {
    let model = situation.model;
    let old = model.status.as_ref();
    let old_conditions = old.map_or(&[][..], |status| &status.conditions);
    let standing = situation.standing();
    let serving = rollout::in_service(situation.revisions).filter(|revision| revision.ready > 0);
    let pods: i32 = situation.revisions.iter().map(|revision| revision.pods).sum();
    let ready: i32 = situation.revisions.iter().map(|revision| revision.ready).sum();
    let shown = serving
        .map(|revision| revision.name.clone())
        .or_else(|| situation.desired.map(|desired| desired.name_any()));
    let result = shown.and_then(|name| situation.result(&name)).unwrap_or_default();

    let generation = model.metadata.generation;
    let condition = |kind, status, reason, message: &str| situation.condition(old_conditions, kind, status, reason, message, generation);
    let is = |progress| standing.progress == progress;
    let rolled_out = is(Progress::Done);
    // A condition that does not hold has nothing to add to Ready's message.
    let only_if = |holds: bool| if holds { standing.message.as_str() } else { "" };
    let optimized = situation
        .optimization
        .is_some_and(|optimization| matches!(optimization, Optimization::Done { .. }))
        && situation.refusal.is_none();
    let (available_reason, available_message) = match serving {
        Some(revision) => (Reason::Serving, format!("revision {} ({}) serves", revision.number, revision.name)),
        None => (Reason::NoReadyReplica, "no replica of any revision is ready".to_owned()),
    };
    let (optimized_reason, optimized_message) = if optimized {
        let desired = situation
            .desired
            .and_then(|desired| situation.result(&desired.name_any()))
            .unwrap_or_default();
        (Reason::Optimized, desired.artifact.unwrap_or_default())
    } else {
        (standing.reason, standing.message.clone())
    };
    let conditions = vec![
        condition(ConditionType::Ready, is(Progress::Done), standing.reason, &standing.message),
        condition(
            ConditionType::Reconciling,
            is(Progress::Working),
            standing.reason,
            only_if(is(Progress::Working)),
        ),
        condition(
            ConditionType::Stalled,
            is(Progress::Stalled),
            standing.reason,
            only_if(is(Progress::Stalled)),
        ),
        condition(ConditionType::Optimized, optimized, optimized_reason, &optimized_message),
        condition(ConditionType::Available, serving.is_some(), available_reason, &available_message),
        condition(ConditionType::RolledOut, rolled_out, standing.reason, &standing.message),
    ];
    ModelDeploymentStatus {
        observed_generation: generation,
        revision: serving.map(|revision| revision.number),
        serving_revision: serving.map(|revision| revision.name.clone()),
        desired_revision: situation.desired.map(|desired| desired.name_any()),
        artifact: serving.and_then(|revision| revision.artifact.clone()),
        replicas: pods,
        ready_replicas: ready,
        readiness: Some(format!("{ready}/{}", situation.replicas)),
        selector: Some(format!("{MODEL_LABEL}={},app.kubernetes.io/component=runtime", model.name_any())),
        size: result.size,
        accuracy: result.accuracy,
        fidelity: result.fidelity,
        engine: situation.engine_choice().or(result.engine),
        endpoint: Some(format!(
            "http://{}.{}.svc/v2/models/{}",
            model.name_any(),
            model.namespace().unwrap_or_default(),
            model.name_any()
        )),
        conditions,
    }
}

impl Situation<'_> {
    fn engine_choice(&self) -> Option<String> {
        match self.model.spec.runtime.as_ref()?.engine? {
            EngineChoice::Auto => None,
            chosen => Some(chosen.to_string()),
        }
    }

    /// What is known of the result of the revision `name`: what its status recorded, or what its Job has just said.
    fn result(&self, name: &str) -> Option<ModelRevisionStatus> {
        if self.desired.is_some_and(|desired| desired.name_any() == name)
            && let Some(Optimization::Done {
                summary: Some(summary), ..
            }) = self.optimization
        {
            return Some(result_of(summary));
        }
        let revision = self.observed.revisions.iter().find(|revision| revision.name_any() == name)?;
        revision.status.clone()
    }
}

/// The measured part of a revision's status.
fn result_of(summary: &Summary) -> ModelRevisionStatus {
    let bytes = |size: u64| i64::try_from(size).unwrap_or(i64::MAX);
    let change = |before: u64, after: u64| format!("{} -> {}", display_size(before), display_size(after));
    ModelRevisionStatus {
        artifact: summary.artifact.as_ref().map(ToString::to_string),
        reused: Some(summary.reused),
        source_digest: Some(summary.source_digest.to_string()),
        evaluation_digest: summary.evaluation_digest.as_ref().map(ToString::to_string),
        size_before: Some(bytes(summary.size_before)),
        size_after: Some(bytes(summary.size_after)),
        size: Some(change(summary.size_before, summary.size_after)),
        size_layer_before: summary.size_layer_before.map(bytes),
        size_layer_after: summary.size_layer_after.map(bytes),
        pulled: summary
            .size_layer_before
            .zip(summary.size_layer_after)
            .map(|(before, after)| change(before, after)),
        accuracy: summary
            .metric
            .map(|metric| format!("{} -> {}", metric.name.display(metric.before), metric.name.display(metric.after))),
        metric: summary.metric.map(|metric| metric.name.to_string()),
        fidelity: summary.fidelity.map(|fidelity| format!("{fidelity:.4}")),
        sparsity: Some(display_percent(summary.sparsity)),
        latency: summary
            .latency
            .map(|latency| format!("{:.0} us -> {:.0} us", latency.before_us, latency.after_us)),
        engine: Some(summary.engine.to_string()),
        toolchain: Some(summary.toolchain.clone()),
        ..ModelRevisionStatus::default()
    }
}

/// The status of every revision that exists or is about to.
#[must_use]
pub fn revision_statuses(situation: &Situation) -> BTreeMap<String, ModelRevisionStatus> {
    situation
        .revisions
        .iter()
        .map(|revision| (revision.name.clone(), revision_status(situation, revision)))
        .collect()
}

fn revision_status(situation: &Situation, revision: &Revision) -> ModelRevisionStatus {
    let observed = situation
        .observed
        .revisions
        .iter()
        .find(|observed| observed.name_any() == revision.name);
    let old = observed.and_then(|observed| observed.status.clone()).unwrap_or_default();
    let is_desired = situation.desired.is_some_and(|desired| desired.name_any() == revision.name);
    let failure = match situation.optimization {
        Some(Optimization::Failed(trouble)) if is_desired => Some(trouble.clone()),
        _ => None,
    };
    let phase = match (&failure, &revision.artifact) {
        (Some(_), _) => RevisionPhase::Failed,
        (None, None) if !is_desired => old.phase.unwrap_or(RevisionPhase::Retired),
        (None, None) => RevisionPhase::Optimizing,
        (None, Some(_)) if revision.ready > 0 => RevisionPhase::Serving,
        (None, Some(_)) if situation.planned.get(&revision.name).copied().unwrap_or(0) > 0 => RevisionPhase::Starting,
        (None, Some(_)) => RevisionPhase::Retired,
    };
    let mut status = situation.result(&revision.name).unwrap_or_default();
    status.phase = Some(phase);
    // A revision that is superseded before its artifact was made keeps what was last said of it.
    if revision.artifact.is_none() && !is_desired {
        status.conditions = old.conditions;
        return status;
    }
    let generation = observed.and_then(|observed| observed.metadata.generation).or(Some(1));
    let condition = |kind, status, reason, message: &str| situation.condition(&old.conditions, kind, status, reason, message, generation);
    let serves = revision.ready > 0;
    let available = condition(
        ConditionType::Available,
        serves,
        if serves { Reason::Serving } else { Reason::NoReadyReplica },
        &format!(
            "{} of {} replicas ready",
            revision.ready,
            situation.planned.get(&revision.name).copied().unwrap_or(0)
        ),
    );
    status.conditions = match (&failure, &revision.artifact) {
        (Some(trouble), _) => vec![
            condition(ConditionType::Optimized, false, trouble.reason, &trouble.message),
            condition(ConditionType::Stalled, true, trouble.reason, &trouble.message),
            available,
        ],
        (None, Some(artifact)) => vec![condition(ConditionType::Optimized, true, Reason::Optimized, artifact), available],
        (None, None) => {
            let standing = situation.standing();
            vec![
                condition(ConditionType::Optimized, false, standing.reason, &standing.message),
                available,
            ]
        }
    };
    status
}

/// What is news in `new`: a change of the reason, or the same reason for another revision.
#[must_use]
pub fn events(situation: &Situation, new: &ModelDeploymentStatus) -> Vec<Notice> {
    let Standing { reason, message, .. } = situation.standing();
    let is_news = situation.model.status.as_ref().is_none_or(|old| {
        let before = old
            .conditions
            .iter()
            .find(|condition| condition.type_ == ConditionType::Ready.to_string());
        before.is_none_or(|before| before.reason != reason.to_string()) || old.desired_revision != new.desired_revision
    });
    is_news.then_some(Notice { reason, message }).into_iter().collect()
}
