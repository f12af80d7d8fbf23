//! The operator as whoever runs it sees it: its pods, which of them leads, what it measures of itself, and ways to end it.

use std::process::Command;

use serde_json::Value;

use crate::cluster::{SYSTEM, kubectl, text};
use crate::watch::Watch;

/// The names of the operator's running pods.
pub(crate) fn operators() -> Vec<String> {
    let selector = "app.kubernetes.io/component=operator";
    let list: Value = serde_json::from_str(&kubectl(&["-n", SYSTEM, "get", "pods", "-l", selector, "-o", "json"])).unwrap();
    let running = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["phase"] == "Running";
    let pods = list["items"].as_array().unwrap();
    pods.iter()
        .filter(running)
        .map(|pod| text(&pod["metadata"]["name"]).to_owned())
        .collect()
}

/// The pod that the Lease names; empty where it names none.
pub(crate) fn leader() -> String {
    let lease: Value = serde_json::from_str(&kubectl(&["-n", SYSTEM, "get", "lease", "plimsoll-operator", "-o", "json"])).unwrap();
    text(&lease["spec"]["holderIdentity"]).to_owned()
}

/// Waits until every replica of the operator is up.
pub(crate) fn wait_up() {
    kubectl(&["-n", SYSTEM, "rollout", "status", "deployment/plimsoll-operator", "--timeout=120s"]);
}

/// The lines of a pod's `/metrics` that belong to the metric `name`.
fn series(pod: &str, name: &str) -> Vec<String> {
    let text = kubectl(&[
        "get",
        "--raw",
        &format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}:8080/proxy/metrics"),
    ]);
    let of_metric = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    text.lines().filter(of_metric).map(str::to_owned).collect()
}

/// The sum of a metric's series in a pod's `/metrics`; 0 where there is none.
pub(crate) fn metric(pod: &str, name: &str) -> f64 {
    let value = |line: &String| line.rsplit(' ').next().unwrap().parse::<f64>().expect("a number");
    series(pod, name).iter().map(value).sum()
}

/// Whether the operator's pod has passed over a model since it started.
pub(crate) fn has_seen(pod: &str, namespace: &str, model: &str) -> bool {
    let of_model = |line: &String| line.contains(&format!("namespace=\"{namespace}\"")) && line.contains(&format!("name=\"{model}\""));
    series(pod, "plimsoll_operator_model").iter().any(of_model)
}

/// Ends the leader's process as the kernel does where memory runs out, and waits until the kubelet has started it again.
pub(crate) fn crash_leader() {
    let leader = leader();
    let pods = Watch::start(SYSTEM, "pods");
    let restarts = |pods: &[&Value]| {
        let pod = pods.iter().find(|pod| pod["metadata"]["name"] == *leader)?;
        let container = &pod["status"]["containerStatuses"][0];
        container["state"]["running"]
            .is_object()
            .then(|| container["restartCount"].as_u64())?
    };
    let before = pods.until("the leader runs", restarts);
    let killed = Command::new("kill")
        .args(["-KILL", &process(&leader)])
        .status()
        .expect("kill starts");
    assert!(killed.success(), "the leader's process was gone already");
    pods.until("the leader is started again", |pods| restarts(pods).filter(|now| *now > before));
}

/// The id of the operator's process in a pod: the node is this machine.
fn process(pod: &str) -> String {
    let name = format!("POD_NAME={pod}");
    let of_pod = |folder: &std::path::Path| {
        let command = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
        let environment = std::fs::read(folder.join("environ")).unwrap_or_default();
        command.starts_with("plimsoll-opera") && environment.split(|byte| *byte == 0).any(|variable| variable == name.as_bytes())
    };
    let mut processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    let found = processes
        .find(|folder| of_pod(folder))
        .unwrap_or_else(|| panic!("no process of {pod}"));
    found.file_name().unwrap().to_string_lossy().into_owned()
}

/// Removes the leader's pod, as when its node is lost, and returns its name.
pub(crate) fn remove_leader() -> String {
    let leader = leader();
    kubectl(&["-n", SYSTEM, "delete", "pod", &leader, "--grace-period=0", "--force"]);
    leader
}

/// The operator of the whole cluster while it stands aside; it comes back whatever becomes of the test.
pub(crate) struct Aside;

impl Aside {
    pub(crate) fn stand() -> Self {
        scale("0");
        let selector = "app.kubernetes.io/component=operator";
        kubectl(&["-n", SYSTEM, "wait", "--for=delete", "pod", "-l", selector, "--timeout=60s"]);
        Self
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        scale("2");
        wait_up();
    }
}

fn scale(replicas: &str) {
    kubectl(&["-n", SYSTEM, "scale", "deployment/plimsoll-operator", "--replicas", replicas]);
}
