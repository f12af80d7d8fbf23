//! Decisions over random histories: a small world in which plans come true and the rest happens in any order.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus};
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use plimsoll_crds::{ModelDeployment, ModelRevision, REVISION_NAME_LABEL, RevisionPhase, Rollout};
use plimsoll_package::digest::Digest;
use plimsoll_package::key::{ArtifactKey, Contents};
use plimsoll_package::manifest::Engine;
use plimsoll_package::report::{Failure, FailureReason, Summary, Termination};
use proptest::prelude::*;
use serde_json::json;

use super::{JobPlan, Plan, decide, optimization};
use crate::build;
use crate::observe::{Lookup, Observed};
use crate::settings::Settings;

/// How long a finished Job stays, in seconds.
const JOB_KEPT_S: i64 = 3600;

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
        1 => Just(Happening::TimePasses(JOB_KEPT_S)),
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
    /// What was published, by tag.
    registry: BTreeMap<String, Digest>,
}

fn is_finished(job: &Job) -> bool {
    job.status.as_ref().is_some_and(|status| status.conditions.is_some())
}

fn summary(artifact: &Digest) -> Summary {
    Summary {
        artifact: Some(artifact.clone()),
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
            registry: BTreeMap::new(),
        }
    }

    fn plan(&mut self) -> Plan {
        loop {
            let plan = decide(&self.model, &self.observed, &self.settings, self.now);
            let Some(tag) = plan.lookup.clone() else {
                // That something is absent is not remembered.
                self.observed.lookups.retain(|_, lookup| *lookup != Lookup::Absent);
                return plan;
            };
            let found = |digest: &Digest| Lookup::Found(digest.clone(), Box::new(summary(digest)));
            let answer = self.registry.get(&tag).map_or(Lookup::Absent, found);
            assert_eq!(self.observed.lookups.insert(tag.clone(), answer), None, "{tag} is asked for twice");
        }
    }

    fn revision(&self, name: &str) -> Option<&ModelRevision> {
        self.observed
            .revisions
            .iter()
            .find(|revision| revision.name_any() == name)
            .map(AsRef::as_ref)
    }

    /// The tags under which a Job for `revision` publishes: of the run, and of the contents where these are pinned.
    fn tags(&self, revision: &ModelRevision) -> Vec<String> {
        let inputs = optimization::inputs(revision, &self.settings);
        let key = Contents::pinned(&inputs).map(|contents| ArtifactKey::new(&inputs, &contents).as_str().to_owned());
        inputs.run_tag.into_iter().chain(key).collect()
    }

    /// Makes the Job that a plan asks for; never a second one.
    fn make_job(&mut self, plan: &JobPlan) {
        let name = plan.revision.name_any();
        let revision = self.revision(&name).expect("the revision is written first").clone();
        for job in self.observed.jobs.iter().filter(|job| job.labels()[REVISION_NAME_LABEL] == name) {
            assert!(
                job.name_any() != plan.name && is_finished(job),
                "{} works for {name} already",
                job.name_any()
            );
        }
        let status = revision.status.clone().unwrap_or_default();
        assert_eq!(status.artifact, None, "{name} has its artifact");
        assert_ne!(status.phase, Some(RevisionPhase::Failed), "{name} failed for good");
        for tag in self.tags(&revision) {
            assert!(!self.registry.contains_key(&tag), "{name} was optimised, and is found by {tag}");
        }
        let job = build::job::job(&JobPlan { revision, ..plan.clone() }, &self.settings);
        self.jobs_made.push(job.name_any());
        self.observed.jobs.push(Arc::new(job));
    }

    /// Deletes Jobs, and with them their pods.
    fn delete_jobs(&mut self, goes: impl Fn(&Job) -> bool) {
        let (gone, kept): (Vec<Arc<Job>>, _) = std::mem::take(&mut self.observed.jobs).into_iter().partition(|job| goes(job));
        self.observed.jobs = kept;
        let gone: Vec<String> = gone.iter().map(|job| job.name_any()).collect();
        self.observed
            .pods
            .retain(|pod| !gone.contains(&pod.labels()["batch.kubernetes.io/job-name"]));
    }

    /// Deletes a revision, and with it what it owns; never one that is asked for or serves.
    fn delete_revision(&mut self, name: &str, plan: &Plan) {
        assert_ne!(
            plan.status.desired_revision.as_deref(),
            Some(name),
            "the revision that is asked for was deleted"
        );
        if let Some(index) = self.deployment(name) {
            let deployment = &self.observed.deployments[index];
            let status = deployment.status.as_ref().unwrap();
            let pods = [deployment.spec.as_ref().unwrap().replicas, status.replicas, status.ready_replicas];
            assert!(
                pods.iter().all(|pods| pods.unwrap_or(0) == 0),
                "{name} was deleted, with pods: {pods:?}"
            );
        }
        self.observed.revisions.retain(|revision| revision.name_any() != name);
        self.observed.deployments.retain(|deployment| deployment.name_any() != name);
        self.delete_jobs(|job| job.labels()[REVISION_NAME_LABEL] == name);
    }

    /// What applying `plan` would still write.
    fn unmet(&self, plan: &Plan) -> Vec<String> {
        let Plan {
            revision,
            lookup,
            job,
            delete_jobs,
            replicas,
            artifacts,
            delete_revisions,
            revision_status,
            status,
            events,
            requeue_after: _,
        } = plan;
        let mut unmet: Vec<String> = vec![];
        unmet.extend(revision.iter().map(|revision| format!("revision {}", revision.name_any())));
        unmet.extend(lookup.iter().map(|tag| format!("lookup of {tag}")));
        unmet.extend(job.iter().map(|job| format!("Job {}", job.name)));
        unmet.extend(delete_jobs.iter().map(|name| format!("no Job {name}")));
        unmet.extend(delete_revisions.iter().map(|name| format!("no revision {name}")));
        unmet.extend(events.iter().map(|event| format!("Event {}: {}", event.reason, event.message)));
        for (name, replicas) in replicas {
            let live = self
                .deployment(name)
                .and_then(|index| self.observed.deployments[index].spec.as_ref()?.replicas);
            if live != Some(*replicas) && artifacts.contains_key(name) {
                unmet.push(format!("{replicas} replicas of {name}, which has {live:?}"));
            }
        }
        for (name, artifact) in artifacts {
            let recorded = self.revision(name).and_then(|revision| revision.status.as_ref()?.artifact.clone());
            if recorded.as_ref() != Some(artifact) {
                unmet.push(format!("artifact {artifact} of {name}, which has {recorded:?}"));
            }
        }
        for (name, status) in revision_status {
            let live = self.revision(name).and_then(|revision| revision.status.as_ref());
            if live != Some(status) {
                unmet.push(format!("status of {name}: {live:?} -> {status:?}"));
            }
        }
        if self.model.status.as_ref() != Some(status) {
            unmet.push(format!("status: {:?} -> {status:?}", self.model.status));
        }
        unmet
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
        if let Some(job) = &plan.job {
            self.make_job(job);
        }
        self.delete_jobs(|job| plan.delete_jobs.contains(&job.name_any()));
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
        for name in &plan.delete_revisions {
            self.delete_revision(name, &plan);
        }
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
            // Every other version is pinned.
            Happening::SpecChanges(version) => self.change(|model| {
                model.spec.source.uri = format!("oci://r.example/m:v{version}");
                model.spec.source.digest = (version % 2 == 1).then(|| Digest::of(&[version]));
            }),
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
            Happening::TimePasses(seconds) => self.pass_time(SignedDuration::from_secs(seconds)),
            Happening::OperatorRestarts => self.observed.lookups.clear(),
        }
    }

    fn change(&mut self, change: impl FnOnce(&mut ModelDeployment)) {
        change(&mut self.model);
        self.model.metadata.generation = self.model.metadata.generation.map(|generation| generation + 1);
    }

    fn pass_time(&mut self, time: SignedDuration) {
        self.now += time;
        let forgotten = self.now - SignedDuration::from_secs(JOB_KEPT_S);
        self.delete_jobs(|job| {
            let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
            conditions
                .filter_map(|condition| condition.last_transition_time.as_ref())
                .any(|ended| ended.0 <= forgotten)
        });
    }

    fn end_job(&mut self, failure: Option<FailureReason>) {
        let now = self.now;
        let Some(index) = self.observed.jobs.iter().position(|job| !is_finished(job)) else {
            return;
        };
        let name = self.observed.jobs[index].name_any();
        let artifact = Digest::of(name.as_bytes());
        if failure.is_none() {
            let revision = self.revision(&self.observed.jobs[index].labels()[REVISION_NAME_LABEL]).unwrap();
            let tags = self.tags(revision);
            self.registry.extend(tags.into_iter().map(|tag| (tag, artifact.clone())));
        }
        let job = &mut self.observed.jobs[index];
        let (condition, code, message) = match failure {
            None => ("Complete", 0, Termination::Succeeded(Box::new(summary(&artifact)))),
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
    fn no_history_breaks_the_floor_the_ceiling_or_the_one_job_rule(
        rollout in rollout(), limit in 0..4_i32, history in prop::collection::vec(happening(), 1..60)
    ) {
        let (surge, unavailable) = limits(rollout.as_ref());
        let mut world = World::new(rollout);
        world.model.spec.revision_history_limit = Some(limit);
        for happening in history {
            world.happen(happening);
            let (ready_before, asked_before) = (world.ready(), world.asked());
            // Making a second Job for a hash, or deleting a revision that is in use, fails in here.
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

            // With nothing more happening, what the plan itself brought about settles at once, and then deciding again changes nothing.
            for _ in 0..3 {
                world.pass();
            }
            let again = world.plan();
            prop_assert_eq!(world.unmet(&again), Vec::<String>::new());
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
