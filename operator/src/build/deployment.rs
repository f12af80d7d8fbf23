//! The Deployment of a revision: pods that mount its artifact and serve it.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{
    Container, ContainerPort, EmptyDirVolumeSource, EnvVar, HTTPGetAction, ImageVolumeSource, PodSpec, PodTemplateSpec, Probe,
    ResourceRequirements, SecretVolumeSource, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use plimsoll_crds::{Accelerator, EngineChoice, ModelRevision, Runtime};

use super::metadata::{Component, metadata, model_name, revision_labels};
use super::pull_secrets::pull_secrets;
use super::security;
use crate::settings::Settings;

/// The port of the Open Inference Protocol.
pub const HTTP_PORT: i32 = 8080;
/// The port of the protocol over gRPC.
pub const GRPC_PORT: i32 = 8081;
/// The port of the metrics.
pub const METRICS_PORT: i32 = 8082;
/// Where the artifact is mounted; its layers hold `model/`.
const ARTIFACT: &str = "/artifact";

/// The Deployment of `revision`, serving the artifact of digest `artifact` on `replicas` pods.
#[must_use]
pub fn deployment(revision: &ModelRevision, artifact: &str, replicas: i32, settings: &Settings) -> Deployment {
    let runtime = revision.spec.template.runtime.clone().unwrap_or_default();
    let overlay = runtime.pod.clone().unwrap_or_default();
    let accelerator = revision.spec.template.accelerator.as_ref();
    let labels = revision_labels(revision, Component::Runtime);
    let mut pod_labels: BTreeMap<String, String> = overlay.labels.iter().map(|(key, value)| (key.clone(), value.0.clone())).collect();
    pod_labels.extend(labels.clone());
    let selector = LabelSelector {
        match_labels: Some([(plimsoll_crds::REVISION_NAME_LABEL.to_owned(), revision.name_any())].into()),
        ..LabelSelector::default()
    };
    let reference = format!("{}@{artifact}", settings.registry_pull);
    let mut tolerations = overlay.tolerations.clone();
    tolerations.extend(accelerator.and_then(toleration));

    let mut volumes = vec![artifact_volume(&reference, settings)];
    let mut init_containers = None;
    if !settings.image_volumes {
        init_containers = Some(vec![pull(revision, &reference, settings)]);
        if let Some(secret) = &settings.registry_pull_secret {
            let secret = Some(SecretVolumeSource {
                secret_name: Some(secret.clone()),
                ..SecretVolumeSource::default()
            });
            volumes.push(Volume {
                name: "registry".into(),
                secret,
                ..Volume::default()
            });
        }
    }
    let spec = PodSpec {
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(security::pod()),
        termination_grace_period_seconds: Some(40),
        image_pull_secrets: pull_secrets(settings, settings.registry_pull_secret.as_ref()),
        node_selector: accelerator.map(node_labels).filter(|labels| !labels.is_empty()),
        tolerations: Some(tolerations).filter(|tolerations| !tolerations.is_empty()),
        affinity: overlay.affinity.clone(),
        topology_spread_constraints: Some(overlay.topology_spread_constraints.clone()).filter(|constraints| !constraints.is_empty()),
        priority_class_name: overlay.priority_class_name.clone(),
        init_containers,
        containers: vec![server(revision, &runtime, accelerator, settings)],
        volumes: Some(volumes),
        ..PodSpec::default()
    };
    Deployment {
        metadata: metadata(revision.name_any(), revision, labels),
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            selector,
            revision_history_limit: Some(0),
            // The pods of one revision are all alike; a replaced pod of it must not cost a device that is not there.
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(0)),
                    max_unavailable: Some(IntOrString::Int(1)),
                }),
            }),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(pod_labels),
                    ..ObjectMeta::default()
                }),
                spec: Some(spec),
            },
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

fn server(revision: &ModelRevision, runtime: &Runtime, accelerator: Option<&Accelerator>, settings: &Settings) -> Container {
    let name = model_name(revision);
    let engine = match runtime.engine.unwrap_or_default() {
        EngineChoice::Auto => "auto",
        EngineChoice::Tract => "tract",
        EngineChoice::OnnxRuntime => "onnxruntime",
    };
    let args = [
        "serve",
        &format!("{ARTIFACT}/model"),
        "--name",
        &name,
        "--engine",
        engine,
        "--http",
        &format!("0.0.0.0:{HTTP_PORT}"),
        "--grpc",
        &format!("0.0.0.0:{GRPC_PORT}"),
        "--metrics",
        &format!("0.0.0.0:{METRICS_PORT}"),
    ];
    let env: Vec<EnvVar> = runtime
        .pod
        .iter()
        .flat_map(|pod| &pod.env)
        .map(|variable| EnvVar {
            name: variable.name.clone(),
            value: Some(variable.value.clone()),
            ..EnvVar::default()
        })
        .collect();
    let port = |name: &str, port| ContainerPort {
        name: Some(name.into()),
        container_port: port,
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    };
    let probe = |path: String, period, failures| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path),
            port: IntOrString::String("http".into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(2),
        failure_threshold: Some(failures),
        ..Probe::default()
    };
    Container {
        name: "runtime".into(),
        image: Some(revision.spec.runtime_image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        args: Some(args.map(Into::into).into_iter().chain(batching(runtime)).collect()),
        env: Some(env).filter(|env| !env.is_empty()),
        ports: Some(vec![
            port("http", HTTP_PORT),
            port("grpc", GRPC_PORT),
            port("metrics", METRICS_PORT),
        ]),
        readiness_probe: Some(probe(format!("/v2/models/{name}/ready"), 1, 2)),
        liveness_probe: Some(probe("/v2/health/live".into(), 10, 6)),
        resources: Some(resources(runtime, accelerator)),
        security_context: Some(security::container()),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(vec![VolumeMount {
            name: "artifact".into(),
            mount_path: ARTIFACT.into(),
            read_only: Some(true),
            ..VolumeMount::default()
        }]),
        ..Container::default()
    }
}

