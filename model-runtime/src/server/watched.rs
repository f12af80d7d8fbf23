//! Files that are read anew when they change, as Kubernetes renews a mounted Secret.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often it is looked whether the files changed, at most: when what they hold is asked for.
const PAUSE: Duration = Duration::from_secs(1);

/// What some files hold, as it was when they last changed.
pub(super) struct Watched<T> {
    paths: Vec<PathBuf>,
    read: Box<dyn Fn() -> Result<T, String> + Send + Sync>,
    current: Mutex<Current<T>>,
}

struct Current<T> {
    value: Arc<T>,
    stamps: Vec<Option<Stamp>>,
    looked: Instant,
}

/// What tells a file from what it was: its inode, size, and times of change in seconds and nanoseconds.
type Stamp = (u64, u64, i64, i64);

impl<T> Watched<T> {
    /// Reads the files at `paths`, by `read`.
    ///
    /// # Errors
    /// As `read`.
    pub(super) fn new(paths: Vec<PathBuf>, read: impl Fn() -> Result<T, String> + Send + Sync + 'static) -> Result<Self, String> {
        // Before they are read, so that what changes meanwhile is read again.
        let stamps = stamps(&paths);
        let value = Arc::new(read()?);
        Ok(Self {
            paths,
            read: Box::new(read),
            current: Mutex::new(Current {
                value,
                stamps,
                looked: Instant::now(),
            }),
        })
    }

    /// What the files hold. Where they changed and cannot be read, what they held before, and a warning.
    pub(super) fn get(&self) -> Arc<T> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() >= PAUSE {
            current.looked = Instant::now();
            let stamps = stamps(&self.paths);
            if stamps != current.stamps {
                current.stamps = stamps;
                match (self.read)() {
                    Ok(value) => {
                        current.value = Arc::new(value);
                        tracing::info!(paths = ?self.paths, "read anew");
                    }
                    Err(reason) => tracing::warn!(reason, "a file that changed cannot be read; what it held before holds on"),
                }
            }
        }
        Arc::clone(&current.value)
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Option<Stamp>> {
    let stamp = |path: &PathBuf| -> io::Result<Stamp> {
        let metadata = std::fs::metadata(path)?;
        Ok((metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
    };
    paths.iter().map(|path| stamp(path).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_and_a_broken_one_is_not_taken() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |text: &str| std::fs::write(file.path(), text).unwrap();
        write("1");
        let path = file.path().to_owned();
        let read = move || {
            let text = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
            text.parse::<u32>().map_err(|error| error.to_string())
        };
        let watched = Watched::new(vec![file.path().to_owned()], read).unwrap();
        // As if the pause were over.
        let look = || watched.current.lock().unwrap().looked -= PAUSE;
        assert_eq!(*watched.get(), 1);
        write("22");
        assert_eq!(*watched.get(), 1, "not yet looked at");
        look();
        assert_eq!(*watched.get(), 22);
        write("broken");
        look();
        assert_eq!(*watched.get(), 22);
        write("333");
        look();
        assert_eq!(*watched.get(), 333);
    }
}
