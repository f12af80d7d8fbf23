//! Faults of the things around: the operator killed, the registry away, the object deleted half-way.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::{Namespace, SYSTEM, condition, digits_spec, eventually, file_server, fixture, kubectl, text};
use crate::operator::{crash_leader, has_seen, leader, metric, operators, remove_leader, wait_up};
use crate::traffic::infer;
use crate::watch::Watch;

/// The steps of an optimisation's pod; the containers start together, and each waits for the one before.
const STEPS: [&str; 5] = ["fetch", "convert", "compress", "evaluate", "publish"];

/// The optimisation pods of a model.
fn of_optimizer<'a>(pods: &[&'a Value], model: &str) -> impl Iterator<Item = &'a Value> {
    let of_model = move |pod: &&Value| {
        let labels = &pod["metadata"]["labels"];
        labels["plimsoll.dev/model"] == model && labels["app.kubernetes.io/component"] == "optimizer"
    };
    pods.iter().copied().filter(of_model)
}

/// The state of a step's container; null before it has one.
fn state<'a>(pod: &'a Value, step: &str) -> &'a Value {
    let containers = pod["status"]["containerStatuses"].as_array();
    let found = containers.and_then(|containers| containers.iter().find(|container| container["name"] == step));
    found.map_or(&Value::Null, |container| &container["state"])
}

/// The step at which a model's optimisation is: the first that has not ended.
fn step(pods: &[&Value], model: &str) -> Option<&'static str> {
    let pod = of_optimizer(pods, model).max_by_key(|pod| text(&pod["metadata"]["creationTimestamp"]).to_owned())?;
    let under_way = STEPS.into_iter().find(|step| !state(pod, step)["terminated"].is_object())?;
    state(pod, under_way)["running"].is_object().then_some(under_way)
}

/// Whether a model's result was made, and no try to publish it has got through.
fn publishes(pods: &[&Value], model: &str) -> bool {
    let done = |step: &str| of_optimizer(pods, model).any(|pod| state(pod, step)["terminated"]["exitCode"] == 0);
    done("evaluate") && !done("publish")
}

fn of_model(objects: &[Value], model: &str) -> Vec<Value> {
    let labelled = |object: &&Value| object["metadata"]["labels"]["plimsoll.dev/model"] == model;
    objects.iter().filter(labelled).cloned().collect()
}

/// The label without which the pods of a test find no node.
struct Gate;

impl Gate {
    const LABEL: &str = "plimsoll.dev/e2e-gate";

    fn open() -> Self {
        kubectl(&["label", "nodes", "--all", "--overwrite", &format!("{}=open", Self::LABEL)]);
        Self
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        kubectl(&["label", "nodes", "--all", &format!("{}-", Self::LABEL)]);
    }
}

