//! The only writer of the cluster: makes true what was decided, and writes nothing where it already is.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client, Resource, ResourceExt as _};
use plimsoll_crds::{ModelDeployment, ModelRevision};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::build;
use crate::decide::Plan;
use crate::observe::Observed;
use crate::settings::Settings;

/// The operator's name as a field manager.
pub const FIELD_MANAGER: &str = "plimsoll";

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
    #[error("{kind} `{name}` exists and is not this ModelDeployment's; rename or delete it, or rename the ModelDeployment")]
    NameTaken {
        /// The kind.
        kind: String,
        /// The name.
        name: String,
    },
}

/// What applying needs besides the plan.
pub struct Writer<'a> {
    /// The client.
    pub client: &'a Client,
    /// The settings.
    pub settings: &'a Settings,
    /// For Events.
    pub recorder: &'a Recorder,
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
            revision_status,
            status,
            events,
            requeue_after: _,
        } = plan;
        let written = match revision {
            Some(revision) => Some(self.write_revision(revision).await?),
            None => None,
        };
        let revision_named = |name: &str| {
            let written = written.as_ref().filter(|written| written.name_any() == name).cloned();
            written.or_else(|| {
                self.observed
                    .revisions
                    .iter()
                    .find(|revision| revision.name_any() == name)
                    .map(|revision| ModelRevision::clone(revision))
            })
        };
        if let Some(job) = job
            && let Some(revision) = revision_named(&job.revision.name_any())
        {
            let job = build::job::job(&crate::decide::JobPlan { revision, ..job.clone() }, self.settings);
            self.create(&job).await?;
        }
        for name in delete_jobs {
            self.delete::<Job>(name).await?;
        }
        for (name, replicas) in replicas {
            let Some(artifact) = artifacts.get(name) else { continue };
            let Some(revision) = revision_named(name) else { continue };
            self.write_deployment(&revision, artifact, *replicas).await?;
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
        for (name, status) in revision_status {
            let live = revision_named(name);
            if live.as_ref().is_some_and(|live| live.status.as_ref() != Some(status)) {
                self.write_status::<ModelRevision>(name, status).await?;
            }
        }
        if self.model.status.as_ref() != Some(status) {
            self.write_status::<ModelDeployment>(&self.model.name_any(), status).await?;
        }
        for name in delete_revisions {
            self.delete::<ModelRevision>(name).await?;
        }
        for notice in events {
            let event = Event {
                type_: if notice.warning { EventType::Warning } else { EventType::Normal },
                reason: notice.reason.clone(),
                note: Some(notice.message.chars().take(1000).collect()),
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
            Some(_) => {
                let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
                let patched = self
                    .api::<Deployment>()
                    .patch(
                        &name,
                        &PatchParams {
                            field_manager: Some(FIELD_MANAGER.into()),
                            ..PatchParams::default()
                        },
                        &patch,
                    )
                    .await;
                patched.map(drop).map_err(failed::<Deployment>("scale", &name))
            }
            None => {
                self.create(&build::deployment::deployment(revision, artifact, replicas, self.settings))
                    .await
            }
        }
    }

    /// Creates what is named by its content; where it is there already, it is what it should be.
    async fn create<K>(&self, object: &K) -> Result<(), Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
    {
        let name = object.name_any();
        let parameters = PostParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PostParams::default()
        };
        match self.api::<K>().create(&parameters, object).await {
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            created => created.map(drop).map_err(failed::<K>("create", &name)),
        }
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
            None => {
                let found = self.api::<K>().get_opt(&name).await.map_err(failed::<K>("read", &name))?;
                let ours = |found: &K| {
                    found
                        .owner_references()
                        .iter()
                        .any(|owner| Some(&owner.uid) == self.model.uid().as_ref())
                };
                if found.is_some_and(|found| !ours(&found)) {
                    return Err(Error::NameTaken {
                        kind: K::kind(&()).into_owned(),
                        name,
                    });
                }
            }
        }
        self.server_side_apply::<K>(&name, &value).await.map(drop)
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
mod tests {
    use super::*;

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
}
