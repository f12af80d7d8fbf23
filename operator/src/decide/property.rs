//! Decisions over random histories: a small world in which plans come true and the rest happens in any order.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus};
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use plimsoll_crds::{ModelDeployment, ModelRevision, Rollout};
use plimsoll_package::digest::Digest;
use plimsoll_package::manifest::Engine;
use plimsoll_package::report::{Failure, FailureReason, Summary, Termination};
use proptest::prelude::*;
use serde_json::json;

use super::{Plan, decide};
use crate::build;
use crate::observe::{Lookup, Observed};
use crate::settings::Settings;

/// What may happen between two passes.
#[derive(Debug, Clone)]
enum Happening {
    SpecChanges(u8),
    ReplicasChange(i32),
    Pauses(bool),
    JobEnds(Option<FailureReason>),
    JobPodVanishes,
    PodGetsReady(usize),
    PodFails(usize),
    PodsGo(usize),
    TimePasses(i64),
    OperatorRestarts,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        2 => (0..4_u8).prop_map(Happening::SpecChanges),
        1 => (0..5_i32).prop_map(Happening::ReplicasChange),
        1 => any::<bool>().prop_map(Happening::Pauses),
        4 => Just(Happening::JobEnds(None)),
        1 => Just(Happening::JobEnds(Some(FailureReason::BudgetExceeded))),
        1 => Just(Happening::JobEnds(Some(FailureReason::SourceUnreachable))),
        1 => Just(Happening::JobPodVanishes),
        8 => (0..4_usize).prop_map(Happening::PodGetsReady),
        1 => (0..4_usize).prop_map(Happening::PodFails),
        4 => (0..4_usize).prop_map(Happening::PodsGo),
        1 => (1..400_i64).prop_map(Happening::TimePasses),
        1 => Just(Happening::OperatorRestarts),
    ]
}

struct World {
    model: ModelDeployment,
    observed: Observed,
    now: Timestamp,
    settings: Settings,
    uids: u32,
    jobs_made: Vec<String>,
}

fn summary(of: &str) -> Summary {
    Summary {
        artifact: Some(Digest::of(of.as_bytes())),
        reused: false,
        source_digest: Digest::of(b"source"),
        evaluation_digest: None,
        size_before: 1000,
        size_after: 300,
        size_layer_before: None,
        size_layer_after: None,
        sparsity: 0.5,
        metric: None,
        fidelity: Some(0.999),
        latency: None,
        engine: Engine::Tract,
        toolchain: "0.1.0".into(),
    }
}

impl World {
    fn new(rollout: Option<Rollout>) -> Self {
        let mut model: ModelDeployment = serde_json::from_value(json!({
            "apiVersion": "plimsoll.dev/v1alpha1", "kind": "ModelDeployment",
            "metadata": { "name": "m", "namespace": "n", "uid": "u", "generation": 1 },
            "spec": { "source": { "uri": "oci://r.example/m:v0" }, "replicas": 2 },
        }))
        .unwrap();
        model.spec.rollout = rollout;
        let now = "2026-01-01T12:00:00Z".parse().unwrap();
        Self {
            model,
            observed: Observed::default(),
            now,
            settings: Settings::fixture(),
            uids: 0,
            jobs_made: vec![],
        }
    }

    fn plan(&mut self) -> Plan {
        loop {
            let plan = decide(&self.model, &self.observed, &self.settings, self.now);
            match plan.lookup.clone() {
                // What a run published is in the registry though its pod is gone.
                Some(tag) => {
                    let found = Lookup::Found(Digest::of(tag.as_bytes()), Box::new(summary(&tag)));
                    self.observed.lookups.insert(tag, found);
                }
                None => return plan,
            }
        }
    }

