//! The cluster as a user sees it: kubectl, a namespace a test, models in the registry and behind a file server.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::watch::Watch;

/// The registry as pods reach it.
pub(crate) const REGISTRY: &str = "plimsoll-registry.plimsoll-system.svc.cluster.local:5000";
/// The registry as this machine reaches it.
const REGISTRY_OUTSIDE: &str = "127.0.0.1:30500";
/// The namespace of the operator.
pub(crate) const SYSTEM: &str = "plimsoll-system";
/// Longest wait for anything: a busy machine of two cores, and several tests at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

static SHARED: RwLock<()> = RwLock::new(());

/// The right to use the cluster, alone or beside others.
#[allow(dead_code)]
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// A namespace that goes with the test.
pub(crate) struct Namespace {
    pub(crate) name: String,
    /// More namespaces of the test.
    others: Mutex<Vec<String>>,
    _turn: Turn,
}

impl Namespace {
    /// A namespace beside other tests.
    pub(crate) fn new(name: &str) -> Self {
        Self::create(name, Turn::Shared(SHARED.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// A namespace with the cluster for itself.
    pub(crate) fn alone(name: &str) -> Self {
        Self::create(name, Turn::Alone(SHARED.write().unwrap_or_else(PoisonError::into_inner)))
    }

    fn create(name: &str, turn: Turn) -> Self {
        let name = format!("e2e-{name}");
        make_namespace(&name);
        Self {
            name,
            others: Mutex::default(),
            _turn: turn,
        }
    }

    /// The name of a further namespace that goes with the test.
    pub(crate) fn beside(&self, name: &str) -> String {
        let name = format!("{}-{name}", self.name);
        make_namespace(&name);
        self.others.lock().unwrap_or_else(PoisonError::into_inner).push(name.clone());
        name
    }

    /// Applies a ModelDeployment named `name` with `spec`.
    pub(crate) fn apply_model(&self, name: &str, spec: &Value) {
        apply(&self.model(name, spec));
    }

    pub(crate) fn model(&self, name: &str, spec: &Value) -> Value {
        json!({ "apiVersion": "plimsoll.dev/v1alpha1", "kind": "ModelDeployment", "metadata": { "name": name, "namespace": self.name }, "spec": spec })
    }

    /// kubectl in this namespace.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        kubectl(&[&["-n", &self.name], arguments].concat())
    }

    /// `kubectl apply` of a manifest in this namespace; the error is what the user would read.
    pub(crate) fn try_apply(&self, manifest: &str) -> Result<String, String> {
        feed(&["-n", &self.name], manifest)
    }

    pub(crate) fn get(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.kubectl(&[&["get", "-o", "json"], arguments].concat())).expect("kubectl prints JSON")
    }

    pub(crate) fn items(&self, arguments: &[&str]) -> Vec<Value> {
        self.get(arguments)["items"].as_array().expect("a list").clone()
    }

    /// Waits for a condition of a ModelDeployment, as a user's pipeline does.
    pub(crate) fn wait_for(&self, model: &str, condition: &str) {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        let output = run(program("PLIMSOLL_KUBECTL").args([
            "-n",
            &self.name,
            "wait",
            &format!("--for={condition}"),
            &timeout,
            &format!("md/{model}"),
        ]));
        assert!(
            output.status.success(),
            "{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            story(&self.name)
        );
    }

    /// Waits until this generation is ready: `Ready` of an older one does not count.
    pub(crate) fn wait_ready(&self, model: &str) {
        self.wait_until(model, "this generation is ready", |md| {
            md["status"]["observedGeneration"] == md["metadata"]["generation"] && condition(md, "Ready")["status"] == "True"
        });
    }

    /// Waits until `holds` of a ModelDeployment, and returns it.
    pub(crate) fn wait_until(&self, model: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        self.watch("md").until(what, |models| {
            let named = models.iter().find(|md| md["metadata"]["name"] == model);
            named.filter(|md| holds(md)).map(|md| (*md).clone())
        })
    }

    /// Waits for the Event of `reason` about a ModelDeployment, and returns it: news is told last, when what it tells of is there.
    pub(crate) fn wait_event(&self, reason: &str) -> Value {
        self.watch("events").until(&format!("there is an Event {reason}"), |events| {
            let told = |event: &&&Value| event["regarding"]["kind"] == "ModelDeployment" && event["reason"] == reason;
            events.iter().find(told).map(|event| (*event).clone())
        })
    }

    /// kind/name and resource version of all that the operator writes here, its Events among them.
    pub(crate) fn versions(&self) -> BTreeMap<String, String> {
        let kinds = "md,mr,jobs,deployments,services,poddisruptionbudgets,networkpolicies";
        let mut written = self.items(&[kinds]);
        let is_news = |event: &Value| event["reportingController"] == "plimsoll-operator";
        written.extend(self.items(&["events.events.k8s.io"]).into_iter().filter(is_news));
        let named = |object: &Value| format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]));
        let version = |object: &Value| text(&object["metadata"]["resourceVersion"]).to_owned();
        written.iter().map(|object| (named(object), version(object))).collect()
    }

    /// Waits until the Kubernetes controllers have written down what the start of a model brought about.
    pub(crate) fn wait_settled(&self) {
        if !self.items(&["jobs"]).is_empty() {
            self.kubectl(&["wait", "--for=condition=complete", "job", "--all", "--timeout=60s"]);
        }
        self.watch("deployments").until("the Deployments are rolled out", |deployments| {
            let is_done = |deployment: &&Value| {
                let (spec, status) = (&deployment["spec"], &deployment["status"]);
                status["observedGeneration"] == deployment["metadata"]["generation"]
                    && status["availableReplicas"].as_u64().unwrap_or(0) == spec["replicas"].as_u64().unwrap_or(1)
                    && condition(deployment, "Progressing")["reason"] == "NewReplicaSetAvailable"
            };
            deployments.iter().all(is_done).then_some(())
        });
        self.watch("poddisruptionbudgets").until("the pods are counted", |budgets| {
            let is_counted = |budget: &&Value| {
                let status = &budget["status"];
                status["expectedPods"].as_u64() > Some(0) && status["currentHealthy"] == status["expectedPods"]
            };
            budgets.iter().all(is_counted).then_some(())
        });
        self.wait_event("Serving");
        let mut before = self.versions();
        loop {
            std::thread::sleep(Duration::from_secs(2));
            let now = self.versions();
            if now == before {
                return;
            }
            before = now;
        }
    }

    /// A watch of the objects of `kind` in this namespace.
    pub(crate) fn watch(&self, kind: &str) -> Watch {
        Watch::start(&self.name, kind)
    }

    /// Waits for the reason of `Ready`, and returns the object.
    pub(crate) fn wait_reason(&self, model: &str, reason: &str) -> Value {
        self.wait_until(model, &format!("Ready's reason is {reason}"), |md| {
            md["status"]["observedGeneration"] == md["metadata"]["generation"] && condition(md, "Ready")["reason"] == reason
        })
    }

    /// The ClusterIP of a model's Service, once it leads somewhere: kube-proxy learns of ready pods when everyone else does, and forwards to
    /// them a moment later.
    pub(crate) fn address(&self, model: &str) -> String {
        let service = self.get(&["service", model]);
        let address = service["spec"]["clusterIP"].as_str().expect("a ClusterIP");
        eventually(&format!("the Service `{model}` leads somewhere"), || {
            TcpStream::connect((address, 80)).is_ok()
        });
        format!("http://{address}")
    }
}

