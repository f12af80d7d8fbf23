//! What the machine must have and what the cluster changes on it: privileges, Debian's packages, cgroups, sysctls.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::removal::CNI_NETWORK;
use crate::debian;
use crate::workspace::find_program;

/// capabilities(7)
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// Programs that come from Debian, with their packages. A self-built runc lacks seccomp, which needs C.
const PROGRAMS: [(&str, &str); 5] = [
    ("runc", "runc"),
    ("iptables", "iptables"),
    ("conntrack", "conntrack"),
    ("ip", "iproute2"),
    ("setsid", "util-linux"),
];
const CNI_PACKAGE: &str = "containernetworking-plugins";
/// Where Debian and where everybody else puts CNI plugins.
const CNI_FOLDERS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
const CNI_PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];

/// Settings that the kubelet, kube-proxy or this task change; `down` puts the old values back.
const SYSCTLS: [&str; 10] = [
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/vs/conntrack",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
];

/// Folders whose place the kubelet, containerd and the CNI plugins do not let one choose.
const FOLDERS: [&str; 9] = [
    "/var/lib/kubelet",
    "/var/lib/cni",
    "/var/log/pods",
    "/var/log/containers",
    "/var/run/kubernetes",
    "/run/containerd",
    "/run/nri",
    "/opt/containerd",
    "/usr/libexec/kubernetes",
];

/// Which cgroup hierarchy the machine has.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Cgroups {
    V1,
    V2,
}

/// Why a node cannot run here; nothing where it can.
pub(super) fn obstacles() -> Vec<String> {
    let mut reasons = Vec::new();
    if !cfg!(target_os = "linux") {
        return vec!["this is not Linux".to_owned()];
    }
    if !rustix::process::geteuid().is_root() {
        reasons.push("containers need root".to_owned());
    } else if !has_capability(CAP_SYS_ADMIN) || !has_capability(CAP_NET_ADMIN) {
        reasons.push("this root may neither mount nor make network devices (a container without --privileged?)".to_owned());
    }
    if cgroups().is_none() {
        reasons.push("no cgroups are mounted at /sys/fs/cgroup".to_owned());
    }
    let missing = missing_packages();
    if !missing.is_empty() && !debian::is_here() {
        reasons.push(format!(
            "these are missing, and only on Debian are they installed for you: {}",
            missing.join(", ")
        ));
    }
    reasons
}

/// The cgroup hierarchy that containers are put in: v1 where controllers are mounted apart, whatever else is.
pub(super) fn cgroups() -> Option<Cgroups> {
    cgroups_at(Path::new("/sys/fs/cgroup"))
}

fn cgroups_at(root: &Path) -> Option<Cgroups> {
    if root.join("cgroup.controllers").exists() {
        Some(Cgroups::V2)
    } else {
        root.join("memory").is_dir().then_some(Cgroups::V1)
    }
}

/// The folders of the hierarchy at which a cgroup's path begins.
pub(super) fn cgroup_roots() -> Vec<PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    match cgroups() {
        Some(Cgroups::V2) => vec![root],
        Some(Cgroups::V1) => fs::read_dir(root)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_dir())
            .collect(),
        None => Vec::new(),
    }
}

/// Whether runc may lower a process's oom_score_adj.
pub(super) fn can_lower_oom_score() -> bool {
    has_capability(CAP_SYS_RESOURCE)
}

fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    effective.is_some_and(|bits| bits >> number & 1 == 1)
}

/// The folder of the CNI plugins, where all that are needed are there.
pub(super) fn cni_folder() -> Option<&'static Path> {
    CNI_FOLDERS
        .iter()
        .map(Path::new)
        .find(|folder| CNI_PLUGINS.iter().all(|plugin| folder.join(plugin).is_file()))
}

fn missing_packages() -> Vec<&'static str> {
    let programs = PROGRAMS
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package);
    programs.chain(cni_folder().is_none().then_some(CNI_PACKAGE)).collect()
}

/// Installs what is missing.
///
/// # Errors
/// As [`debian::install`].
pub(super) fn install_packages() -> Result<()> {
    debian::install(&missing_packages())
}

/// What the machine was like before the cluster, so that `down` can leave it like that.
#[derive(Serialize, Deserialize, PartialEq, Debug)]
pub(super) struct Before {
    /// The machine's start; nothing that runs or is mounted survives another one.
    pub(super) boot: String,
    sysctls: BTreeMap<String, String>,
    absent_folders: Vec<String>,
    /// Whether other programs' CNI chains were there, which are then left alone.
    pub(super) had_cni_chains: bool,
}