    /// One pass: decides, and makes the plan true as `apply` does.
    fn pass(&mut self) -> Plan {
        let plan = self.plan();
        if let Some(revision) = &plan.revision {
            let mut revision = revision.clone();
            if revision.metadata.uid.is_none() {
                self.uids += 1;
                revision.metadata.uid = Some(format!("uid-{}", self.uids));
            }
            self.observed.revisions.retain(|other| other.name_any() != revision.name_any());
            self.observed.revisions.push(Arc::new(revision));
        }
        self.observed.jobs.retain(|job| !plan.delete_jobs.contains(&job.name_any()));
        self.observed.pods.retain(|pod| {
            !plan
                .delete_jobs
                .iter()
                .any(|job| pod.labels().get("batch.kubernetes.io/job-name") == Some(job))
        });
        if let Some(job_plan) = &plan.job {
            let job = build::job::job(job_plan, &self.settings);
            self.jobs_made.push(job.name_any());
            self.observed.jobs.push(Arc::new(job));
        }
        for (name, replicas) in &plan.replicas {
            let Some(artifact) = plan.artifacts.get(name) else { continue };
            let revision = self
                .observed
                .revisions
                .iter()
                .find(|revision| revision.name_any() == *name)
                .unwrap()
                .clone();
            match self.deployment(name) {
                Some(index) => edit(&mut self.observed.deployments[index], |deployment| {
                    deployment.spec.as_mut().unwrap().replicas = Some(*replicas)
                }),
                None => {
                    let mut deployment = build::deployment::deployment(&revision, artifact, *replicas, &self.settings);
                    deployment.status = Some(DeploymentStatus {
                        replicas: Some(*replicas),
                        ready_replicas: Some(0),
                        ..DeploymentStatus::default()
                    });
                    self.observed.deployments.push(Arc::new(deployment));
                }
            }
            // The Deployment's controller makes missing pods at once; surplus ones take their time to go, the unready first.
            let index = self.deployment(name).unwrap();
            edit(&mut self.observed.deployments[index], |deployment| {
                let status = deployment.status.as_mut().unwrap();
                status.replicas = Some(status.replicas.unwrap_or(0).max(*replicas));
                status.ready_replicas = Some(status.ready_replicas.unwrap_or(0).min(*replicas));
            });
        }
        for (name, status) in &plan.revision_status {
            if let Some(revision) = self.observed.revisions.iter_mut().find(|revision| revision.name_any() == *name) {
                edit(revision, |revision| revision.status = Some(status.clone()));
            }
        }
        self.observed
            .revisions
            .retain(|revision| !plan.delete_revisions.contains(&revision.name_any()));
        self.observed
            .deployments
            .retain(|deployment| !plan.delete_revisions.contains(&deployment.name_any()));
        self.model.status = Some(plan.status.clone());
        plan
    }

    fn deployment(&self, name: &str) -> Option<usize> {
        self.observed
            .deployments
            .iter()
            .position(|deployment| deployment.name_any() == name)
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::SpecChanges(version) => self.change(|model| model.spec.source.uri = format!("oci://r.example/m:v{version}")),
            Happening::ReplicasChange(replicas) => self.change(|model| model.spec.replicas = Some(replicas)),
            Happening::Pauses(paused) => self.change(|model| model.spec.paused = Some(paused)),
            Happening::JobEnds(failure) => self.end_job(failure),
            Happening::JobPodVanishes => self.observed.pods.clear(),
            Happening::PodGetsReady(index) => self.pods(index, |asked, ready, _| *ready = (*ready + 1).min(asked)),
            Happening::PodFails(index) => self.pods(index, |_, ready, _| *ready = (*ready - 1).max(0)),
            Happening::PodsGo(index) => self.pods(index, |asked, ready, pods| {
                *pods = asked;
                *ready = (*ready).min(asked);
            }),
            Happening::TimePasses(seconds) => self.now += SignedDuration::from_secs(seconds),
            Happening::OperatorRestarts => self.observed.lookups.clear(),
        }
    }

    fn change(&mut self, change: impl FnOnce(&mut ModelDeployment)) {
        change(&mut self.model);
        self.model.metadata.generation = self.model.metadata.generation.map(|generation| generation + 1);
    }

    fn end_job(&mut self, failure: Option<FailureReason>) {
        let running = |job: &&mut Arc<Job>| job.status.as_ref().is_none_or(|status| status.conditions.is_none());
        let now = self.now;
        let Some(job) = self.observed.jobs.iter_mut().find(running) else {
            return;
        };
        let name = job.name_any();
        let (condition, code, message) = match failure {
            None => ("Complete", 0, Termination::Succeeded(Box::new(summary(&name)))),
            Some(reason) => (
                "Failed",
                reason.exit_code(),
                Termination::Failed(Failure {
                    reason,
                    message: "it went wrong".into(),
                    measured: None,
                }),
            ),
        };
        edit(job, |job| {
            let condition = JobCondition {
                type_: condition.into(),
                status: "True".into(),
                last_transition_time: Some(Time(now)),
                ..JobCondition::default()
            };
            job.status = Some(JobStatus {
                conditions: Some(vec![condition]),
                ..JobStatus::default()
            });
        });
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": format!("{name}-pod"), "labels": { "batch.kubernetes.io/job-name": name } },
            "status": { "containerStatuses": [{ "name": "publish", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "terminated": { "exitCode": code, "message": message.to_message() } } }] },
        }))
        .unwrap();
        self.observed.pods.push(Arc::new(pod));
    }

    fn pods(&mut self, index: usize, change: impl FnOnce(i32, &mut i32, &mut i32)) {
        let Some(deployment) = self.observed.deployments.get_mut(index) else {
            return;
        };
        edit(deployment, |deployment| {
            let asked = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
            let status = deployment.status.as_mut().unwrap();
            let (mut ready, mut pods) = (status.ready_replicas.unwrap_or(0), status.replicas.unwrap_or(0));
            change(asked, &mut ready, &mut pods);
            status.ready_replicas = Some(ready);
            status.replicas = Some(pods);
        });
    }

    fn ready(&self) -> i32 {
        self.observed
            .deployments
            .iter()
            .filter_map(|deployment| deployment.status.as_ref()?.ready_replicas)
            .sum()
    }

    fn asked(&self) -> i32 {
        self.observed
            .deployments
            .iter()
            .filter_map(|deployment| deployment.spec.as_ref()?.replicas)
            .sum()
    }
}

