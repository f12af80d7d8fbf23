//! Files mapped into memory, whose pages can be given back once they were read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};

/// The mappings that there are, by the address of their first byte.
static MAPPINGS: Mutex<BTreeMap<usize, Mapped>> = Mutex::new(BTreeMap::new());

struct Mapped {
    map: Arc<Mmap>,
    /// The file's path, where it has one.
    path: Option<PathBuf>,
}

fn mappings() -> MutexGuard<'static, BTreeMap<usize, Mapped>> {
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

/// Maps the file at `path`; its pages are read as they are touched.
///
/// # Errors
/// Where it cannot be opened, or the system does not map it.
pub fn map(path: &Path) -> io::Result<Bytes> {
    map_file(&File::open(path)?, Some(path))
}

/// Maps a file without a name.
///
/// # Errors
/// Where the system does not map it.
pub fn map_unnamed(file: &File) -> io::Result<Bytes> {
    map_file(file, None)
}

fn map_file(file: &File, path: Option<&Path>) -> io::Result<Bytes> {
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // Mapping is unsafe because another process may change the file meanwhile: a package is immutable once it is published, and a Job's
    // folder is its own.
    #[allow(unsafe_code)]
    let map = Arc::new(unsafe { Mmap::map(file) }?);
    let mapped = Mapped {
        map: Arc::clone(&map),
        path: path.map(Path::to_owned),
    };
    mappings().insert(map.as_ptr() as usize, mapped);
    Ok(Bytes::from_owner(Mapping(map)))
}

/// The path of the file that `bytes` are mapped from, and where they begin in it; `None` of other memory.
#[must_use]
pub fn origin(bytes: &[u8]) -> Option<(PathBuf, u64)> {
    let mappings = mappings();
    let (mapped, offset) = within(&mappings, bytes.as_ptr() as usize, bytes.len())?;
    Some((mapped.path.clone()?, offset as u64))
}

/// The mapping that holds the `length` bytes from the address `start` on, and where they begin in it.
fn within(mappings: &BTreeMap<usize, Mapped>, start: usize, length: usize) -> Option<(&Mapped, usize)> {
    let (first, mapped) = mappings.range(..=start).next_back()?;
    let offset = start - first;
    (offset + length <= mapped.map.len() && length > 0).then_some((mapped, offset))
}

/// Gives the pages of `values` back to the system where they are of a mapped file; touched again, they are read again. Values of other
/// memory are left alone.
pub fn release<T>(values: &[T]) {
    let mappings = mappings();
    let length = size_of_val(values);
    let Some((Mapped { map, .. }, offset)) = within(&mappings, values.as_ptr() as usize, length) else {
        return;
    };
    // Sound: the mapping is of a file and read-only, so that its pages come back as they were.
    #[allow(unsafe_code)]
    let released = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, length) };
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
        let mapped = map_unnamed(&file).unwrap();
        let part = mapped.slice(10_000..90_000);
        assert_eq!(part, content[10_000..90_000]);
        release(&part[..]);
        assert_eq!(part, content[10_000..90_000]);
        let heap = content.clone();
        release(&heap[..]);
        assert_eq!(heap, content);
        let start = mapped.as_ptr() as usize;
        assert!(mappings().contains_key(&start));
        drop((mapped, part));
        assert!(!mappings().contains_key(&start));
    }
}
