//! The only reader of the cluster: watch stores, and from them [`Observed`], all that a decision about one model may look at.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use plimsoll_crds::{MODEL_LABEL, ModelDeployment, ModelRevision};
use plimsoll_package::digest::Digest;
use plimsoll_package::report::Summary;
use serde::de::DeserializeOwned;

use crate::decide::optimization::Trouble;

/// All that a decision about one model may look at.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Its revisions.
    pub revisions: Vec<Arc<ModelRevision>>,
    /// Its optimisation Jobs.
    pub jobs: Vec<Arc<Job>>,
    /// Its Deployments, one a revision.
    pub deployments: Vec<Arc<Deployment>>,
    /// Its pods, of Jobs and of Deployments.
    pub pods: Vec<Arc<Pod>>,
    /// Its Service.
    pub services: Vec<Arc<Service>>,
    /// Its disruption budget.
    pub disruption_budgets: Vec<Arc<PodDisruptionBudget>>,
    /// Its network policies.
    pub network_policies: Vec<Arc<NetworkPolicy>>,
    /// What the registry answered, by tag.
    pub lookups: BTreeMap<String, Lookup>,
    /// Why a write cannot be made, as an attempt has just shown: no watch tells of that.
    pub obstacle: Option<Trouble>,
}

/// What the registry answered about a tag.
#[derive(Debug, Clone, PartialEq)]
pub enum Lookup {
    /// The artifact is there.
    Found(Digest, Box<Summary>),
    /// It is not there, or the registry does not say.
    Absent,
}

/// The artifacts that the registry is known to hold, remembered while the process lives: an artifact's tag never moves.
#[derive(Debug, Default)]
pub struct Lookups(Mutex<BTreeMap<String, Lookup>>);

impl Lookups {
    /// Most answers that are remembered.
    const COUNT_MAX: usize = 10_000;

    /// Remembers that an artifact is there; that it is absent may change at any time.
    pub fn remember(&self, tag: &str, lookup: &Lookup) {
        let mut lookups = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *lookup != Lookup::Absent && lookups.len() < Self::COUNT_MAX {
            lookups.insert(tag.to_owned(), lookup.clone());
        }
    }

    /// What is remembered of `tag`.
    #[must_use]
    pub fn get(&self, tag: &str) -> Option<Lookup> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(tag).cloned()
    }
}

/// The watch stores of one namespace, or of all.
#[derive(Clone)]
pub struct Stores {
    models: Store<ModelDeployment>,
    revisions: Store<ModelRevision>,
    jobs: Store<Job>,
    deployments: Store<Deployment>,
    pods: Store<Pod>,
    services: Store<Service>,
    disruption_budgets: Store<PodDisruptionBudget>,
    network_policies: Store<NetworkPolicy>,
}

/// The changes of the children, each as a reference to the model that it belongs to.
pub type ChildChanges = futures::stream::BoxStream<'static, ObjectRef<ModelDeployment>>;

/// The changes of the models.
pub type ModelChanges = futures::stream::BoxStream<'static, Result<ModelDeployment, watcher::Error>>;

impl Stores {
    /// Starts to watch `namespace`, or all. The stores of the children fill by themselves; that of the models fills as its stream is polled.
    #[must_use]
    pub fn watch(client: &Client, namespace: Option<&str>) -> (Self, ModelChanges, ChildChanges) {
        let (models, model_changes) = store::<ModelDeployment>(client, namespace, watcher::Config::default());
        let (revisions, revision_changes) = children(client, namespace);
        let (jobs, job_changes) = children(client, namespace);
        let (deployments, deployment_changes) = children(client, namespace);
        let (pods, pod_changes) = children(client, namespace);
        let (services, service_changes) = children(client, namespace);
        let (disruption_budgets, disruption_budget_changes) = children(client, namespace);
        let (network_policies, network_policy_changes) = children(client, namespace);
        let stores = Self {
            models,
            revisions,
            jobs,
            deployments,
            pods,
            services,
            disruption_budgets,
            network_policies,
        };
        let changes_of_children = futures::stream::select_all([
            revision_changes,
            job_changes,
            deployment_changes,
            pod_changes,
            service_changes,
            disruption_budget_changes,
            network_policy_changes,
        ]);
        // Polled by a task of its own: a store must fill though nobody asks for its changes yet.
        let (sender, changes) = futures::channel::mpsc::unbounded();
        tokio::spawn(changes_of_children.for_each(move |change| {
            let _ = sender.unbounded_send(change);
            std::future::ready(())
        }));
        (stores, Box::pin(model_changes), Box::pin(changes))
    }

