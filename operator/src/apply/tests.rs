use std::collections::BTreeMap;

use kube::runtime::events::Reporter;
use plimsoll_crds::{ModelDeploymentStatus, ModelRevisionStatus, RevisionPhase};
use plimsoll_package::report::FailureReason;

use super::*;
use crate::apiserver::Apiserver;
use crate::decide::{Notice, revision};

/// The namespace of the tests' model.
const NAMESPACE: &str = "n";

/// A cluster with one model, and an operator that writes to it.
pub(crate) struct Cluster {
    pub(crate) server: Apiserver,
    pub(crate) client: Client,
    settings: Settings,
    recorder: Recorder,
    metrics: Metrics,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let server = Apiserver::default();
        server.put(
            &path("plimsoll.dev/v1alpha1", "modeldeployments", "m"),
            json!({
                "apiVersion": "plimsoll.dev/v1alpha1", "kind": "ModelDeployment",
                "metadata": { "name": "m", "namespace": NAMESPACE, "uid": "model", "generation": 1 },
                "spec": { "source": { "uri": "oci://r.example/m:v1" } },
            }),
        );
        let client = server.client();
        let reporter = Reporter {
            controller: "plimsoll-operator".into(),
            instance: Some("test".into()),
        };
        Self {
            settings: Settings::fixture(),
            recorder: Recorder::new(client.clone(), reporter),
            metrics: Metrics::default(),
            server,
            client,
        }
    }

    fn model(&self) -> ModelDeployment {
        self.server.all::<ModelDeployment>("modeldeployments")[0].as_ref().clone()
    }

    fn observed(&self) -> Observed {
        Observed {
            revisions: self.server.all("modelrevisions"),
            jobs: self.server.all("jobs"),
            deployments: self.server.all("deployments"),
            services: self.server.all("services"),
            disruption_budgets: self.server.all("poddisruptionbudgets"),
            network_policies: self.server.all("networkpolicies"),
            ..Observed::default()
        }
    }

    /// A plan with every part that makes something.
    pub(crate) fn plan(&self) -> Plan {
        let (revision, _) = revision::desired(&self.model(), &Observed::default(), &self.settings);
        let revision = revision.unwrap();
        let name = revision.name_any();
        let job = JobPlan {
            name: format!("{name}-optimize"),
            revision: revision.clone(),
            attempt: 0,
        };
        let status = ModelRevisionStatus {
            phase: Some(RevisionPhase::Starting),
            ..ModelRevisionStatus::default()
        };
        Plan {
            revision: Some(revision),
            job: Some(job),
            replicas: BTreeMap::from([(name.clone(), 1)]),
            artifacts: BTreeMap::from([(name.clone(), "sha256:77e0".into())]),
            revision_status: BTreeMap::from([(name, status)]),
            status: ModelDeploymentStatus {
                observed_generation: Some(1),
                ..ModelDeploymentStatus::default()
            },
            ..Plan::default()
        }
    }

    /// Applies `plan` with what the cluster holds in view, or with nothing in view, as of an operator that has not seen its own writes yet.
    pub(crate) async fn apply(&self, plan: &Plan, observed: Observed) -> Result<(), Error> {
        let model = self.model();
        let writer = Writer {
            client: &self.client,
            settings: &self.settings,
            recorder: &self.recorder,
            metrics: &self.metrics,
            model: &model,
            observed: &observed,
        };
        writer.apply(plan).await
    }

    pub(crate) async fn apply_seeing(&self, plan: &Plan) -> Result<(), Error> {
        self.apply(plan, self.observed()).await
    }
}

fn path(group_version: &str, resource: &str, name: &str) -> String {
    let root = if group_version == "v1" { "api" } else { "apis" };
    format!("/{root}/{group_version}/namespaces/{NAMESPACE}/{resource}/{name}")
}

#[tokio::test]
async fn what_is_true_already_is_not_written_even_where_the_watch_lags_behind() {
    let cluster = Cluster::new();
    let plan = cluster.plan();
    cluster.apply_seeing(&plan).await.unwrap();
    let writes = cluster.server.take_writes();
    // Revision, Job, Deployment, Service, disruption budget, two network policies, two statuses.
    assert_eq!(writes.len(), 9, "{writes:#?}");
    cluster.apply_seeing(&plan).await.unwrap();
    assert_eq!(cluster.server.take_writes(), Vec::<String>::new());
    cluster.apply(&plan, Observed::default()).await.unwrap();
    assert_eq!(cluster.server.take_writes(), Vec::<String>::new(), "nothing in view");
    assert!(cluster.metrics.encode().contains("plimsoll_operator_optimization_jobs_total 1"));
}

