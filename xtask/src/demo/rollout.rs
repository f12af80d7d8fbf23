//! Applying a version of the model and following it until it serves: by watches, every change with the time it was seen.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use plimsoll_package::report::{Summary, Termination};
use serde_json::Value;

use super::gateway::{Client, Gateway};
use super::target::Target;
use super::{MODEL, NAMESPACE, manifest, seconds_since};
use crate::progress::{Amount, Unit, phase, show};

/// Longest way from apply to Ready: the first one on a cluster may have to pull images.
const PATIENCE: Duration = Duration::from_secs(600);

/// An object as it was seen to change.
pub(super) struct Seen {
    pub(super) what: Watched,
    pub(super) at: SystemTime,
    pub(super) object: Value,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Watched {
    Model,
    Pod,
}

/// A version that came to serve.
pub(super) struct Served {
    /// When `kubectl apply` was called.
    pub(super) begun: Instant,
    /// The same as the wall clock has it.
    pub(super) applied_at: SystemTime,
    /// From then to Ready, in seconds.
    pub(super) ready_s: f64,
    pub(super) ready_at: SystemTime,
    pub(super) revision: i64,
    pub(super) revision_name: String,
    pub(super) endpoint: String,
    /// Digest of the artifact that serves.
    pub(super) artifact: String,
    /// All that was seen on the way.
    pub(super) seen: Vec<Seen>,
}

impl Served {
    /// Whether a Job published the artifact on the way, rather than that an earlier one was found.
    pub(super) fn published(&self) -> bool {
        let published = |status: &Value| {
            let message = status["state"]["terminated"]["message"].as_str().unwrap_or_default();
            matches!(serde_json::from_str(message), Ok(Termination::Succeeded(summary)) if !summary.reused)
        };
        let statuses = |seen: &Seen| {
            seen.object["status"]["containerStatuses"]
                .as_array()
                .is_some_and(|all| all.iter().any(published))
        };
        self.seen.iter().any(|seen| seen.what == Watched::Pod && statuses(seen))
    }
}

/// Brings versions of the model to serve, one after the other.
pub(super) struct Rollout<'a> {
    target: &'a Target,
    client: Client,
    accelerated: bool,
}

impl<'a> Rollout<'a> {
    pub(super) fn new(target: &'a Target, gateway: &Gateway, accelerated: bool) -> Self {
        Self {
            target,
            client: gateway.client(),
            accelerated,
        }
    }

    /// Removes the model of an earlier run, so that this one begins at the beginning.
    ///
    /// # Errors
    /// Where it does not go.
    pub(super) fn clear(target: &Target) -> Result<()> {
        let earlier = target.kubectl_json(&["get", "modeldeployment", MODEL, "--namespace", NAMESPACE, "--ignore-not-found"])?;
        if earlier.is_null() {
            return Ok(());
        }
        phase("removing the model", |_| {
            let wait = ["--namespace", NAMESPACE, "--timeout=120s"];
            target.kubectl_text(&[&["delete", "modeldeployment", MODEL, "--cascade=foreground", "--wait"][..], &wait].concat())?;
            let selector = format!("--selector=plimsoll.dev/model={MODEL}");
            target
                .kubectl_text(&[&["wait", "pods", &selector, "--for=delete"][..], &wait].concat())
                .map(drop)
        })
    }

    /// Applies the model of `version` and waits until it is Ready.
    ///
    /// # Errors
    /// Where the cluster refuses the manifest, the operator says that it is stalled, or it takes too long.
    pub(super) fn apply(&self, version: &str) -> Result<Served> {
        self.apply_manifest(version, &manifest::manifest(version, self.accelerated)?)
    }

    /// Applies the model of `version` with its contents pinned, so that no Job is needed where the artifact is there.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub(super) fn apply_pinned(&self, version: &str, summary: &Summary) -> Result<Served> {
        self.apply_manifest(version, &manifest::pinned(version, self.accelerated, summary)?)
    }

    fn apply_manifest(&self, version: &str, manifest: &str) -> Result<Served> {
        let (sender, receiver) = channel();
        let selector = format!("labelSelector=plimsoll.dev/model%3D{MODEL}");
        self.watch(
            "/apis/plimsoll.dev/v1alpha1",
            "modeldeployments",
            "fieldSelector=metadata.name%3Ddigits",
            Watched::Model,
            &sender,
        )?;
        self.watch("/api/v1", "pods", &selector, Watched::Pod, &sender)?;
        drop(sender);
        phase(&format!("kubectl apply of digits:{version}, until it is Ready"), |bar| {
            let (begun, applied_at) = (Instant::now(), SystemTime::now());
            let applied = self.target.apply(manifest)?;
            let generation = applied["metadata"]["generation"].as_i64().context("an object has a generation")?;
            let say = |words: &str| {
                bar.suspend(|| eprintln!("    {:6.2} s  {words}", seconds_since(begun)));
            };
            let steps = |done| {
                let amount = Amount {
                    done,
                    total: JOB_STEPS,
                    unit: Unit::Things("steps of the Job"),
                };
                show(bar, &amount, "");
            };
            follow(&receiver, begun, applied_at, generation, say, steps)
        })
    }

    fn watch(&self, group: &str, resource: &str, selector: &str, what: Watched, sender: &Sender<Seen>) -> Result<()> {
        let events = self.client.watch(&format!(
            "{group}/namespaces/{NAMESPACE}/{resource}?watch=1&timeoutSeconds=3600&{selector}"
        ))?;
        let sender = sender.clone();
        // It ends with the rollout, when nobody receives, or with the gateway.
        thread::spawn(move || {
            for mut event in events {
                let object = event["object"].take();
                if event["type"] != "DELETED"
                    && sender
                        .send(Seen {
                            what,
                            at: SystemTime::now(),
                            object,
                        })
                        .is_err()
                {
                    break;
                }
            }
        });
        Ok(())
    }
}