    /// The models' store.
    #[must_use]
    pub fn models(&self) -> Store<ModelDeployment> {
        self.models.clone()
    }

    /// Waits until every store of children has its first full list: deciding before would take what is not listed yet for missing.
    ///
    /// # Errors
    /// Where a watch ended before.
    pub async fn ready(&self) -> Result<(), reflector::store::WriterDropped> {
        self.revisions.wait_until_ready().await?;
        self.jobs.wait_until_ready().await?;
        self.deployments.wait_until_ready().await?;
        self.pods.wait_until_ready().await?;
        self.services.wait_until_ready().await?;
        self.disruption_budgets.wait_until_ready().await?;
        self.network_policies.wait_until_ready().await
    }

    /// What is known of `model`.
    #[must_use]
    pub fn observe(&self, model: &ModelDeployment, lookups: BTreeMap<String, Lookup>) -> Observed {
        Observed {
            revisions: owned(&self.revisions, model),
            jobs: owned(&self.jobs, model),
            deployments: owned(&self.deployments, model),
            pods: owned(&self.pods, model),
            services: owned(&self.services, model),
            disruption_budgets: owned(&self.disruption_budgets, model),
            network_policies: owned(&self.network_policies, model),
            lookups,
            obstacle: None,
        }
    }
}

fn store<K>(
    client: &Client,
    namespace: Option<&str>,
    config: watcher::Config,
) -> (Store<K>, impl Stream<Item = Result<K, watcher::Error>> + Send + use<K>)
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    K::DynamicType: Default + Clone + Eq + std::hash::Hash,
{
    let api: Api<K> = namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace));
    let (reader, writer) = reflector::store();
    let stream = watcher(api, config)
        .default_backoff()
        .modify(|object| object.managed_fields_mut().clear())
        .reflect(writer)
        .touched_objects();
    (reader, stream)
}

fn children<K>(client: &Client, namespace: Option<&str>) -> (Store<K>, ChildChanges)
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    K::DynamicType: Default + Clone + Eq + std::hash::Hash,
{
    let (reader, stream) = store::<K>(client, namespace, watcher::Config::default().labels(MODEL_LABEL));
    let changes = stream.filter_map(|change| {
        // The watcher itself goes on with a backoff.
        let object = change.inspect_err(|error| tracing::warn!(%error, "a watch was interrupted")).ok();
        std::future::ready(object.and_then(|object| model_of(&object)))
    });
    (reader, Box::pin(changes))
}

fn model_of(object: &impl Resource) -> Option<ObjectRef<ModelDeployment>> {
    let name = object.labels().get(MODEL_LABEL)?;
    Some(ObjectRef::new(name).within(object.meta().namespace.as_deref()?))
}

/// The objects of `model`, oldest first, then by name: an order that no watch event changes.
fn owned<K>(store: &Store<K>, model: &ModelDeployment) -> Vec<Arc<K>>
where
    K: Resource + Clone + 'static,
    K::DynamicType: Clone + Eq + std::hash::Hash,
{
    let mut objects = store.state_filter(|object| {
        object.meta().namespace == model.metadata.namespace
            && object.labels().get(MODEL_LABEL) == model.metadata.name.as_ref()
            && object.meta().deletion_timestamp.is_none()
    });
    objects.sort_by_key(|object| (object.creation_timestamp(), object.name_any()));
    objects
}
