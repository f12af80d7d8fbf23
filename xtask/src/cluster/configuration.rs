//! The files that the node's programs read.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::host::{self, Cgroups};
use super::network::{Network, POD_BRIDGE};
use super::removal::CNI_NETWORK;
use crate::workspace;

/// The node's name.
pub(super) const NODE: &str = "node1";
/// Reference of the image that holds a pod's namespaces.
pub(super) const PAUSE_IMAGE: &str = "plimsoll.local/pause:1";
/// Reference of the tests' file server, for pods with `imagePullPolicy: Never`.
pub(crate) const FIXTURE_SERVER_IMAGE: &str = "plimsoll.local/fixture-server:1";
/// Port of CoreDNS on the node's address; 53 may be taken by the machine's own.
const DNS_PORT: u16 = 10053;
/// Address at which CoreDNS tells its health.
pub(super) const DNS_HEALTH: &str = "127.0.0.1:10054";

/// Writes every file into the state folder.
///
/// # Errors
/// Where a file cannot be written or CNI's plugins are missing.
pub(super) fn write(run: &Path, network: &Network) -> Result<()> {
    let folder = run.join("config");
    fs::create_dir_all(folder.join("cni"))?;
    let files: [(&str, String); 5] = [
        ("containerd.toml", containerd(run)?),
        ("cni/10-plimsoll.conflist", cni(run, network).to_string()),
        // Every JSON text is YAML, too.
        ("kubelet.yaml", kubelet(run, network).to_string()),
        ("kube-proxy.yaml", kube_proxy(run, network).to_string()),
        ("Corefile", corefile(run, network)),
    ];
    for (name, content) in files {
        fs::write(folder.join(name), content).with_context(|| format!("cannot write {name}"))?;
    }
    fs::write(folder.join("addons.json"), addons(network).to_string())?;
    Ok(())
}

fn containerd(run: &Path) -> Result<String> {
    let cni = host::cni_folder().context("the CNI plugins are missing")?;
    let runc = workspace::find_program("runc").context("runc is missing")?;
    Ok(format!(
        r#"version = 3
root = "{run}/containerd/root"
state = "{run}/containerd/state"
[grpc]
  address = "{run}/containerd.sock"
[plugins.'io.containerd.internal.v1.opt']
  path = "{run}/containerd/opt"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = "{run}/config/certs.d"
[plugins.'io.containerd.cri.v1.runtime']
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = {restrict}
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["{cni}"]
  conf_dir = "{run}/config/cni"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = "{runc}"
  Root = "{run}/containerd/runc"
  SystemdCgroup = false
"#,
        run = run.display(),
        restrict = !host::can_lower_oom_score(),
        cni = cni.display(),
        runc = runc.display(),
    ))
}

fn cni(run: &Path, network: &Network) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": CNI_NETWORK,
        "plugins": [
            {
                "type": "bridge",
                "bridge": POD_BRIDGE,
                "isGateway": true,
                // One rule for all of them is set when the cluster starts; a chain for each would be most of a pod's network.
                "ipMasq": false,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": run.join("cni"),
                    "ranges": [[{"subnet": network.pod_subnet()}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn kubelet(run: &Path, network: &Network) -> Value {
    let mut configuration = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": network.node,
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": run.join("pki/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        // runc's own driver works with every init system.
        "cgroupDriver": "cgroupfs",
        "clusterDNS": [network.dns_service()],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": format!("unix://{}", run.join("containerd.sock").display()),
        // A developer's disk may be nearly full, and images that were imported cannot be pulled again.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "failSwapOn": false,
        "podLogsDir": run.join("log/pods"),
        "resolvConf": resolver(),
        "tlsCertFile": run.join("pki/kubelet.crt"),
        "tlsPrivateKeyFile": run.join("pki/kubelet.key"),
        "volumePluginDir": run.join("kubelet-plugins"),
    });
    if host::cgroups() == Some(Cgroups::V1) {
        configuration["failCgroupV1"] = json!(false);
    }
    configuration
}

fn kube_proxy(run: &Path, network: &Network) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clientConnection": {"kubeconfig": run.join("pki/kube-proxy.conf")},
        "clusterCIDR": network.pod_subnet(),
        "hostnameOverride": NODE,
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        // Node ports are for this machine, not for its neighbours.
        "nodePortAddresses": ["127.0.0.0/8", format!("{}/32", network.node)],
        "iptables": {"localhostNodePorts": true, "minSyncPeriod": "10ms"},
        // The machine's own limits stay.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

/// kubeadm's settings, on the node instead of in pods: names resolve as soon as the node is ready.
fn corefile(run: &Path, network: &Network) -> String {
    let forward = if resolver().is_file() {
        format!("    forward . {}\n", resolver().display())
    } else {
        String::new()
    };
    format!(
        ".:{DNS_PORT} {{
    bind {node}
    errors
    health {DNS_HEALTH}
    cache 30 {{
        disable success cluster.local
        disable denial cluster.local
    }}
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {run}/pki/coredns.conf
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }}
{forward}}}
",
        node = network.node,
        run = run.display(),
    )
}

/// The file that names real name servers: systemd's stub is a loopback address, which means nothing in a pod.
fn resolver() -> PathBuf {
    let behind_stub = PathBuf::from("/run/systemd/resolve/resolv.conf");
    if behind_stub.is_file() {
        behind_stub
    } else {
        PathBuf::from("/etc/resolv.conf")
    }
}

/// Objects that every cluster has: DNS, and a default StorageClass.
fn addons(network: &Network) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            role(
                "system:coredns",
                &json!([
                    {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
                    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
                ]),
            ),
            binding("system:coredns", "coredns"),
            role(
                "system:volume-provisioner",
                &json!([
                    {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["list", "watch"]},
                    {"apiGroups": [""], "resources": ["persistentvolumes"], "verbs": ["list", "watch", "create", "delete"]},
                ]),
            ),
            binding("system:volume-provisioner", "volume-provisioner"),
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
                "spec": {
                    "clusterIP": network.dns_service(),
                    "ports": [
                        {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": DNS_PORT},
                        {"name": "dns-tcp", "protocol": "TCP", "port": 53, "targetPort": DNS_PORT},
                    ],
                },
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": "kube-dns-node",
                    "namespace": "kube-system",
                    "labels": {"kubernetes.io/service-name": "kube-dns", "endpointslice.kubernetes.io/managed-by": "cargo-xtask-cluster"},
                },
                "addressType": "IPv4",
                "endpoints": [{"addresses": [network.node], "conditions": {"ready": true}}],
                "ports": [
                    {"name": "dns", "protocol": "UDP", "port": DNS_PORT},
                    {"name": "dns-tcp", "protocol": "TCP", "port": DNS_PORT},
                ],
            },
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "StorageClass",
                "metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
                "provisioner": "plimsoll.dev/node-folder",
                "reclaimPolicy": "Delete",
                "volumeBindingMode": "Immediate",
            },
        ],
    })
}

fn role(name: &str, rules: &Value) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules})
}

fn binding(role: &str, user: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": role},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    })
}