/// Containers of the Job's pod, one a step.
const JOB_STEPS: u64 = 5;

fn follow(
    receiver: &Receiver<Seen>,
    begun: Instant,
    applied_at: SystemTime,
    generation: i64,
    say: impl Fn(&str),
    steps: impl Fn(u64),
) -> Result<Served> {
    let mut seen = Vec::new();
    let mut said = String::new();
    loop {
        let event = match receiver.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => bail!("not Ready after {} s; last said: {said}", PATIENCE.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("the watch of the cluster broke off; last said: {said}"),
        };
        if event.what == Watched::Pod && event.object["metadata"]["labels"]["app.kubernetes.io/component"] == "optimizer" {
            let statuses = event.object["status"]["containerStatuses"].as_array();
            let ended = statuses
                .into_iter()
                .flatten()
                .filter(|status| status["state"]["terminated"].is_object());
            steps(ended.count() as u64);
        }
        let standing = (event.what == Watched::Model)
            .then(|| Standing::of(&event.object, generation))
            .flatten();
        seen.push(event);
        let Some(standing) = standing else { continue };
        let words = format!("{:<12} {}", standing.reason, standing.message);
        if words != said {
            say(&words);
            said = words;
        }
        if standing.stalled {
            bail!("the operator says {}: {}", standing.reason, standing.message);
        }
        if standing.ready {
            let last = seen.last().context("an event was seen")?;
            let status = &last.object["status"];
            let text = |field: &str| status[field].as_str().unwrap_or_default().to_owned();
            return Ok(Served {
                begun,
                applied_at,
                ready_s: seconds_since(begun),
                ready_at: last.at,
                revision: status["revision"].as_i64().context("a model that is Ready has a revision")?,
                revision_name: text("servingRevision"),
                endpoint: text("endpoint"),
                artifact: text("artifact"),
                seen,
            });
        }
    }
}

/// What the operator says of the model.
#[derive(Debug, PartialEq)]
struct Standing {
    ready: bool,
    stalled: bool,
    reason: String,
    message: String,
}

impl Standing {
    /// Where `model` stands at `generation`; `None` while the status is of an older one.
    fn of(model: &Value, generation: i64) -> Option<Self> {
        let status = &model["status"];
        if model["metadata"]["generation"].as_i64()? < generation || status["observedGeneration"] != model["metadata"]["generation"] {
            return None;
        }
        let condition = |kind: &str| {
            status["conditions"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|condition| condition["type"] == kind)
        };
        let is = |kind| condition(kind).is_some_and(|condition| condition["status"] == "True");
        let ready = condition("Ready")?;
        let text = |field: &str| ready[field].as_str().unwrap_or_default().to_owned();
        Some(Self {
            ready: is("Ready"),
            stalled: is("Stalled"),
            reason: text("reason"),
            message: text("message"),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn model(generation: i64, observed: i64, ready: &str) -> Value {
        let condition = json!({"type": "Ready", "status": ready, "reason": "Serving", "message": "revision 1 serves"});
        json!({
            "metadata": {"generation": generation},
            "status": {"observedGeneration": observed, "conditions": [condition], "revision": 1, "artifact": "sha256:0"},
        })
    }

    #[test]
    fn ready_counts_only_for_the_generation_that_was_applied() {
        assert_eq!(Standing::of(&model(1, 1, "True"), 2), None, "the event is from before the change");
        assert_eq!(Standing::of(&model(2, 1, "True"), 2), None, "the operator has not seen the change");
        assert!(Standing::of(&model(2, 2, "True"), 2).unwrap().ready);
        assert!(!Standing::of(&model(2, 2, "False"), 2).unwrap().ready);
    }

    #[test]
    fn following_ends_when_the_watch_does() {
        let (sender, receiver) = channel();
        sender
            .send(Seen {
                what: Watched::Model,
                at: SystemTime::now(),
                object: model(1, 1, "False"),
            })
            .unwrap();
        drop(sender);
        let error = follow(&receiver, Instant::now(), SystemTime::now(), 1, |_| (), |_| ())
            .err()
            .unwrap();
        assert!(error.to_string().contains("broke off; last said: Serving"), "{error}");
    }
}
