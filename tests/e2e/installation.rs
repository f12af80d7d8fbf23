//! Ways to install, to upgrade and to take away: the chart on a real cluster.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::cluster::{Namespace, REGISTRY, SYSTEM, apply, condition, digits_spec, eventually, fixture, helm, kubectl, pinned_spec, text};
use crate::operator::{Aside, has_seen, leader, operators};
use crate::traffic::{get_as, infer};

/// The chart.
fn chart() -> PathBuf {
    fixture("../charts/plimsoll")
}

/// A registry of the user's own that lets nobody in without a password.
struct OwnRegistry {
    host: String,
    /// Its address on this machine.
    address: String,
    /// Where the node's container runtime is told how to speak to it.
    told: PathBuf,
}

/// Users with their passwords, and the bcrypt hashes that the registry knows them by.
const USERS: [(&str, &str, &str); 3] = [
    ("pusher", "push-e2e", "$2b$04$e2ePushSaltForTestsOneht81vnyUNYap5U9babVRG89Fgy98Qca"),
    ("puller", "pull-e2e", "$2b$04$e2ePullSaltForTestsOneberdN/UXYZfhKtu3FmdtVDsWKFUIw1S"),
    ("looker", "look-e2e", "$2b$04$e2eLookSaltForTestsOneOlBY7dj9YcTCANb4BQk4Lav/uYmMeZy"),
];

impl OwnRegistry {
    fn start(namespace: &Namespace) -> Self {
        let host = format!("registry.{}.svc.cluster.local:5000", namespace.name);
        let users: Vec<String> = USERS.iter().map(|(user, _, hash)| format!("{user}:{hash}")).collect();
        apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "users", "namespace": namespace.name },
            "stringData": { "htpasswd": users.join("\n") },
        }));
        for (user, password, _) in USERS {
            Self::write_secret(namespace, &host, user, password);
        }
        let image = kubectl(&[
            "-n",
            SYSTEM,
            "get",
            "deployment/plimsoll-registry",
            "-o",
            "jsonpath={.spec.template.spec.containers[0].image}",
        ]);
        let variable = |name: &str, value: &str| json!({ "name": name, "value": value });
        let labels = json!({ "app": "registry" });
        apply(&json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "registry", "namespace": namespace.name },
            "spec": { "selector": { "matchLabels": labels }, "template": { "metadata": { "labels": labels }, "spec": {
                "automountServiceAccountToken": false, "enableServiceLinks": false,
                "securityContext": { "runAsNonRoot": true, "runAsUser": 65532, "fsGroup": 65532, "seccompProfile": { "type": "RuntimeDefault" } },
                "containers": [{
                    "name": "registry", "image": image, "imagePullPolicy": "IfNotPresent",
                    "env": [
                        variable("REGISTRY_AUTH", "htpasswd"),
                        variable("REGISTRY_AUTH_HTPASSWD_REALM", "e2e"),
                        variable("REGISTRY_AUTH_HTPASSWD_PATH", "/users/htpasswd"),
                    ],
                    "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                    "readinessProbe": { "tcpSocket": { "port": 5000 }, "periodSeconds": 1 },
                    "volumeMounts": [{ "name": "users", "mountPath": "/users" }, { "name": "storage", "mountPath": "/var/lib/registry" }],
                }],
                "volumes": [{ "name": "users", "secret": { "secretName": "users" } }, { "name": "storage", "emptyDir": {} }],
            } } },
        }));
        apply(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "registry", "namespace": namespace.name },
            "spec": { "type": "NodePort", "selector": labels, "ports": [{ "port": 5000 }] },
        }));
        namespace.kubectl(&["rollout", "status", "deployment/registry", "--timeout=120s"]);
        let port = namespace.kubectl(&["get", "service/registry", "-o", "jsonpath={.spec.ports[0].nodePort}"]);
        let address = format!("http://127.0.0.1:{port}");
        // As the administrator of a node does for a registry without TLS.
        let cluster = std::env::var("KUBECONFIG").expect("set by cargo xtask test");
        let told = Path::new(&cluster).with_file_name("config").join("certs.d").join(&host);
        std::fs::create_dir_all(&told).unwrap();
        std::fs::write(told.join("hosts.toml"), format!("server = \"{address}\"\n")).unwrap();
        Self { host, address, told }
    }

    /// The Secret `user`, with which one logs in.
    fn write_secret(namespace: &Namespace, host: &str, user: &str, password: &str) {
        let login = json!({ "auths": { host: { "username": user, "password": password } } });
        apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": { "name": user, "namespace": namespace.name },
            "type": "kubernetes.io/dockerconfigjson", "stringData": { ".dockerconfigjson": login.to_string() },
        }));
    }

    /// The tags of what was published.
    fn tags(&self) -> Value {
        let list = format!("{}/v2/team/models/tags/list", self.address);
        assert_eq!(get_as(None, &list).0, 401, "nobody is let in without a password");
        let (user, password, _) = USERS[1];
        get_as(Some((user, password)), &list).1
    }
}

