//! Memory: how much more a process holds once a model is loaded and has run.

use std::path::Path;

use plimsoll_package::report::{MemoryChange, Spread};

use super::latency::spread;

/// The bytes that the process holds: those allocated, by mallinfo2(3), which counts every allocator of this process (the engines are built
/// against the same C library), and those resident of files in `folder` that are mapped, by `/proc/self/smaps` (proc(5)). Unlike resident
/// memory as a whole it counts neither what was freed and not given back nor the engine's own code. `None` where the system has neither.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(super) fn held(folder: &Path) -> Option<u64> {
    // SAFETY: it takes no argument, and locks each arena while it counts it.
    #[allow(unsafe_code)]
    let allocated = unsafe { libc::mallinfo2() };
    let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
    Some((allocated.uordblks + allocated.hblkhd) as u64 + mapped(&maps, folder))
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(super) fn held(_folder: &Path) -> Option<u64> {
    None
}

/// The resident bytes of files in `folder`, by `smaps`.
fn mapped(smaps: &str, folder: &Path) -> u64 {
    let mut counts = false;
    let mut kibibytes = 0;
    for line in smaps.lines() {
        match line.strip_prefix("Rss:") {
            Some(size) if counts => kibibytes += size.trim().trim_end_matches("kB").trim().parse().unwrap_or(0),
            Some(_) => {}
            // A mapping begins with its addresses and ends with its path; the lines about it begin with a word and a colon.
            None if !line.split(' ').next().unwrap_or_default().ends_with(':') => {
                counts = line.find('/').is_some_and(|start| Path::new(&line[start..]).starts_with(folder));
            }
            None => {}
        }
    }
    kibibytes << 10
}

/// The medians of what was measured load by load, and the spread of after / before; `None` where nothing was.
pub(super) fn summary(changes: &[MemoryChange]) -> Option<(MemoryChange, Spread)> {
    if changes.is_empty() {
        return None;
    }
    let median = |bytes: fn(&MemoryChange) -> u64| spread(changes.iter().map(|change| bytes(change) as f64).collect()).median as u64;
    let ratios = changes.iter().map(|change| change.after_bytes as f64 / change.before_bytes as f64);
    let change = MemoryChange {
        before_bytes: median(|change| change.before_bytes),
        after_bytes: median(|change| change.after_bytes),
    };
    Some((change, spread(ratios.collect())))
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
    fn what_is_allocated_and_what_is_mapped_count() {
        let folder = Path::new("/work");
        let before = held(folder).unwrap();
        // Of this process's other tests nothing is as large.
        let block = std::hint::black_box(Vec::<u8>::with_capacity(4 << 30));
        let added = held(folder).unwrap() - before;
        assert!(added >= 3 << 30, "{added} for {} bytes", block.capacity());

        let smaps = "7f00-7f01 r--p 00000000 fe:00 42   /work/compressed/model.onnx.data\n\
                     Size:               8192 kB\nRss:                4096 kB\nPss:                4096 kB\n\
                     7f01-7f02 r-xp 00000000 fe:00 43   /usr/lib/libc.so.6\nSize:  8 kB\nRss:                   8 kB\n\
                     7f02-7f03 rw-p 00000000 00:00 0 \nRss:                 100 kB\n";
        assert_eq!(mapped(smaps, folder), 4 << 20);
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
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn the_ratio_is_of_the_loads_that_belong_together() {
        let loads = [(100, 30), (200, 50), (120, 24)].map(|(before_bytes, after_bytes)| MemoryChange { before_bytes, after_bytes });
        let (medians, ratio) = summary(&loads).unwrap();
        assert_eq!((medians.before_bytes, medians.after_bytes), (120, 30));
        assert_eq!(ratio.median, 0.25);
        assert!((ratio.p10 - 0.21).abs() < 1e-12 && (ratio.p90 - 0.29).abs() < 1e-12, "{ratio:?}");
    }
}