#[tokio::test]
async fn everything_is_applied_under_one_field_manager() {
    let cluster = Cluster::new();
    let mut plan = cluster.plan();
    cluster.apply_seeing(&plan).await.unwrap();
    plan.replicas.values_mut().for_each(|replicas| *replicas = 3);
    cluster.apply_seeing(&plan).await.unwrap();
    let writes = cluster.server.take_writes();
    assert!(writes.iter().all(|write| write.starts_with("patch ")), "{writes:#?}");
    let queries = cluster.server.patch_queries();
    assert!(queries.iter().all(|query| query.contains("fieldManager=plimsoll")), "{queries:#?}");
}

#[tokio::test]
async fn jobs_and_pods_stay_as_they_were_made_whatever_an_upgraded_operator_would_make() {
    let mut cluster = Cluster::new();
    let mut plan = cluster.plan();
    cluster.apply_seeing(&plan).await.unwrap();
    cluster.server.take_writes();
    cluster.settings.image_pull_policy = "Always".into();
    cluster.settings.image_pull_secrets = vec!["mirror".into()];
    cluster.apply_seeing(&plan).await.unwrap();
    cluster.apply(&plan, Observed::default()).await.unwrap();
    assert_eq!(cluster.server.take_writes(), Vec::<String>::new());

    let deployment = path("apps/v1", "deployments", &plan.revision.as_ref().unwrap().name_any());
    let template = |cluster: &Cluster| cluster.server.get(&deployment).unwrap()["spec"]["template"].clone();
    let before = template(&cluster);
    plan.replicas.values_mut().for_each(|replicas| *replicas = 3);
    cluster.apply_seeing(&plan).await.unwrap();
    assert_eq!(cluster.server.take_writes(), [format!("patch {deployment}")]);
    assert_eq!(cluster.server.get(&deployment).unwrap()["spec"]["replicas"], 3);
    assert_eq!(template(&cluster), before);
}

#[tokio::test]
async fn what_belongs_to_somebody_else_is_not_touched_and_named() {
    let cluster = Cluster::new();
    let plan = cluster.plan();
    let foreign = [
        path("v1", "services", "m"),
        path("batch/v1", "jobs", &plan.job.as_ref().unwrap().name),
    ];
    for path in foreign {
        let name = path.rsplit('/').next().unwrap();
        cluster
            .server
            .put(&path, json!({ "metadata": { "name": name, "namespace": NAMESPACE } }));
        let before = cluster.server.get(&path);
        // The watches are of labelled objects.
        let error = cluster.apply(&plan, Observed::default()).await.unwrap_err();
        let trouble = error.trouble().expect("people are told");
        assert_eq!(trouble.reason, Reason::NameTaken);
        assert!(trouble.message.contains(name), "{}", trouble.message);
        assert_eq!(cluster.server.get(&path), before);
    }
}

#[tokio::test]
async fn a_refusal_of_the_apiserver_is_passed_on_in_its_words() {
    let cluster = Cluster::new();
    cluster.server.refuse("/deployments/");
    let error = cluster.apply_seeing(&cluster.plan()).await.unwrap_err();
    let trouble = error.trouble().expect("people are told");
    assert_eq!(trouble.reason, Reason::WriteRefused);
    let name = cluster.plan().revision.unwrap().name_any();
    assert_eq!(trouble.message, format!("cannot apply Deployment `{name}`: exceeded quota"));
}

#[tokio::test]
async fn news_is_published_for_the_model() {
    let cluster = Cluster::new();
    let mut plan = cluster.plan();
    plan.events = vec![Notice {
        reason: Reason::Failed(FailureReason::BudgetExceeded),
        message: "too much was lost".into(),
    }];
    cluster.apply_seeing(&plan).await.unwrap();
    let event = cluster.server.all::<k8s_openapi::api::events::v1::Event>("events")[0].clone();
    assert_eq!(
        (event.type_.as_deref(), event.reason.as_deref()),
        (Some("Warning"), Some("BudgetExceeded"))
    );
    assert_eq!(event.note.as_deref(), Some("too much was lost"));
    assert_eq!(event.regarding.as_ref().unwrap().uid.as_deref(), Some("model"));
}

#[test]
fn what_the_server_fills_in_is_no_difference() {
    let desired = json!({ "spec": { "ports": [{ "port": 80 }], "selector": { "a": "b" } } });
    let live = json!({ "spec": { "ports": [{ "port": 80, "protocol": "TCP" }], "selector": { "a": "b" }, "clusterIP": "10.0.0.1" }, "status": {} });
    assert!(covers(&live, &desired));
    assert!(!covers(
        &json!({ "spec": { "ports": [{ "port": 81 }], "selector": { "a": "b" } } }),
        &desired
    ));
    assert!(!covers(&json!({ "spec": { "selector": { "a": "b" } } }), &desired));
}
