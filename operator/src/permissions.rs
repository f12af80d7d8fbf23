//! The chart's roles grant what the operator's requests take, and no more: each request that it can make is made here, and recorded.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use futures::StreamExt as _;
use kube::ResourceExt as _;
use serde::Deserialize;

use crate::apiserver::Permission;
use crate::apply::tests::Cluster;
use crate::decide::reason::Reason;
use crate::decide::{Notice, Plan};
use crate::lease::Election;
use crate::observe::Stores;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    api_groups: Vec<String>,
    resources: Vec<String>,
    verbs: Vec<String>,
}

/// The permissions that a file of the chart grants.
fn granted(file: &str) -> BTreeSet<Permission> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../charts/plimsoll/files/rules")
        .join(file);
    let rules: Vec<Rule> = serde_yaml_ng::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut granted = BTreeSet::new();
    for rule in rules {
        for group in &rule.api_groups {
            for resource in &rule.resources {
                for verb in &rule.verbs {
                    let new = granted.insert((group.clone(), resource.clone(), verb.clone()));
                    assert!(new, "{file} grants {verb} of {resource} twice");
                }
            }
        }
    }
    granted
}

#[tokio::test]
async fn in_the_namespaces_of_models_exactly_what_is_used_is_granted() {
    let cluster = Cluster::new();
    let (stores, models, _changes) = Stores::watch(&cluster.client, Some("n"));
    let drained = tokio::spawn(models.for_each(|_| std::future::ready(())));
    stores.ready().await.unwrap();
    let watches = || {
        cluster
            .server
            .permissions()
            .into_iter()
            .filter(|(_, _, verb)| verb == "watch")
            .count()
    };
    tokio::time::timeout(Duration::from_secs(10), async {
        while watches() < 8 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("each store lists, then watches");
    drained.abort();

    let mut plan = cluster.plan();
    let notice = Notice {
        reason: Reason::Serving,
        message: "it serves".into(),
    };
    // The same news twice is one Event, counted.
    plan.events = vec![notice.clone(), notice];
    cluster.apply_seeing(&plan).await.unwrap();
    plan.replicas.values_mut().for_each(|replicas| *replicas = 2);
    cluster.apply_seeing(&plan).await.unwrap();
    let last = Plan {
        delete_jobs: plan.job.iter().map(|job| job.name.clone()).collect(),
        delete_revisions: plan.revision.iter().map(|revision| revision.name_any()).collect(),
        status: plan.status,
        ..Plan::default()
    };
    cluster.apply_seeing(&last).await.unwrap();
    assert_eq!(granted("models.yaml"), cluster.server.permissions());
}

// While the clock is stopped, time passes where somebody waits for it, and nowhere else.
#[tokio::test(start_paused = true)]
async fn for_the_election_exactly_what_is_used_is_granted() {
    let cluster = Cluster::new();
    let mut election = Election::new(cluster.client.clone(), "n", "a".into());
    election.acquire().await;
    election.release().await;
    assert_eq!(granted("leader.yaml"), cluster.server.permissions());
    let mut other = Election::new(cluster.client.clone(), "n", "b".into());
    tokio::time::timeout(Duration::from_secs(1), other.acquire())
        .await
        .expect("what was given up is taken at once");
}
