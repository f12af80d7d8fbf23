//! The embedded Kubernetes: a whole cluster of one node on this machine, for demonstrations and tests.

mod builds;
mod components;
mod configuration;
mod host;
mod network;
mod process;
mod removal;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::progress::phase;
use crate::workspace;
use components::{Component, GPU_COUNT, GPU_RESOURCE, Health, Kind, cluster_program};
pub(crate) use configuration::FIXTURE_SERVER_IMAGE;
use configuration::{NODE, PAUSE_IMAGE};
use host::Before;
use network::Network;
use process::Supervisor;

/// How long components may take to become healthy: a machine that builds something else beside may be slow.
const START_TIMEOUT: Duration = Duration::from_secs(180);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Builds what is missing, starts the cluster and prints the line that points kubectl at it.
    Up {
        /// Only etcd, apiserver, controller-manager and scheduler, without a node: needs neither root nor Linux' containers.
        #[arg(long)]
        control_plane: bool,
        /// Adds this many nodes that kwok plays: pods on them run in name only.
        #[arg(long, value_name = "COUNT", default_value_t = 0)]
        fake_nodes: u32,
    },
    /// Stops the cluster and leaves the machine as it was.
    Down {
        /// Only the cluster that `up --control-plane` started.
        #[arg(long)]
        control_plane: bool,
    },
    /// Lists the components: process, health, memory.
    Status,
    /// Shows a component's log, or every component's last lines.
    Logs {
        /// As `status` names it.
        component: Option<String>,
        /// Goes on showing what is added.
        #[arg(short, long)]
        follow: bool,
    },
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.action {
        Action::Up { control_plane, fake_nodes } => {
            let kind = if *control_plane { Kind::ControlPlane } else { Kind::Node };
            let kubeconfig = Cluster::of(kind).up()?;
            if *fake_nodes > 0 {
                add_fake_nodes(&kubeconfig, *fake_nodes)?;
            }
            println!("export KUBECONFIG={}", kubeconfig.display());
            Ok(())
        }
        Action::Down { control_plane } => remove(|cluster| !control_plane || cluster.kind == Kind::ControlPlane),
        Action::Status => existing().iter().try_for_each(Cluster::status),
        Action::Logs { component, follow } => existing()
            .iter()
            .try_for_each(|cluster| cluster.logs(component.as_deref(), *follow)),
    }
}

/// Starts the cluster with one real node, unless it runs, and gives the path of its kubeconfig.
///
/// # Errors
/// Where this machine cannot run one (see [`can_run`]), a program cannot be built, or a component dies or stays unhealthy.
pub(crate) fn up() -> Result<PathBuf> {
    Cluster::of(Kind::Node).up()
}

/// Starts only the control plane, which needs no privilege, with one fake node per `fake_nodes`; gives the path of its kubeconfig.
///
/// # Errors
/// Where a program cannot be built, or a component dies or stays unhealthy.
pub(crate) fn up_control_plane(fake_nodes: u32) -> Result<PathBuf> {
    let kubeconfig = Cluster::of(Kind::ControlPlane).up()?;
    if fake_nodes > 0 {
        add_fake_nodes(&kubeconfig, fake_nodes)?;
    }
    Ok(kubeconfig)
}

/// Stops every embedded cluster and removes all that they left on the machine; nothing happens where there is none.
///
/// # Errors
/// Where something cannot be removed.
pub(crate) fn down() -> Result<()> {
    remove(|_| true)
}

fn remove(which: impl Fn(&Cluster) -> bool) -> Result<()> {
    let _lock = lock("run")?;
    existing().iter().filter(|cluster| which(cluster)).try_for_each(Cluster::down)
}

/// Whether this machine can run a cluster with a real node.
///
/// # Errors
/// The reasons against it, in words.
pub(crate) fn can_run() -> Result<(), String> {
    let mut reasons = host::obstacles();
    if builds::program_is_missing("cluster") && !builds::has_go() {
        reasons.push("Go is not installed, with which the cluster's programs are built".to_owned());
    }
    if reasons.is_empty() { Ok(()) } else { Err(reasons.join("; ")) }
}

