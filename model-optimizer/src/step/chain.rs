//! How steps that start together run one after another, without polling.
//!
//! Each step holds a lock for as long as its process lives; the kernel lets go of it however the process ends, even killed. A step
//! waits for its predecessor's lock file to appear (inotify), then for the lock, and then looks whether the predecessor left its
//! mark. So the end of a step starts the next one, or ends all that follow, within milliseconds.

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::inotify;

use super::Step;

/// The folder of locks and marks.
const FOLDER: &str = ".steps";
/// The mark of an artifact that was found, so that nothing is left to do.
const REUSED: &str = "reused";

/// A step's place in the chain; the place is given up when the process ends.
pub struct Place {
    folder: PathBuf,
    step: Step,
    _lock: File,
}

/// What a step does on its turn.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// Its work.
    Work,
    /// Nothing: the artifact exists.
    Reused,
    /// Nothing: an earlier step failed.
    EarlierFailed,
}

impl Place {
    /// Takes the place of `step` in the chain of the folder `work`.
    ///
    /// # Errors
    /// Where the folder cannot be written.
    pub fn take(work: &Path, step: Step) -> io::Result<Self> {
        let folder = work.join(FOLDER);
        fs::create_dir_all(&folder)?;
        // Locked under another name first: whoever sees the name sees it locked.
        let unnamed = tempfile::Builder::new().prefix(&format!(".{step}-")).tempfile_in(&folder)?;
        unnamed.as_file().lock()?;
        // A mark of an earlier try is not this one's.
        remove(&folder.join(format!("{step}.done")))?;
        if step == Step::Fetch {
            remove(&folder.join(REUSED))?;
        }
        let lock = unnamed.persist(folder.join(format!("{step}.lock"))).map_err(|error| error.error)?;
        Ok(Self { folder, step, _lock: lock })
    }

    /// Waits until the step before has ended.
    ///
    /// # Errors
    /// Where the folder cannot be watched.
    pub fn wait(&self) -> io::Result<Turn> {
        let Some(predecessor) = self.step.predecessor() else {
            return Ok(Turn::Work);
        };
        self.wait_for_lock_file(&format!("{predecessor}.lock"))?.lock_shared()?;
        if !self.folder.join(format!("{predecessor}.done")).exists() {
            return Ok(Turn::EarlierFailed);
        }
        Ok(if self.folder.join(REUSED).exists() {
            Turn::Reused
        } else {
            Turn::Work
        })
    }

    fn wait_for_lock_file(&self, name: &str) -> io::Result<File> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&watch, &self.folder, inotify::WatchFlags::MOVED_TO)?;
        let mut buffer = [MaybeUninit::uninit(); 1024];
        let mut events = inotify::Reader::new(watch, &mut buffer);
        loop {
            // After the watch began, so that nothing slips between.
            match File::open(self.folder.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    events.next()?;
                }
                opened => return opened,
            }
        }
    }

    /// Leaves the mark that lets the next step work, with the time that this one took.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn done(&self, took: Duration, reused: bool) -> io::Result<()> {
        if reused {
            fs::write(self.folder.join(REUSED), "")?;
        }
        fs::write(
            self.folder.join(format!("{}.done", self.step)),
            format!("{:.3}", took.as_secs_f64() * 1e3),
        )
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The milliseconds that a step took; `None` before it is done.
#[must_use]
pub fn took_ms(work: &Path, step: Step) -> Option<f64> {
    fs::read_to_string(work.join(FOLDER).join(format!("{step}.done")))
        .ok()?
        .parse()
        .ok()
}

/// Whether the process is at work, rather than waiting: only then is a signal its failure.
static WORKING: AtomicBool = AtomicBool::new(false);

/// Marks that the process is at work from now on.
pub fn begin_work() {
    WORKING.store(true, Ordering::SeqCst);
}

/// Calls `ended` (with whether the process was at work) when the process is asked to end, by SIGTERM or SIGINT. `ended` shall exit.
///
/// # Errors
/// Where no handler can be set.
pub fn on_termination(ended: impl FnOnce(bool) + Send + 'static) -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut terminate, mut interrupt) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            let (first, second) = (std::pin::pin!(terminate.recv()), std::pin::pin!(interrupt.recv()));
            futures::future::select(first, second).await;
        });
        ended(WORKING.load(Ordering::SeqCst));
    })?;
    Ok(())
}