/// Asks again and again until `holds`, of what cannot be watched.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// All that a person would look at in a namespace, for a failed test's message.
pub(crate) fn story(namespace: &str) -> String {
    let show = |arguments: &[&str]| {
        let output = run(program("PLIMSOLL_KUBECTL").args(["-n", namespace]).args(arguments));
        format!(
            "$ kubectl {}\n{}{}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    };
    const CONDITIONS: &str = "jsonpath={range .items[*]}{.metadata.name}:{\"\\n\"}{range .status.conditions[*]}  {.type}={.status} {.reason}: \
                              {.message}{\"\\n\"}{end}{end}";
    [
        show(&["get", "md,mr,jobs,deploy,pods", "-o", "wide"]),
        show(&["get", "md", "-o", CONDITIONS]),
        show(&["get", "events", "--sort-by=.lastTimestamp"]),
        show(&[
            "logs",
            "-l",
            "app.kubernetes.io/component=optimizer",
            "--all-containers",
            "--tail=10",
        ]),
        show(&["logs", "-l", "app.kubernetes.io/component=runtime", "--tail=10"]),
        show(&["logs", "-n", SYSTEM, "-l", "app.kubernetes.io/component=operator", "--tail=15"]),
    ]
    .join("\n")
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
            run(program("PLIMSOLL_KUBECTL")
                .args(["delete", "namespace", &self.name, "--wait=false"])
                .args(others.iter()));
        }
    }
}