/// The path of one of the cluster's programs (`kubectl`, `helm`, `crane`, `registry`, `fixture-server`, `kwok`, `ctr`...), built first
/// where the cache lacks it.
///
/// # Errors
/// Where there is no such program or it cannot be built.
pub(crate) fn tool(name: &str) -> Result<PathBuf> {
    fs::create_dir_all(home())?;
    builds::program(name)
}

/// Puts image archives (OCI, with the reference in an annotation, or Docker's) on the node.
///
/// # Errors
/// Where the cluster does not run or containerd refuses an archive.
pub(crate) fn import_images(archives: &[PathBuf]) -> Result<()> {
    let cluster = Cluster::of(Kind::Node);
    if cluster.supervisor().find("containerd").is_none() {
        bail!("the cluster's containerd does not run: `cargo xtask cluster up` starts it");
    }
    for archive in archives {
        let mut command = cluster.ctr()?;
        host::run(command.args(["images", "import", "--local"]).arg(archive))
            .with_context(|| format!("cannot import {}", archive.display()))?;
    }
    Ok(())
}

/// Registers nodes `fake-1`, `fake-2`... with the label and the capacity of GPU nodes, played by kwok in the cluster of `kubeconfig`.
///
/// # Errors
/// Where the cluster is none of this project's, or kwok cannot be built or started.
pub(crate) fn add_fake_nodes(kubeconfig: &Path, count: u32) -> Result<()> {
    let run = kubeconfig.parent().context("a kubeconfig lies in a folder")?;
    let supervisor = Supervisor::new(run);
    let kwok = components::kwok(run)?;
    supervisor.start(kwok.name, &kwok.command)?;
    let capacity = json!({"cpu": "32", "memory": "256Gi", "pods": "110", GPU_RESOURCE: "8"});
    let nodes: Vec<_> = (1..=count)
        .map(|number| {
            let name = format!("fake-{number}");
            json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {
                    "name": name,
                    "annotations": {"kwok.x-k8s.io/node": "fake", "node.alpha.kubernetes.io/ttl": "0"},
                    "labels": {
                        "kubernetes.io/hostname": name,
                        "kubernetes.io/os": "linux",
                        "kubernetes.io/arch": "amd64",
                        "type": "kwok",
                        "nvidia.com/gpu.present": "true",
                    },
                },
                "status": {"allocatable": capacity, "capacity": capacity},
            })
        })
        .collect();
    let file = run.join("config/fake-nodes.json");
    fs::create_dir_all(file.parent().expect("a file in a folder"))?;
    fs::write(&file, json!({"apiVersion": "v1", "kind": "List", "items": nodes}).to_string())?;
    phase(&format!("adding {count} fake nodes"), |_| {
        let kubectl = |arguments: &[&str]| host::run(Command::new(tool("kubectl")?).arg("--kubeconfig").arg(kubeconfig).args(arguments));
        kubectl(&["apply", "--filename", &file.to_string_lossy()])?;
        kubectl(&["wait", "nodes", "--selector=type=kwok", "--for=condition=Ready", "--timeout=60s"])
    })
}

/// Where the cluster's programs and state are kept.
fn home() -> PathBuf {
    workspace::cache().join("cluster")
}

/// Waits until no other task holds the lock `name`, and holds it until the file is dropped.
fn lock(name: &str) -> Result<File> {
    fs::create_dir_all(home())?;
    let path = home().join(format!("{name}.lock"));
    let file = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("  waiting for another task that holds {}", path.display());
        file.lock()?;
    }
    Ok(file)
}

/// The clusters that have state on this machine.
fn existing() -> Vec<Cluster> {
    let clusters: Vec<Cluster> = [Kind::Node, Kind::ControlPlane]
        .map(Cluster::of)
        .into_iter()
        .filter(|cluster| cluster.run.exists())
        .collect();
    if clusters.is_empty() {
        eprintln!("no cluster: `cargo xtask cluster up` starts one");
    }
    clusters
}

/// A cluster by its state folder.
struct Cluster {
    kind: Kind,
    run: PathBuf,
}

impl Cluster {
    fn of(kind: Kind) -> Self {
        let folder = match kind {
            Kind::Node => "run",
            Kind::ControlPlane => "control-plane",
        };
        Self {
            kind,
            run: home().join(folder),
        }
    }