fn batching(runtime: &Runtime) -> Vec<String> {
    let Some(batching) = &runtime.batching else { return vec![] };
    let delay = batching.max_delay_ms.map(|delay_ms| format!("--max-delay-ms={delay_ms}"));
    std::iter::once(format!("--max-batch={}", batching.max_size)).chain(delay).collect()
}

fn resources(runtime: &Runtime, accelerator: Option<&Accelerator>) -> ResourceRequirements {
    let asked = runtime.resources.clone().unwrap_or_default();
    let mut requests: BTreeMap<String, Quantity> = asked.requests.iter().map(|(name, amount)| (name.clone(), amount.into())).collect();
    let mut limits: BTreeMap<String, Quantity> = asked.limits.iter().map(|(name, amount)| (name.clone(), amount.into())).collect();
    if requests.is_empty() && limits.is_empty() {
        requests.insert("cpu".into(), Quantity("100m".into()));
        requests.insert("memory".into(), Quantity("128Mi".into()));
    }
    if let Some(Accelerator {
        resource: Some(resource),
        count,
        ..
    }) = accelerator
    {
        limits.insert(resource.clone(), Quantity(count.unwrap_or(1).to_string()));
    }
    ResourceRequirements {
        requests: Some(requests).filter(|requests| !requests.is_empty()),
        limits: Some(limits).filter(|limits| !limits.is_empty()),
        ..ResourceRequirements::default()
    }
}

/// The labels that a node must carry: those of the spec, or the one that NVIDIA's feature discovery sets.
fn node_labels(accelerator: &Accelerator) -> BTreeMap<String, String> {
    if !accelerator.node_labels.is_empty() {
        return accelerator
            .node_labels
            .iter()
            .map(|(key, value)| (key.clone(), value.0.clone()))
            .collect();
    }
    match accelerator.resource.as_deref() {
        Some(resource) if resource.starts_with("nvidia.com/") => [("nvidia.com/gpu.present".to_owned(), "true".to_owned())].into(),
        _ => BTreeMap::new(),
    }
}

/// Nodes with devices are commonly tainted by the device's vendor, so that nothing else lands there.
fn toleration(accelerator: &Accelerator) -> Option<Toleration> {
    let resource = accelerator.resource.as_deref()?;
    let key = if resource.starts_with("nvidia.com/") {
        "nvidia.com/gpu"
    } else {
        resource
    };
    Some(Toleration {
        key: Some(key.into()),
        operator: Some("Exists".into()),
        effect: Some("NoSchedule".into()),
        ..Toleration::default()
    })
}

fn artifact_volume(reference: &str, settings: &Settings) -> Volume {
    let mut volume = Volume {
        name: "artifact".into(),
        ..Volume::default()
    };
    if settings.image_volumes {
        volume.image = Some(ImageVolumeSource {
            reference: Some(reference.into()),
            pull_policy: Some("IfNotPresent".into()),
        });
    } else {
        volume.empty_dir = Some(EmptyDirVolumeSource::default());
    }
    volume
}

/// Where the kubelet mounts no images, an init container pulls; it reaches the registry from inside, as Jobs do.
fn pull(revision: &ModelRevision, reference: &str, settings: &Settings) -> Container {
    let inside = reference.replacen(&settings.registry_pull, &settings.registry_push, 1);
    let host = settings.registry_push.split('/').next().unwrap_or_default();
    let mut args: Vec<String> = vec!["pull".into(), inside, format!("{ARTIFACT}/model")];
    if settings.plain_http_hosts.iter().any(|plain| plain == host) {
        args.push("--plain-http".into());
    }
    let mut mounts = vec![VolumeMount {
        name: "artifact".into(),
        mount_path: ARTIFACT.into(),
        ..VolumeMount::default()
    }];
    if settings.registry_pull_secret.is_some() {
        args.extend(["--credentials".into(), "/secrets/registry".into()]);
        mounts.push(VolumeMount {
            name: "registry".into(),
            mount_path: "/secrets/registry".into(),
            read_only: Some(true),
            ..VolumeMount::default()
        });
    }
    Container {
        name: "pull".into(),
        image: Some(revision.spec.runtime_image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        args: Some(args),
        security_context: Some(security::container()),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}
