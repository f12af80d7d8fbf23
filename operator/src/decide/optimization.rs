//! Where the optimisation of a revision stands: read off its status, its Job, the Job's pods and the registry's answers.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod};
use kube::ResourceExt as _;
use plimsoll_crds::{ConditionType, MODEL_LABEL, ModelRevision, REVISION_NAME_LABEL, RevisionPhase, RevisionTemplate};
use plimsoll_package::key::{ArtifactKey, Contents};
use plimsoll_package::recipe::{Inputs, Optimization as Recipe};
use plimsoll_package::report::{FailureReason, Summary, Termination, exit_code};

use super::reason::Reason;
use crate::observe::{Lookup, Observed};
use crate::settings::Settings;

/// The label of a Job that counts the Jobs for the same revision that failed before it.
pub const ATTEMPT_LABEL: &str = "plimsoll.dev/attempt";

/// Longest wait between two Jobs of a revision.
const BACKOFF_MAX: SignedDuration = SignedDuration::from_secs(300);
/// Wait after the first failed Job of a revision.
const BACKOFF_MIN: SignedDuration = SignedDuration::from_secs(10);

/// Longest run of a Job where the spec does not say.
const DEADLINE: Duration = Duration::from_secs(3600);

/// Where the optimisation of a revision stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Optimization {
    /// The registry has to be asked for this tag first.
    Lookup {
        /// The tag.
        tag: String,
    },
    /// A Job has to be started.
    Start {
        /// How many failed before it.
        attempt: u32,
    },
    /// A Job is under way.
    Running {
        /// Its name.
        job: String,
        /// Why its pod does not get on, where it does not.
        trouble: Option<Trouble>,
    },
    /// A Job failed in a way that may pass; the next one waits.
    Waiting {
        /// Why.
        trouble: Trouble,
        /// Until when.
        until: Timestamp,
    },
    /// It failed, and trying again would not help.
    Failed(Trouble),
    /// The artifact is there.
    Done {
        /// Its digest.
        artifact: String,
        /// What was measured; `None` where status already says it.
        summary: Option<Box<Summary>>,
    },
}

/// Why an optimisation does not get on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The condition's reason.
    pub reason: Reason,
    /// What happened, for people.
    pub message: String,
}

/// The name of a revision's Job after `attempt` failed ones.
#[must_use]
pub fn job_name(revision: &ModelRevision, attempt: u32) -> String {
    let name = revision.name_any();
    if attempt == 0 {
        format!("{name}-optimize")
    } else {
        format!("{name}-optimize-{attempt}")
    }
}

/// The Jobs of a revision, the latest last.
fn jobs_of<'a>(revision: &ModelRevision, observed: &'a Observed) -> Vec<&'a Job> {
    let name = revision.name_any();
    let of_revision = |job: &&std::sync::Arc<Job>| job.labels().get(REVISION_NAME_LABEL) == Some(&name);
    let mut jobs: Vec<&Job> = observed.jobs.iter().filter(of_revision).map(AsRef::as_ref).collect();
    jobs.sort_by_key(|job| attempt(job));
    jobs
}

/// The Jobs of a revision that a later one replaced.
#[must_use]
pub fn superseded(revision: &ModelRevision, observed: &Observed) -> Vec<String> {
    let jobs = jobs_of(revision, observed);
    jobs[..jobs.len().saturating_sub(1)].iter().map(|job| job.name_any()).collect()
}

fn attempt(job: &Job) -> u32 {
    job.labels()
        .get(ATTEMPT_LABEL)
        .and_then(|attempt| attempt.parse().ok())
        .unwrap_or(0)
}

/// Longest run of a Job.
#[must_use]
pub fn deadline(template: &RevisionTemplate) -> Duration {
    let job = template.optimize.as_ref().and_then(|optimize| optimize.job.as_ref());
    let deadline = job.and_then(|job| job.deadline.as_ref());
    deadline.and_then(|deadline| deadline.value().ok()).unwrap_or(DEADLINE)
}