fn edit<T: Clone>(shared: &mut Arc<T>, change: impl FnOnce(&mut T)) {
    change(Arc::make_mut(shared));
}

fn rollout() -> impl Strategy<Value = Option<Rollout>> {
    let number = |amount| Some(IntOrString::Int(amount));
    prop_oneof![
        Just(None),
        (0..3_i32, 0..3_i32)
            .prop_filter("both must not be 0", |(surge, unavailable)| surge + unavailable > 0)
            .prop_map(move |(surge, unavailable)| Some(Rollout {
                max_surge: number(surge),
                max_unavailable: number(unavailable),
                ..Rollout::default()
            })),
    ]
}

fn limits(rollout: Option<&Rollout>) -> (i32, i32) {
    let number = |amount: Option<&IntOrString>, default| match amount {
        Some(IntOrString::Int(amount)) => *amount,
        _ => default,
    };
    (
        number(rollout.and_then(|rollout| rollout.max_surge.as_ref()), 1),
        number(rollout.and_then(|rollout| rollout.max_unavailable.as_ref()), 0),
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_the_floor_the_ceiling_or_the_one_job_rule(rollout in rollout(), history in prop::collection::vec(happening(), 1..60)) {
        let (surge, unavailable) = limits(rollout.as_ref());
        let mut world = World::new(rollout);
        for happening in history {
            world.happen(happening);
            let (ready_before, asked_before) = (world.ready(), world.asked());
            world.pass();
            let desired = world.model.spec.replicas.unwrap_or(1);
            let kept: i32 = world.observed.deployments.iter().map(|deployment| {
                let status = deployment.status.as_ref().unwrap();
                status.ready_replicas.unwrap_or(0).min(deployment.spec.as_ref().unwrap().replicas.unwrap_or(0))
            }).sum();
            prop_assert!(kept >= ready_before.min(desired - unavailable), "ready pods fell from {} to {} of {}", ready_before, kept, desired);
            prop_assert!(world.asked() <= asked_before.max(desired + surge), "{} pods are asked for, {} allowed", world.asked(), desired + surge);
            if ready_before > 0 && desired > unavailable {
                prop_assert!(kept > 0, "the only ready revision was removed");
            }

            let unfinished = |revision: &str| world.observed.jobs.iter().filter(|job| {
                job.labels()["plimsoll.dev/revision-name"] == revision && job.status.as_ref().is_none_or(|status| status.conditions.is_none())
            }).count();
            for revision in &world.observed.revisions {
                prop_assert!(unfinished(&revision.name_any()) <= 1, "two Jobs work for {}", revision.name_any());
            }
            let made = world.jobs_made.len();
            let mut distinct = world.jobs_made.clone();
            distinct.sort();
            distinct.dedup();
            // A revision that fell out of the history and came back may be optimised again.
            prop_assert!(distinct.len() == made || world.uids > 4, "a Job was made twice for one hash: {:?}", world.jobs_made);

            // With nothing more happening, what the plan itself brought about settles at once, and then deciding again changes nothing.
            for _ in 0..3 {
                world.pass();
            }
            let again = world.plan();
            prop_assert_eq!(&again.revision, &None);
            prop_assert!(again.job.is_none(), "another Job: {:?}", again.job);
            prop_assert_eq!(&again.replicas, &world.observed.deployments.iter().map(|deployment| (deployment.name_any(), deployment.spec.as_ref().unwrap().replicas.unwrap())).collect());
            prop_assert_eq!(&again.events, &vec![]);
            prop_assert_eq!(&again.delete_revisions, &Vec::<String>::new());
        }
    }

    #[test]
    fn every_history_ends_served_once_the_world_behaves(history in prop::collection::vec(happening(), 1..40)) {
        let mut world = World::new(None);
        for happening in history {
            world.happen(happening);
            world.pass();
        }
        world.change(|model| {
            model.spec.paused = None;
            model.spec.replicas = Some(2);
            model.spec.source.uri = "oci://r.example/m:final".into();
        });
        for _ in 0..60 {
            world.pass();
            world.happen(Happening::JobEnds(None));
            for index in 0..world.observed.deployments.len() {
                world.happen(Happening::PodGetsReady(index));
                world.happen(Happening::PodsGo(index));
            }
        }
        let status = world.pass().status;
        let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
        prop_assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("True", "Serving"), "{}", ready.message);
        prop_assert_eq!(status.readiness.as_deref(), Some("2/2"));
    }
}