    fn supervisor(&self) -> Supervisor {
        Supervisor::new(&self.run)
    }

    fn kubeconfig(&self) -> PathBuf {
        self.run.join("admin.conf")
    }

    fn up(&self) -> Result<PathBuf> {
        if self.kind == Kind::Node {
            can_run().map_err(|reasons| anyhow::anyhow!("this machine cannot run a cluster: {reasons}"))?;
        }
        let _lock = lock("run")?;
        if self.kind == Kind::Node {
            host::install_packages()?;
        }
        self.remember_machine()?;
        let network = self.network()?;
        let all = components::components(self.kind, &self.run, &network)?;
        let supervisor = self.supervisor();
        if all.iter().all(|component| supervisor.find(component.name).is_some()) && self.wait(&all, Duration::ZERO).is_ok() {
            eprintln!("  the cluster runs already");
            return Ok(self.kubeconfig());
        }
        let is_first = !all.iter().any(|component| supervisor.was_started(component.name));
        if is_first
            && ![Kind::Node, Kind::ControlPlane]
                .map(Self::of)
                .iter()
                .any(|other| other.kind != self.kind && other.run.exists())
        {
            builds::prune()?;
        }
        if self.kind == Kind::Node {
            // Built here, before any other line of progress stands on the terminal.
            tool("pause")?;
            tool("fixture-server")?;
        }
        phase("starting the control plane", |_| {
            self.prepare(&network)?;
            if is_first {
                Network::check_ports(&components::listeners(self.kind, &network))?;
            }
            for stage in 0..=1 {
                self.start(&all, stage)?;
            }
            host::run(
                self.kubectl()?
                    .args(["wait", "namespace/kube-system", "--for=create", "--timeout=60s"]),
            )?;
            if self.kind == Kind::ControlPlane {
                self.start(&all, 2)
            } else {
                Ok(())
            }
        })?;
        if self.kind == Kind::Node {
            phase("starting the node", |_| {
                self.import_own_images()?;
                host::run(
                    self.kubectl()?
                        .args(["apply", "--filename"])
                        .arg(self.run.join("config/addons.json")),
                )?;
                self.start(&all, 2)?;
                self.wait_for_node()
            })?;
        }
        host::run(
            self.kubectl()?
                .args(["wait", "serviceaccount/default", "--for=create", "--timeout=60s"]),
        )?;
        Ok(self.kubeconfig())
    }

    /// Notes what the machine is like before the cluster changes it. State that an earlier run of the machine left is removed.
    fn remember_machine(&self) -> Result<()> {
        let file = self.run.join("before.json");
        if let Ok(text) = fs::read_to_string(&file) {
            let before: Before = serde_json::from_str(&text).with_context(|| format!("cannot read {}", file.display()))?;
            if before.boot == host::boot()? {
                return Ok(());
            }
            eprintln!("  the machine was restarted: the cluster starts anew");
            self.down()?;
        } else if self.run.exists() {
            // An `up` that was interrupted before it changed anything.
            removal::remove_state(&self.run)?;
        }
        let before = match self.kind {
            Kind::Node => Before::observe()?,
            Kind::ControlPlane => Before::untouched()?,
        };
        fs::create_dir_all(&self.run)?;
        write_whole(&file, &serde_json::to_string_pretty(&before)?)
    }

    fn network(&self) -> Result<Network> {
        let file = self.run.join("network.json");
        if let Ok(text) = fs::read_to_string(&file) {
            return serde_json::from_str(&text).with_context(|| format!("cannot read {}", file.display()));
        }
        let network = match self.kind {
            Kind::Node => Network::choose()?,
            Kind::ControlPlane => Network::CONTROL_PLANE,
        };
        write_whole(&file, &serde_json::to_string(&network)?)?;
        Ok(network)
    }

    /// Certificates, configuration, addresses.
    fn prepare(&self, network: &Network) -> Result<()> {
        let hosts = format!("127.0.0.1,{},{}", network.node, network.api_service());
        let mut pki = cluster_program("pki")?;
        pki.arg("--out")
            .arg(self.run.join("pki"))
            .args(["--server", &components::api_url(self.kind, network)]);
        pki.args(["--hosts", &hosts, "--node", NODE, "--node-address", &network.node.to_string()]);
        host::run(&mut pki)?;
        if !self.kubeconfig().exists() {
            fs::copy(self.run.join("pki/admin.conf"), self.kubeconfig())?;
        }
        if self.kind == Kind::Node {
            configuration::write(&self.run, network)?;
            host::enable_routing()?;
            network::make_node_bridge(network)?;
        }
        Ok(())
    }

