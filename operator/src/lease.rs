//! Leadership by a `coordination.k8s.io` Lease: of several operators one writes, and another takes over when it goes.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};

/// How long a leader that falls silent keeps the Lease.
const DURATION: Duration = Duration::from_secs(15);
/// How often a leader renews it, and others look.
const RENEW: Duration = Duration::from_secs(2);
/// Name of the Lease.
const NAME: &str = "plimsoll-operator";

/// A holder, or would-be holder, of the Lease.
pub struct Election {
    api: Api<Lease>,
    identity: String,
}

/// What came of a try to get or keep the Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Held,
    NotHeld,
}

impl Election {
    /// A candidate named `identity` for the Lease in `namespace`.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            identity,
        }
    }

    /// Waits until this process leads.
    pub async fn acquire(&self) {
        loop {
            match self.attempt().await {
                Ok(Outcome::Held) => return,
                Ok(Outcome::NotHeld) => {}
                Err(error) => tracing::warn!(%error, "cannot reach the lease"),
            }
            tokio::time::sleep(RENEW).await;
        }
    }

    /// Keeps the Lease; returns once it is lost, after which this process must write nothing more.
    pub async fn keep(&self) {
        let mut renewed = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(RENEW).await;
            match tokio::time::timeout(RENEW * 2, self.attempt()).await {
                Ok(Ok(Outcome::Held)) => renewed = tokio::time::Instant::now(),
                Ok(Ok(Outcome::NotHeld)) => return,
                Ok(Err(error)) => tracing::warn!(%error, "cannot renew the lease"),
                Err(_) => tracing::warn!("the lease's renewal timed out"),
            }
            // Stop well before anybody else may take over.
            if renewed.elapsed() > DURATION * 2 / 3 {
                return;
            }
        }
    }

    /// Gives the Lease up, so that another takes over at once.
    pub async fn release(&self) {
        if let Ok(Some(mut lease)) = self.api.get_opt(NAME).await
            && let Some(spec) = lease
                .spec
                .as_mut()
                .filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity))
        {
            spec.holder_identity = None;
            let _ = self.api.replace(NAME, &PostParams::default(), &lease).await;
        }
    }

    async fn attempt(&self) -> Result<Outcome, kube::Error> {
        let now = Timestamp::now();
        let Some(mut lease) = self.api.get_opt(NAME).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(NAME.into()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.held(now, now, 0)),
            };
            return outcome(self.api.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or(0);
        if spec.holder_identity.as_deref() == Some(&self.identity) {
            let acquired = spec.acquire_time.map_or(now, |time| time.0);
            lease.spec = Some(self.held(acquired, now, transitions));
        } else if is_free(&spec, now) {
            lease.spec = Some(self.held(now, now, transitions + 1));
        } else {
            return Ok(Outcome::NotHeld);
        }
        // The resource version in it makes the write fail where another was faster.
        outcome(self.api.replace(NAME, &PostParams::default(), &lease).await)
    }

    fn held(&self, acquired: Timestamp, renewed: Timestamp, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(DURATION.as_secs()).unwrap_or(15)),
            acquire_time: Some(MicroTime(acquired)),
            renew_time: Some(MicroTime(renewed)),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }
}

fn is_free(spec: &LeaseSpec, now: Timestamp) -> bool {
    if spec.holder_identity.as_deref().is_none_or(str::is_empty) {
        return true;
    }
    let Some(renewed) = &spec.renew_time else { return true };
    let duration = Duration::from_secs(u64::try_from(spec.lease_duration_seconds.unwrap_or(0)).unwrap_or(0));
    renewed.0 + duration < now
}

fn outcome(written: Result<Lease, kube::Error>) -> Result<Outcome, kube::Error> {
    match written {
        Ok(_) => Ok(Outcome::Held),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(Outcome::NotHeld),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_free_once_its_holder_fell_silent_or_left() {
        let now: Timestamp = "2026-01-01T12:00:00Z".parse().unwrap();
        let election_time = |seconds: i64| Some(MicroTime(now - jiff::SignedDuration::from_secs(seconds)));
        let spec = |holder: Option<&str>, silent| LeaseSpec {
            holder_identity: holder.map(Into::into),
            lease_duration_seconds: Some(15),
            renew_time: election_time(silent),
            ..LeaseSpec::default()
        };
        assert!(!is_free(&spec(Some("a"), 14), now));
        assert!(is_free(&spec(Some("a"), 16), now));
        assert!(is_free(&spec(None, 1), now));
    }
}
