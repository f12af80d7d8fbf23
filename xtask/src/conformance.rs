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

use crate::onnxruntime::Library;
use crate::{images, progress, python, workspace};
use outcome::Outcome;

mod outcome;
mod page;

/// Longest wait for a case, in which it is loaded and run.
const PATIENCE: Duration = Duration::from_secs(30);

/// Options of `cargo xtask conformance`.
#[derive(Default, clap::Args)]
pub(crate) struct Arguments {
    /// Writes nothing; fails where a case does not pass that passes by the recorded results.
    #[arg(long)]
    check: bool,

    /// What the engines compute on; all but cpu are ONNX Runtime alone, cuda on the first device.
    #[arg(long, value_enum, default_value = "cpu")]
    device: Library,

    /// A program to run the cases by, compiled elsewhere as the example `conformance` of the runtime.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

/// An engine on a device: a column of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Column {
    name: &'static str,
    /// As the runtime's flags name them.
    engine: &'static str,
    device: &'static str,
    /// Also what `--device` chooses it by.
    library: Library,
}

const COLUMNS: [Column; 4] = [
    Column {
        name: "tract",
        engine: "tract",
        device: "cpu",
        library: Library::Cpu,
    },
    Column {
        name: "onnxruntime",
        engine: "onnxruntime",
        device: "cpu",
        library: Library::Cpu,
    },
    Column {
        name: "cuda",
        engine: "onnxruntime",
        device: "cuda:0",
        library: Library::Gpu,
    },
    Column {
        name: "openvino",
        engine: "onnxruntime",
        device: "openvino",
        library: Library::OpenVino,
    },
];

impl Arguments {
    /// The columns that are measured, by their place.
    fn columns(&self) -> impl Iterator<Item = usize> {
        (0..COLUMNS.len()).filter(|&column| COLUMNS[column].library == self.device)
    }
}

/// A case of the suite, as `cases.py` lists it.
#[derive(Serialize, Deserialize)]
struct Case {
    name: String,
    operator: String,
    rtol: f64,
    atol: f64,
}

/// What came of a case in each column: a line of `results.csv`.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    case: String,
    operator: String,
    outcomes: [Outcome; COLUMNS.len()],
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check {
        let passed = check(arguments)?;
        println!("all {passed} that passed by the recorded results pass");
        return Ok(());
    }
    let rows = measure(arguments)?;
    fs::write(results(), write(&rows))?;
    let page = page_path();
    fs::write(&page, page::render(&rows)?)?;
    println!("written to {}", page.display());
    Ok(())
}

/// Runs all cases; gives how many of them passed by the recorded results, in all columns together.
///
/// # Errors
/// Where one of those does not pass, naming them; where a program or a package cannot be had.
pub(crate) fn check(arguments: &Arguments) -> Result<usize> {
    let recorded = read()?;
    let now: BTreeMap<String, Row> = measure(arguments)?.into_iter().map(|row| (row.case.clone(), row)).collect();
    let mut worse = vec![];
    let mut passed = 0;
    for row in &recorded {
        for (column, outcome) in arguments.columns().map(|column| (column, row.outcomes[column])) {
            if outcome != Outcome::Passed {
                continue;
            }
            passed += 1;
            match now.get(&row.case).map(|row| row.outcomes[column]) {
                Some(Outcome::Passed) => {}
                Some(other) => worse.push(format!("{} on {}: {other}", row.case, COLUMNS[column].name)),
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
    let lines = rows.iter().map(|row| {
        format!(
            "{},{},{}\n",
            row.case,
            row.operator,
            row.outcomes.map(|outcome| outcome.to_string()).join(",")
        )
    });
    let names = COLUMNS.map(|column| column.name);
    format!("case,operator,{}\n{}", names.join(","), lines.collect::<String>())
}

fn read() -> Result<Vec<Row>> {
    let path = results();
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let row = |line: &str| {
        let mut fields = line.split(',');
        let (case, operator) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        let outcomes: Vec<Outcome> = fields.map(|field| field.parse().ok()).collect::<Option<_>>()?;
        Some(Row {
            case,
            operator,
            outcomes: outcomes.try_into().ok()?,
        })
    };
    let rows = text
        .lines()
        .skip(1)
        .map(|line| row(line).with_context(|| format!("{}: `{line}`", path.display())));
    rows.collect()
}

/// Runs every case in each column that is asked for, side by side; the others keep what is recorded.
fn measure(arguments: &Arguments) -> Result<Vec<Row>> {
    let folder = folder();
    fs::create_dir_all(&folder)?;
    let cases = cases(&folder)?;
    let program = match &arguments.program {
        Some(program) => program.clone(),
        None => images::program::example("plimsoll-runtime", "conformance")?,
    };
    let all: Vec<Case> = serde_json::from_slice(&fs::read(cases.join("cases.json"))?)?;
    let columns: Vec<Column> = arguments.columns().map(|column| COLUMNS[column]).collect();
    let in_column = |column: &Column| {
        let mut suite = Suite {
            column: *column,
            program: &program,
            library: &column.library.path()?,
            cases: &cases,
            words: File::create(folder.join(format!("{}.txt", column.name)))?,
            log: File::create(folder.join(format!("{}.log", column.name)))?,
            worker: None,
        };
        all.iter().map(|case| suite.run(case)).collect::<Result<Vec<Outcome>>>()
    };
    let in_column = &in_column;
    let names: Vec<&str> = columns.iter().map(|column| column.name).collect();
    let measured = progress::phase(&format!("{} cases on {}", all.len(), names.join(" and ")), |_| {
        thread::scope(|scope| {
            let running: Vec<_> = columns.iter().map(|column| scope.spawn(move || in_column(column))).collect();
            let ended = running.into_iter().zip(&names);
            ended
                .map(|(running, name)| running.join().map_err(|_| anyhow::anyhow!("the run of {name} panicked"))?)
                .collect::<Result<Vec<_>>>()
        })
    })?;
    let mut recorded: BTreeMap<String, Row> = read()?.into_iter().map(|row| (row.case.clone(), row)).collect();
    let rows = all.into_iter().enumerate().map(|(index, case)| {
        let recorded = recorded.remove(&case.name).map(|row| row.outcomes);
        // A new case is in the columns that are measured next.
        let mut outcomes = recorded.unwrap_or([Outcome::Unmeasured; COLUMNS.len()]);
        for (column, measured) in arguments.columns().zip(&measured) {
            outcomes[column] = measured[index];
        }
        Row {
            case: case.name,
            operator: case.operator,
            outcomes,
        }
    });
    Ok(rows.collect())
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
    column: Column,
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
            .args([self.column.engine, self.column.device])
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
                    folder().join(format!("{}.log", self.column.name)).display()
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
            column: COLUMNS[0],
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
