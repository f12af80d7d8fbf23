//! Taking a cluster away so that nothing of it stays: processes, mounts, network devices, rules, cgroups, folders.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::host::{self, Before};
use super::network;
use super::process::Process;
use crate::workspace;

/// Name of the CNI network: its rules carry it in their comments.
pub(super) const CNI_NETWORK: &str = "plimsoll";

/// Kills what runs in the pods, and the shims that hold them. The kubelet and containerd must have been stopped.
///
/// # Errors
/// Where processes stay.
pub(super) fn kill_containers(run: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let processes = leftovers(run);
        if processes.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "these processes do not end: {}",
                processes
                    .iter()
                    .map(|process| process.pid.to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            );
        }
        Process::kill(&processes);
    }
}

/// Processes in the pods' cgroups, and the cluster's programs (shims, and what an interrupted start left without a pid file) that work
/// on the state folder.
fn leftovers(run: &Path) -> Vec<Process> {
    let mut pids = BTreeSet::new();
    for root in host::cgroup_roots() {
        collect_pids(&root.join("kubepods"), &mut pids);
    }
    let programs = super::home();
    let marker = format!("{}/", run.display());
    for entry in fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok) {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        let is_ours = arguments
            .next()
            .is_some_and(|program| program.ends_with("containerd-shim-runc-v2") || Path::new(&*program).starts_with(&programs));
        if is_ours && arguments.any(|argument| argument.contains(&marker)) {
            pids.insert(pid);
        }
    }
    pids.into_iter().filter_map(Process::of).collect()
}

fn collect_pids(cgroup: &Path, pids: &mut BTreeSet<i32>) {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for child in child_folders(cgroup) {
        collect_pids(&child, pids);
    }
}

fn child_folders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Removes everything that the cluster with the state folder `run` left on the machine, and the folder itself.
///
/// # Errors
/// Where something cannot be removed; a second call goes on.
pub(super) fn clean_machine(run: &Path, before: &Before) -> Result<()> {
    unmount_below(&[run, Path::new("/var/lib/kubelet"), Path::new("/run/containerd")])?;
    network::remove_bridges()?;
    for family in ["iptables", "ip6tables"] {
        remove_rules(family, before.had_cni_chains)?;
    }
    for root in host::cgroup_roots() {
        remove_cgroup(&root.join("kubepods"))?;
    }
    before.restore()
}

/// Removes the state folder.
///
/// # Errors
/// Where the folder cannot be removed.
pub(super) fn remove_state(run: &Path) -> Result<()> {
    fs::remove_dir_all(run).with_context(|| format!("cannot remove {}", run.display()))
}

fn unmount_below(folders: &[&Path]) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mut points: Vec<&str> = table.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    // The last mounted goes first: it may lie in, or over, an earlier one.
    points.reverse();
    // The kernel writes a blank as \\040.
    let points = points.into_iter().map(|point| PathBuf::from(point.replace("\\040", " ")));
    for point in points.filter(|point| folders.iter().any(|folder| point.starts_with(folder))) {
        host::run(Command::new("umount").arg("--lazy").arg(&point))?;
    }
    Ok(())
}

fn remove_cgroup(cgroup: &Path) -> Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    for child in child_folders(cgroup) {
        remove_cgroup(&child)?;
    }
    // The kernel lets a cgroup go a moment after its last process.
    let deadline = Instant::now() + Duration::from_secs(5);
    while let Err(error) = fs::remove_dir(cgroup) {
        if Instant::now() > deadline {
            return Err(error).with_context(|| format!("cannot remove the cgroup {}", cgroup.display()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The rules of `iptables` or `ip6tables` as its -save program prints them; nothing where there are none to save.
pub(super) fn saved_rules(family: &str) -> String {
    let Some(program) = workspace::find_program(&format!("{family}-save")) else {
        return String::new();
    };
    host::output(&mut Command::new(program)).unwrap_or_default()
}

fn remove_rules(family: &str, keep_foreign_cni: bool) -> Result<()> {
    let saved = saved_rules(family);
    let kept = without_ours(&saved, keep_foreign_cni);
    if kept == saved {
        return Ok(());
    }
    let program = workspace::find_program(&format!("{family}-restore")).context("iptables-restore is missing")?;
    let mut child = Command::new(program).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().expect("a pipe").write_all(kept.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "{family}-restore refused the rules without the cluster's: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The rules but for those of kube-proxy, the kubelet and this cluster's CNI network.
fn without_ours(saved: &str, keep_foreign_cni: bool) -> String {
    let ours_in_comments = format!("name: \\\"{CNI_NETWORK}\\\"");
    // The chains that the network's own rules jump to.
    let chains: BTreeSet<&str> = saved
        .lines()
        .filter(|line| line.contains(&ours_in_comments))
        .flat_map(|line| line.split_whitespace().filter(|word| word.starts_with("CNI-")))
        .collect();
    let is_ours = |line: &str| {
        let words = || line.split_whitespace().map(|word| word.trim_start_matches(':'));
        words().any(|word| word.starts_with("KUBE-") || chains.contains(word) || (!keep_foreign_cni && word.starts_with("CNI-")))
            || line.contains(&ours_in_comments)
    };
    saved
        .lines()
        .filter(|line| !is_ours(line))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "*nat\n:PREROUTING ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n:CNI-aaa - [0:0]\n:CNI-bbb - [0:0]\n:KUBE-SERVICES - [0:0]\n\
        -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
        -A POSTROUTING -s 10.244.0.5/32 -m comment --comment \"name: \\\"plimsoll\\\" id: \\\"1\\\"\" -j CNI-aaa\n\
        -A POSTROUTING -s 10.88.0.5/32 -m comment --comment \"name: \\\"podman\\\" id: \\\"2\\\"\" -j CNI-bbb\n\
        -A CNI-aaa -d 10.244.0.0/24 -j ACCEPT\n-A CNI-bbb -d 10.88.0.0/16 -j ACCEPT\n-A POSTROUTING -o eth0 -j MASQUERADE\nCOMMIT\n";

    #[test]
    fn rules_of_others_stay() {
        let kept = without_ours(RULES, true);
        assert!(
            !kept.contains("KUBE-") && !kept.contains("CNI-aaa") && !kept.contains("plimsoll"),
            "{kept}"
        );
        assert_eq!(kept.matches("CNI-bbb").count(), 3);
        assert!(kept.contains("-o eth0 -j MASQUERADE") && kept.ends_with("COMMIT\n"));
    }

    #[test]
    fn where_no_other_cni_was_every_chain_of_cni_goes() {
        assert!(!without_ours(RULES, false).contains("CNI-"));
    }
}
