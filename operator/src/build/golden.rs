//! The objects as YAML, held by golden files: a change of what is applied shows in review.

use kube::ResourceExt as _;
use plimsoll_crds::{EngineChoice, ModelDeployment, ModelRevision};

use super::{deployment, disruption_budget, job, network_policy, service};
use crate::decide::optimization::inputs;
use crate::decide::{JobPlan, revision};
use crate::observe::Observed;
use crate::settings::Settings;

const MODEL: &str = r#"
apiVersion: plimsoll.dev/v1alpha1
kind: ModelDeployment
metadata: {name: digits, namespace: vision, uid: 11111111-1111-1111-1111-111111111111}
spec:
  source:
    uri: pvc://models/digits.onnx
    credentialsSecret: source-login
  optimize:
    recipe:
      - prune: {amount: "50%"}
      - quantize: {scheme: Int8Dynamic}
    evaluation:
      dataset: {uri: "https://data.example.org/digits-heldout.npz", credentialsSecret: data-login}
      metric: Accuracy
    budget: {maxAccuracyDrop: "1%", maxSize: 1Mi}
    job:
      resources: {requests: {cpu: 2, memory: 4Gi}, limits: {memory: 8Gi}}
      deadline: 10m
      backoffLimit: 1
  runtime:
    engine: OnnxRuntime
    resources: {requests: {cpu: 500m}, limits: {memory: 1Gi}}
    pod:
      labels: {team: vision}
      env: [{name: RUST_LOG, value: debug}]
      priorityClassName: serving
  accelerator: {resource: nvidia.com/gpu, count: 2}
"#;

fn model() -> ModelDeployment {
    serde_yaml_ng::from_str(MODEL).unwrap()
}

fn model_revision(settings: &Settings) -> ModelRevision {
    let (desired, _) = revision::desired(&model(), &Observed::default(), settings);
    let mut desired = desired.unwrap();
    desired.metadata.uid = Some("22222222-2222-2222-2222-222222222222".into());
    desired
}

fn job_plan(settings: &Settings) -> JobPlan {
    let revision = model_revision(settings);
    JobPlan {
        name: format!("{}-optimize", revision.name_any()),
        revision,
        attempt: 0,
    }
}

#[test]
fn a_revision() {
    insta::assert_yaml_snapshot!(model_revision(&Settings::fixture()));
}

#[test]
fn a_model_on_a_gpu_is_served_by_the_image_with_cuda_where_there_is_one() {
    let settings = Settings {
        cuda_runtime_image: Some("ghcr.io/plimsoll-dev/runtime-cuda:0.1.0".into()),
        ..Settings::fixture()
    };
    let image = |changed: fn(&mut ModelDeployment)| {
        let mut model = model();
        changed(&mut model);
        revision::desired(&model, &Observed::default(), &settings)
            .0
            .unwrap()
            .spec
            .runtime_image
    };
    assert_eq!(image(|_| ()), "ghcr.io/plimsoll-dev/runtime-cuda:0.1.0");
    assert_eq!(image(|model| model.spec.accelerator = None), settings.runtime_image);
    let of_another_vendor = |model: &mut ModelDeployment| {
        model.spec.accelerator.as_mut().unwrap().resource = Some("amd.com/gpu".into());
    };
    assert_eq!(image(of_another_vendor), settings.runtime_image);
    let named = |model: &mut ModelDeployment| model.spec.runtime.as_mut().unwrap().image = Some("example.org/own:1".into());
    assert_eq!(image(named), "example.org/own:1");
    assert_eq!(
        model_revision(&Settings::fixture()).spec.runtime_image,
        Settings::fixture().runtime_image
    );
}

#[test]
fn the_optimisation_job() {
    let settings = Settings {
        registry_push_secret: Some("push".into()),
        image_pull_secrets: vec!["mirror".into()],
        extra_ca_config_map: Some("roots".into()),
        ..Settings::fixture()
    };
    insta::assert_yaml_snapshot!(job::job(&job_plan(&settings), &settings));
}

#[test]
fn a_search_may_take_half_of_the_jobs_time() {
    let settings = Settings::fixture();
    let searching = |search: &str| {
        let mut revision = model_revision(&settings);
        let optimize = revision.spec.template.optimize.as_mut().unwrap();
        optimize.optimization.recipe.clear();
        optimize.optimization.search = serde_yaml_ng::from_str(search).unwrap();
        let search = inputs(&revision, &settings).optimize.search.unwrap();
        search.max_duration.unwrap().as_str().to_owned()
    };
    // The deadline is ten minutes.
    assert_eq!(searching("{}"), "300s");
    assert_eq!(searching("{maxDuration: 2m}"), "2m");
}

#[test]
fn the_optimisation_measures_on_the_engine_that_will_serve() {
    let settings = Settings::fixture();
    let told = |engine: Option<EngineChoice>| {
        let mut revision = model_revision(&settings);
        revision.spec.template.runtime.as_mut().unwrap().engine = engine;
        serde_json::to_value(inputs(&revision, &settings)).unwrap().get("engine").cloned()
    };
    assert_eq!(told(Some(EngineChoice::Tract)), Some("Tract".into()));
    assert_eq!(told(Some(EngineChoice::OnnxRuntime)), Some("OnnxRuntime".into()));
    // What is measured decides, and the key of the artifact is as it was before there was a choice.
    assert_eq!((told(Some(EngineChoice::Auto)), told(None)), (None, None));
}

#[test]
fn the_deployment_with_an_image_volume() {
    let settings = Settings::fixture();
    insta::assert_yaml_snapshot!(deployment::deployment(&model_revision(&settings), "sha256:77e0", 2, &settings));
}

#[test]
fn the_deployment_with_an_init_container() {
    let settings = Settings {
        image_volumes: false,
        registry_pull_secret: Some("pull".into()),
        image_pull_secrets: vec!["mirror".into(), "pull".into()],
        ..Settings::fixture()
    };
    insta::assert_yaml_snapshot!(deployment::deployment(&model_revision(&settings), "sha256:77e0", 2, &settings));
}

#[test]
fn what_stands_before_the_pods() {
    insta::assert_yaml_snapshot!("service", service::service(&model()));
    insta::assert_yaml_snapshot!("disruption_budget", disruption_budget::disruption_budget(&model()));
    insta::assert_yaml_snapshot!("network_policies", network_policy::network_policies(&model(), &Settings::fixture()));
}

#[test]
fn credentials_are_mounted_only_where_they_are_used() {
    let settings = Settings {
        registry_push_secret: Some("push".into()),
        ..Settings::fixture()
    };
    let job = job::job(&job_plan(&settings), &settings);
    for container in job.spec.unwrap().template.spec.unwrap().containers {
        let secrets: Vec<String> = container
            .volume_mounts
            .unwrap()
            .into_iter()
            .map(|mount| mount.mount_path)
            .filter(|path| path.starts_with("/secrets"))
            .collect();
        let expected: &[&str] = match container.name.as_str() {
            "fetch" => &["/secrets/registry", "/secrets/source", "/secrets/evaluation"],
            "publish" => &["/secrets/registry"],
            _ => &[],
        };
        assert_eq!(secrets, expected, "{}", container.name);
    }
}
