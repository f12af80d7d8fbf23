//! The programs of a cluster: their command lines, their order, and how each tells its health.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::builds::{self, KWOK_STAGES};
use super::configuration::{DNS_HEALTH, NODE};
use super::network::Network;

/// Devices that the node advertises.
pub(super) const GPU_COUNT: u32 = 4;
pub(super) const GPU_RESOURCE: &str = "nvidia.com/gpu";
const DEVICE_PLUGIN_SOCKET: &str = "/var/lib/kubelet/device-plugins/nvidia-com-gpu.sock";

/// How much of a cluster there is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Kind {
    /// One real node; needs root.
    Node,
    /// No node, or kwok's imitations; needs no privilege.
    ControlPlane,
}

/// A program of the cluster.
pub(super) struct Component {
    pub(super) name: &'static str,
    /// Components of a stage start together, when those of the stages before are healthy.
    pub(super) stage: u8,
    pub(super) command: Command,
    pub(super) health: Health,
}

/// How to see whether a component works.
pub(super) enum Health {
    /// It answers 200 here.
    Url(String),
    /// It accepts connections here.
    Socket(PathBuf),
    /// It lives.
    Process,
}

impl Component {
    /// The argument that asks the health check about this component.
    pub(super) fn probe(&self) -> Option<String> {
        match &self.health {
            Health::Url(url) => Some(format!("{}={url}", self.name)),
            Health::Socket(_) | Health::Process => None,
        }
    }
}

/// The name under which fake nodes' program runs; it is started on demand.
pub(super) const KWOK: &str = "kwok";
/// The name under which tests run the operator beside the control plane alone.
pub(super) const OPERATOR: &str = "operator";

/// All components in the order of their start. Builds their programs first, where the cache lacks them.
///
/// # Errors
/// Where a program cannot be built.
pub(super) fn components(kind: Kind, run: &Path, network: &Network) -> Result<Vec<Component>> {
    let mut all = control_plane(kind, run, network)?;
    if kind == Kind::Node {
        all.extend(node(run, network)?);
    }
    all.sort_by_key(|component| component.stage);
    Ok(all)
}

/// The address at which the apiserver serves: pods must reach the node's.
pub(super) fn api_address(kind: Kind, network: &Network) -> Ipv4Addr {
    match kind {
        Kind::Node => network.node,
        Kind::ControlPlane => Ipv4Addr::LOCALHOST,
    }
}

/// The apiserver's URL.
pub(super) fn api_url(kind: Kind, network: &Network) -> String {
    format!("https://{}:{}", api_address(kind, network), network.port(6443))
}

/// Every TCP port that must be free on a first start.
pub(super) fn listeners(kind: Kind, network: &Network) -> Vec<(Ipv4Addr, u16, &'static str)> {
    let local = Ipv4Addr::LOCALHOST;
    let mut all = vec![
        (local, network.port(2379), "etcd"),
        (local, network.port(2380), "etcd"),
        (api_address(kind, network), network.port(6443), "kube-apiserver"),
        (local, network.port(10257), "kube-controller-manager"),
        (local, network.port(10259), "kube-scheduler"),
    ];
    if kind == Kind::Node {
        all.extend([
            (network.node, 10250, "kubelet"),
            (local, 10248, "kubelet"),
            (local, 10256, "kube-proxy"),
            (local, 10249, "kube-proxy"),
        ]);
    }
    all
}

/// A call of one of the programs in the multi-call binary.
pub(super) fn cluster_program(name: &str) -> Result<Command> {
    let mut command = Command::new(builds::program("cluster")?);
    command.arg(name);
    Ok(command)
}

