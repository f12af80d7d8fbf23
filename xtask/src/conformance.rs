//! `cargo xtask conformance`: ONNX's own tests of every operator on each engine, and what came of them as a page of the documentation.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{images, onnxruntime, progress, python, workspace};
use outcome::Outcome;

mod outcome;
mod page;

/// Longest wait for a case, in which it is loaded and run.
const PATIENCE: Duration = Duration::from_secs(30);

/// Options of `cargo xtask conformance`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Writes nothing; fails where a case does not pass that passes by the recorded results.
    #[arg(long)]
    check: bool,
}

/// The engines, as the runtime's flag names them.
const ENGINES: [&str; 2] = ["tract", "onnxruntime"];

/// A case of the suite, as `cases.py` lists it.
#[derive(Serialize, Deserialize)]
struct Case {
    name: String,
    operator: String,
    rtol: f64,
    atol: f64,
}

/// What came of a case on each engine: a line of `results.csv`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Row {
    case: String,
    operator: String,
    tract: Outcome,
    onnxruntime: Outcome,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check {
        let passed = check()?;
        println!("all {passed} that passed by the recorded results pass");
        return Ok(());
    }
    let rows = measure()?;
    fs::write(results(), write(&rows))?;
    let page = page_path();
    fs::write(&page, page::render(&rows)?)?;
    println!("written to {}", page.display());
    Ok(())
}

/// Runs all cases; gives how many of them passed by the recorded results, on all engines together.
///
/// # Errors
/// Where one of those does not pass, naming them; where a program or a package cannot be had.
pub(crate) fn check() -> Result<usize> {
    let recorded = read()?;
    let now: BTreeMap<String, Row> = measure()?.into_iter().map(|row| (row.case.clone(), row)).collect();
    let mut worse = vec![];
    let mut passed = 0;
    for row in &recorded {
        for engine in ENGINES {
            if row.of(engine) != Outcome::Passed {
                continue;
            }
            passed += 1;
            match now.get(&row.case).map(|row| row.of(engine)) {
                Some(Outcome::Passed) => {}
                Some(other) => worse.push(format!("{} on {engine}: {other}", row.case)),
                None => worse.push(format!("{} is no case any more", row.case)),
            }
        }
    }
    ensure!(
        worse.is_empty(),
        "{} cases passed by {} and do not now; their words are in {}:\n{}",
        worse.len(),
        results().display(),
        folder().display(),
        worse.join("\n")
    );
    Ok(passed)
}

impl Row {
    fn of(&self, engine: &str) -> Outcome {
        if engine == "tract" { self.tract } else { self.onnxruntime }
    }
}

fn folder() -> PathBuf {
    workspace::target().join("conformance")
}

fn source() -> PathBuf {
    workspace::root().join("model-runtime/tests/conformance")
}

fn results() -> PathBuf {
    source().join("results.csv")
}

fn page_path() -> PathBuf {
    workspace::root().join("docs/onnx-conformance.md")
}

fn write(rows: &[Row]) -> String {
    let lines = rows
        .iter()
        .map(|row| format!("{},{},{},{}\n", row.case, row.operator, row.tract, row.onnxruntime));
    format!("case,operator,{}\n{}", ENGINES.join(","), lines.collect::<String>())
}

fn read() -> Result<Vec<Row>> {
    let path = results();
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let row = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        let [case, operator, tract, onnxruntime] = fields[..] else {
            return None;
        };
        Some(Row {
            case: case.to_owned(),
            operator: operator.to_owned(),
            tract: tract.parse().ok()?,
            onnxruntime: onnxruntime.parse().ok()?,
        })
    };
    let rows = text
        .lines()
        .skip(1)
        .map(|line| row(line).with_context(|| format!("{}: `{line}`", path.display())));
    rows.collect()
}

/// Runs every case on each engine, the engines side by side.
fn measure() -> Result<Vec<Row>> {
    let folder = folder();
    fs::create_dir_all(&folder)?;
    let cases = cases(&folder)?;
    let library = onnxruntime::library()?;
    let program = images::program::example("plimsoll-runtime", "conformance")?;
    let all: Vec<Case> = serde_json::from_slice(&fs::read(cases.join("cases.json"))?)?;
    let of_engine = |engine: &'static str| {
        let mut suite = Suite {
            engine,
            program: &program,
            library: &library,
            cases: &cases,
            words: File::create(folder.join(format!("{engine}.txt")))?,
            log: File::create(folder.join(format!("{engine}.log")))?,
            worker: None,
        };
        all.iter().map(|case| suite.run(case)).collect::<Result<Vec<Outcome>>>()
    };
    let of_engine = &of_engine;
    let (tract, onnxruntime) = progress::phase(&format!("{} cases on {}", all.len(), ENGINES.join(" and ")), |_| {
        thread::scope(|scope| {
            let other = scope.spawn(move || of_engine(ENGINES[1]));
            let one = of_engine(ENGINES[0])?;
            let other = other.join().map_err(|_| anyhow::anyhow!("the run of {} panicked", ENGINES[1]))??;
            Ok((one, other))
        })
    })?;
    let rows = all.into_iter().zip(tract.into_iter().zip(onnxruntime));
    Ok(rows
        .map(|(case, (tract, onnxruntime))| Row {
            case: case.name,
            operator: case.operator,
            tract,
            onnxruntime,
        })
        .collect())
}

