//! The optimisation Job: one pod, a container for each step, all started together.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, Container, EmptyDirVolumeSource, EnvVar, PersistentVolumeClaimVolumeSource, PodSpec, PodTemplateSpec,
    ResourceRequirements, SecretVolumeSource, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use plimsoll_crds::{JobSettings, ModelRevision, Resources};
use plimsoll_package::recipe::{Dataset, INPUTS_ENV, Optimization};
use plimsoll_package::report::exit_code;

use super::metadata::{Component, metadata, revision_labels};
use super::pull_secrets::pull_secrets;
use super::security;
use crate::decide::JobPlan;
use crate::decide::optimization::{ATTEMPT_LABEL, deadline, inputs};
use crate::settings::Settings;

/// The steps in their order; each is a container of this name.
pub const STEPS: [&str; 5] = ["fetch", "convert", "compress", "evaluate", "publish"];

/// How long a finished Job stays for its logs, in seconds.
const KEPT_S: i32 = 3600;
/// Tries of a Job's pod where the spec does not say.
const BACKOFF_LIMIT: i32 = 3;

/// The Job that `plan` asks for.
#[must_use]
pub fn job(plan: &JobPlan, settings: &Settings) -> Job {
    let revision = &plan.revision;
    let job_settings = revision
        .spec
        .template
        .optimize
        .as_ref()
        .and_then(|optimize| optimize.job.clone())
        .unwrap_or_default();
    let labels = revision_labels(revision, Component::Optimizer);
    let mut job_labels = labels.clone();
    job_labels.insert(ATTEMPT_LABEL.into(), plan.attempt.to_string());
    let deadline_s = i64::try_from(deadline(&revision.spec.template).as_secs()).unwrap_or(i64::MAX);
    let mounts = Mounts::of(revision, settings);
    Job {
        metadata: metadata(plan.name.clone(), revision, job_labels),
        spec: Some(JobSpec {
            active_deadline_seconds: Some(deadline_s.max(1)),
            backoff_limit: Some(job_settings.backoff_limit.unwrap_or(BACKOFF_LIMIT)),
            ttl_seconds_after_finished: Some(KEPT_S),
            pod_replacement_policy: Some("Failed".into()),
            pod_failure_policy: Some(failure_policy()),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels),
                    ..ObjectMeta::default()
                }),
                spec: Some(PodSpec {
                    restart_policy: Some("Never".into()),
                    automount_service_account_token: Some(false),
                    enable_service_links: Some(false),
                    security_context: Some(security::pod()),
                    image_pull_secrets: pull_secrets(settings, None),
                    termination_grace_period_seconds: Some(5),
                    containers: STEPS
                        .iter()
                        .map(|step| container(step, revision, &job_settings, &mounts, settings))
                        .collect(),
                    volumes: Some(mounts.volumes),
                    ..PodSpec::default()
                }),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

fn failure_policy() -> PodFailurePolicy {
    let codes = [exit_code::USAGE, exit_code::BUDGET_EXCEEDED, exit_code::UNUSABLE].map(i32::from);
    PodFailurePolicy {
        rules: vec![
            PodFailurePolicyRule {
                action: "FailJob".into(),
                on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
                    operator: "In".into(),
                    values: codes.to_vec(),
                    ..Default::default()
                }),
                ..PodFailurePolicyRule::default()
            },
            // An eviction or a drained node is nobody's fault and counts as no try.
            PodFailurePolicyRule {
                action: "Ignore".into(),
                on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
                    type_: "DisruptionTarget".into(),
                    status: Some("True".into()),
                }]),
                ..PodFailurePolicyRule::default()
            },
        ],
    }
}

