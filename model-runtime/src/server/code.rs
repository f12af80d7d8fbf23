//! The pages of code that only the start needed.
//!
//! Reading a model, optimising its graph and proving an engine touch most of the program and of ONNX Runtime's library once. The pages stay
//! resident, about 24 MiB, until memory is short; serving needs a third of them.

use std::fs;

/// Gives the resident pages of code back to the system: those that run again are mapped again, from the file or, as a rule, from the page
/// cache, which every process of a node shares.
pub(super) fn release() {
    // Where the system does not tell its mappings, all pages stay.
    let mappings = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    for (start, length) in unchanged_code(&mappings) {
        // Sound: the mapping is of a file, not writable and without pages of its own, so that its pages come back as they were.
        #[allow(unsafe_code)]
        let released = unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
        if released != 0 {
            tracing::debug!(error = %std::io::Error::last_os_error(), "pages of code stay");
        }
    }
}

/// Address and length in bytes of each mapping that holds code as it is in its file, by `smaps` of proc(5).
fn unchanged_code(mappings: &str) -> Vec<(usize, usize)> {
    let mut found = vec![];
    let mut code = None;
    for line in mappings.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            // Pages that were written to, as by a debugger, are private.
            (Some("Anonymous:"), Some("0")) => found.extend(code.take()),
            (Some(range), Some("r-xp")) => code = words.nth(3).filter(|path| path.starts_with('/')).and(range_of(range)),
            (Some(range), Some(_)) if range_of(range).is_some() => code = None,
            _ => {}
        }
    }
    found
}

fn range_of(written: &str) -> Option<(usize, usize)> {
    let (start, end) = written.split_once('-')?;
    let address = |digits| usize::from_str_radix(digits, 16).ok();
    let (start, end) = (address(start)?, address(end)?);
    Some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_that_is_as_in_its_file_is_given_back() {
        let mappings = "\
55d0a0000000-55d0a0001000 r--p 00000000 fe:00 77   /usr/bin/program
Anonymous:             0 kB
55d0a0001000-55d0a0005000 r-xp 00001000 fe:00 77   /usr/bin/program
Rss:                  16 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
55d0a0005000-55d0a0007000 r-xp 00005000 fe:00 77   /usr/bin/patched
Anonymous:             4 kB
55d0a0007000-55d0a0009000 rw-p 00000000 00:00 0    [heap]
Anonymous:             0 kB
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0    [vdso]
Anonymous:             0 kB
7ffe00000000-7ffe00001000 r-xp 00000000 00:00 0
Anonymous:             0 kB
";
        assert_eq!(unchanged_code(mappings), [(0x55d0_a000_1000, 0x4000)]);
        assert_eq!(unchanged_code("nothing of the kind"), []);
    }

    #[test]
    fn code_runs_on_when_its_pages_are_given_back() {
        release();
        assert!(!unchanged_code(&fs::read_to_string("/proc/self/smaps").unwrap()).is_empty());
    }
}
