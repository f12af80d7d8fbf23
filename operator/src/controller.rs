//! The wiring: watch stores, the reconcile loop, retries.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::events::Recorder;
use kube::{Client, ResourceExt as _};
use plimsoll_crds::{ConditionType, ModelDeployment, ModelDeploymentStatus};
use plimsoll_package::registry::Registry;
use tracing::Instrument as _;

use crate::apply::{self, Writer};
use crate::decide::{Plan, decide};
use crate::metrics::Metrics;
use crate::observe::{Lookup, Lookups, Stores};
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
    });
    Controller::for_stream(models, stores.models())
        .with_config(kube::runtime::controller::Config::default().concurrency(CONCURRENCY))
        .reconcile_on(children)
        .graceful_shutdown_on(stop)
        .run(reconcile, retry, scope)
        .map_err(|error| tracing::debug!(%error, "a pass did not run"))
        .for_each(|_| async {})
        .await;
}

async fn reconcile(model: Arc<ModelDeployment>, scope: Arc<Scope>) -> Result<Action, Error> {
    let started = Instant::now();
    let span = tracing::info_span!(
        "reconcile",
        trace_id = %trace_id(),
        namespace = model.namespace(),
        name = %model.name_any(),
        generation = model.metadata.generation
    );
    let result = pass(&model, &scope).instrument(span).await;
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
    report(model, &plan, &context.metrics);
    let writer = Writer {
        client: &context.client,
        settings: &context.settings,
        recorder: &context.recorder,
        model,
        observed: &observed,
    };
    writer.apply(&plan).await?;
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

fn report(model: &ModelDeployment, plan: &Plan, metrics: &Metrics) {
    let (namespace, name) = (model.namespace().unwrap_or_default(), model.name_any());
    let reason = |status: &ModelDeploymentStatus| {
        status
            .conditions
            .iter()
            .find(|condition| condition.type_ == ConditionType::Ready.to_string())
            .map(|condition| condition.reason.clone())
    };
    let old = model.status.as_ref().and_then(reason);
    match reason(&plan.status) {
        Some(reason) => metrics.set_model(&namespace, &name, old.as_deref(), &reason),
        None => metrics.forget_model(&namespace, &name, old.as_deref().unwrap_or_default()),
    }
    if let Some(job) = &plan.job {
        metrics.job_started();
        tracing::info!(job = job.name, attempt = job.attempt, "starting an optimisation");
    }
    for notice in &plan.events {
        tracing::info!(reason = notice.reason, message = notice.message, "standing");
    }
}

fn retry(model: Arc<ModelDeployment>, error: &Error, scope: Arc<Scope>) -> Action {
    use std::error::Error as _;
    let cause = error
        .source()
        .map(|cause| format!("{cause}: {}", cause.source().map(ToString::to_string).unwrap_or_default()));
    let Error::Apply(failed) = error;
    tracing::warn!(namespace = model.namespace(), name = %model.name_any(), cause, "a pass failed");
    if let apply::Error::NameTaken { .. } = failed {
        let context = scope.context.clone();
        let (model, message) = (model.clone(), failed.to_string());
        tokio::spawn(async move {
            let event = kube::runtime::events::Event {
                type_: kube::runtime::events::EventType::Warning,
                reason: "NameTaken".into(),
                note: Some(message),
                action: "Reconcile".into(),
                secondary: None,
            };
            let _ = context
                .recorder
                .publish(&event, &kube::Resource::object_ref(model.as_ref(), &()))
                .await;
        });
    }
    // Spread by name, so that many models do not come back at once.
    let spread = model.name_any().bytes().map(u64::from).sum::<u64>() % 1000;
    Action::requeue(Duration::from_millis(2000 + spread))
}

/// A trace id as of the W3C trace context: 16 random bytes in hex.
fn trace_id() -> String {
    use std::hash::{BuildHasher as _, Hasher as _};
    // The standard library's hasher is keyed by the system's randomness, anew for each.
    let random = || std::hash::RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}