impl Drop for OwnRegistry {
    fn drop(&mut self) {
        // What is left does no harm; the cluster's end takes it.
        let _ = std::fs::remove_dir_all(&self.told);
    }
}

/// The kind PodMonitor as the Prometheus operator publishes it, until the test ends.
struct PodMonitors;

impl PodMonitors {
    const MODULE: &str = "github.com/prometheus-operator/prometheus-operator@v0.92.1";
    const FILE: &str = "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml";
    const DIGEST: &str = "sha256:b0d6a359b39fd7ffe22f3aaa0eb157cf5e2ce22fefee8e3f2b2e222669906285";

    fn install() -> Self {
        let output = Command::new("go")
            .args(["mod", "download", "-json", Self::MODULE])
            .current_dir("/")
            .output()
            .expect("go starts");
        let printed = String::from_utf8_lossy(&output.stdout);
        let module: Value = serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"));
        let file = Path::new(text(&module["Dir"])).join(Self::FILE);
        assert_eq!(crate::cluster::digest(&file), Self::DIGEST, "{}: {module}", file.display());
        kubectl(&["apply", "--server-side", "-f", file.to_str().unwrap()]);
        let made = Self;
        kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd/podmonitors.monitoring.coreos.com",
            "--timeout=30s",
        ]);
        made
    }
}

impl Drop for PodMonitors {
    fn drop(&mut self) {
        kubectl(&["delete", "crd", "podmonitors.monitoring.coreos.com", "--wait=false"]);
    }
}