/// What the steps of a revision's Job are told.
#[must_use]
pub fn inputs(revision: &ModelRevision, settings: &Settings) -> Inputs {
    let template = &revision.spec.template;
    let mut optimize = template
        .optimize
        .as_ref()
        .map_or_else(Recipe::default, |optimize| optimize.optimization.clone());
    // Names of secrets mean nothing inside of the Job, where the credentials are mounted.
    for dataset in optimize.datasets_mut() {
        dataset.credentials_secret = None;
    }
    // What the search leaves of the Job's time is for the other steps.
    if let Some(search) = &mut optimize.search
        && search.max_duration.is_none()
    {
        let half_s = (deadline(template).as_secs() / 2).clamp(1, 999_999);
        search.max_duration = format!("{half_s}s").parse().ok();
    }
    Inputs {
        source: template.source.location(),
        optimize,
        teacher: None,
        engine: template.runtime.as_ref().and_then(|runtime| runtime.engine?.settled()),
        toolchain: revision.spec.toolchain.clone(),
        repository: settings.registry_push.clone(),
        max_fetch_size: settings.max_fetch_size.clone(),
        plain_http_hosts: settings.plain_http_hosts.clone(),
        annotations: [(
            "dev.plimsoll.model".to_owned(),
            revision.labels().get(MODEL_LABEL).cloned().unwrap_or_default(),
        )]
        .into(),
        no_gate: false,
        run_tag: revision.uid().map(|uid| format!("run-{uid}")),
    }
}

/// Where the optimisation of `revision` stands.
#[must_use]
pub fn optimization(revision: &ModelRevision, observed: &Observed, settings: &Settings, now: Timestamp) -> Optimization {
    if let Some(recorded) = recorded(revision) {
        return recorded;
    }
    let inputs = inputs(revision, settings);
    match jobs_of(revision, observed).last() {
        Some(job) => of_job(job, observed, inputs.run_tag.as_deref(), now),
        None => {
            let start = Optimization::Start { attempt: 0 };
            match Contents::pinned(&inputs).map(|contents| ArtifactKey::new(&inputs, &contents)) {
                Some(key) => looked_up(key.as_str(), observed, start),
                None => published_by_a_run(inputs.run_tag.as_deref(), observed, start),
            }
        }
    }
}

/// What status recorded, once and for all: the artifact, or a failure that trying again would not mend.
fn recorded(revision: &ModelRevision) -> Option<Optimization> {
    let status = revision.status.as_ref()?;
    if let Some(artifact) = &status.artifact {
        return Some(Optimization::Done {
            artifact: artifact.clone(),
            summary: None,
        });
    }
    let stalled = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == ConditionType::Stalled.to_string() && condition.status == "True")?;
    // What an older or newer version found, and this one has no name for, is looked into again.
    let reason = stalled.reason.parse().ok()?;
    (status.phase == Some(RevisionPhase::Failed)).then(|| {
        Optimization::Failed(Trouble {
            reason,
            message: stalled.message.clone(),
        })
    })
}

fn looked_up(tag: &str, observed: &Observed, absent: Optimization) -> Optimization {
    match observed.lookups.get(tag) {
        None => Optimization::Lookup { tag: tag.to_owned() },
        Some(Lookup::Absent) => absent,
        Some(Lookup::Found(digest, summary)) => Optimization::Done {
            artifact: digest.to_string(),
            summary: Some(reused(summary.clone())),
        },
    }
}

/// What a Job of this very revision published that is gone, or whose pod is gone and its message with it: it is found by the run's tag.
fn published_by_a_run(run_tag: Option<&str>, observed: &Observed, absent: Optimization) -> Optimization {
    let Some(tag) = run_tag else { return absent };
    match looked_up(tag, observed, absent) {
        Optimization::Done { artifact, summary } => Optimization::Done {
            artifact,
            summary: summary.map(|mut summary| {
                summary.reused = false;
                summary
            }),
        },
        other => other,
    }
}

fn reused(mut summary: Box<Summary>) -> Box<Summary> {
    summary.reused = true;
    summary
}

fn of_job(job: &Job, observed: &Observed, run_tag: Option<&str>, now: Timestamp) -> Optimization {
    let name = job.name_any();
    let attempt = attempt(job);
    let pods: Vec<&Pod> = observed
        .pods
        .iter()
        .filter(|pod| pod.labels().get("batch.kubernetes.io/job-name").is_some_and(|owner| *owner == name))
        .map(AsRef::as_ref)
        .collect();
    if let Some((artifact, summary)) = pods.iter().rev().find_map(|pod| published(pod)) {
        return Optimization::Done {
            artifact,
            summary: Some(summary),
        };
    }
    let trouble = pods.iter().rev().find_map(|pod| failure(pod));
    // What trying again would not mend is said at once, without waiting for the Job's own bookkeeping.
    if let Some((trouble, false)) = trouble {
        return Optimization::Failed(trouble);
    }
    if let Some(failed) = condition(job, "Failed") {
        if failed.reason.as_deref() == Some("DeadlineExceeded") {
            return Optimization::Failed(Trouble {
                reason: Reason::DeadlineExceeded,
                message: format!("the Job {name} took longer than spec.optimize.job.deadline; allow it more time"),
            });
        }
        let (trouble, transient) = trouble.unwrap_or_else(|| {
            let message = failed.message.clone().unwrap_or_else(|| "it does not say why".into());
            (
                Trouble {
                    reason: Reason::Failed(FailureReason::Interrupted),
                    message: format!("the Job {name} failed: {message}"),
                },
                true,
            )
        });
        if !transient {
            return Optimization::Failed(trouble);
        }
        let since = failed.last_transition_time.as_ref().map_or(now, |time| time.0);
        let until = since + backoff(&name, attempt);
        return if until > now {
            Optimization::Waiting { trouble, until }
        } else {
            Optimization::Start { attempt: attempt + 1 }
        };
    }
    if condition(job, "Complete").is_some() {
        return published_by_a_run(run_tag, observed, Optimization::Start { attempt: attempt + 1 });
    }
    let trouble = trouble
        .map(|(trouble, _)| trouble)
        .or_else(|| pods.last().and_then(|pod| waiting(pod)));
    Optimization::Running { job: name, trouble }
}

