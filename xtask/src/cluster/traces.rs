//! What a cluster may leave on a machine, so that `down` can be held to its word: mounts, network devices, processes, rules, cgroups, settings,
//! folders.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::host;
use super::removal;

/// Longest that the kernel may take to let go of what a cluster had.
const SETTLED_MAX: Duration = Duration::from_secs(10);

/// What is on a machine at one time.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    /// Each as a person would name it.
    things: BTreeSet<String>,
    settings: BTreeMap<&'static str, String>,
}

impl Traces {
    /// What is on the machine now.
    pub(crate) fn observe() -> Self {
        let mut all = BTreeSet::new();
        all.extend(mounts().map(|point| format!("mount {point}")));
        all.extend(names("/sys/class/net").map(|name| format!("network device {name}")));
        all.extend(processes().map(|process| format!("process {process}")));
        for family in ["iptables", "ip6tables"] {
            all.extend(rules(&removal::saved_rules(family)).map(|rule| format!("{family} {rule}")));
        }
        for root in host::cgroup_roots() {
            let root = root.display().to_string();
            let pods = names(&root).filter(|name| name.starts_with("kubepods"));
            all.extend(pods.map(|name| format!("cgroup {root}/{name}")));
        }
        all.extend(host::folders().map(|folder| format!("folder {folder}")));
        Self {
            things: all,
            settings: host::settings().collect(),
        }
    }

    /// How the machine differs from what it was `before`, a line each; nothing where it does not. The kernel takes a network namespace's devices
    /// away a moment after the namespace, so that this waits for up to [`SETTLED_MAX`].
    pub(crate) fn left_since(before: &Self) -> Vec<String> {
        let deadline = Instant::now() + SETTLED_MAX;
        loop {
            let differences = Self::observe().differences(before);
            if differences.is_empty() || Instant::now() > deadline {
                return differences;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn differences(&self, before: &Self) -> Vec<String> {
        let left = self.things.difference(&before.things).map(|thing| format!("left behind: {thing}"));
        let gone = before.things.difference(&self.things).map(|thing| format!("gone: {thing}"));
        // A setting that was not there came with a module of the kernel, which stays loaded.
        let changed = before.settings.iter().filter_map(|(name, value)| {
            let now = self.settings.get(name)?;
            (now != value).then(|| format!("changed: sysctl {name} from {value} to {now}"))
        });
        left.chain(gone).chain(changed).collect()
    }
}

/// Mount points; proc(5) numbers the fields.
fn mounts() -> impl Iterator<Item = String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4).map(str::to_owned));
    points.collect::<Vec<_>>().into_iter()
}

fn names(folder: &str) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

/// Those of the cluster: what works on its state, and what runs in pods.
fn processes() -> impl Iterator<Item = String> {
    let state = super::home().join("run").display().to_string();
    names("/proc")
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .filter_map(move |pid| {
            let process = Path::new("/proc").join(&pid);
            let cgroup = fs::read_to_string(process.join("cgroup")).unwrap_or_default();
            let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
            (cgroup.contains("kubepods") || arguments.contains(&format!("{state}/"))).then(|| format!("{pid} ({})", arguments.trim()))
        })
}

/// Rules, and chains that are not built in; what a table counted does not matter.
fn rules(saved: &str) -> impl Iterator<Item = String> {
    let is_kept = |line: &&str| line.starts_with("-A ") || (line.starts_with(':') && line.contains(" - "));
    saved
        .lines()
        .filter(is_kept)
        .map(|line| line.split(" [").next().unwrap_or(line).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traces(things: &[&str], panic: &str) -> Traces {
        Traces {
            things: things.iter().map(|thing| (*thing).to_owned()).collect(),
            settings: [("kernel/panic", panic.to_owned())].into(),
        }
    }

    #[test]
    fn what_stays_what_is_gone_and_what_changed_differs() {
        let before = traces(&["mount /", "folder /opt/containerd"], "0");
        assert!(traces(&["mount /", "folder /opt/containerd"], "0").differences(&before).is_empty());
        assert_eq!(
            traces(&["mount /", "mount /run/x"], "10").differences(&before),
            [
                "left behind: mount /run/x",
                "gone: folder /opt/containerd",
                "changed: sysctl kernel/panic from 0 to 10"
            ]
        );
        let with_module = traces(&["mount /", "folder /opt/containerd"], "0");
        let mut without_module = traces(&["mount /", "folder /opt/containerd"], "0");
        without_module.settings.clear();
        assert!(with_module.differences(&without_module).is_empty());
    }

    #[test]
    fn counters_and_empty_tables_are_no_rules() {
        let saved = "*nat\n:PREROUTING ACCEPT [12:3456]\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n";
        assert_eq!(
            rules(saved).collect::<Vec<_>>(),
            [":KUBE-SERVICES -", "-A PREROUTING -j KUBE-SERVICES"]
        );
    }

    #[test]
    fn the_machine_has_mounts_and_a_loopback_device() {
        let now = Traces::observe();
        assert!(
            now.things.contains("mount /") && now.things.contains("network device lo"),
            "{:?}",
            now.things
        );
    }
}