impl Before {
    /// # Errors
    /// Where another kubelet keeps its pods on this machine: two would fight over cgroups and rules.
    pub(super) fn observe() -> Result<Self> {
        if cgroup_roots()
            .iter()
            .any(|root| root.join("kubepods").exists() || root.join("kubepods.slice").exists())
        {
            bail!("another kubelet runs pods on this machine (there is a `kubepods` cgroup): use its cluster through KUBECONFIG instead");
        }
        let rules = super::removal::saved_rules("iptables");
        if rules.contains(":KUBE-SERVICES") {
            bail!("another kube-proxy works on this machine (there are KUBE-SERVICES rules): use its cluster through KUBECONFIG instead");
        }
        Ok(Self {
            boot: boot()?,
            sysctls: settings().map(|(name, value)| (name.to_owned(), value)).collect(),
            absent_folders: FOLDERS
                .iter()
                .filter(|folder| !Path::new(folder).exists())
                .map(|folder| (*folder).to_owned())
                .collect(),
            had_cni_chains: rules.contains(":CNI-"),
        })
    }

    /// Of a cluster that changes nothing on the machine.
    ///
    /// # Errors
    /// Where the kernel does not tell its boot id.
    pub(super) fn untouched() -> Result<Self> {
        Ok(Self {
            boot: boot()?,
            sysctls: BTreeMap::new(),
            absent_folders: Vec::new(),
            had_cni_chains: true,
        })
    }

    /// Puts the settings back and removes the folders that were not there.
    ///
    /// # Errors
    /// Where a folder cannot be removed.
    pub(super) fn restore(&self) -> Result<()> {
        for (name, value) in &self.sysctls {
            if read_sysctl(name).as_ref() != Some(value) {
                write_sysctl(name, value)?;
            }
        }
        for folder in self.absent_folders.iter().filter(|folder| Path::new(folder).exists()) {
            fs::remove_dir_all(folder).with_context(|| format!("cannot remove {folder}"))?;
        }
        Ok(())
    }
}

/// An identifier of the machine's current run.
///
/// # Errors
/// Where the kernel does not tell.
pub(super) fn boot() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .context("cannot read the boot id")?
        .trim()
        .to_owned())
}

/// The settings that the cluster changes, as they are now.
pub(super) fn settings() -> impl Iterator<Item = (&'static str, String)> {
    SYSCTLS.iter().filter_map(|name| Some((*name, read_sysctl(name)?)))
}

/// The folders that the cluster makes, where they are there now.
pub(super) fn folders() -> impl Iterator<Item = &'static str> {
    FOLDERS.iter().copied().filter(|folder| Path::new(folder).exists())
}

fn read_sysctl(name: &str) -> Option<String> {
    Some(fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().to_owned())
}

fn write_sysctl(name: &str, value: &str) -> Result<()> {
    fs::write(Path::new("/proc/sys").join(name), value).with_context(|| format!("cannot set sysctl {name}"))
}

/// Lets the machine route between pods, and iptables see what crosses the pods' bridge (a Service whose endpoint is a neighbour
/// answers through it).
///
/// # Errors
/// Where routing cannot be switched on.
pub(super) fn enable_routing() -> Result<()> {
    write_sysctl("net/ipv4/ip_forward", "1")?;
    let bridge = "net/bridge/bridge-nf-call-iptables";
    if read_sysctl(bridge).is_none() {
        // Where the module is built in or cannot be loaded, the check below says so.
        let _ = run(Command::new("modprobe").arg("br_netfilter"));
    }
    match read_sysctl(bridge).as_deref() {
        Some("1") => Ok(()),
        Some(_) => write_sysctl(bridge, "1"),
        None => bail!("the kernel module br_netfilter is missing: Services would not reach pods"),
    }
}

/// Gives what pods send to the world the machine's address. The comment is a CNI network's own, by which the rule is removed with it.
///
/// # Errors
/// Where iptables refuses the rule.
pub(super) fn masquerade(pods: &str) -> Result<()> {
    let program = find_program("iptables").context("iptables is missing")?;
    let comment = format!("name: \"{CNI_NETWORK}\"");
    let rule = |verb: &str| {
        let mut command = Command::new(&program);
        command.args(["--wait", "--table", "nat", verb, "POSTROUTING", "--source", pods]);
        command.args([
            "!",
            "--destination",
            pods,
            "--match",
            "comment",
            "--comment",
            &comment,
            "--jump",
            "MASQUERADE",
        ]);
        command
    };
    // It is there where the cluster runs already.
    run(&mut rule("--check")).or_else(|_| run(&mut rule("--append")))
}

/// Runs a short command to its end.
///
/// # Errors
/// Where it cannot start or fails; its words are in the error.
pub(super) fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// What a short command prints.
///
/// # Errors
/// As [`run`].
pub(super) fn output(command: &mut Command) -> Result<String> {
    let shown = format!("{:?}", &command).replace('"', "");
    let output = command.output().with_context(|| format!("cannot start `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_hierarchies_of_cgroups_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(cgroups_at(root.path()), None);
        fs::create_dir(root.path().join("memory")).unwrap();
        assert_eq!(cgroups_at(root.path()), Some(Cgroups::V1));
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(cgroups_at(root.path()), Some(Cgroups::V2));
    }
}
