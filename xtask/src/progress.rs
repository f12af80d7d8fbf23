//! Progress for people: a spinner with the elapsed time on a terminal, plain lines elsewhere; a command's output goes to a log that
//! is shown when it fails.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Time between two lines that say that a phase goes on, where there is no terminal to draw on.
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

/// Runs `work` under a line that says `what` and how long it takes.
///
/// # Errors
/// Whatever `work` fails with.
pub(crate) fn phase<T>(what: &str, work: impl FnOnce(&ProgressBar) -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {prefix} {msg:.dim} [{elapsed}]").expect("a constant template"));
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    if bar.is_hidden() {
        eprintln!("  ... {what}");
    }
    let (ended, end) = mpsc::channel::<()>();
    let result = thread::scope(|scope| {
        if bar.is_hidden() {
            let bar = &bar;
            scope.spawn(move || {
                while end.recv_timeout(SIGN_OF_LIFE) == Err(mpsc::RecvTimeoutError::Timeout) {
                    eprintln!("  ... {what} ({:.0} s) {}", started.elapsed().as_secs_f64(), bar.message());
                }
            });
        }
        let result = work(&bar);
        drop(ended);
        result
    });
    bar.finish_and_clear();
    let mark = if result.is_ok() { "ok " } else { "FAILED" };
    eprintln!("  {mark} {what} ({:.1} s)", started.elapsed().as_secs_f64());
    result
}

/// Runs `command` with its output in `log`; the bar shows the log's last line.
///
/// # Errors
/// Where the command cannot start or fails; the error ends with the log's last lines.
pub(crate) fn run_logged(command: &mut Command, log: &Path, bar: &ProgressBar) -> Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot start `{name}`"))?;
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                return Ok(());
            }
            let text = fs::read_to_string(log).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(20).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("`{name}` failed with {status}; the end of {}:\n{}", log.display(), tail.join("\n"));
        }
        let text = fs::read_to_string(log).unwrap_or_default();
        if let Some(line) = text.lines().last() {
            let line: String = line.chars().take(100).collect();
            bar.set_message(format!("line {}: {}", text.lines().count(), line.trim()));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
