//! The rolling update over all revisions: who gets how many replicas next.
//!
//! One rule set as in Kubernetes' Deployment, but counted over revisions: pods never exceed desired + surge, ready pods never fall below
//! desired - unavailable by our doing, and pods that are not ready go before those that are.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use plimsoll_crds::Rollout;

use super::revision::Revision;

/// Replicas by revision that shall be asked for now, on the way to `desired` pods of the revision that is asked for.
///
/// While that one has no artifact yet, the revision that serves best keeps the place. A revision without a Deployment appears only once it
/// shall have pods.
#[must_use]
pub fn replicas(revisions: &[Revision], desired_revision: Option<&str>, desired: i32, rollout: Option<&Rollout>) -> BTreeMap<String, i32> {
    let mut planned: BTreeMap<String, i32> = revisions
        .iter()
        .filter_map(|revision| Some((revision.name.clone(), revision.replicas?)))
        .collect();
    let target = revisions
        .iter()
        .find(|revision| Some(revision.name.as_str()) == desired_revision && revision.artifact.is_some())
        .or_else(|| in_service(revisions));
    let Some(target) = target else { return planned };

    let (surge, unavailable) = limits(desired, rollout);
    let old: Vec<&Revision> = revisions.iter().filter(|revision| revision.name != target.name).collect();
    let asked = |revision: &Revision| revision.replicas.unwrap_or(0);
    let old_asked: i32 = old.iter().map(|revision| asked(revision)).sum();
    // Pods that are still going count against the ceiling: their devices are not free yet.
    let old_pods: i32 = old.iter().map(|revision| revision.pods.max(asked(revision))).sum();

    let room = (desired + surge - old_pods).max(0);
    let current = asked(target);
    let grown = if current > desired {
        desired
    } else {
        desired.min(room.max(current))
    };
    planned.insert(target.name.clone(), grown);

    // How many of the old may go: what is there, less the floor, less what the target still owes.
    let target_ready = target.ready.min(grown);
    let old_ready: i32 = old.iter().map(|revision| revision.ready.min(asked(revision))).sum();
    let floor = (desired - unavailable).max(0);
    let mut spare_ready = (old_ready + target_ready - floor).clamp(0, old_ready);
    let mut unready = old_asked - old_ready;
    for revision in &old {
        let ready = revision.ready.min(asked(revision));
        let drop_unready = (asked(revision) - ready).min(unready);
        unready -= drop_unready;
        let drop_ready = ready.min(spare_ready);
        // A Deployment that is scaled down loses its unready pods first, so this many ready ones go at most.
        spare_ready -= drop_ready;
        if revision.replicas.is_some() {
            planned.insert(revision.name.clone(), asked(revision) - drop_unready - drop_ready);
        }
    }
    planned
}

/// The revision that serves best: most ready pods, then most asked for, then the newest; `None` where nothing was ever deployed.
#[must_use]
pub fn in_service(revisions: &[Revision]) -> Option<&Revision> {
    revisions
        .iter()
        .filter(|revision| revision.replicas.is_some() && revision.artifact.is_some())
        .max_by_key(|revision| (revision.ready, revision.replicas, revision.number))
}

/// Surge and unavailable pods; surge is 1 where both would be 0.
fn limits(desired: i32, rollout: Option<&Rollout>) -> (i32, i32) {
    let resolve = |amount: &IntOrString, up: bool| match amount {
        IntOrString::Int(number) => (*number).max(0),
        IntOrString::String(text) => {
            let percent: i32 = text.strip_suffix('%').and_then(|percent| percent.parse().ok()).unwrap_or(0);
            let scaled = desired * percent;
            if up { (scaled + 99) / 100 } else { scaled / 100 }
        }
    };
    let surge = rollout
        .and_then(|rollout| rollout.max_surge.as_ref())
        .map_or(1, |amount| resolve(amount, true));
    let unavailable = rollout
        .and_then(|rollout| rollout.max_unavailable.as_ref())
        .map_or(0, |amount| resolve(amount, false));
    if surge == 0 && unavailable == 0 {
        (0, 1)
    } else {
        (surge, unavailable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revision(number: i64, replicas: i32, ready: i32) -> Revision {
        Revision {
            name: format!("m-{number}"),
            number,
            artifact: Some(format!("sha256:{number}")),
            replicas: (replicas >= 0).then_some(replicas),
            pods: replicas.max(0),
            ready,
        }
    }

    #[test]
    fn a_first_revision_gets_all_replicas_at_once() {
        let planned = replicas(&[revision(1, -1, 0)], Some("m-1"), 3, None);
        assert_eq!(planned, BTreeMap::from([("m-1".into(), 3)]));
    }

    #[test]
    fn the_new_revision_starts_within_the_surge_and_the_old_stays_until_it_is_ready() {
        let planned = replicas(&[revision(1, 2, 2), revision(2, -1, 0)], Some("m-2"), 2, None);
        assert_eq!(planned, BTreeMap::from([("m-1".into(), 2), ("m-2".into(), 1)]));
        let planned = replicas(&[revision(1, 2, 2), revision(2, 1, 1)], Some("m-2"), 2, None);
        assert_eq!(planned, BTreeMap::from([("m-1".into(), 1), ("m-2".into(), 1)]));
    }

    #[test]
    fn without_surge_an_old_pod_makes_room_first() {
        let scarce = Rollout {
            max_surge: Some(IntOrString::Int(0)),
            max_unavailable: Some(IntOrString::Int(1)),
            ..Rollout::default()
        };
        let planned = replicas(&[revision(1, 2, 2), revision(2, -1, 0)], Some("m-2"), 2, Some(&scarce));
        assert_eq!(planned, BTreeMap::from([("m-1".into(), 1), ("m-2".into(), 0)]));
        // The old pod still holds its device while it drains.
        let draining = Revision {
            pods: 2,
            ..revision(1, 1, 1)
        };
        assert_eq!(replicas(&[draining, revision(2, 0, 0)], Some("m-2"), 2, Some(&scarce))["m-2"], 0);
        assert_eq!(
            replicas(&[revision(1, 1, 1), revision(2, 0, 0)], Some("m-2"), 2, Some(&scarce))["m-2"],
            1
        );
    }

    #[test]
    fn a_revision_without_artifact_leaves_the_one_in_service_alone() {
        let failed = Revision {
            artifact: None,
            ..revision(2, -1, 0)
        };
        let planned = replicas(&[revision(1, 3, 3), failed], Some("m-2"), 3, None);
        assert_eq!(planned, BTreeMap::from([("m-1".into(), 3)]));
    }

    #[test]
    fn old_pods_that_never_got_ready_go_first() {
        let planned = replicas(&[revision(1, 2, 2), revision(2, 1, 0), revision(3, -1, 0)], Some("m-3"), 2, None);
        assert_eq!(planned["m-1"], 2);
        assert_eq!(planned["m-2"], 0);
    }
}