/// Five models, each held in another phase while the operator's process is killed.
#[test]
fn an_operator_killed_in_each_phase_goes_on_without_a_second_job() {
    let namespace = Namespace::alone("killed");
    wait_up();
    let (jobs, pods) = (namespace.watch("jobs"), namespace.watch("pods"));

    // Rolling out: its Deployment is there, and its pod waits for a node.
    let mut spec = digits_spec("v1");
    spec["optimize"]["recipe"][0]["prune"]["amount"] = json!("11%");
    namespace.apply_model("replacing", &digits_spec("v2"));
    namespace.wait_ready("replacing");
    spec["accelerator"] = json!({ "resource": "nvidia.com/gpu", "nodeLabels": { Gate::LABEL: "open" } });
    namespace.apply_model("rolling-out", &spec);
    namespace.wait_reason("rolling-out", "Unschedulable");
    // The same, of a model whose first revision serves on.
    namespace.apply_model("replacing", &spec);
    namespace.wait_reason("replacing", "Unschedulable");

    // What the others read must not lie in the registry, which goes away for a while so that publishing takes as long.
    let digits = |file: &str| fixture("models/digits").join(file);
    let (model, data, heldout) = (
        digits("digits-v1.onnx"),
        digits("digits-training.npz"),
        digits("digits-heldout.npz"),
    );
    let files: [(&str, &std::path::Path); 3] = [("digits.onnx", &model), ("training.npz", &data), ("heldout.npz", &heldout)];
    let host = file_server(&namespace, &files, 1);
    let down = RegistryDown::cut();
    let spec = |path: &str, recipe: Value| {
        let evaluation = json!({ "dataset": { "uri": format!("{host}/heldout.npz") }, "metric": "Accuracy" });
        let optimize = json!({ "recipe": recipe, "evaluation": evaluation, "budget": { "maxAccuracyDrop": "5%" } });
        json!({ "source": { "uri": format!("{host}/{path}") }, "optimize": optimize })
    };
    namespace.apply_model("publishing", &spec("digits.onnx", json!([{ "prune": { "amount": "13%" } }])));
    pods.until("one publishes", |pods| publishes(pods, "publishing").then_some(()));
    let slow = "slow?seconds=25&path=digits.onnx";
    namespace.apply_model("fetching", &spec(slow, json!([{ "prune": { "amount": "12%" } }])));
    let long = json!({ "epochs": 100, "data": { "uri": format!("{host}/training.npz") } });
    let training = json!([{ "prune": { "amount": "14%" } }, { "distill": long }]);
    namespace.apply_model("compressing", &spec("digits.onnx", training));
    pods.until("one fetches, another compresses", |pods| {
        (step(pods, "fetching") == Some("fetch") && step(pods, "compressing") == Some("compress")).then_some(())
    });

    crash_leader();
    let now = pods.now();
    let now: Vec<&Value> = now.iter().collect();
    assert_eq!(step(&now, "fetching"), Some("fetch"), "it was killed while one fetched");
    assert_eq!(step(&now, "compressing"), Some("compress"), "it was killed while one compressed");
    assert!(publishes(&now, "publishing"), "it was killed while one published");
    let waiting = namespace.get(&["md", "rolling-out"]);
    assert_eq!(
        condition(&waiting, "Ready")["status"],
        "False",
        "it was killed while one rolled out"
    );
    assert_eq!(of_model(&namespace.items(&["deployments"]), "rolling-out").len(), 1);
    let replacing = namespace.get(&["md", "replacing"]);
    assert_eq!(
        (&condition(&replacing, "Available")["status"], &replacing["status"]["revision"]),
        (&json!("True"), &json!(1)),
        "it was killed while one replaced a revision that served on"
    );
    assert_eq!(of_model(&namespace.items(&["deployments"]), "replacing").len(), 2);

    drop(down);
    let _gate = Gate::open();
    for (model, revisions) in [
        ("rolling-out", 1),
        ("replacing", 2),
        ("publishing", 1),
        ("compressing", 1),
        ("fetching", 1),
    ] {
        namespace.wait_ready(model);
        let made = of_model(&jobs.ever(), model);
        let uids: BTreeSet<&str> = made.iter().map(|job| text(&job["metadata"]["uid"])).collect();
        assert_eq!(uids.len(), revisions, "{model} had other Jobs than one a revision: {made:#?}");
        infer(&namespace.address(model), model).unwrap();
    }
}

/// A policy of the apiserver that notes on each object, as a label, which pod of the operator wrote it last.
struct WritersNoted;

impl WritersNoted {
    const LABEL: &str = "plimsoll.dev/e2e-writer";
    const NAME: &str = "plimsoll-e2e-writer";

