//! The whole way on a laptop: from a model to a package in a folder.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use comfy_table::Table;
use plimsoll_package::manifest::{MANIFEST_FILE, REPORT_FILE};
use plimsoll_package::recipe::{Inputs, Metric};
use plimsoll_package::report::front::{Candidate, Front, Outcome};
use plimsoll_package::report::{LatencyChange, Report, Spread, Summary, Verdict, exit_code};
use plimsoll_package::units::{display_percent, display_size};

use crate::failure::{Failure, FailureReason, disk, failure, internal};
use crate::progress::Console;
use crate::search::front;
use crate::step::{self, Context, Step, chain, fetch};

/// Held while files take their place.
static PLACING: Mutex<()> = Mutex::new(());
/// Most attempts to remove the folder of the work.
const REMOVAL_TRIES: usize = 100;

/// Where to work, and with what.
pub struct Place {
    /// The folder of the package.
    pub output: PathBuf,
    /// The folder to work in, where it is to be kept.
    pub work: Option<PathBuf>,
    /// Threads that an inference may use.
    pub threads: usize,
    /// A PEM file with roots to trust beside the system's.
    pub extra_ca: Option<PathBuf>,
}

/// Optimises as `inputs` say, writes the package to the folder of the output, and returns its report. Where the result is outside of its budget
/// the folder holds the report alone. All of it appears at once and in place of what was there, or nothing does.
///
/// # Errors
/// Whatever a step fails with, or where a folder holds something else.
pub fn optimize(inputs: Inputs, place: Place, console: &Console) -> Result<Report, Failed> {
    let output = place.output.as_path();
    let occupied = fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !output.join(MANIFEST_FILE).is_file() && !output.join(REPORT_FILE).is_file() {
        let message = format!(
            "{} is not empty and no package; name another folder with --output",
            output.display()
        );
        return Err(failure(FailureReason::InvalidInputs, message).into());
    }
    let work = match &place.work {
        Some(folder) => Workplace::kept(folder)?,
        None => Workplace::Removed(tempfile::tempdir().map_err(|error| internal("cannot make a folder for the work", &error))?),
    };
    let folder = work.folder().to_owned();
    exit_when_ended(&work)?;
    let context = |console: Console| Context {
        inputs: inputs.clone(),
        secrets: folder.join("secrets"),
        claims: folder.join("claims"),
        work: folder.clone(),
        extra_ca: place.extra_ca.clone(),
        threads: place.threads,
        console,
    };
    let (beside, context) = (context(console.beside()), context(console.clone()));
    let run = |steps: &[Step]| steps.iter().try_for_each(|step| run_step(*step, &context));
    let ran = if fetch::is_ahead(&context) {
        // What is left of fetching is to hash the model; one core does that while others work.
        let (fetched, compressed) = std::thread::scope(|scope| {
            let fetching = scope.spawn(|| run_step(Step::Fetch, &beside));
            let compressed = run(&[Step::Convert, Step::Compress]);
            (fetching.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), compressed)
        });
        fetched.and(compressed).and_then(|()| run(&[Step::Evaluate]))
    } else {
        run(&[Step::Fetch, Step::Convert, Step::Compress, Step::Evaluate])
    };
    match ran {
        Ok(()) => {}
        Err(failure) if failure.reason == FailureReason::BudgetExceeded && context.package().join(REPORT_FILE).is_file() => {
            let report = context.read(&format!("package/{REPORT_FILE}"))?;
            move_into_place(&context.package(), output)?;
            return Err(Failed {
                failure,
                report: Some(report),
            });
        }
        Err(failure) => return Err(failure.into()),
    }
    let report = context.read(&format!("package/{REPORT_FILE}"))?;
    move_into_place(&context.package(), output)?;
    Ok(report)
}

/// Why there is no package.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub failure: Failure,
    /// What was measured, where the result is outside of its budget.
    pub report: Option<Report>,
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self { failure, report: None }
    }
}

fn run_step(step: Step, context: &Context) -> Result<(), Failure> {
    let begun = Instant::now();
    let place = chain::Place::take(&context.work, step).map_err(disk("write", &context.work))?;
    step::run(step, context)?;
    place.done(begun.elapsed(), false).map_err(disk("write", &context.work))
}

/// The folder to work in.
enum Workplace {
    /// It goes when the work is done.
    Removed(tempfile::TempDir),
    /// It stays; nobody else works there as long as its file is locked.
    Kept { folder: PathBuf, _lock: File },
}