fn condition<'a>(job: &'a Job, kind: &str) -> Option<&'a k8s_openapi::api::batch::v1::JobCondition> {
    job.status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| condition.type_ == kind && condition.status == "True")
}

/// Grows with each attempt, is capped, and differs between Jobs so that many do not come back at once.
fn backoff(name: &str, attempt: u32) -> SignedDuration {
    let grown = BACKOFF_MIN.checked_mul(1 << attempt.min(8)).unwrap_or(BACKOFF_MAX).min(BACKOFF_MAX);
    let spread: u32 = name
        .bytes()
        .fold(attempt, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
        % 40;
    grown * (80 + i32::try_from(spread).unwrap_or(0)) / 100
}

fn terminated(pod: &Pod) -> impl Iterator<Item = (&str, &ContainerStateTerminated)> {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    statuses.filter_map(|status| Some((status.name.as_str(), status.state.as_ref()?.terminated.as_ref()?)))
}

fn published(pod: &Pod) -> Option<(String, Box<Summary>)> {
    terminated(pod).find_map(|(_, state)| match serde_json::from_str(state.message.as_deref()?).ok()? {
        Termination::Succeeded(summary) if state.exit_code == i32::from(exit_code::DONE) => {
            Some((summary.artifact.clone()?.to_string(), summary))
        }
        _ => None,
    })
}

/// The failure of a pod, and whether it may pass.
fn failure(pod: &Pod) -> Option<(Trouble, bool)> {
    let failed = |state: &ContainerStateTerminated| state.exit_code != 0 && state.exit_code != i32::from(exit_code::EARLIER_STEP_FAILED);
    let (step, state) = terminated(pod).find(|(_, state)| failed(state))?;
    if let Some(Ok(Termination::Failed(failure))) = state.message.as_deref().map(serde_json::from_str) {
        return Some((
            Trouble {
                reason: Reason::Failed(failure.reason),
                message: failure.message,
            },
            failure.reason.is_transient(),
        ));
    }
    let end = match state.reason.as_deref() {
        Some("OOMKilled") => "ran out of memory; raise spec.optimize.job.resources.limits.memory".to_owned(),
        _ => format!(
            "ended with exit code {}; see kubectl logs {} -c {step}",
            state.exit_code,
            pod.name_any()
        ),
    };
    Some((
        Trouble {
            reason: Reason::Failed(FailureReason::Interrupted),
            message: format!("step {step} {end}"),
        },
        true,
    ))
}

/// Why a pod does not start.
#[must_use]
pub fn waiting(pod: &Pod) -> Option<Trouble> {
    let status = pod.status.as_ref()?;
    let unschedulable = status.conditions.iter().flatten().find(|condition| {
        condition.type_ == "PodScheduled" && condition.status == "False" && condition.reason.as_deref() == Some("Unschedulable")
    });
    if let Some(condition) = unschedulable {
        let message = condition.message.clone().unwrap_or_default();
        return Some(Trouble {
            reason: Reason::Unschedulable,
            message: format!("pod {}: {message}", pod.name_any()),
        });
    }
    let containers = status
        .init_container_statuses
        .iter()
        .flatten()
        .chain(status.container_statuses.iter().flatten());
    containers
        .filter_map(|container| Some((&container.name, container.state.as_ref()?.waiting.as_ref()?)))
        .find_map(|(name, waiting)| {
            let reason = waiting.reason.as_deref()?;
            let reason = match reason {
                "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" | "RegistryUnavailable" => {
                    Reason::ImageUnavailable
                }
                "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => Reason::ContainerNotCreated,
                "CrashLoopBackOff" => Reason::RuntimeFailed,
                _ => return None,
            };
            Some(Trouble {
                reason,
                message: format!(
                    "pod {}, container {name}: {}",
                    pod.name_any(),
                    waiting.message.as_deref().unwrap_or("no message")
                ),
            })
        })
}