    fn in_namespace(namespace: &Namespace) -> Self {
        // A token is bound to its pod, and the apiserver knows which it is.
        let pod = "request.userInfo.extra['authentication.kubernetes.io/pod-name'][0]";
        let patch = format!(
            "[JSONPatch{{op: 'add', path: '/metadata/labels/{}', value: {pod}}}]",
            Self::LABEL.replace('/', "~1")
        );
        crate::cluster::apply(&json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicy", "metadata": { "name": Self::NAME },
            "spec": {
                "failurePolicy": "Fail", "reinvocationPolicy": "Never",
                "matchConstraints": {
                    "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": namespace.name } },
                    "resourceRules": [{
                        "apiGroups": ["*"], "apiVersions": ["*"], "operations": ["CREATE", "UPDATE"],
                        "resources": ["modelrevisions", "jobs", "deployments", "services", "poddisruptionbudgets", "networkpolicies"],
                    }],
                },
                "matchConditions": [{
                    "name": "operator", "expression": format!("request.userInfo.username == '{OPERATOR_USER}'"),
                }],
                "mutations": [{ "patchType": "JSONPatch", "jsonPatch": { "expression": patch } }],
            },
        }));
        crate::cluster::apply(&json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicyBinding", "metadata": { "name": Self::NAME },
            "spec": { "policyName": Self::NAME },
        }));
        let noted = Self;
        // It is in force a moment after it is stored.
        let user = format!("--as={OPERATOR_USER}");
        let extra = "--as-user-extra=authentication.kubernetes.io/pod-name=probe";
        let mut probe = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "probe", "labels": { "probe": "true" } },
            "spec": { "ports": [{ "port": 80 }] } });
        probe["metadata"]["namespace"] = json!(namespace.name);
        eventually("the policy is in force", || {
            let written = crate::cluster::apply_with(&["--dry-run=server", "-o", "json", &user, extra], &probe);
            Self::writer(&written) == "probe"
        });
        noted
    }

    fn writer(object: &Value) -> &str {
        text(&object["metadata"]["labels"][Self::LABEL])
    }
}

impl Drop for WritersNoted {
    fn drop(&mut self) {
        let kinds = "mutatingadmissionpolicy,mutatingadmissionpolicybinding";
        kubectl(&["delete", kinds, Self::NAME, "--ignore-not-found"]);
    }
}

/// The user that the operator's pods are to the apiserver.
const OPERATOR_USER: &str = "system:serviceaccount:plimsoll-system:plimsoll";

/// Asserts that all there is of `model` was written by the operator's pod `writer`, and so were its Events.
fn expect_written_by(namespace: &Namespace, model: &str, writer: &str) {
    let kinds = "mr,jobs,deployments,services,poddisruptionbudgets,networkpolicies";
    let written = namespace.items(&[kinds, "-l", &format!("plimsoll.dev/model={model}")]);
    let found: BTreeSet<&str> = written.iter().map(|object| text(&object["kind"])).collect();
    assert_eq!(found.len(), 6, "of each kind something: {found:?}");
    for object in &written {
        assert_eq!(
            WritersNoted::writer(object),
            writer,
            "{}/{}",
            object["kind"],
            object["metadata"]["name"]
        );
    }
    // News is told last.
    let writers: BTreeSet<String> = namespace.watch("events").until("it is told that the model serves", |events| {
        let is_of_model = |event: &&&Value| event["regarding"]["kind"] == "ModelDeployment" && event["regarding"]["name"] == model;
        let news: Vec<&&Value> = events.iter().filter(is_of_model).collect();
        let writers = || news.iter().map(|event| text(&event["reportingInstance"]).to_owned()).collect();
        news.iter().any(|event| event["reason"] == "Serving").then(writers)
    });
    assert_eq!(writers, BTreeSet::from([writer.to_owned()]), "who told of {model}");
}

