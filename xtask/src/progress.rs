//! Progress for people: a bar with amounts where they are known, else a spinner, with the elapsed time on a terminal, plain lines elsewhere;
//! a command's output goes to a log that is shown when it fails.

use std::fmt;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};

/// Time between two lines that say that a phase goes on, where there is no terminal to draw on.
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);
/// Time between two looks at a command's log.
const LOOK: Duration = Duration::from_millis(200);
/// Most characters of a log's line that are shown.
const SHOWN_MAX: usize = 100;

/// Runs `work` under a line that says `what` and how long it takes.
///
/// # Errors
/// Whatever `work` fails with.
pub(crate) fn phase<T>(what: &str, work: impl FnOnce(&ProgressBar) -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bar = ProgressBar::new_spinner();
    bar.set_style(style("{spinner} {prefix} {msg:.dim} [{elapsed}]"));
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

/// How much of something is done.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Amount {
    pub(crate) done: u64,
    pub(crate) total: u64,
    pub(crate) unit: Unit,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Unit {
    Bytes,
    /// Things of this name.
    Things(&'static str),
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unit {
            Unit::Bytes => write!(f, "{} of {}", DecimalBytes(self.done), DecimalBytes(self.total)),
            Unit::Things(name) => write!(f, "{} of {} {name}", self.done, self.total),
        }
    }
}

/// Shows how much is done, and `now`, what is being done.
pub(crate) fn show(bar: &ProgressBar, amount: &Amount, now: &str) {
    if bar.length() != Some(amount.total) {
        bar.set_length(amount.total);
        bar.set_style(style("{spinner} {prefix} [{bar:24}] {msg:.dim} [{elapsed}]").progress_chars("=> "));
    }
    bar.set_position(amount.done.min(amount.total));
    let now: String = now.trim().chars().take(SHOWN_MAX).collect();
    bar.set_message(if now.is_empty() {
        amount.to_string()
    } else {
        format!("{amount}: {now}")
    });
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("a constant template")
}

/// Where a command's progress is read.
pub(crate) enum Gauge<'a> {
    /// In its output, where that is cargo's or a test program's.
    Output,
    /// It writes a line for each of so many things.
    Lines { total: u64, unit: &'static str },
    /// In the size of what grows in a folder; pip's output says what it will be.
    Download(&'a Path),
}

/// Runs `command` with its output in `log`; the bar shows what it is at.
///
/// # Errors
/// Where the command cannot start or fails; the error ends with the log's last lines.
pub(crate) fn run_logged(command: &mut Command, log: &Path, bar: &ProgressBar) -> Result<()> {
    run_gauged(command, log, bar, &Gauge::Output)
}

/// As [`run_logged`], with its progress read as `gauge` says.
///
/// # Errors
/// As [`run_logged`].
pub(crate) fn run_gauged(command: &mut Command, log: &Path, bar: &ProgressBar, gauge: &Gauge<'_>) -> Result<()> {
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
    let mut output = Output::default();
    let mut written = File::open(log)?;
    loop {
        let status = child.try_wait()?;
        let mut bytes = Vec::new();
        written.read_to_end(&mut bytes)?;
        output.take(&String::from_utf8_lossy(&bytes));
        match status {
            Some(status) if status.success() => return Ok(()),
            Some(status) => bail!("`{name}` failed with {status}; the end of {}:\n{}", log.display(), tail(log)),
            None => match output.amount(gauge) {
                Some(amount) => show(bar, &amount, output.now()),
                None if output.lines > 0 => bar.set_message(format!("line {}: {}", output.lines, output.now())),
                None => {}
            },
        }
        thread::sleep(LOOK);
    }
}

/// The last lines of a log, without the bars that cargo drew.
fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter_map(drawn_over).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// What stands in a line after all that was drawn over it; nothing where that is only a bar.
fn drawn_over(line: &str) -> Option<&str> {
    let last = line.rsplit('\r').find(|part| !part.trim_start_matches("\u{1b}[K").is_empty())?;
    let last = last.trim_start_matches("\u{1b}[K");
    (built(last).is_none()).then_some(last)
}

/// What a command has written so far.
#[derive(Default)]
struct Output {
    lines: usize,
    last: String,
    /// Of a line that is not at its end.
    begun: String,
    /// Crates that cargo has compiled, and all.
    crates: Option<(u64, u64)>,
    /// Tests that have ended, and all.
    tests: Option<(u64, u64)>,
    /// Bytes that pip says it fetches.
    announced: Option<u64>,
}

impl Output {
    fn take(&mut self, text: &str) {
        for part in text.split_inclusive(['\n', '\r']) {
            self.begun.push_str(part);
            if part.ends_with(['\n', '\r']) {
                let line = std::mem::take(&mut self.begun);
                self.line(line.trim_end().trim_start_matches("\u{1b}[K"));
            }
        }
    }

    fn line(&mut self, line: &str) {
        if line.is_empty() {
            return;
        }
        self.lines += 1;
        if let Some((done, total, now)) = built(line) {
            self.crates = Some((done, total));
            self.last = now.to_owned();
            return;
        }
        if let Some(count) = line
            .strip_prefix("running ")
            .and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok())
        {
            let (done, total) = self.tests.unwrap_or_default();
            self.tests = Some((done, total + count));
        } else if let Some((done, _)) = &mut self.tests
            && line.starts_with("test ")
            && [" ok", " FAILED", " ignored"].iter().any(|end| line.ends_with(end))
        {
            *done += 1;
        } else if let Some(size) = line.trim_start().strip_prefix("Downloading ").and_then(in_parentheses) {
            self.announced = decimal_bytes(size);
        }
        self.last = line.to_owned();
    }

    fn now(&self) -> &str {
        let end = self.last.char_indices().nth(SHOWN_MAX).map_or(self.last.len(), |(index, _)| index);
        self.last[..end].trim()
    }

    fn amount(&self, gauge: &Gauge<'_>) -> Option<Amount> {
        let amount = |(done, total), unit| Amount { done, total, unit };
        match gauge {
            Gauge::Output => self
                .tests
                .map(|tests| amount(tests, Unit::Things("tests")))
                .or_else(|| self.crates.map(|crates| amount(crates, Unit::Things("crates")))),
            Gauge::Lines { total, unit } => Some(amount((self.lines as u64, *total), Unit::Things(unit))),
            Gauge::Download(folder) => Some(amount((size_of(folder), self.announced?), Unit::Bytes)),
        }
    }
}

/// What a bar of cargo's says: crates compiled, all, and those that are being compiled.
fn built(line: &str) -> Option<(u64, u64, &str)> {
    let (_, counts) = line.trim_start().strip_prefix("Building [")?.split_once(']')?;
    let (counts, now) = counts.split_once(':').unwrap_or((counts, ""));
    let (done, total) = counts.trim().split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?, now.trim()))
}