/// The folder of the cases, written anew where the package or the script changed.
fn cases(folder: &Path) -> Result<PathBuf> {
    let (requirements, script) = (source().join("requirements.txt"), source().join("cases.py"));
    let cases = folder.join("cases");
    let mark = cases.join("made-by");
    let wanted = [fs::read(&requirements)?, fs::read(&script)?].concat();
    if fs::read(&mark).ok().as_ref() == Some(&wanted) {
        return Ok(cases);
    }
    let log = folder.join("cases.log");
    let python = python::environment("conformance", &requirements, &log)?;
    progress::phase("writing ONNX's node tests", |bar| {
        if cases.exists() {
            fs::remove_dir_all(&cases)?;
        }
        progress::run_logged(Command::new(&python).arg(&script).arg(&cases), &log, bar)?;
        Ok(fs::write(&mark, &wanted)?)
    })?;
    Ok(cases)
}

/// The cases on one engine, in a process that is replaced where a case takes it along.
struct Suite<'a> {
    engine: &'static str,
    program: &'a Path,
    library: &'a Path,
    cases: &'a Path,
    /// What the engine says of cases that do not pass.
    words: File,
    log: File,
    worker: Option<Worker>,
}

struct Worker {
    child: Child,
    answers: Receiver<String>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It has ended, or hangs.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Suite<'_> {
    fn start(&self) -> Result<Worker> {
        let mut child = Command::new(self.program)
            .arg(self.engine)
            .arg(self.cases)
            .env("ORT_DYLIB_PATH", self.library)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(self.log.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let output = child.stdout.take().context("its output is piped")?;
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            // The receiver goes when the process is given up.
            let lines = BufReader::new(output).lines().map_while(|line| line.ok());
            lines.map_while(|line| sender.send(line).ok()).for_each(drop);
        });
        Ok(Worker { child, answers })
    }

    fn run(&mut self, case: &Case) -> Result<Outcome> {
        #[derive(Deserialize)]
        struct Answer {
            outcome: Outcome,
            words: String,
        }
        let mut worker = match self.worker.take() {
            Some(worker) => worker,
            None => self.start()?,
        };
        let input = worker.child.stdin.as_mut().context("its input is piped")?;
        // Where it is gone, that shows when nothing is answered.
        let _ = writeln!(input, "{}", serde_json::to_string(case)?);
        let answer = match worker.answers.recv_timeout(PATIENCE) {
            Ok(line) => {
                self.worker = Some(worker);
                serde_json::from_str(&line).with_context(|| format!("`{line}` is no answer"))?
            }
            Err(RecvTimeoutError::Timeout) => Answer {
                outcome: Outcome::Hung,
                words: format!("no answer within {} s", PATIENCE.as_secs()),
            },
            Err(RecvTimeoutError::Disconnected) => {
                let status = worker.child.wait()?;
                // It says so where it cannot work at all.
                ensure!(
                    status.code().is_none(),
                    "{} ended with {status} at {}; see {}",
                    self.program.display(),
                    case.name,
                    folder().join(format!("{}.log", self.engine)).display()
                );
                Answer {
                    outcome: Outcome::Crashed,
                    words: status.to_string(),
                }
            }
        };
        if answer.outcome != Outcome::Passed {
            writeln!(self.words, "{}: {}: {}", case.name, answer.outcome, answer.words)?;
        }
        Ok(answer.outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_that_of_the_results() {
        let rows = read().unwrap();
        assert_eq!(write(&rows), fs::read_to_string(results()).unwrap());
        let page = fs::read_to_string(page_path()).unwrap();
        assert!(page == page::render(&rows).unwrap(), "run `cargo xtask conformance`");
    }

    #[test]
    fn a_case_that_takes_the_process_along_or_hangs_is_an_outcome() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("engine");
        // Passes the first case, and is killed by the second.
        let script = "#!/bin/sh\nread case\necho '{\"outcome\":\"passed\",\"words\":\"\"}'\nread case\nkill -9 $$\n";
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut suite = Suite {
            engine: "tract",
            program: &program,
            library: Path::new(""),
            cases: folder.path(),
            words: tempfile::tempfile().unwrap(),
            log: tempfile::tempfile().unwrap(),
            worker: None,
        };
        let case = Case {
            name: "test_abs".to_owned(),
            operator: "Abs".to_owned(),
            rtol: 1e-3,
            atol: 1e-7,
        };
        let outcomes: Vec<Outcome> = (0..3).map(|_| suite.run(&case).unwrap()).collect();
        assert_eq!(outcomes, [Outcome::Passed, Outcome::Crashed, Outcome::Passed]);
        // One that ends by itself cannot work at all.
        fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
        suite.worker = None;
        assert!(suite.run(&case).unwrap_err().to_string().contains("ended with"));
    }
}
