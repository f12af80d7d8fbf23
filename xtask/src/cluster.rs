//! The embedded Kubernetes: a whole cluster of one node on this machine, for demonstrations and tests.

mod builds;
mod components;
mod configuration;
mod host;
mod lifecycle;
mod network;
mod process;
mod removal;
mod report;
mod traces;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use serde_json::json;

use crate::progress::{Amount, Unit, phase, show};
use crate::workspace;
use components::{GPU_RESOURCE, Kind};
pub(crate) use configuration::FIXTURE_SERVER_IMAGE;
use lifecycle::Cluster;
use process::Supervisor;
pub(crate) use traces::Traces;

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
    /// Prints the path of a program (kubectl, helm, crane, ctr...); builds it first where the cache lacks it.
    Tool { name: String },
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
        Action::Tool { name } => {
            println!("{}", tool(name)?.display());
            Ok(())
        }
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

/// Whether the cluster with one real node runs already.
pub(crate) fn is_running() -> bool {
    Cluster::of(Kind::Node).supervisor().find("kube-apiserver").is_some()
}

/// What to do where this machine can run no cluster, for `reasons`.
pub(crate) fn ways_out(reasons: &str) -> String {
    format!(
        "this machine can run no cluster: {reasons}.\nThree ways out:\n  \
         1. a cluster that you have: `cargo xtask demo --kubeconfig FILE` (or KUBECONFIG)\n  \
         2. kind or k3d: `kind create cluster`, then `cargo xtask demo --kubeconfig ~/.kube/config`\n  \
         3. a Linux machine with root, where `cargo xtask demo` and `cargo xtask test` start a Kubernetes of their own\n\
         Without any of them, `cargo xtask demo --local` shows the same model without a cluster, and `cargo xtask test` starts the control \
         plane alone and says what it leaves out."
    )
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

/// Whether the control plane alone runs already.
pub(crate) fn is_control_plane_running() -> bool {
    Cluster::of(Kind::ControlPlane).supervisor().find("kube-apiserver").is_some()
}

/// Starts the operator as a process beside the control plane, anew where it runs.
///
/// # Errors
/// Where it cannot be started.
pub(crate) fn start_operator(command: &Command) -> Result<()> {
    stop_operator();
    Cluster::of(Kind::ControlPlane).supervisor().start(components::OPERATOR, command)
}

/// Ends the operator that [`start_operator`] started.
pub(crate) fn stop_operator() {
    Cluster::of(Kind::ControlPlane).supervisor().stop(&[components::OPERATOR]);
}

/// Stops the cluster that [`up`] started, and removes all that it left on the machine.
///
/// # Errors
/// Where something cannot be removed.
pub(crate) fn down_node() -> Result<()> {
    remove(|cluster| cluster.kind == Kind::Node)
}

/// Stops the control plane that [`up_control_plane`] started, with what works beside it.
///
/// # Errors
/// Where its folder cannot be removed.
pub(crate) fn down_control_plane() -> Result<()> {
    remove(|cluster| cluster.kind == Kind::ControlPlane)
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
pub(crate) fn import_images(archives: &[PathBuf], bar: &ProgressBar) -> Result<()> {
    let cluster = Cluster::of(Kind::Node);
    if cluster.supervisor().find("containerd").is_none() {
        bail!("the cluster's containerd does not run: `cargo xtask cluster up` starts it");
    }
    let sizes = archives.iter().map(|archive| Ok(fs::metadata(archive)?.len()));
    let sizes = sizes.collect::<Result<Vec<u64>>>()?;
    let mut amount = Amount {
        done: 0,
        total: sizes.iter().sum(),
        unit: Unit::Bytes,
    };
    for (archive, size) in archives.iter().zip(sizes) {
        show(bar, &amount, &archive.file_stem().unwrap_or_default().to_string_lossy());
        let mut command = cluster.ctr()?;
        host::run(command.args(["images", "import", "--local"]).arg(archive))
            .with_context(|| format!("cannot import {}", archive.display()))?;
        amount.done += size;
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

/// Writes a file that is either there whole or not at all.
fn write_whole(file: &Path, content: &str) -> Result<()> {
    let temporary = file.with_extension("new");
    fs::write(&temporary, content).with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, file).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_ways_out_are_three_and_say_what_is_wrong() {
        let text = super::ways_out("containers need root");
        for part in [
            "containers need root",
            "1. ",
            "--kubeconfig FILE",
            "2. kind or k3d",
            "3. a Linux machine with root",
            "--local",
        ] {
            assert!(text.contains(part), "`{part}` is not in {text}");
        }
    }
}
