//! Faults of the things around: the operator killed, the registry away, the object deleted half-way.

use serde_json::{Value, json};

use crate::cluster::{Namespace, SYSTEM, condition, digits_spec, kubectl};
use crate::traffic::infer;

fn operators() -> Vec<String> {
    let list: Value = serde_json::from_str(&kubectl(&[
        "-n",
        SYSTEM,
        "get",
        "pods",
        "-l",
        "app.kubernetes.io/component=operator",
        "-o",
        "json",
    ]))
    .unwrap();
    let running = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["phase"] == "Running";
    list["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(running)
        .map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned())
        .collect()
}

fn leader() -> String {
    let lease: Value = serde_json::from_str(&kubectl(&["-n", SYSTEM, "get", "lease", "plimsoll-operator", "-o", "json"])).unwrap();
    lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
}

/// Kills the operator without a chance to say goodbye.
fn kill_leader() -> String {
    let leader = leader();
    kubectl(&["-n", SYSTEM, "delete", "pod", &leader, "--grace-period=0", "--force"]);
    leader
}

fn jobs(namespace: &Namespace) -> Vec<String> {
    namespace
        .items(&["jobs"])
        .iter()
        .map(|job| job["metadata"]["uid"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn an_operator_killed_in_any_phase_goes_on_without_a_second_job() {
    let namespace = Namespace::alone("killed");
    for (name, phase) in [("at-once", None), ("job", Some("Optimizing")), ("rollout", Some("RollingOut"))] {
        let mut spec = digits_spec("v1");
        // A recipe of its own for each, so that none finds the other's artifact.
        spec["optimize"]["recipe"][0]["prune"]["amount"] = json!(format!("1{}%", name.len()));
        namespace.apply_model(name, &spec);
        if let Some(phase) = phase {
            namespace.wait_until(name, &format!("it is {phase}"), |md| {
                condition(md, "Ready")["reason"] == phase || condition(md, "Ready")["status"] == "True"
            });
        }
        let seen = jobs(&namespace);
        kill_leader();
        namespace.wait_ready(name);
        let now: Vec<String> = jobs(&namespace);
        assert!(seen.iter().all(|job| now.contains(job)), "{name}: a Job was made again");
        let of_model = namespace.items(&["jobs", "-l", &format!("plimsoll.dev/model={name}")]);
        assert_eq!(of_model.len(), 1, "{name}");
        kubectl(&["-n", SYSTEM, "rollout", "status", "deployment/plimsoll-operator", "--timeout=120s"]);
    }
}

#[test]
fn of_two_operators_only_the_leader_writes_and_the_other_takes_over() {
    let namespace = Namespace::alone("leader");
    kubectl(&["-n", SYSTEM, "rollout", "status", "deployment/plimsoll-operator", "--timeout=120s"]);
    namespace.apply_model("one", &digits_spec("v1"));
    namespace.wait_ready("one");
    let (first, all) = (leader(), operators());
    assert_eq!(all.len(), 2, "{all:?}");
    assert!(all.contains(&first), "{first} is none of {all:?}");
    for other in all.iter().filter(|pod| **pod != first) {
        let log = kubectl(&["-n", SYSTEM, "logs", other]);
        assert!(
            !log.contains("\"standing\"") && !log.contains("leading"),
            "{other} works without leading:\n{log}"
        );
    }
    kill_leader();
    namespace.apply_model("two", &digits_spec("v2"));
    namespace.wait_ready("two");
    assert_ne!(leader(), first);
}

/// Cuts the registry off at its Service; what it holds stays.
struct RegistryDown;

impl RegistryDown {
    fn cut() -> Self {
        kubectl(&[
            "-n",
            SYSTEM,
            "patch",
            "service",
            "plimsoll-registry",
            "--type=merge",
            "-p",
            r#"{"spec":{"selector":{"plimsoll.dev/cut":"true"}}}"#,
        ]);
        Self
    }
}

impl Drop for RegistryDown {
    fn drop(&mut self) {
        kubectl(&[
            "-n",
            SYSTEM,
            "patch",
            "service",
            "plimsoll-registry",
            "--type=merge",
            "-p",
            r#"{"spec":{"selector":{"plimsoll.dev/cut":null}}}"#,
        ]);
    }
}

#[test]
fn a_registry_that_is_away_while_a_job_publishes_is_waited_for() {
    let namespace = Namespace::alone("registry-publish");
    // The source must not lie in the registry that goes away.
    let host = crate::cluster::file_server(
        &namespace,
        &[("digits.onnx", &crate::cluster::fixture("models/digits/digits-v1.onnx"))],
        1,
    );
    let down = RegistryDown::cut();
    namespace.apply_model(
        "m",
        &json!({ "source": { "uri": format!("{host}/digits.onnx") }, "optimize": { "recipe": [{ "prune": { "amount": "7%" } }] } }),
    );
    let md = namespace.wait_reason("m", "RegistryUnavailable");
    assert_eq!(condition(&md, "Stalled")["status"], "False", "it may pass");
    drop(down);
    namespace.wait_ready("m");
}

#[test]
fn a_registry_that_is_away_while_a_pod_starts_is_named_and_waited_for() {
    let namespace = Namespace::alone("registry-pull");
    let mut spec = digits_spec("v1");
    // A recipe that no earlier run had: the node must not have pulled the artifact yet.
    let unique = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_millis()
        % 10_000;
    spec["optimize"]["recipe"][0]["prune"]["amount"] = json!(format!("8.{unique:04}%"));
    spec["replicas"] = json!(0);
    namespace.apply_model("digits", &spec);
    namespace.wait_ready("digits");
    let down = RegistryDown::cut();
    namespace.kubectl(&["scale", "md/digits", "--replicas=1"]);
    let md = namespace.wait_reason("digits", "ImageUnavailable");
    assert_eq!(condition(&md, "Stalled")["status"], "False");
    drop(down);
    namespace.wait_until("digits", "its pod came up", |md| md["status"]["readiness"] == "1/1");
    infer(&namespace.address("digits"), "digits").unwrap();
}

#[test]
fn a_model_deleted_while_its_job_runs_leaves_nothing_behind() {
    let namespace = Namespace::new("deleted");
    let host = crate::cluster::file_server(
        &namespace,
        &[("digits.onnx", &crate::cluster::fixture("models/digits/digits-v1.onnx"))],
        1,
    );
    namespace.apply_model(
        "m",
        &json!({ "source": { "uri": format!("{host}/slow?seconds=60&path=digits.onnx") } }),
    );
    namespace.wait_until("m", "its Job's pod runs", |_| {
        namespace
            .items(&["pods", "-l", "app.kubernetes.io/component=optimizer"])
            .iter()
            .any(|pod| pod["status"]["phase"] == "Running")
    });
    namespace.kubectl(&["delete", "md", "m"]);
    let kinds = "md,mr,jobs,deployments,pods,services,poddisruptionbudgets,networkpolicies";
    let started = std::time::Instant::now();
    while !namespace.items(&[kinds, "-l", "plimsoll.dev/model=m"]).is_empty() {
        assert!(
            started.elapsed() < crate::cluster::PATIENCE,
            "still there:\n{}",
            namespace.kubectl(&["get", kinds, "-l", "plimsoll.dev/model=m"])
        );
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
}
