//! The wiring: watch stores, the reconcile loop, retries.

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt as _;
use jiff::Timestamp;
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::events::Recorder;
use kube::runtime::reflector::ObjectRef;
use kube::{Client, ResourceExt as _};
use plimsoll_crds::{ConditionType, ModelDeployment};
use plimsoll_package::registry::Registry;
use tracing::Instrument as _;

use crate::apply::{self, Writer};
use crate::backoff::Backoffs;
use crate::decide::{Plan, decide};
use crate::metrics::Metrics;
use crate::observe::{Lookup, Lookups, Observed, Stores};
use crate::settings::Settings;

/// Most models that are worked on at once.
const CONCURRENCY: u16 = 16;

/// What a pass over a model needs.
pub struct Context {
    /// The client.
    pub client: Client,
    /// The settings.
    pub settings: Settings,
    /// The registry, for lookups.
    pub registry: Registry,
    /// For Events.
    pub recorder: Recorder,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

struct Scope {
    context: Arc<Context>,
    stores: Stores,
    lookups: Lookups,
    backoffs: Backoffs,
}

impl Scope {
    /// Forgets a model that is gone.
    fn forget(&self, namespace: &str, name: &str) {
        self.context.metrics.forget_model(namespace, name);
        self.backoffs.reset(&ObjectRef::new(name).within(namespace));
    }
}

/// A pass that failed.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
pub enum Error {
    /// A write failed.
    #[error("cannot bring about what was decided")]
    Apply(#[from] apply::Error),
}

/// Works on the models of `namespace`, or of all, until `stop` resolves; a pass that is under way then is finished.
pub async fn run(context: Arc<Context>, namespace: Option<String>, stop: impl Future<Output = ()> + Send + Sync + 'static) {
    let (stores, models, children) = Stores::watch(&context.client, namespace.as_deref());
    if stores.ready().await.is_err() {
        tracing::error!("a watch ended before its first list");
        return;
    }
    let scope = Arc::new(Scope {
        context,
        stores: stores.clone(),
        lookups: Lookups::default(),
        backoffs: Backoffs::default(),
    });
    Controller::for_stream(models, stores.models())
        .with_config(controller::Config::default().concurrency(CONCURRENCY))
        .reconcile_on(children)
        .graceful_shutdown_on(stop)
        .run(reconcile, retry, scope.clone())
        .for_each(|result| {
            match result {
                Err(controller::Error::ObjectNotFound(gone)) => scope.forget(gone.namespace.as_deref().unwrap_or_default(), &gone.name),
                Err(error) => tracing::debug!(%error, "a pass did not run"),
                Ok(_) => {}
            }
            std::future::ready(())
        })
        .await;
}

async fn reconcile(model: Arc<ModelDeployment>, scope: Arc<Scope>) -> Result<Action, Error> {
    let started = Instant::now();
    let span = tracing::info_span!(
        "reconcile",
        trace_id = %trace_id(),
        namespace = model.namespace(),
        // Not `name`, which in JSON is the span's own.
        model = %model.name_any(),
        generation = model.metadata.generation
    );
    let result = pass(&model, &scope).instrument(span.clone()).await;
    match &result {
        Ok(_) => scope.backoffs.reset(&ObjectRef::from_obj(model.as_ref())),
        // Said here, for what decides on the retry knows nothing of the trace.
        Err(error) => span.in_scope(|| tracing::warn!(cause = causes(error), "a pass failed")),
    }
    scope
        .context
        .metrics
        .reconciled(started.elapsed(), result.as_ref().err().map(|Error::Apply(error)| error.into()));
    result
}

async fn pass(model: &ModelDeployment, scope: &Scope) -> Result<Action, Error> {
    let context = &scope.context;
    let mut lookups = std::collections::BTreeMap::new();
    let (observed, plan) = loop {
        let observed = scope.stores.observe(model, lookups.clone());
        let plan = decide(model, &observed, &context.settings, Timestamp::now());
        match &plan.lookup {
            Some(tag) if !lookups.contains_key(tag) => {
                let answer = match scope.lookups.get(tag) {
                    Some(found) => found,
                    None => look_up(context, tag).await,
                };
                scope.lookups.remember(tag, &answer);
                lookups.insert(tag.clone(), answer);
            }
            _ => break (observed, plan),
        }
    };
    let writer = Writer {
        client: &context.client,
        settings: &context.settings,
        recorder: &context.recorder,
        metrics: &context.metrics,
        model,
        observed: &observed,
    };
    if let Err(error) = writer.apply(&plan).await {
        if let Some(trouble) = error.trouble() {
            let obstructed = Observed {
                obstacle: Some(trouble),
                ..observed.clone()
            };
            let plan = decide(model, &obstructed, &context.settings, Timestamp::now());
            writer.tell(&plan, None).await?;
            report(model, &plan, &context.metrics);
        }
        return Err(error.into());
    }
    report(model, &plan, &context.metrics);
    Ok(plan.requeue_after.map_or_else(Action::await_change, Action::requeue))
}

async fn look_up(context: &Context, tag: &str) -> Lookup {
    let reference = format!("{}:{tag}", context.settings.registry_push);
    match context.registry.lookup(&reference).await {
        Ok(Some(found)) => match found.summary {
            Some(summary) => Lookup::Found(found.digest, Box::new(summary)),
            None => Lookup::Absent,
        },
        Ok(None) => Lookup::Absent,
        Err(error) => {
            // The Job asks again and, where the registry is really away, says so.
            tracing::warn!(%error, tag, "cannot ask the registry for an artifact");
            Lookup::Absent
        }
    }
}

/// Says where the model stands in metrics and, where it is news, in the log.
fn report(model: &ModelDeployment, plan: &Plan, metrics: &Metrics) {
    let mut conditions = plan.status.conditions.iter();
    if let Some(ready) = conditions.find(|condition| condition.type_ == ConditionType::Ready.to_string()) {
        metrics.set_model(&model.namespace().unwrap_or_default(), &model.name_any(), &ready.reason);
    }
    for notice in &plan.events {
        tracing::info!(reason = %notice.reason, detail = notice.message, "standing");
    }
}

fn retry(model: Arc<ModelDeployment>, _: &Error, scope: Arc<Scope>) -> Action {
    Action::requeue(scope.backoffs.failed(ObjectRef::from_obj(model.as_ref())))
}

/// What an error says, and what each of its sources adds.
fn causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A trace id as of the W3C trace context: 16 random bytes in hex.
fn trace_id() -> String {
    use std::hash::{BuildHasher as _, Hasher as _};
    // The standard library's hasher is keyed by the system's randomness, anew for each.
    let random = || std::hash::RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kube::runtime::events::Reporter;
    use plimsoll_package::registry::Access;
    use serde_json::{Value, json};

    use super::*;
    use crate::apiserver::Apiserver;

    const MODEL: &str = "/apis/plimsoll.dev/v1alpha1/namespaces/n/modeldeployments/m";

    /// Runs the controller on a cluster with one model.
    fn start(server: &Apiserver) {
        plimsoll_package::registry::install_crypto_provider();
        server.put(
            MODEL,
            json!({
                "apiVersion": "plimsoll.dev/v1alpha1", "kind": "ModelDeployment",
                "metadata": { "name": "m", "namespace": "n", "uid": "model", "generation": 1 },
                "spec": { "source": { "uri": "oci://r.example/m:v1" } },
            }),
        );
        let client = server.client();
        let reporter = Reporter {
            controller: "plimsoll-operator".into(),
            instance: Some("test".into()),
        };
        let context = Context {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            settings: Settings::fixture(),
            registry: Registry::new(Access::default()).unwrap(),
            metrics: Arc::default(),
        };
        tokio::spawn(run(Arc::new(context), Some("n".into()), std::future::pending()));
    }

    async fn until(what: &str, holds: impl Fn() -> bool) {
        let waited = tokio::time::timeout(Duration::from_secs(20), async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("waited in vain until {what}"));
    }

    fn condition(server: &Apiserver, kind: &str) -> Value {
        let model = server.get(MODEL).unwrap();
        let mut conditions = model["status"]["conditions"].as_array().into_iter().flatten();
        conditions.find(|condition| condition["type"] == kind).cloned().unwrap_or_default()
    }

    #[tokio::test]
    async fn a_model_that_cannot_have_its_name_is_stalled_until_the_name_is_free() {
        let server = Apiserver::default();
        let service = "/api/v1/namespaces/n/services/m";
        server.put(service, json!({ "metadata": { "name": "m", "namespace": "n" } }));
        start(&server);
        until("it is stalled", || condition(&server, "Stalled")["status"] == "True").await;
        let ready = condition(&server, "Ready");
        assert_eq!((&ready["status"], &ready["reason"]), (&json!("False"), &json!("NameTaken")));
        assert!(ready["message"].as_str().unwrap().starts_with("Service `m` exists"), "{ready}");
        let news = || server.all::<k8s_openapi::api::events::v1::Event>("events");
        until("an Event says so", || !news().is_empty()).await;
        assert_eq!(news()[0].reason.as_deref(), Some("NameTaken"));

        server.remove(service);
        until("it goes on", || condition(&server, "Ready")["reason"] == "Optimizing").await;
        assert_eq!(condition(&server, "Stalled")["status"], "False");
        assert!(server.get(service).is_some());
    }
}