fn control_plane(kind: Kind, run: &Path, network: &Network) -> Result<Vec<Component>> {
    let pki = |file: &str| run.join("pki").join(file).display().to_string();
    let port = |well_known| network.port(well_known);
    let (etcd, etcd_peer) = (
        format!("http://127.0.0.1:{}", port(2379)),
        format!("http://127.0.0.1:{}", port(2380)),
    );
    let api = api_url(kind, network);
    Ok(vec![
        Component {
            name: "etcd",
            stage: 0,
            command: flags(
                "etcd",
                [
                    ("data-dir", run.join("etcd").display().to_string()),
                    ("listen-client-urls", etcd.clone()),
                    ("advertise-client-urls", etcd.clone()),
                    ("listen-peer-urls", etcd_peer.clone()),
                    ("initial-advertise-peer-urls", etcd_peer.clone()),
                    ("initial-cluster", format!("default={etcd_peer}")),
                    // What is in a test's cluster need not survive a power failure.
                    ("unsafe-no-fsync", "true".into()),
                ],
            )?,
            health: Health::Url(format!("{etcd}/health")),
        },
        Component {
            name: "kube-apiserver",
            stage: 1,
            command: flags(
                "kube-apiserver",
                [
                    ("etcd-servers", etcd),
                    ("bind-address", api_address(kind, network).to_string()),
                    ("secure-port", port(6443).to_string()),
                    // May be no loopback address; it need not exist where no pod has to reach it.
                    ("advertise-address", network.node.to_string()),
                    ("cert-dir", run.join("apiserver").display().to_string()),
                    ("service-cluster-ip-range", network.service_subnet()),
                    ("service-account-issuer", "https://kubernetes.default.svc".into()),
                    ("service-account-signing-key-file", pki("service-account.key")),
                    ("service-account-key-file", pki("service-account.pub")),
                    ("client-ca-file", pki("ca.crt")),
                    ("tls-cert-file", pki("apiserver.crt")),
                    ("tls-private-key-file", pki("apiserver.key")),
                    ("authorization-mode", "Node,RBAC".into()),
                    ("enable-admission-plugins", "NodeRestriction".into()),
                    ("allow-privileged", "true".into()),
                    ("kubelet-client-certificate", pki("apiserver-kubelet-client.crt")),
                    ("kubelet-client-key", pki("apiserver-kubelet-client.key")),
                    ("kubelet-certificate-authority", pki("ca.crt")),
                    ("kubelet-preferred-address-types", "InternalIP".into()),
                    ("requestheader-client-ca-file", pki("ca.crt")),
                    ("requestheader-allowed-names", "front-proxy-client".into()),
                    ("requestheader-extra-headers-prefix", "X-Remote-Extra-".into()),
                    ("requestheader-group-headers", "X-Remote-Group".into()),
                    ("requestheader-username-headers", "X-Remote-User".into()),
                    ("proxy-client-cert-file", pki("front-proxy-client.crt")),
                    ("proxy-client-key-file", pki("front-proxy-client.key")),
                    ("enable-aggregator-routing", "true".into()),
                ],
            )?,
            health: Health::Url(format!("{api}/readyz")),
        },
        Component {
            name: "kube-controller-manager",
            stage: 2,
            command: flags(
                "kube-controller-manager",
                [
                    ("kubeconfig", pki("controller-manager.conf")),
                    ("bind-address", "127.0.0.1".into()),
                    ("secure-port", port(10257).to_string()),
                    ("cert-dir", run.join("controller-manager").display().to_string()),
                    ("service-account-private-key-file", pki("service-account.key")),
                    ("root-ca-file", pki("ca.crt")),
                    ("cluster-signing-cert-file", pki("ca.crt")),
                    ("cluster-signing-key-file", pki("ca.key")),
                    ("use-service-account-credentials", "true".into()),
                    // It is the only one.
                    ("leader-elect", "false".into()),
                ],
            )?,
            health: Health::Url(format!("https://127.0.0.1:{}/healthz", port(10257))),
        },
        Component {
            name: "kube-scheduler",
            stage: 2,
            command: flags(
                "kube-scheduler",
                [
                    ("kubeconfig", pki("scheduler.conf")),
                    ("bind-address", "127.0.0.1".into()),
                    ("secure-port", port(10259).to_string()),
                    ("cert-dir", run.join("scheduler").display().to_string()),
                    ("leader-elect", "false".into()),
                ],
            )?,
            health: Health::Url(format!("https://127.0.0.1:{}/healthz", port(10259))),
        },
    ])
}

fn node(run: &Path, network: &Network) -> Result<Vec<Component>> {
    let config = |file: &str| run.join("config").join(file).display().to_string();
    let pki = |file: &str| run.join("pki").join(file).display().to_string();
    let containerd = builds::program("containerd")?;
    let mut search = vec![containerd.parent().expect("a file in a folder").to_owned()];
    search.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    search.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let mut runtime = Command::new(&containerd);
    runtime
        .arg("--config")
        .arg(config("containerd.toml"))
        .env("PATH", std::env::join_paths(search)?);
    let mut dns = Command::new(builds::program("coredns")?);
    dns.arg("-conf").arg(config("Corefile"));
    Ok(vec![
        Component {
            name: "containerd",
            stage: 0,
            command: runtime,
            health: Health::Socket(run.join("containerd.sock")),
        },
        Component {
            name: "kubelet",
            stage: 2,
            command: flags(
                "kubelet",
                [
                    ("config", config("kubelet.yaml")),
                    ("kubeconfig", pki("kubelet.conf")),
                    ("hostname-override", NODE.into()),
                    ("node-ip", network.node.to_string()),
                    ("node-labels", "nvidia.com/gpu.present=true".into()),
                    ("root-dir", run.join("kubelet").display().to_string()),
                    ("cert-dir", run.join("kubelet/pki").display().to_string()),
                ],
            )?,
            health: Health::Url("http://127.0.0.1:10248/healthz".into()),
        },
        Component {
            name: "kube-proxy",
            stage: 2,
            command: flags("kube-proxy", [("config", config("kube-proxy.yaml"))])?,
            health: Health::Url("http://127.0.0.1:10256/healthz".into()),
        },
        Component {
            name: "coredns",
            stage: 2,
            command: dns,
            health: Health::Url(format!("http://{DNS_HEALTH}/health")),
        },
        Component {
            name: "device-plugin",
            stage: 2,
            command: flags(
                "device-plugin",
                [("resource", GPU_RESOURCE.into()), ("count", GPU_COUNT.to_string())],
            )?,
            health: Health::Socket(DEVICE_PLUGIN_SOCKET.into()),
        },
        Component {
            name: "volume-provisioner",
            stage: 2,
            command: flags(
                "volume-provisioner",
                [
                    ("kubeconfig", pki("volume-provisioner.conf")),
                    ("node", NODE.into()),
                    ("folder", run.join("volumes").display().to_string()),
                ],
            )?,
            health: Health::Process,
        },
    ])
}

/// kwok, which plays the kubelet of every node that carries its annotation.
pub(super) fn kwok(run: &Path) -> Result<Component> {
    let program = builds::program(KWOK)?;
    let stages = program.with_file_name(KWOK_STAGES);
    let mut command = Command::new(program);
    command.arg("--kubeconfig").arg(run.join("admin.conf")).arg("--config").arg(stages);
    command.args([
        "--manage-all-nodes=false",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
    ]);
    Ok(Component {
        name: KWOK,
        stage: 3,
        command,
        health: Health::Process,
    })
}

fn flags<const N: usize>(program: &str, flags: [(&str, String); N]) -> Result<Command> {
    let mut command = cluster_program(program)?;
    command.args(flags.map(|(name, value)| format!("--{name}={value}")));
    Ok(command)
}
