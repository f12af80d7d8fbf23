//! Files mapped into memory, whose pages can be given back once they were read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};

/// The mappings that there are, by the address of their first byte.
static MAPPINGS: Mutex<BTreeMap<usize, Arc<Mmap>>> = Mutex::new(BTreeMap::new());

fn mappings() -> MutexGuard<'static, BTreeMap<usize, Arc<Mmap>>> {
    MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Mapping(Arc<Mmap>);

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        mappings().remove(&(self.0.as_ptr() as usize));
    }
}

/// Maps `file`; its pages are read as they are touched.
///
/// # Errors
/// Where the system does not map it.
pub fn map(file: &File) -> io::Result<Bytes> {
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // Mapping is unsafe because another process may change the file meanwhile: a package is immutable once it is published, and a Job's
    // folder is its own.
    #[allow(unsafe_code)]
    let map = Arc::new(unsafe { Mmap::map(file) }?);
    mappings().insert(map.as_ptr() as usize, Arc::clone(&map));
    Ok(Bytes::from_owner(Mapping(map)))
}

/// Gives the pages of `bytes` back to the system where they are of a mapped file; touched again, they are read again. Bytes of other
/// memory are left alone.
pub fn release(bytes: &[u8]) {
    let start = bytes.as_ptr() as usize;
    let mappings = mappings();
    let Some((first, map)) = mappings.range(..=start).next_back() else {
        return;
    };
    let offset = start - first;
    if offset + bytes.len() > map.len() || bytes.is_empty() {
        return;
    }
    // Sound: the mapping is of a file and read-only, so that its pages come back as they were.
    #[allow(unsafe_code)]
    let released = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, bytes.len()) };
    // Where the system does not take the advice, the pages stay.
    drop(released);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn what_was_released_reads_the_same_and_other_memory_is_left_alone() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..100_000_u32).map(|index| (index % 251) as u8).collect();
        file.write_all(&content).unwrap();
        let mapped = map(&file).unwrap();
        let part = mapped.slice(10_000..90_000);
        assert_eq!(part, content[10_000..90_000]);
        release(&part);
        assert_eq!(part, content[10_000..90_000]);
        let heap = content.clone();
        release(&heap);
        assert_eq!(heap, content);
        let start = mapped.as_ptr() as usize;
        assert!(mappings().contains_key(&start));
        drop((mapped, part));
        assert!(!mappings().contains_key(&start));
    }
}