/// What stands between the parentheses at a line's end.
fn in_parentheses(line: &str) -> Option<&str> {
    line.strip_suffix(')')?.rsplit_once('(').map(|(_, inside)| inside)
}

/// A size as pip writes it: `17.4 MB`.
fn decimal_bytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_once(' ')?;
    let factor = match unit {
        "bytes" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return None,
    };
    Some((number.parse::<f64>().ok()? * factor) as u64)
}

/// Bytes of all files below `folder`; those that vanish meanwhile do not count.
fn size_of(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount_of(text: &str) -> Option<Amount> {
        let mut output = Output::default();
        // In pieces, as it is written.
        for piece in text.as_bytes().chunks(7) {
            output.take(&String::from_utf8_lossy(piece));
        }
        output.amount(&Gauge::Output)
    }

    #[test]
    fn cargos_bars_give_the_crates() {
        let text = "   Compiling a v1.0.0\n\r    Building [====>      ] 12/345: b, c(build)\r\u{1b}[K   Compiling d v1.0.0\n";
        let expected = Amount {
            done: 12,
            total: 345,
            unit: Unit::Things("crates"),
        };
        assert_eq!(amount_of(text), Some(expected.clone()));
        assert_eq!(expected.to_string(), "12 of 345 crates");
        assert_eq!(amount_of("   Compiling a v1.0.0\n"), None);
    }

    #[test]
    fn tests_count_over_all_programs_that_ran() {
        let text = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\ntest result: FAILED. 1 passed; 1 failed;\n\nrunning 3 tests\ntest c ... ok\n";
        let expected = Amount {
            done: 3,
            total: 5,
            unit: Unit::Things("tests"),
        };
        assert_eq!(amount_of(text), Some(expected));
    }

    #[test]
    fn a_download_is_measured_against_what_pip_announces() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("unpacked")).unwrap();
        fs::write(folder.path().join("unpacked/wheel"), [0; 1000]).unwrap();
        let mut output = Output::default();
        assert_eq!(output.amount(&Gauge::Download(folder.path())), None);
        output.take("Collecting x\n  Downloading x-1.0-cp311-manylinux.whl (17.4 MB)\n");
        let amount = output.amount(&Gauge::Download(folder.path())).unwrap();
        assert_eq!((amount.done, amount.total), (1000, 17_400_000));
        assert_eq!(amount.to_string(), "1.00 kB of 17.40 MB");
    }

    #[test]
    fn a_failed_commands_words_are_shown_without_bars() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "printf '    Building [=> ] 1/2: a\\r\\033[Kerror: no such thing\\n'; exit 3"]);
        let error = run_logged(&mut command, &log, &ProgressBar::hidden()).unwrap_err().to_string();
        assert!(
            error.contains("error: no such thing") && !error.contains("Building") && error.contains("3"),
            "{error}"
        );
    }
}