#[test]
fn a_release_for_one_namespace_with_a_registry_behind_passwords() {
    // The cluster-wide operator must not work on this namespace as well, so it stands aside for the test.
    let namespace = Namespace::alone("namespaced");
    let elsewhere = namespace.beside("elsewhere");
    let registry = OwnRegistry::start(&namespace);
    let _monitors = PodMonitors::install();
    let _aside = Aside::stand();
    let install = |image_volumes: &str| {
        let values = json!({
            "crds": { "install": false },
            "watchNamespaces": [namespace.name],
            "operator": { "replicas": 1 },
            "models": { "imageVolumes": image_volumes, "plainHttpHosts": [REGISTRY] },
            "registry": {
                "internal": { "enabled": false },
                "external": {
                    "repository": format!("{}/team/models", registry.host), "plainHttp": true,
                    "pushSecret": "pusher", "pullSecret": "puller", "operatorSecret": "looker",
                },
            },
            "metrics": { "podMonitor": { "enabled": true, "labels": { "release": "prometheus" } } },
        });
        upgrade("narrow", &namespace.name, &chart(), &values);
    };
    install("always");

    // In a namespace that it does not watch, nothing happens, and nothing may.
    apply(&json!({ "apiVersion": "plimsoll.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": { "name": "unseen", "namespace": elsewhere }, "spec": digits_spec("v1") }));
    namespace.apply_model("mounted", &pinned_spec("v1"));
    namespace.wait_ready("mounted");
    let user = format!("--as=system:serviceaccount:{}:narrow-plimsoll", namespace.name);
    for (verb, kind) in [
        ("list", "modeldeployments.plimsoll.dev"),
        ("create", "jobs.batch"),
        ("list", "pods"),
        ("get", "secrets"),
    ] {
        let may = |place: &str| crate::cluster::answer(&["auth", "can-i", verb, kind, "-n", place, &user]);
        assert_eq!(may(&elsewhere), "no", "{verb} {kind}");
        assert_eq!(may(&namespace.name), if kind == "secrets" { "no" } else { "yes" }, "{verb} {kind}");
    }
    let roles = kubectl(&["get", "clusterroles,clusterrolebindings", "-o", "name"]);
    assert!(
        !roles.contains("narrow"),
        "an operator of one namespace needs nothing cluster-wide: {roles}"
    );

    // The artifact went to the own registry, and the kubelet mounted it with the pull secret.
    let pod = &namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"])[0];
    let reference = text(&pod["spec"]["volumes"][0]["image"]["reference"]);
    assert!(
        reference.starts_with(&format!("{}/team/models@sha256:", registry.host)),
        "{reference}"
    );
    assert_eq!(pod["spec"]["imagePullSecrets"], json!([{ "name": "puller" }]));
    infer(&namespace.address("mounted"), "mounted").unwrap();
    let tags = registry.tags();
    assert!(!tags["tags"].as_array().unwrap_or(&vec![]).is_empty(), "{tags}");
    let job = &namespace.items(&["jobs"])[0];
    for container in job["spec"]["template"]["spec"]["containers"].as_array().unwrap() {
        let mounted = container["volumeMounts"].to_string().contains("/secrets/registry");
        let needs = ["fetch", "publish"].contains(&text(&container["name"]));
        assert_eq!(
            mounted, needs,
            "{}: only those that speak to the registry get its password",
            container["name"]
        );
    }
    // With its own secret the operator finds what is there: no second Job.
    namespace.apply_model("shared", &pinned_spec("v1"));
    namespace.wait_ready("shared");
    assert!(namespace.items(&["jobs", "-l", "plimsoll.dev/model=shared"]).is_empty());

    // The Prometheus operator's kind takes the PodMonitor, which selects a pod that has the port.
    let monitor = namespace.get(&["podmonitor", "narrow-plimsoll-operator"]);
    assert_eq!(monitor["metadata"]["labels"]["release"], "prometheus");
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    let selector = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap();
    let selector: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={}", text(value))).collect();
    let selected = namespace.items(&["pods", "-l", &selector.join(",")]);
    assert_eq!(selected.len(), 1);
    let ports = selected[0]["spec"]["containers"][0]["ports"].as_array().unwrap();
    let port = ports
        .iter()
        .find(|port| port["name"] == endpoint["port"])
        .expect("the port of the PodMonitor");
    let (pod, path) = (text(&selected[0]["metadata"]["name"]), text(&endpoint["path"]));
    let metrics = format!(
        "/api/v1/namespaces/{}/pods/{pod}:{}/proxy{path}",
        namespace.name, port["containerPort"]
    );
    assert!(kubectl(&["get", "--raw", &metrics]).contains("plimsoll_operator_leader 1"));

    // A wrong password is named.
    OwnRegistry::write_secret(&namespace, &registry.host, "pusher", "forgotten");
    let mut spec = digits_spec("v1");
    spec["optimize"]["recipe"][0]["prune"]["amount"] = json!("21%");
    namespace.apply_model("refused", &spec);
    let md = namespace.wait_reason("refused", "RegistryUnavailable");
    let ready = condition(&md, "Ready");
    assert!(text(&ready["message"]).contains(&registry.host), "{ready}");
    namespace.kubectl(&["delete", "md", "refused"]);
    OwnRegistry::write_secret(&namespace, &registry.host, "pusher", "push-e2e");

    // Without image volumes an init container pulls, by the same secret.
    install("never");
    spec["optimize"]["recipe"][0]["prune"]["amount"] = json!("22%");
    namespace.apply_model("pulled", &spec);
    namespace.wait_ready("pulled");
    let pod = &namespace.items(&["pods", "-l", "plimsoll.dev/model=pulled,app.kubernetes.io/component=runtime"])[0];
    assert_eq!(pod["spec"]["initContainers"][0]["name"], "pull");
    assert_eq!(pod["spec"]["volumes"][0]["emptyDir"], json!({}));
    assert!(
        pod["spec"]["initContainers"][0]["volumeMounts"]
            .to_string()
            .contains("/secrets/registry")
    );
    infer(&namespace.address("pulled"), "pulled").unwrap();
    // What ran before the change was not restarted by it.
    let mounted = &namespace.items(&["pods", "-l", "plimsoll.dev/model=mounted,app.kubernetes.io/component=runtime"])[0];
    assert!(mounted["spec"]["volumes"][0]["image"].is_object(), "{}", mounted["spec"]["volumes"]);

    let unseen: Value = serde_json::from_str(&kubectl(&["-n", &elsewhere, "get", "md", "unseen", "-o", "json"])).unwrap();
    assert!(unseen["status"].is_null(), "{}", unseen["status"]);
    let there = kubectl(&["-n", &elsewhere, "get", "mr,jobs,deployments,services,events", "-o", "name"]);
    assert_eq!(there, "", "in a namespace that is not watched");
    helm(&["uninstall", "narrow", "-n", &namespace.name, "--wait"]);
}

/// `helm upgrade --install` of the chart at `chart`.
fn upgrade(release: &str, namespace: &str, chart: &Path, values: &Value) {
    let file = std::env::temp_dir().join(format!("plimsoll-e2e-{}-{release}.json", std::process::id()));
    std::fs::write(&file, values.to_string()).unwrap();
    let (chart, file) = (chart.to_str().unwrap(), file.to_str().unwrap());
    helm(&[
        "upgrade",
        "--install",
        release,
        chart,
        "-n",
        namespace,
        "--wait",
        "--timeout",
        "120s",
        "-f",
        file,
    ]);
    std::fs::remove_file(file).unwrap();
}

const CRD: &str = "modeldeployments.plimsoll.dev";

