//! How many processors this process may use: a container's CPU limit, not the machine's size.

use std::fs;
use std::path::Path;
use std::thread;

/// Threads worth starting: the CPU quota of the control group (version 2 or 1) rounded up, at most the machine's processors, at least 1.
#[must_use]
pub fn processors() -> usize {
    let machine = thread::available_parallelism().map_or(1, usize::from);
    quota(Path::new("/sys/fs/cgroup")).map_or(machine, |quota| (quota.ceil() as usize).clamp(1, machine))
}

/// The quota in processors; `None` where there is no limit. A container sees its own group at the root of the mount.
fn quota(root: &Path) -> Option<f64> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|number| *number > 0.0);
    if let Some(text) = read("cpu.max") {
        let (quota, period) = text.trim().split_once(' ')?;
        return Some(number(quota)? / number(period)?);
    }
    Some(number(&read("cpu/cpu.cfs_quota_us")?)? / number(&read("cpu/cpu.cfs_period_us")?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_read_from_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(quota(dir.path()), None);
        write("cpu/cpu.cfs_quota_us", "-1\n");
        write("cpu/cpu.cfs_period_us", "100000\n");
        assert_eq!(quota(dir.path()), None);
        write("cpu/cpu.cfs_quota_us", "250000\n");
        assert_eq!(quota(dir.path()), Some(2.5));
        write("cpu.max", "max 100000\n");
        assert_eq!(quota(dir.path()), None);
        write("cpu.max", "50000 100000\n");
        assert_eq!(quota(dir.path()), Some(0.5));
    }

    #[test]
    fn there_is_always_a_processor() {
        assert!(processors() >= 1);
    }
}