    fn start(&self, all: &[Component], stage: u8) -> Result<()> {
        let supervisor = self.supervisor();
        for component in all.iter().filter(|component| component.stage == stage) {
            supervisor.start(component.name, &component.command)?;
        }
        let started: Vec<&Component> = all.iter().filter(|component| component.stage <= stage).collect();
        self.wait(started, START_TIMEOUT)
    }

    /// Waits until the components are healthy; one that dies ends the waiting.
    fn wait<'a>(&self, all: impl IntoIterator<Item = &'a Component>, timeout: Duration) -> Result<()> {
        let supervisor = self.supervisor();
        let all: Vec<&Component> = all.into_iter().collect();
        let mut probe = cluster_program("health")?;
        probe
            .arg(format!("--wait={}s", timeout.as_secs()))
            .args(all.iter().filter_map(|component| component.probe()));
        let mut probe = probe
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the health check")?;
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(dead) = all.iter().find(|component| supervisor.find(component.name).is_none()) {
                // It may have ended by itself already.
                let _ = probe.kill();
                let _ = probe.wait();
                bail!(
                    "{} died; the end of {}:\n{}",
                    dead.name,
                    supervisor.log(dead.name).display(),
                    supervisor.tail(dead.name, 15)
                );
            }
            let deaf = all
                .iter()
                .find(|component| matches!(&component.health, Health::Socket(path) if UnixStream::connect(path).is_err()));
            if probe.try_wait()?.is_some() && (deaf.is_none() || Instant::now() > deadline) {
                let output = probe.wait_with_output()?;
                let text = String::from_utf8_lossy(&output.stdout);
                let unhealthy: Vec<&str> = text
                    .lines()
                    .filter(|line| !line.ends_with(" ok"))
                    .chain(deaf.map(|component| component.name))
                    .collect();
                if unhealthy.is_empty() {
                    return Ok(());
                }
                bail!(
                    "not healthy after {} s: {} (see `cargo xtask cluster logs`)",
                    timeout.as_secs(),
                    unhealthy.join(", ")
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_for_node(&self) -> Result<()> {
        let node = format!("node/{NODE}");
        let gpus = format!(
            "--for=jsonpath={{.status.allocatable.{}}}={GPU_COUNT}",
            GPU_RESOURCE.replace('.', "\\.")
        );
        for condition in ["--for=create", "--for=condition=Ready", &gpus] {
            host::run(self.kubectl()?.args(["wait", &node, condition, "--timeout=120s"]))?;
        }
        Ok(())
    }

    /// The images that the cluster itself needs.
    fn import_own_images(&self) -> Result<()> {
        let present = host::output(self.ctr()?.args(["images", "list", "--quiet"]))?;
        for (program, reference) in [("pause", PAUSE_IMAGE), ("fixture-server", FIXTURE_SERVER_IMAGE)] {
            if present.lines().any(|line| line == reference) {
                continue;
            }
            let archive = self.run.join(format!("{program}.tar"));
            host::run(
                cluster_program("image")?
                    .arg("--program")
                    .arg(tool(program)?)
                    .args(["--name", reference])
                    .arg("--out")
                    .arg(&archive),
            )?;
            import_images(std::slice::from_ref(&archive))?;
            fs::remove_file(&archive)?;
        }
        Ok(())
    }

    fn kubectl(&self) -> Result<Command> {
        let mut command = Command::new(tool("kubectl")?);
        command.arg("--kubeconfig").arg(self.kubeconfig());
        Ok(command)
    }

    fn ctr(&self) -> Result<Command> {
        let mut command = Command::new(tool("ctr")?);
        command
            .arg("--address")
            .arg(self.run.join("containerd.sock"))
            .args(["--namespace", "k8s.io"]);
        Ok(command)
    }

    fn down(&self) -> Result<()> {
        phase(&format!("removing the cluster in {}", self.run.display()), |_| {
            let supervisor = self.supervisor();
            // Whoever would start a thing anew goes before the thing.
            supervisor.stop(&["kwok", "device-plugin", "volume-provisioner", "kubelet", "kube-proxy", "coredns"]);
            supervisor.stop(&["kube-scheduler", "kube-controller-manager", "kube-apiserver", "containerd"]);
            supervisor.stop(&["etcd"]);
            if let Ok(text) = fs::read_to_string(self.run.join("before.json")) {
                let before: Before = serde_json::from_str(&text)?;
                if self.kind == Kind::Node {
                    removal::kill_containers(&self.run)?;
                    removal::clean_machine(&self.run, &before)?;
                }
            }
            removal::remove_state(&self.run)
        })
    }

    fn status(&self) -> Result<()> {
        let network = self.network()?;
        let supervisor = self.supervisor();
        let mut all = components::components(self.kind, &self.run, &network)?;
        if supervisor.was_started(components::KWOK) {
            all.push(components::kwok(&self.run)?);
        }
        let mut probe = cluster_program("health")?;
        let probed = probe.args(all.iter().filter_map(Component::probe)).output()?;
        let answers = String::from_utf8_lossy(&probed.stdout);
        let mut table = comfy_table::Table::new();
        table
            .load_style(comfy_table::presets::NOTHING)
            .set_header(["COMPONENT", "PID", "MEMORY", "HEALTH"]);
        let mut memory_bytes = 0;
        for component in &all {
            let process = supervisor.find(component.name);
            let memory = process.map_or(0, process::Process::memory_bytes);
            memory_bytes += memory;
            let health = match (process, &component.health) {
                (None, _) if supervisor.was_started(component.name) => format!("died; see {}", supervisor.log(component.name).display()),
                (None, _) => "not started".to_owned(),
                (Some(_), Health::Process) => "ok".to_owned(),
                (Some(_), Health::Socket(path)) => UnixStream::connect(path).map_or_else(|error| error.to_string(), |_| "ok".to_owned()),
                (Some(_), Health::Url(_)) => {
                    let answer = answers
                        .lines()
                        .find_map(|line| line.strip_prefix(component.name)?.strip_prefix(' '));
                    answer.unwrap_or("no answer").to_owned()
                }
            };
            let pid = process.map_or_else(|| "-".to_owned(), |process| process.pid.to_string());
            table.add_row([component.name.to_owned(), pid, format!("{} MiB", memory >> 20), health]);
        }
        println!("{table}");
        println!(
            "{} MiB in all; pods {}, services {}; state in {}",
            memory_bytes >> 20,
            network.pod_subnet(),
            network.service_subnet(),
            self.run.display()
        );
        if self.kind == Kind::Node {
            println!("NetworkPolicies are accepted but not enforced: the bridge that connects the pods knows none.");
        }
        println!("export KUBECONFIG={}", self.kubeconfig().display());
        Ok(())
    }

    fn logs(&self, component: Option<&str>, follow: bool) -> Result<()> {
        let mut command = Command::new("tail");
        if follow {
            command.arg("--follow=name");
        }
        let folder = self.run.join("log");
        let mut logs: Vec<PathBuf> = fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.sort();
        let names = logs
            .iter()
            .filter_map(|path| path.file_stem())
            .map(|name| name.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(", ");
        match component {
            Some(name) => {
                logs.retain(|path| path.file_stem().is_some_and(|stem| stem == name));
                command.arg("--lines=200");
            }
            None => {
                command.arg("--lines=10");
            }
        }
        if logs.is_empty() {
            bail!("no such log in {}; there are: {names}", folder.display());
        }
        command.args(logs).status().context("cannot start `tail`")?;
        Ok(())
    }
}

impl Component {
    /// The argument that asks the health check about this component.
    fn probe(&self) -> Option<String> {
        match &self.health {
            Health::Url(url) => Some(format!("{}={url}", self.name)),
            Health::Socket(_) | Health::Process => None,
        }
    }
}

/// Writes a file that is either there whole or not at all.
fn write_whole(file: &Path, content: &str) -> Result<()> {
    let temporary = file.with_extension("new");
    fs::write(&temporary, content).with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, file).with_context(|| format!("cannot write {}", file.display()))
}