impl Workplace {
    /// What of an earlier run's work is not gone on with.
    const BEGUN_ANEW: [&str; 3] = ["converted", "compressed", "package"];
    /// The file that is locked, by which a folder is known as one that was worked in.
    const LOCK: &str = ".plimsoll-work";

    /// `folder`, made where it is missing.
    fn kept(folder: &Path) -> Result<Self, Failure> {
        let refusal = |why: &str| failure(FailureReason::InvalidInputs, format!("cannot work in {}: {why}", folder.display()));
        fs::create_dir_all(folder).map_err(disk("make", folder))?;
        let lock = folder.join(Self::LOCK);
        let is_empty = fs::read_dir(folder).map_err(disk("read", folder))?.next().is_none();
        if !is_empty && !lock.is_file() {
            return Err(refusal(
                "it is not empty and was not worked in before; name another folder with --work",
            ));
        }
        let lock = File::options()
            .create(true)
            .append(true)
            .open(&lock)
            .map_err(disk("write", folder))?;
        if lock.try_lock().is_err() {
            return Err(refusal(
                "another run is at work there; wait for it, or name another folder with --work",
            ));
        }
        for name in Self::BEGUN_ANEW {
            match fs::remove_dir_all(folder.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk("remove", folder)(error)),
                _ => {}
            }
        }
        Ok(Self::Kept {
            folder: folder.to_owned(),
            _lock: lock,
        })
    }

    fn folder(&self) -> &Path {
        match self {
            Self::Removed(folder) => folder.path(),
            Self::Kept { folder, .. } => folder,
        }
    }
}

/// Lets the process end when it is asked to, without a folder of the work that nobody wants.
fn exit_when_ended(work: &Workplace) -> Result<(), Failure> {
    let removed = match work {
        Workplace::Removed(folder) => Some(folder.path().to_owned()),
        Workplace::Kept { .. } => None,
    };
    let ended = move |_| {
        // What is about to appear appears whole.
        let _placed = PLACING.lock();
        // What is still being written there keeps a folder from going at the first try.
        for _ in 0..REMOVAL_TRIES {
            if removed.as_ref().is_none_or(|folder| fs::remove_dir_all(folder).is_ok()) {
                break;
            }
        }
        std::process::exit(i32::from(exit_code::TRANSIENT));
    };
    chain::on_termination(ended).map_err(|error| internal("cannot watch for signals", &error))
}

/// Moves the files of `folder` to the place of `output`: they come to lie beside it, and then take its name.
fn move_into_place(folder: &Path, output: &Path) -> Result<(), Failure> {
    let _placing = PLACING.lock();
    let parent = match output.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => {
            return Err(failure(
                FailureReason::InvalidInputs,
                format!("{} cannot be replaced", output.display()),
            ));
        }
    };
    fs::create_dir_all(parent).map_err(disk("make", parent))?;
    let beside = tempfile::Builder::new()
        .prefix(".plimsoll-")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in(parent)
        .map_err(disk("write", parent))?;
    for entry in fs::read_dir(folder).map_err(disk("read", folder))? {
        let entry = entry.map_err(disk("read", folder))?;
        let file = beside.path().join(entry.file_name());
        // From another file system it is a copy.
        fs::rename(entry.path(), &file)
            .or_else(|_| fs::copy(entry.path(), &file).map(drop))
            .map_err(disk("write", output))?;
    }
    // An empty folder gives way to a renamed one; one that holds an older package changes names with it.
    if fs::rename(beside.path(), output).is_ok() {
        drop(beside.keep());
        return Ok(());
    }
    if rustix::fs::renameat_with(
        rustix::fs::CWD,
        beside.path(),
        rustix::fs::CWD,
        output,
        rustix::fs::RenameFlags::EXCHANGE,
    )
    .is_ok()
    {
        // The older package lies there now.
        return beside.close().map_err(disk("write", parent));
    }
    // Some file systems cannot exchange names.
    fs::remove_dir_all(output).map_err(disk("write", output))?;
    fs::rename(beside.path(), output).map_err(disk("write", output))?;
    drop(beside.keep());
    Ok(())
}

