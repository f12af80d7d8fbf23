//! The only writer of the cluster: makes true what was decided, by server-side apply under one name, and writes nothing where it already is.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client, Resource, ResourceExt as _};
use plimsoll_crds::{MODEL_LABEL, ModelDeployment, ModelRevision};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::build;
use crate::decide::optimization::Trouble;
use crate::decide::reason::Reason;
use crate::decide::{JobPlan, Plan};
use crate::metrics::Metrics;
use crate::observe::Observed;
use crate::settings::Settings;

/// The operator's name as a field manager.
pub const FIELD_MANAGER: &str = "plimsoll";

/// Longest note of an Event, in bytes: the API's limit.
const NOTE_BYTES_MAX: usize = 1024;

/// A write that failed.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
pub enum Error {
    /// The apiserver refused or did not answer.
    #[error("cannot {verb} {kind} `{name}`")]
    Write {
        /// What was attempted.
        verb: &'static str,
        /// On which kind.
        kind: String,
        /// On which object.
        name: String,
        /// Why it failed.
        #[source]
        source: Box<kube::Error>,
    },
    /// An object of that name belongs to somebody else.
    #[error(
        "{kind} `{name}` exists and is not this ModelDeployment's; delete it, which is noticed within five minutes, or rename the ModelDeployment"
    )]
    NameTaken {
        /// The kind.
        kind: String,
        /// The name.
        name: String,
    },
}

impl Error {
    /// What people are told of it; `None` where it is likely to pass by itself: the apiserver is busy or away, or another write came first.
    #[must_use]
    pub fn trouble(&self) -> Option<Trouble> {
        /// Not there any more, too slow, in conflict, too many.
        const PASSING: [u16; 4] = [404, 408, 409, 429];
        match self {
            Self::NameTaken { .. } => Some(Trouble {
                reason: Reason::NameTaken,
                message: self.to_string(),
            }),
            Self::Write { source, .. } => match source.as_ref() {
                kube::Error::Api(status) if (400..500).contains(&status.code) && !PASSING.contains(&status.code) => Some(Trouble {
                    reason: Reason::WriteRefused,
                    message: format!("{self}: {}", status.message),
                }),
                _ => None,
            },
        }
    }
}

/// What applying needs besides the plan.
pub struct Writer<'a> {
    /// The client.
    pub client: &'a Client,
    /// The settings.
    pub settings: &'a Settings,
    /// For Events.
    pub recorder: &'a Recorder,
    /// The metrics.
    pub metrics: &'a Metrics,
    /// The model.
    pub model: &'a ModelDeployment,
    /// What is there.
    pub observed: &'a Observed,
}