/// The revision that `model` asks for, by its name.
#[test]
fn an_undo_brings_the_older_revision_back_under_the_next_number() {
    let mut world = World::new(None);
    let serve = |world: &mut World| {
        for _ in 0..20 {
            world.pass();
            world.happen(Happening::JobEnds(None));
            for index in 0..world.observed.deployments.len() {
                world.happen(Happening::PodGetsReady(index));
                world.happen(Happening::PodsGo(index));
            }
        }
        world.pass().status
    };
    let first = serve(&mut world);
    world.happen(Happening::SpecChanges(1));
    let second = serve(&mut world);
    assert_eq!((first.revision, second.revision), (Some(1), Some(2)));
    world.happen(Happening::SpecChanges(0));
    let undone = serve(&mut world);
    assert_eq!(undone.revision, Some(3));
    assert_eq!(undone.serving_revision, first.serving_revision);
    assert_eq!(world.jobs_made.len(), 2, "an undo needs no Job");
    let revision: &ModelRevision = world
        .observed
        .revisions
        .iter()
        .find(|revision| Some(revision.name_any()) == undone.serving_revision)
        .unwrap();
    assert_eq!(revision.labels()["plimsoll.dev/revision"], "3");
}

#[test]
fn a_failed_successor_leaves_the_revision_in_service_alone_and_says_why() {
    let mut world = World::new(None);
    for _ in 0..10 {
        world.pass();
        world.happen(Happening::JobEnds(None));
        world.happen(Happening::PodGetsReady(0));
    }
    world.happen(Happening::SpecChanges(1));
    world.pass();
    world.happen(Happening::JobEnds(Some(FailureReason::BudgetExceeded)));
    let plan = world.pass();
    let condition = |kind: &str| plan.status.conditions.iter().find(|condition| condition.type_ == kind).unwrap();
    assert_eq!(
        (condition("Stalled").status.as_str(), condition("Stalled").reason.as_str()),
        ("True", "BudgetExceeded")
    );
    assert_eq!(condition("Ready").status, "False");
    assert_eq!(condition("Available").status, "True");
    assert_eq!(plan.status.readiness.as_deref(), Some("2/2"));
    assert_eq!(plan.status.revision, Some(1));
    // Hours later, the failed Job long gone, nothing is tried again.
    world.observed.jobs.clear();
    world.observed.pods.clear();
    world.happen(Happening::TimePasses(100_000));
    assert_eq!(world.pass().job, None);
}

#[test]
fn deployments_that_lie_about_their_status_do_not_empty_the_service() {
    let mut world = World::new(None);
    world.pass();
    world.happen(Happening::JobEnds(None));
    world.pass();
    let deployment: &mut Arc<Deployment> = &mut world.observed.deployments[0];
    edit(deployment, |deployment| deployment.status = None);
    assert_eq!(world.plan().replicas.values().sum::<i32>(), 2);
}

#[test]
fn a_rollout_that_makes_no_progress_is_stalled_at_its_deadline_and_ends_well_should_a_pod_get_ready() {
    let mut world = World::new(Some(Rollout {
        deadline: Some("2m".parse().unwrap()),
        ..Rollout::default()
    }));
    let ready = |plan: &Plan| {
        let ready = plan.status.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
        ready.reason.clone()
    };
    world.pass();
    // However long the Job takes, the rollout has not begun.
    world.happen(Happening::TimePasses(1000));
    world.happen(Happening::JobEnds(None));
    for _ in 0..3 {
        assert_eq!(ready(&world.pass()), "RollingOut");
    }
    world.happen(Happening::TimePasses(119));
    let waiting = world.pass();
    assert_eq!(ready(&waiting), "RollingOut");
    assert_eq!(waiting.requeue_after, Some(std::time::Duration::from_secs(1)));
    world.happen(Happening::TimePasses(1));
    let stalled = world.pass();
    assert_eq!(ready(&stalled), "ProgressDeadlineExceeded");
    assert_eq!(stalled.replicas, waiting.replicas, "what is asked for stays asked for");
    assert_eq!(stalled.requeue_after, None);
    world.happen(Happening::PodGetsReady(0));
    world.happen(Happening::PodGetsReady(0));
    assert_eq!(ready(&world.pass()), "Serving");
    // A new revision, hours later, begins anew.
    world.happen(Happening::TimePasses(10_000));
    world.happen(Happening::SpecChanges(1));
    world.pass();
    world.happen(Happening::JobEnds(None));
    assert_eq!(ready(&world.pass()), "RollingOut");
}
