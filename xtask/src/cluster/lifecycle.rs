//! A cluster's way from nothing to a ready node, and back.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;

use super::components::{self, Component, GPU_COUNT, GPU_RESOURCE, Health, Kind, cluster_program};
use super::configuration::{self, FIXTURE_SERVER_IMAGE, NODE, PAUSE_IMAGE};
use super::host::{self, Before};
use super::network::{self, Network};
use super::process::Supervisor;
use super::{builds, can_run, home, import_images, lock, removal, tool, write_whole};
use crate::progress::phase;

/// How long components may take to become healthy: a machine that builds something else beside may be slow.
const START_TIMEOUT: Duration = Duration::from_secs(180);

/// A cluster by its state folder.
pub(super) struct Cluster {
    pub(super) kind: Kind,
    pub(super) run: PathBuf,
}

impl Cluster {
    pub(super) fn of(kind: Kind) -> Self {
        let folder = match kind {
            Kind::Node => "run",
            Kind::ControlPlane => "control-plane",
        };
        Self {
            kind,
            run: home().join(folder),
        }
    }

    pub(super) fn supervisor(&self) -> Supervisor {
        Supervisor::new(&self.run)
    }

    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.run.join("admin.conf")
    }

    pub(super) fn up(&self) -> Result<PathBuf> {
        if self.kind == Kind::Node {
            can_run().map_err(|reasons| anyhow::anyhow!(super::ways_out(&reasons)))?;
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
            phase("starting the node", |bar| {
                self.import_own_images(bar)?;
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

    pub(super) fn network(&self) -> Result<Network> {
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
            host::masquerade(&network.pod_subnet())?;
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
    fn import_own_images(&self, bar: &ProgressBar) -> Result<()> {
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
            import_images(std::slice::from_ref(&archive), bar)?;
            fs::remove_file(&archive)?;
        }
        Ok(())
    }

    fn kubectl(&self) -> Result<Command> {
        let mut command = Command::new(tool("kubectl")?);
        command.arg("--kubeconfig").arg(self.kubeconfig());
        Ok(command)
    }

    pub(super) fn ctr(&self) -> Result<Command> {
        let mut command = Command::new(tool("ctr")?);
        command
            .arg("--address")
            .arg(self.run.join("containerd.sock"))
            .args(["--namespace", "k8s.io"]);
        Ok(command)
    }

    pub(super) fn down(&self) -> Result<()> {
        phase(&format!("removing the cluster in {}", self.run.display()), |_| {
            let supervisor = self.supervisor();
            // Whoever would start a thing anew goes before the thing.
            supervisor.stop(&[
                components::OPERATOR,
                components::KWOK,
                "device-plugin",
                "volume-provisioner",
                "kubelet",
                "kube-proxy",
                "coredns",
            ]);
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
}
