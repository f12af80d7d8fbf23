//! Leadership by a `coordination.k8s.io` Lease: of several operators one writes, and another takes over when it goes.
//!
//! As in client-go, nobody compares clocks: a holder has fallen silent when *this* process has seen no change of the Lease for its duration.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::Instant;

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
    watched: Watched,
}

/// What came of a try to get or keep the Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Held,
    NotHeld,
}

/// The holder's last sign of life, and when this process saw it.
#[derive(Debug, Default)]
struct Watched {
    last: Option<(LeaseSpec, Instant)>,
}

impl Watched {
    /// Whether the Lease is anybody's to take, as it is seen at `now`: it has no holder, or did not change for its duration.
    fn is_free(&mut self, spec: &LeaseSpec, now: Instant) -> bool {
        let since = match &self.last {
            Some((last, since)) if last == spec => *since,
            _ => {
                self.last = Some((spec.clone(), now));
                now
            }
        };
        let duration_s = spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .unwrap_or(0);
        spec.holder_identity.as_deref().is_none_or(str::is_empty) || now.duration_since(since) > Duration::from_secs(duration_s)
    }
}

impl Election {
    /// A candidate named `identity` for the Lease in `namespace`.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            identity,
            watched: Watched::default(),
        }
    }

    /// Waits until this process leads.
    pub async fn acquire(&mut self) {
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
    pub async fn keep(&mut self) {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEW).await;
            let begun = Instant::now();
            // Well before anybody else may take over, who counts from the moment of the last write or later.
            let deadline = renewed + DURATION * 2 / 3;
            match tokio::time::timeout_at(deadline.min(begun + RENEW * 2), self.attempt()).await {
                Ok(Ok(Outcome::Held)) => renewed = begun,
                Ok(Ok(Outcome::NotHeld)) => return,
                Ok(Err(error)) => tracing::warn!(%error, "cannot renew the lease"),
                Err(_) => tracing::warn!("the lease's renewal timed out"),
            }
            if renewed != begun && Instant::now() >= deadline {
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

    async fn attempt(&mut self) -> Result<Outcome, kube::Error> {
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
        } else if self.watched.is_free(&spec, Instant::now()) {
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

    fn lease(holder: Option<&str>, renewed: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: holder.map(Into::into),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(renewed.parse().unwrap())),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_holder_that_was_not_seen_to_change_the_lease_for_its_duration_has_fallen_silent() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut watched = Watched::default();
        let first = lease(Some("a"), "2026-01-01T12:00:00Z");
        assert!(!watched.is_free(&first, at(0)));
        assert!(!watched.is_free(&first, at(15)));
        let renewed = lease(Some("a"), "2026-01-01T12:00:14Z");
        assert!(!watched.is_free(&renewed, at(16)), "it lives");
        assert!(!watched.is_free(&renewed, at(31)));
        assert!(watched.is_free(&renewed, at(32)));
    }

    #[test]
    fn the_clock_of_the_holder_does_not_matter() {
        let start = Instant::now();
        for renewed in ["1999-01-01T00:00:00Z", "2999-01-01T00:00:00Z"] {
            let mut watched = Watched::default();
            let lease = lease(Some("a"), renewed);
            assert!(!watched.is_free(&lease, start), "{renewed}: it may be alive, and its clock wrong");
            assert!(
                watched.is_free(&lease, start + Duration::from_secs(16)),
                "{renewed}: it is silent, whatever it wrote"
            );
        }
    }

    #[test]
    fn a_lease_that_was_given_up_is_free_at_once() {
        let now = Instant::now();
        assert!(Watched::default().is_free(&lease(None, "2026-01-01T12:00:00Z"), now));
        assert!(Watched::default().is_free(&lease(Some(""), "2026-01-01T12:00:00Z"), now));
    }
}