/// Columns and fields of the ModelDeployment that the apiserver has now.
fn api() -> (Vec<String>, Vec<String>) {
    let crd: Value = serde_json::from_str(&kubectl(&["get", "crd", CRD, "-o", "json"])).unwrap();
    let version = &crd["spec"]["versions"][0];
    let columns = version["additionalPrinterColumns"].as_array().unwrap();
    let columns = columns.iter().map(|column| text(&column["name"]).to_owned()).collect();
    let fields = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        .as_object()
        .unwrap();
    (columns, fields.keys().cloned().collect())
}

/// The chart as an older version might have been: without one column and one field.
fn older_chart(folder: &Path, column: &str, field: &str) -> PathBuf {
    let copied = Command::new("cp").arg("-r").arg(chart()).arg(folder).status().expect("cp starts");
    assert!(copied.success());
    let older = folder.join("plimsoll");
    let file = older.join("files/crds/modeldeployments.yaml");
    let mut crd: Value = serde_yaml_ng::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let version = &mut crd["spec"]["versions"][0];
    let columns = version["additionalPrinterColumns"].as_array_mut().unwrap();
    columns.retain(|found| !text(&found["name"]).eq_ignore_ascii_case(column));
    let fields = &mut version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    fields.as_object_mut().unwrap().remove(field).expect("the field is there");
    std::fs::write(&file, serde_yaml_ng::to_string(&crd).unwrap()).unwrap();
    older
}

#[test]
fn an_upgrade_renews_the_api_and_an_uninstallation_keeps_it_with_every_model() {
    let namespace = Namespace::alone("lifecycle");
    let values: Value = serde_json::from_str(&helm(&["get", "values", "plimsoll", "-n", SYSTEM, "-o", "json"])).unwrap();
    let (columns, fields) = api();
    let folder = std::env::temp_dir().join(format!("plimsoll-e2e-{}-chart", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let older = older_chart(&folder, "engine", "revisionHistoryLimit");
    upgrade("plimsoll", SYSTEM, &older, &values);
    std::fs::remove_dir_all(&folder).unwrap();
    let (fewer_columns, fewer_fields) = api();
    assert_eq!((fewer_columns.len(), fewer_fields.len()), (columns.len() - 1, fields.len() - 1));
    let mut spec = pinned_spec("v1");
    spec["revisionHistoryLimit"] = json!(3);
    let refused = namespace
        .try_apply(&namespace.model("digits", &spec).to_string())
        .expect_err("an unknown field");
    assert!(refused.contains("revisionHistoryLimit"), "{refused}");
    upgrade("plimsoll", SYSTEM, &chart(), &values);
    assert_eq!(api(), (columns, fields), "helm upgrade renews the CRDs");

    // Without Plimsoll: the API, the models and what serves them stay, and so do the artifacts.
    namespace.apply_model("digits", &spec);
    namespace.wait_ready("digits");
    namespace.wait_settled();
    let before = namespace.versions();
    let jobs = namespace.items(&["jobs"]).len();
    let claim = kubectl(&["-n", SYSTEM, "get", "pvc/plimsoll-registry", "-o", "jsonpath={.metadata.uid}"]);
    helm(&["uninstall", "plimsoll", "-n", SYSTEM, "--wait"]);
    kubectl(&["-n", SYSTEM, "wait", "--for=delete", "pod", "--all", "--timeout=60s"]);
    let left = kubectl(&["-n", SYSTEM, "get", "deployments,services,pods", "-o", "name"]);
    assert_eq!(left, "", "of the release");
    kubectl(&["get", "crd", CRD, "modelrevisions.plimsoll.dev"]);
    assert_eq!(namespace.versions(), before, "no object of a model was touched");
    infer(&namespace.address("digits"), "digits").unwrap();

    // A new installation takes over what it finds, as it is.
    upgrade("plimsoll", SYSTEM, &chart(), &values);
    eventually("the new operator has passed over the model", || {
        let leader = leader();
        operators().contains(&leader) && has_seen(&leader, &namespace.name, "digits")
    });
    assert_eq!(namespace.versions(), before, "adopted as it was");
    assert_eq!(
        kubectl(&["-n", SYSTEM, "get", "pvc/plimsoll-registry", "-o", "jsonpath={.metadata.uid}"]),
        claim
    );
    // The artifacts are in the claim that was kept: no Job is needed for a model that is made anew.
    let artifact = namespace.get(&["md", "digits"])["status"]["artifact"].clone();
    namespace.apply_model("again", &spec);
    namespace.wait_ready("again");
    assert_eq!(namespace.get(&["md", "again"])["status"]["artifact"], artifact);
    assert_eq!(namespace.items(&["jobs"]).len(), jobs, "the registry's content outlived its pod");
    infer(&namespace.address("again"), "again").unwrap();
}