#[test]
fn of_two_operators_only_the_leader_writes_and_the_other_takes_over() {
    let namespace = Namespace::alone("leader");
    wait_up();
    let (first, all) = (leader(), operators());
    assert_eq!(all.len(), 2, "{all:?}");
    let second = all.iter().find(|pod| **pod != first).expect("another than the leader");
    let noted = WritersNoted::in_namespace(&namespace);
    namespace.apply_model("one", &digits_spec("v1"));
    namespace.wait_ready("one");
    assert_eq!(leader(), first);
    namespace.wait_settled();
    expect_written_by(&namespace, "one", &first);
    for (pod, leads) in [(&first, true), (second, false)] {
        assert_eq!(metric(pod, "plimsoll_operator_leader"), f64::from(u8::from(leads)), "{pod}");
        assert_eq!(
            metric(pod, "plimsoll_operator_reconciles_total") > 0.0,
            leads,
            "the passes of {pod}"
        );
    }

    let before = namespace.versions();
    remove_leader();
    namespace.apply_model("two", &digits_spec("v2"));
    namespace.wait_ready("two");
    let now = leader();
    assert_ne!(now, first);
    expect_written_by(&namespace, "two", &now);
    // What the first one left is as it should be, so its successor has written nothing.
    expect_written_by(&namespace, "one", &first);
    let after = namespace.versions();
    let changed: Vec<_> = before.iter().filter(|(name, version)| after.get(*name) != Some(version)).collect();
    assert!(changed.is_empty(), "written anew by the second: {changed:?}");
    drop(noted);
    wait_up();
}

#[test]
fn an_operator_that_starts_anew_writes_nothing_where_nothing_changed() {
    let namespace = Namespace::alone("restarted");
    wait_up();
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    namespace.wait_settled();
    let before = namespace.versions();
    let leases = Watch::start(SYSTEM, "leases");
    kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/plimsoll-operator"]);
    wait_up();
    let new = operators();
    let holder = |lease: &Value| text(&lease["spec"]["holderIdentity"]).to_owned();
    leases.until("one of the new pods leads", |leases| {
        leases.iter().any(|lease| new.contains(&holder(lease))).then_some(())
    });
    let is_given_up = |lease: &Value| lease["metadata"]["name"] == "plimsoll-operator" && holder(lease).is_empty();
    assert!(leases.ever_held(is_given_up), "the Lease was not given up, but ran out");
    eventually("the new leader has passed over the model", || {
        let leader = leader();
        operators().contains(&leader) && has_seen(&leader, &namespace.name, "digits")
    });
    // What the pass would write, and what others would then do about it.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(namespace.versions(), before);
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
    let host = file_server(&namespace, &[("digits.onnx", &fixture("models/digits/digits-v1.onnx"))], 1);
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

/// kind/name of everything in a namespace but news.
fn everything(namespace: &Namespace) -> BTreeSet<String> {
    let kinds = "md,mr,jobs,deployments,replicasets,pods,services,endpointslices,poddisruptionbudgets,networkpolicies,configmaps,secrets,\
                 persistentvolumeclaims,serviceaccounts,roles,rolebindings,leases";
    let list = namespace.kubectl(&["get", kinds, "-o", "name"]);
    list.lines().map(str::to_owned).collect()
}

#[test]
fn a_model_deleted_while_its_job_runs_leaves_nothing_behind() {
    let namespace = Namespace::new("deleted");
    let host = file_server(&namespace, &[("digits.onnx", &fixture("models/digits/digits-v1.onnx"))], 1);
    let before = everything(&namespace);
    let source = json!({ "source": { "uri": format!("{host}/slow?seconds=60&path=digits.onnx") } });
    let pods = namespace.watch("pods");
    namespace.apply_model("m", &source);
    pods.until("its Job fetches", |pods| (step(pods, "m") == Some("fetch")).then_some(()));
    namespace.kubectl(&["delete", "md", "m"]);
    pods.until("its pods are gone", |pods| of_optimizer(pods, "m").next().is_none().then_some(()));
    eventually("nothing is left behind", || {
        let now = everything(&namespace);
        let others: Vec<_> = now.symmetric_difference(&before).collect();
        println!("left behind, or gone with it: {others:?}");
        others.is_empty()
    });
}
