//! Memory: how much more of the process is resident once a model is loaded and has run.

use plimsoll_package::report::MemoryChange;

/// The process's resident bytes, by `/proc/self/status` (proc(5)); `None` where there is none.
pub(super) fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

/// What the compressed model and then the original added; `None` where either added nothing, so that the measurement says nothing.
pub(super) fn change(empty: Option<u64>, with_after: Option<u64>, with_both: Option<u64>) -> Option<MemoryChange> {
    let (empty, with_after, with_both) = (empty?, with_after?, with_both?);
    let after_bytes = with_after.checked_sub(empty).filter(|bytes| *bytes > 0)?;
    let before_bytes = with_both.checked_sub(with_after).filter(|bytes| *bytes > 0)?;
    Some(MemoryChange { before_bytes, after_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_becomes_resident() {
        let before = resident().unwrap();
        let held = vec![1_u8; 64 << 20];
        let after = resident().unwrap();
        assert!(after - before >= 60 << 20, "{before} -> {after} for {} bytes", held.len());
    }

    #[test]
    fn a_measurement_that_says_nothing_is_none() {
        assert_eq!(
            change(Some(10), Some(15), Some(35)),
            Some(MemoryChange {
                before_bytes: 20,
                after_bytes: 5
            })
        );
        assert_eq!(change(Some(10), Some(15), Some(15)), None);
        assert_eq!(change(None, Some(15), Some(35)), None);
    }
}