fn make_namespace(name: &str) {
    kubectl(&["delete", "namespace", name, "--ignore-not-found", "--wait"]);
    // Every pod of a model must pass the strictest profile.
    apply(&json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": name, "labels": { "pod-security.kubernetes.io/enforce": "restricted", "plimsoll.dev/test": "true" } },
    }));
}

/// A condition of an object; null where it is missing.
pub(crate) fn condition(object: &Value, kind: &str) -> Value {
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions
        .into_iter()
        .find(|condition| condition["type"] == kind)
        .unwrap_or(Value::Null)
}

/// Text of a field; empty where it is missing.
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// One of the programs that `cargo xtask test` names.
pub(crate) fn program(variable: &str) -> Command {
    Command::new(std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set; run these tests with `cargo xtask test`")))
}

fn run(command: &mut Command) -> Output {
    command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"))
}

/// Runs kubectl and returns what it printed; panics where it fails.
pub(crate) fn kubectl(arguments: &[&str]) -> String {
    succeed(run(program("PLIMSOLL_KUBECTL").args(arguments)), arguments)
}

/// What kubectl prints to a question, whether the answer is yes or no.
pub(crate) fn answer(arguments: &[&str]) -> String {
    let output = run(program("PLIMSOLL_KUBECTL").args(arguments));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Runs helm and returns what it printed; panics where it fails.
pub(crate) fn helm(arguments: &[&str]) -> String {
    succeed(run(program("PLIMSOLL_HELM").args(arguments)), arguments)
}

fn succeed(output: Output, arguments: &[&str]) -> String {
    assert!(
        output.status.success(),
        "{arguments:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// `kubectl apply` of `object`; panics where it is refused.
pub(crate) fn apply(object: &Value) {
    try_apply(&object.to_string()).unwrap_or_else(|error| panic!("refused: {error}\n{object}"));
}

/// `kubectl apply` of `object` with more arguments that make it print JSON; panics where it is refused.
pub(crate) fn apply_with(arguments: &[&str], object: &Value) -> Value {
    let printed = feed(arguments, &object.to_string()).unwrap_or_else(|error| panic!("refused: {error}\n{object}"));
    serde_json::from_str(&printed).expect("kubectl prints JSON")
}

/// `kubectl apply` of a manifest; the error is what the user would read.
pub(crate) fn try_apply(manifest: &str) -> Result<String, String> {
    feed(&[], manifest)
}

fn feed(arguments: &[&str], manifest: &str) -> Result<String, String> {
    let mut child = program("PLIMSOLL_KUBECTL")
        .args(["apply", "-f", "-"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kubectl starts");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(manifest.as_bytes())
        .expect("kubectl reads");
    let output = child.wait_with_output().expect("kubectl ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

/// A file of `tests/`, of the checkout that the tests run in: one that shares its target folder may have compiled them.
pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(&std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs the tests")).join(path)
}

/// `sha256:...` of a file.
pub(crate) fn digest(path: &Path) -> String {
    use sha2::Digest as _;
    format!(
        "sha256:{}",
        hex::encode(sha2::Sha256::digest(std::fs::read(path).expect("a fixture")))
    )
}

/// Pushes `file` as the only file of `repository:tag` and returns the address that pods pull it by.
pub(crate) fn push(file: &Path, reference: &str) -> String {
    let name = file.file_name().expect("a name").to_str().expect("UTF-8");
    push_files(file.parent().expect("a folder"), &[name], reference)
}

/// Pushes files of a folder as an artifact, and returns the address that pods pull it by.
pub(crate) fn push_files(folder: &Path, names: &[&str], reference: &str) -> String {
    // One tar a push, whose name carries the reference: tests push side by side.
    static PUSHES: Mutex<u32> = Mutex::new(0);
    let number = {
        let mut pushes = PUSHES.lock().unwrap_or_else(PoisonError::into_inner);
        *pushes += 1;
        *pushes
    };
    let tar = std::env::temp_dir().join(format!("plimsoll-e2e-{}-{number}.tar", std::process::id()));
    succeed(
        run(Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(folder).args(names)),
        &["tar"],
    );
    let outside = format!("{REGISTRY_OUTSIDE}/{reference}");
    succeed(
        run(program("PLIMSOLL_CRANE")
            .args(["append", "--insecure", "--oci-empty-base", "-t", &outside, "-f"])
            .arg(&tar)),
        &["crane", "append"],
    );
    std::fs::remove_file(&tar).expect("the tar was written");
    format!("oci://{REGISTRY}/{reference}")
}

/// A text file of an artifact in the registry, as a person gets it.
pub(crate) fn file_of_artifact(artifact: &str, path: &str) -> String {
    let outside = artifact.replace(REGISTRY, REGISTRY_OUTSIDE);
    let mut export = program("PLIMSOLL_CRANE")
        .args(["export", "--insecure", &outside, "-"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("crane");
    let tar = export.stdout.take().expect("a pipe");
    let output = Command::new("tar").args(["-xO", path]).stdin(tar).output().expect("tar");
    assert!(export.wait().expect("crane ends").success(), "crane export {outside}");
    succeed(output, &["tar", "-xO", path])
}

/// As [`push`], of what never changes and many tests read: once is enough.
fn pushed(file: &str, reference: &str) -> String {
    static PUSHED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut pushed = PUSHED.lock().unwrap_or_else(PoisonError::into_inner);
    if pushed.insert(reference.to_owned()) {
        push(&fixture(file), reference);
    }
    format!("oci://{REGISTRY}/{reference}")
}

/// The digits model of `version` (`v1`, `v2`) in the registry.
pub(crate) fn digits(version: &str) -> String {
    pushed(&format!("models/digits/digits-{version}.onnx"), &format!("e2e/digits:{version}"))
}

/// The held-out digits in the registry.
pub(crate) fn heldout() -> String {
    pushed("models/digits/digits-heldout.npz", "e2e/digits-heldout:v1")
}

/// The digits to train on, in the registry.
pub(crate) fn training() -> String {
    pushed("models/digits/digits-training.npz", "e2e/digits-training:v1")
}

/// [`digits_spec`] with the contents of model and data pinned, so that the operator knows the artifact before any Job runs.
pub(crate) fn pinned_spec(version: &str) -> Value {
    let mut spec = digits_spec(version);
    spec["source"]["digest"] = json!(digest(&fixture(&format!("models/digits/digits-{version}.onnx"))));
    spec["optimize"]["evaluation"]["dataset"]["digest"] = json!(digest(&fixture("models/digits/digits-heldout.npz")));
    spec
}

/// A spec that compresses digits of `version` within one point of accuracy.
pub(crate) fn digits_spec(version: &str) -> Value {
    json!({
        "source": { "uri": digits(version) },
        "optimize": {
            "recipe": [{ "prune": { "amount": "30%" } }, { "quantize": { "scheme": "Int8" } }],
            "evaluation": { "dataset": { "uri": heldout() }, "metric": "Accuracy" },
            "budget": { "maxAccuracyDrop": "1%" },
        },
    })
}

/// A file server in the namespace that serves `files`, reached at the returned address; it starts with `replicas` pods.
pub(crate) fn file_server(namespace: &Namespace, files: &[(&str, &Path)], replicas: u32) -> String {
    let mut create = vec!["create".to_owned(), "configmap".to_owned(), "fixtures".to_owned()];
    create.extend(files.iter().map(|(name, path)| format!("--from-file={name}={}", path.display())));
    namespace.kubectl(&create.iter().map(String::as_str).collect::<Vec<_>>());
    let image = std::env::var("PLIMSOLL_FIXTURE_SERVER_IMAGE").expect("set by cargo xtask test");
    let labels = json!({ "app": "fixtures" });
    apply(&json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "fixtures", "namespace": namespace.name },
        "spec": { "replicas": replicas, "selector": { "matchLabels": labels }, "template": { "metadata": { "labels": labels }, "spec": {
            "automountServiceAccountToken": false,
            "securityContext": { "runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": "server", "image": image, "imagePullPolicy": "IfNotPresent", "args": ["--folder", "/fixtures", "--address", ":8080"],
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 },
                "volumeMounts": [{ "name": "files", "mountPath": "/fixtures" }],
            }],
            "volumes": [{ "name": "files", "configMap": { "name": "fixtures" } }],
        } } },
    }));
    apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "fixtures", "namespace": namespace.name },
        "spec": { "selector": labels, "ports": [{ "port": 80, "targetPort": 8080 }] },
    }));
    if replicas > 0 {
        namespace.kubectl(&["rollout", "status", "deployment/fixtures", "--timeout=120s"]);
    }
    // The chart is installed with the file servers of these tests among `models.plainHttpHosts`.
    format!("http://fixtures.{}.svc.cluster.local", namespace.name)
}