impl Writer<'_> {
    /// Makes `plan` true.
    ///
    /// # Errors
    /// The first write that fails; what was written before it stays, and the next pass goes on from there.
    pub async fn apply(&self, plan: &Plan) -> Result<(), Error> {
        if self.model.metadata.deletion_timestamp.is_some() {
            // The garbage collector is at its children; one made now would be refused, or collected again.
            return Ok(());
        }
        // Destructured without `..`, so that a new part of a plan cannot be forgotten.
        let Plan {
            revision,
            lookup: _,
            job,
            delete_jobs,
            replicas,
            artifacts,
            delete_revisions,
            revision_status: _,
            status: _,
            events: _,
            requeue_after: _,
        } = plan;
        let written = match revision {
            Some(revision) => Some(self.write_revision(revision).await?),
            None => None,
        };
        if let Some(job) = job
            && let Some(revision) = self.revision(&job.revision.name_any(), written.as_ref())
        {
            let revision = revision.clone();
            let job = JobPlan { revision, ..job.clone() };
            if self.write_once(&build::job::job(&job, self.settings)).await? {
                self.metrics.job_started();
                tracing::info!(job = job.name, attempt = job.attempt, "started an optimisation");
            }
        }
        for name in delete_jobs {
            self.delete::<Job>(name).await?;
        }
        for (name, replicas) in replicas {
            let Some(artifact) = artifacts.get(name) else { continue };
            let Some(revision) = self.revision(name, written.as_ref()) else {
                continue;
            };
            self.write_deployment(revision, artifact, *replicas).await?;
        }
        self.write(&build::service::service(self.model), &self.observed.services).await?;
        self.write(
            &build::disruption_budget::disruption_budget(self.model),
            &self.observed.disruption_budgets,
        )
        .await?;
        for policy in build::network_policy::network_policies(self.model, self.settings) {
            self.write(&policy, &self.observed.network_policies).await?;
        }
        self.tell(plan, written.as_ref()).await?;
        for name in delete_revisions {
            self.delete::<ModelRevision>(name).await?;
        }
        Ok(())
    }

    /// Tells people where the model stands, in statuses and Events, and does nothing else of `plan`. `written` is the revision that this pass wrote.
    ///
    /// # Errors
    /// The first status that cannot be written.
    pub async fn tell(&self, plan: &Plan, written: Option<&ModelRevision>) -> Result<(), Error> {
        for (name, status) in &plan.revision_status {
            let live = self.revision(name, written);
            if live.is_some_and(|live| live.status.as_ref() != Some(status)) {
                self.write_status::<ModelRevision>(name, status).await?;
            }
        }
        if self.model.status.as_ref() != Some(&plan.status) {
            self.write_status::<ModelDeployment>(&self.model.name_any(), &plan.status).await?;
        }
        for notice in &plan.events {
            let event = Event {
                type_: if notice.reason.is_bad() {
                    EventType::Warning
                } else {
                    EventType::Normal
                },
                reason: notice.reason.to_string(),
                note: Some(notice.message[..notice.message.floor_char_boundary(NOTE_BYTES_MAX)].to_owned()),
                action: "Reconcile".into(),
                secondary: None,
            };
            // News that does not get through is no reason to stop the work.
            if let Err(error) = self.recorder.publish(&event, &self.model.object_ref(&())).await {
                tracing::warn!(%error, "cannot publish an event");
            }
        }
        Ok(())
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), self.model.metadata.namespace.as_deref().unwrap_or_default())
    }

    /// The revision `name`, as it was just written or as it is observed.
    fn revision<'a>(&'a self, name: &str, written: Option<&'a ModelRevision>) -> Option<&'a ModelRevision> {
        let observed = self.observed.revisions.iter().map(AsRef::as_ref);
        written.into_iter().chain(observed).find(|revision| revision.name_any() == name)
    }

    async fn write_revision(&self, revision: &ModelRevision) -> Result<ModelRevision, Error> {
        let mut desired = serde_json::to_value(revision).expect("an object serialises");
        // Status has its own way, and what the server filled in is not ours to send back.
        if let Some(object) = desired.as_object_mut() {
            object.remove("status");
        }
        let metadata = json!({
            "name": revision.metadata.name, "namespace": revision.metadata.namespace,
            "labels": revision.metadata.labels, "ownerReferences": revision.metadata.owner_references,
        });
        desired["metadata"] = metadata;
        self.server_side_apply::<ModelRevision>(&revision.name_any(), &desired).await
    }

    /// A revision's pods never change but in number: what an upgraded operator would build differently must not restart them.
    async fn write_deployment(&self, revision: &ModelRevision, artifact: &str, replicas: i32) -> Result<(), Error> {
        let name = revision.name_any();
        let live = self.observed.deployments.iter().find(|deployment| deployment.name_any() == name);
        match live.map(|live| live.spec.as_ref().and_then(|spec| spec.replicas)) {
            Some(asked) if asked == Some(replicas) => Ok(()),
            Some(_) => self.scale(&name, replicas).await,
            None => {
                let deployment = build::deployment::deployment(revision, artifact, replicas, self.settings);
                self.write_once(&deployment).await.map(drop)
            }
        }
    }

    /// Applies a Deployment's number alone. By the scale subresource, for an apply of the Deployment would have to repeat its pod template, with
    /// all that it was made of, or take that away.
    async fn scale(&self, name: &str, replicas: i32) -> Result<(), Error> {
        let scale = json!({
            "apiVersion": "autoscaling/v1", "kind": "Scale",
            "metadata": { "name": name, "namespace": self.model.metadata.namespace }, "spec": { "replicas": replicas },
        });
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let scaled = self.api::<Deployment>().patch_scale(name, &parameters, &Patch::Apply(&scale)).await;
        scaled.map(drop).map_err(failed::<Deployment>("scale", name))
    }

    /// Applies what is named by its content where it is not there yet. Where it is, though the watch has not told of it so far, it is what it
    /// should be: no second Job is made, and the template of the first, which never changes, is left alone. Returns whether it was made.
    async fn write_once<K>(&self, desired: &K) -> Result<bool, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
    {
        let name = desired.name_any();
        if self.exists::<K>(&name).await? {
            return Ok(false);
        }
        let value = serde_json::to_value(desired).expect("an object serialises");
        self.server_side_apply::<K>(&name, &value).await.map(|_| true)
    }

    /// Applies `desired` where the live object says anything else.
    async fn write<K>(&self, desired: &K, live: &[std::sync::Arc<K>]) -> Result<(), Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
    {
        let name = desired.name_any();
        let value = serde_json::to_value(desired).expect("an object serialises");
        match live.iter().find(|live| live.name_any() == name) {
            Some(live) if covers(&serde_json::to_value(live.as_ref()).expect("an object serialises"), &value) => return Ok(()),
            Some(_) => {}
            None => drop(self.exists::<K>(&name).await?),
        }
        self.server_side_apply::<K>(&name, &value).await.map(drop)
    }

    /// Whether an object of this model is there that the watch has not told of; an apply would take over one of somebody else's.
    async fn exists<K>(&self, name: &str) -> Result<bool, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        match self.api::<K>().get_opt(name).await.map_err(failed::<K>("read", name))? {
            None => Ok(false),
            Some(found) if found.labels().get(MODEL_LABEL) == self.model.metadata.name.as_ref() => Ok(true),
            Some(_) => Err(Error::NameTaken {
                kind: K::kind(&()).into_owned(),
                name: name.to_owned(),
            }),
        }
    }

    async fn server_side_apply<K>(&self, name: &str, desired: &Value) -> Result<K, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
    {
        let mut desired = desired.clone();
        desired["apiVersion"] = K::api_version(&()).into();
        desired["kind"] = K::kind(&()).into();
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        self.api::<K>()
            .patch(name, &parameters, &Patch::Apply(&desired))
            .await
            .map_err(failed::<K>("apply", name))
    }

    async fn write_status<K>(&self, name: &str, status: &impl Serialize) -> Result<(), Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        let patch = json!({ "apiVersion": K::api_version(&()), "kind": K::kind(&()), "status": status });
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        match self.api::<K>().patch_status(name, &parameters, &Patch::Apply(&patch)).await {
            // It was deleted meanwhile; there is nobody left to tell.
            Err(kube::Error::Api(error)) if error.code == 404 => Ok(()),
            written => written.map(drop).map_err(failed::<K>("write the status of", name)),
        }
    }

    async fn delete<K>(&self, name: &str) -> Result<(), Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        match self.api::<K>().delete(name, &DeleteParams::background()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            deleted => deleted.map(drop).map_err(failed::<K>("delete", name)),
        }
    }
}

fn failed<K: Resource<DynamicType = ()>>(verb: &'static str, name: &str) -> impl FnOnce(kube::Error) -> Error {
    let (kind, name) = (K::kind(&()).into_owned(), name.to_owned());
    move |source| Error::Write {
        verb,
        kind,
        name,
        source: Box::new(source),
    }
}

/// Whether `live` holds everything that `desired` says; what the server or others added does not count.
fn covers(live: &Value, desired: &Value) -> bool {
    match (live, desired) {
        (Value::Object(live), Value::Object(desired)) => desired
            .iter()
            .all(|(key, value)| live.get(key).map_or_else(|| value.is_null(), |live| covers(live, value))),
        (Value::Array(live), Value::Array(desired)) => {
            live.len() == desired.len() && live.iter().zip(desired).all(|(live, desired)| covers(live, desired))
        }
        (live, desired) => live == desired,
    }
}

#[cfg(test)]
pub(crate) mod tests;