fn container(step: &str, revision: &ModelRevision, job: &JobSettings, mounts: &Mounts, settings: &Settings) -> Container {
    let mut env = vec![EnvVar {
        name: INPUTS_ENV.into(),
        value: Some(serde_json::to_string(&inputs(revision, settings)).expect("a tree of strings and numbers serialises")),
        ..EnvVar::default()
    }];
    if settings.extra_ca_config_map.is_some() {
        env.push(EnvVar {
            name: "PLIMSOLL_EXTRA_CA".into(),
            value: Some("/extra-ca/ca.crt".into()),
            ..EnvVar::default()
        });
    }
    Container {
        name: step.into(),
        image: Some(revision.spec.optimizer_image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        args: Some(["step", step, "--work", "/work"].map(Into::into).into()),
        env: Some(env),
        resources: Some(resources(step, job.resources.as_ref())),
        security_context: Some(security::container()),
        termination_message_policy: Some("File".into()),
        volume_mounts: Some(mounts.of_step(step)),
        ..Container::default()
    }
}

/// The steps run one after the other, so what compressing requests is enough for the pod; the others ask for next to nothing and share
/// its limits.
fn resources(step: &str, asked: Option<&Resources>) -> ResourceRequirements {
    let quantities =
        |amounts: &BTreeMap<String, plimsoll_crds::Amount>| amounts.iter().map(|(name, amount)| (name.clone(), amount.into())).collect();
    let plain = |amounts: &[(&str, &str)]| {
        amounts
            .iter()
            .map(|(name, amount)| ((*name).to_owned(), Quantity((*amount).to_owned())))
            .collect()
    };
    let requests = match asked.map(|asked| &asked.requests).filter(|requests| !requests.is_empty()) {
        _ if step != "compress" => plain(&[("cpu", "10m"), ("memory", "32Mi")]),
        Some(requests) => quantities(requests),
        None => plain(&[("cpu", "250m"), ("memory", "256Mi")]),
    };
    let limits = asked
        .map(|asked| quantities(&asked.limits))
        .filter(|limits: &BTreeMap<_, _>| !limits.is_empty());
    ResourceRequirements {
        requests: Some(requests),
        limits,
        ..ResourceRequirements::default()
    }
}

/// The volumes of the pod, and which step mounts which of them where: credentials only where they are used.
struct Mounts {
    volumes: Vec<Volume>,
    of_fetch: Vec<VolumeMount>,
    of_publish: Vec<VolumeMount>,
    of_all: Vec<VolumeMount>,
}

impl Mounts {
    fn of(revision: &ModelRevision, settings: &Settings) -> Self {
        let template = &revision.spec.template;
        let optimization = template.optimize.as_ref().map(|optimize| &optimize.optimization);
        let datasets: Vec<(String, &Dataset)> = optimization.into_iter().flat_map(Optimization::datasets).collect();
        let mut mounts = Self {
            volumes: vec![],
            of_fetch: vec![],
            of_publish: vec![],
            of_all: vec![],
        };

        mounts.volumes.push(Volume {
            name: "work".into(),
            empty_dir: Some(EmptyDirVolumeSource::default()),
            ..Volume::default()
        });
        mounts.of_all.push(mount("work", "/work", false));
        if let Some(name) = &settings.extra_ca_config_map {
            let config_map = Some(ConfigMapVolumeSource {
                name: name.clone(),
                ..ConfigMapVolumeSource::default()
            });
            mounts.volumes.push(Volume {
                name: "extra-ca".into(),
                config_map,
                ..Volume::default()
            });
            mounts.of_all.push(mount("extra-ca", "/extra-ca", true));
        }
        if let Some(secret) = &settings.registry_push_secret {
            mounts.volumes.push(secret_volume("registry", secret));
            mounts.of_fetch.push(mount("registry", "/secrets/registry", true));
            mounts.of_publish.push(mount("registry", "/secrets/registry", true));
        }
        let of_source = ("source", template.source.credentials_secret.as_ref());
        let of_datasets = datasets
            .iter()
            .map(|(name, dataset)| (name.as_str(), dataset.credentials_secret.as_ref()));
        for (name, secret) in [of_source].into_iter().chain(of_datasets) {
            if let Some(secret) = secret {
                mounts.volumes.push(secret_volume(name, secret));
                mounts.of_fetch.push(mount(name, &format!("/secrets/{name}"), true));
            }
        }
        let uris = datasets.iter().map(|(_, dataset)| dataset.uri.as_str());
        let mut claims: Vec<&str> = uris.chain([template.source.uri.as_str()]).filter_map(claim).collect();
        claims.sort_unstable();
        claims.dedup();
        for (index, claim) in claims.into_iter().enumerate() {
            let name = format!("claim-{index}");
            let source = PersistentVolumeClaimVolumeSource {
                claim_name: claim.into(),
                read_only: Some(true),
            };
            mounts.volumes.push(Volume {
                name: name.clone(),
                persistent_volume_claim: Some(source),
                ..Volume::default()
            });
            mounts.of_fetch.push(mount(&name, &format!("/pvc/{claim}"), true));
        }
        mounts
    }

    fn of_step(&self, step: &str) -> Vec<VolumeMount> {
        let own = match step {
            "fetch" => &self.of_fetch[..],
            "publish" => &self.of_publish[..],
            _ => &[],
        };
        self.of_all.iter().chain(own).cloned().collect()
    }
}

fn claim(uri: &str) -> Option<&str> {
    uri.strip_prefix("pvc://")?.split('/').next()
}

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

fn secret_volume(name: &str, secret: &str) -> Volume {
    let secret = Some(SecretVolumeSource {
        secret_name: Some(secret.into()),
        ..SecretVolumeSource::default()
    });
    Volume {
        name: name.into(),
        secret,
        ..Volume::default()
    }
}