/// What a person wants to know of a report: before and after.
#[must_use]
pub fn table(report: &Report) -> Table {
    let Summary {
        size_before,
        size_after,
        size_layer_before,
        size_layer_after,
        sparsity,
        metric,
        fidelity,
        latency,
        engine,
        ..
    } = &report.summary;
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["", "before", "after"]);
    table.add_row([
        "size".to_owned(),
        display_size(*size_before),
        format!(
            "{} ({:.2}x smaller)",
            display_size(*size_after),
            *size_before as f64 / *size_after as f64
        ),
    ]);
    if let (Some(before), Some(after)) = (size_layer_before, size_layer_after) {
        table.add_row([
            "size as pulled".to_owned(),
            display_size(*before),
            format!("{} ({:.2}x smaller)", display_size(*after), *before as f64 / *after as f64),
        ]);
    }
    if let Some(metric) = metric {
        let name = match metric.name {
            Metric::Accuracy => "accuracy".to_owned(),
            name => name.to_string(),
        };
        let name = format!("{name} ({} samples)", metric.samples);
        table.add_row([name, metric.name.display(metric.before), metric.name.display(metric.after)]);
    }
    if let Some(fidelity) = fidelity {
        table.add_row(["fidelity".to_owned(), "1".to_owned(), format!("{fidelity:.5}")]);
    }
    let slices = report
        .outputs
        .iter()
        .filter_map(|output| Some((output, output.worst_slices.first()?)));
    if let Some((output, slice)) = slices.min_by(|a, b| a.1.cosine.total_cmp(&b.1.cosine)) {
        let place = format!("{} [axis {}, index {}]", output.name, slice.axis, slice.index);
        table.add_row([format!("worst slice, {place}"), "1".to_owned(), format!("{:.5}", slice.cosine)]);
    }
    for measured in &report.engines {
        let name = format!(
            "latency, {}{}",
            measured.engine,
            if measured.engine == *engine { " (chosen)" } else { "" }
        );
        match (&measured.latency, &measured.refused) {
            (Some(latency), _) => table.add_row([
                name,
                display_us(latency.before_us),
                display_latency(latency, measured.latency_ratio),
            ]),
            (None, refused) => table.add_row([name, "-".to_owned(), refused.clone().unwrap_or_else(|| "-".to_owned())]),
        };
    }
    for measured in &report.engines {
        if let Some(memory) = measured.memory {
            let name = format!("memory, {}", measured.engine);
            let after = display_size(memory.after_bytes);
            table.add_row([name, display_size(memory.before_bytes), with_ratio(after, measured.memory_ratio)]);
        }
    }
    if latency.is_none() {
        table.add_row(["engine".to_owned(), String::new(), engine.to_string()]);
    }
    table.add_row(["zero weights".to_owned(), String::new(), display_percent(*sparsity)]);
    let verdict = match report.gate.verdict {
        Verdict::WithinBudget => "within the budget",
        Verdict::BudgetExceeded => "outside of the budget",
        Verdict::NotGated => "not measured: the gate was turned off",
    };
    table.add_row(["verdict".to_owned(), String::new(), verdict.to_owned()]);
    table
}

/// What a search tried, the smallest first, and what came of it.
#[must_use]
pub fn front_table(front: &Front) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    let metric = front.candidates.iter().find_map(|candidate| candidate.metric);
    let measured = metric.map_or("fidelity".to_owned(), |metric| metric.name.to_string().to_lowercase());
    table.set_header(["recipe", "file", "as pulled", &measured, "latency", "outcome"]);
    let mut candidates: Vec<&Candidate> = front.candidates.iter().collect();
    candidates.sort_by_key(|candidate| candidate.size_layer.unwrap_or(u64::MAX));
    let or_none = |words: Option<String>| words.unwrap_or_else(|| "-".to_owned());
    for candidate in candidates {
        let fidelity = || candidate.fidelity.map(|fidelity| format!("{fidelity:.5}"));
        let metric = candidate.metric.map(|metric| metric.name.display(metric.after));
        table.add_row([
            front::words(&candidate.recipe),
            or_none(candidate.size.map(display_size)),
            or_none(candidate.size_layer.map(display_size)),
            or_none(metric.or_else(fidelity)),
            or_none(candidate.latency_ratio.map(|ratio| format!("x {:.2}", ratio.median))),
            match candidate.outcome {
                Outcome::Chosen => "chosen",
                Outcome::OnFront => "on the front",
                Outcome::Dominated => "dominated by another",
                Outcome::BudgetExceeded => "outside of the budget",
                Outcome::Failed => "does not work",
            }
            .to_owned(),
        ]);
    }
    table
}

fn display_latency(latency: &LatencyChange, ratio: Option<Spread>) -> String {
    with_ratio(display_us(latency.after_us), ratio)
}

fn with_ratio(after: String, ratio: Option<Spread>) -> String {
    match ratio {
        Some(Spread { median, p10, p90 }) => format!("{after} (x {median:.2}, {p10:.2} to {p90:.2})"),
        None => after,
    }
}

fn display_us(us: f64) -> String {
    if us < 1e3 {
        format!("{us:.0} us")
    } else {
        format!("{:.2} ms", us / 1e3)
    }
}
