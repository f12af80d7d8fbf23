//! The optimiser's command line: it parses flags, and the library does the work.

use std::fs::{self, File};
use std::io::{IsTerminal as _, Write as _};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use clap::{Args, Parser, Subcommand, ValueEnum};
use plimsoll_optimizer::failure::{Failure, FailureReason, disk, failure, internal};
use plimsoll_optimizer::optimize::{self, Failed, Place};
use plimsoll_optimizer::progress::Console;
use plimsoll_optimizer::recipe_file;
use plimsoll_optimizer::step::{self, Context, Step, chain};
use plimsoll_package::manifest::Engine;
use plimsoll_package::recipe::{
    Budget, Dataset, Distill, Evaluation, INPUTS_ENV, Inputs, Metric, Optimization, Prune, Quantize, QuantizeScheme, SourceLocation,
    Technique,
};
use plimsoll_package::report::{Report, Termination, exit_code};
use plimsoll_package::units::{Duration, Percentage, Ratio, Size};
use strum::IntoEnumIterator as _;

/// Makes a model smaller and faster, and measures what that cost.
#[derive(Parser)]
#[command(name = "plimsoll-optimizer", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Optimises a model and writes the package to a folder.
    #[command(after_help = EXIT_CODES)]
    Optimize(Box<OptimizeArgs>),
    /// Runs one step of a Job, told by PLIMSOLL_INPUTS; waits for the step before.
    #[command(after_help = EXIT_CODES)]
    Step(StepArgs),
}

#[derive(Args)]
struct OptimizeArgs {
    /// The model: a path, or https://, oci://.
    model: String,
    /// Folder to write the package to.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// YAML as in spec.optimize of a ModelDeployment.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prune", "quantize", "epochs"])]
    recipe: Option<PathBuf>,
    /// Share of weights to set to zero, such as 0.5 or 50%.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    prune: Option<Percentage>,
    /// Fewer bits for each weight.
    #[arg(long, value_name = "SCHEME")]
    quantize: Option<Scheme>,
    /// Trains the compressed model against the original on the calibration samples, for that many passes over them.
    #[arg(long, value_name = "N", requires = "calibration", value_parser = clap::value_parser!(u32).range(1..=1000))]
    epochs: Option<u32>,
    /// Model to train against in place of the original: of the same inputs and outputs.
    #[arg(long, value_name = "MODEL")]
    teacher: Option<String>,
    /// Finds the recipe: the smallest model within the budget.
    ///
    /// Ways of quantising, pruning and (with --calibration) training are tried and measured, each on what the one before showed. Layers
    /// that lose most stay wider where that is what the budget asks for. Without a budget the default one holds, so that every output
    /// keeps a fidelity of 0.99. The report shows all that was tried, and why each lost.
    #[arg(long, conflicts_with_all = ["prune", "quantize", "epochs", "no_gate"])]
    search: bool,
    /// Longest time that the search takes, such as 30s or 20m. Default: 10m.
    #[arg(long, value_name = "DURATION", requires = "search")]
    search_time: Option<Duration>,
    /// Unlabelled samples: .npz, CSV, Parquet, JSON lines, or pictures in a folder, .zip or .tar.
    #[arg(long, value_name = "DATA")]
    calibration: Option<String>,
    /// Held-out samples to measure on, in the same forms; labels are the field `y`, or the column `label` of pictures' labels.csv.
    #[arg(long, value_name = "DATA")]
    evaluation: Option<String>,
    /// What to measure on the held-out samples: accuracy, top-5 (or another number), f1, auroc, mean-absolute-error,
    /// root-mean-squared-error, r2, perplexity or fidelity. Default: accuracy where they have labels, fidelity where not.
    #[arg(long, requires = "evaluation", value_parser = metric)]
    metric: Option<Metric>,
    /// Most that the metric may fall, in percentage points, or an error may rise, such as 1%.
    #[arg(long, value_name = "PERCENT")]
    max_accuracy_drop: Option<Percentage>,
    /// Most that the accuracy of any one class may fall, in percentage points. Default: 50% of classes with 5 samples or more.
    #[arg(long, value_name = "PERCENT")]
    max_class_accuracy_drop: Option<Percentage>,
    /// Least cosine similarity of each output to the original's. Default: 0.99, but of what a limited metric judges.
    #[arg(long, value_name = "RATIO")]
    min_fidelity: Option<Ratio>,
    /// Most that the model may weigh, such as 10Mi.
    #[arg(long, value_name = "SIZE")]
    max_size: Option<Size>,
    /// Most that one inference may take, such as 5ms; a model slower than the original is refused then, too.
    #[arg(long, value_name = "DURATION")]
    max_latency: Option<Duration>,
    /// Hands the result out without running it, so that nobody knows what it lost; the report says so.
    #[arg(long, conflicts_with_all = ["evaluation", "max_accuracy_drop", "max_class_accuracy_drop", "min_fidelity", "max_size", "max_latency"])]
    no_gate: bool,
    /// The engine that will serve, where that is settled: the model is measured on it alone. Default: on each, and the fastest is taken.
    #[arg(long)]
    engine: Option<EngineName>,
    /// Folder to work in, which is kept: a search that was cut off goes on there where it was.
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Threads that an inference may use. Default: as many as there are.
    #[arg(long, value_name = "N")]
    threads: Option<std::num::NonZeroUsize>,
    /// Host that may be spoken to in plain HTTP; may be given several times.
    #[arg(long, value_name = "HOST[:PORT]")]
    plain_http: Vec<String>,
    /// Largest model or dataset that is fetched.
    #[arg(long, value_name = "SIZE", default_value = "64Gi")]
    max_fetch_size: Size,
    /// Prints the report as JSON instead of a table, and progress as JSON lines.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct StepArgs {
    /// The step.
    step: Step,
    /// The folder that the steps share.
    #[arg(long, value_name = "DIR")]
    work: PathBuf,
    /// The folder of mounted credentials.
    #[arg(long, value_name = "DIR", default_value = "/secrets")]
    secrets: PathBuf,
    /// The folder of mounted volume claims.
    #[arg(long, value_name = "DIR", default_value = "/pvc")]
    claims: PathBuf,
    /// Where the result is written.
    #[arg(long, value_name = "FILE", default_value = TERMINATION_LOG)]
    termination_log: PathBuf,
    /// Threads that an inference may use. Default: as many as the container may use.
    #[arg(long, value_name = "N")]
    threads: Option<std::num::NonZeroUsize>,
}

/// By [`exit_code`].
const EXIT_CODES: &str = "Exit codes:
  0   done
  1   something that may pass, such as a network that does not answer; try again
  2   the command line or the recipe is wrong
  3   the result is outside of the budget: the report is written, and no model
  4   the model or the data cannot be read or used
  10  of a Job's step: an earlier step failed";

const TERMINATION_LOG: &str = "/dev/termination-log";
/// The environment variable that names a PEM file with more roots.
const EXTRA_CA_ENV: &str = "PLIMSOLL_EXTRA_CA";

#[derive(Clone, Copy, ValueEnum)]
enum Scheme {
    /// 8-bit weights, computed with in the way that measures fastest.
    Int8,
    /// 8-bit weights; matrix products in integers, with activations quantised as they come.
    Int8Dynamic,
    /// 8-bit weights, computed with in floats.
    Int8Weights,
    /// 8-bit weights and activations, with ranges from the calibration data.
    Int8Static,
    /// 8-bit weights of matrix products, each block of 32 with its own scale; ONNX Runtime only.
    Int8Blocks,
    /// 4-bit weights of matrix products, each block of 32 with its own scale; ONNX Runtime only.
    Int4,
    /// 16-bit floats.
    #[value(alias = "float16")]
    Fp16,
}

impl From<Scheme> for QuantizeScheme {
    fn from(scheme: Scheme) -> Self {
        match scheme {
            Scheme::Int8 => Self::Int8,
            Scheme::Int8Dynamic => Self::Int8Dynamic,
            Scheme::Int8Weights => Self::Int8Weights,
            Scheme::Int8Static => Self::Int8Static,
            Scheme::Int8Blocks => Self::Int8Blocks,
            Scheme::Int4 => Self::Int4,
            Scheme::Fp16 => Self::Float16,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineName {
    /// tract, in pure Rust.
    Tract,
    /// ONNX Runtime, whose library ORT_DYLIB_PATH names.
    #[value(name = "onnxruntime")]
    OnnxRuntime,
}

impl From<EngineName> for Engine {
    fn from(name: EngineName) -> Self {
        match name {
            EngineName::Tract => Self::Tract,
            EngineName::OnnxRuntime => Self::OnnxRuntime,
        }
    }
}

/// The metric of a name as in a recipe, in whatever case and with dashes between its words; `top-3` is short for `Top3Accuracy`.
fn metric(text: &str) -> Result<Metric, String> {
    let plain = |text: &str| text.replace('-', "").to_lowercase();
    let wanted = plain(text);
    let found = match wanted.strip_prefix("top") {
        Some(count) => format!("Top{}Accuracy", count.strip_suffix("accuracy").unwrap_or(count))
            .parse()
            .ok(),
        None => Metric::iter().find(|metric| plain(&metric.to_string()) == wanted),
    };
    found.ok_or_else(|| {
        "it is no metric; write accuracy, top-5 (or another number), f1, auroc, mean-absolute-error, root-mean-squared-error, r2, perplexity or fidelity"
            .to_owned()
    })
}

fn share(text: &str) -> Result<Percentage, String> {
    let percentage = match text.parse::<f64>() {
        Ok(ratio) => {
            format!("{:.4}", ratio * 100.0)
                .trim_end_matches('0')
                .trim_end_matches('.')
                .to_owned()
                + "%"
        }
        Err(_) => text.to_owned(),
    };
    percentage.parse().map_err(|_| format!("`{text}` is not a share; write 0.5 or 50%"))
}

/// Where the last panic was, and its message.
static PANIC: Mutex<String> = Mutex::new(String::new());

fn main() -> ExitCode {
    // Sound: no other thread runs yet.
    #[allow(unsafe_code)]
    unsafe {
        plimsoll_runtime::engine::disable_telemetry();
    }
    let arguments = Cli::parse();
    // Faults of engines and of readers of broken files are caught where they happen; whoever reads the output wants one line at most.
    std::panic::set_hook(Box::new(|panic| {
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string().replace('\n', " ");
    }));
    let run = move || match arguments.command {
        Command::Optimize(arguments) => optimize_on_laptop(*arguments),
        Command::Step(arguments) => run_step(&arguments),
    };
    std::panic::catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let fault = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
        eprintln!("error: a fault of the optimiser itself: {fault}; please report it");
        ExitCode::from(FailureReason::Internal.exit_code())
    })
}

fn threads(asked: Option<std::num::NonZeroUsize>) -> usize {
    // The standard library looks at the container's CPU quota, too.
    asked
        .or_else(|| std::thread::available_parallelism().ok())
        .map_or(1, std::num::NonZeroUsize::get)
}

fn extra_ca() -> Option<PathBuf> {
    std::env::var_os(EXTRA_CA_ENV).filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn optimize_on_laptop(arguments: OptimizeArgs) -> ExitCode {
    let console = if arguments.json || !std::io::stderr().is_terminal() {
        Console::json()
    } else {
        Console::terminal()
    };
    let (output, json) = (arguments.output.clone(), arguments.json);
    let place = Place {
        output: output.clone(),
        work: arguments.work.clone(),
        threads: threads(arguments.threads),
        extra_ca: extra_ca(),
    };
    let report = inputs(arguments)
        .map_err(Failed::from)
        .and_then(|inputs| optimize::optimize(inputs, place, &console));
    let print = |report: &Report| {
        if json {
            println!("{}", serde_json::to_string_pretty(report).unwrap_or_default());
        } else {
            println!("{}", optimize::table(report));
            if let Some(front) = &report.front {
                println!("{}", optimize::front_table(front));
            }
        }
    };
    match report {
        Ok(report) => {
            print(&report);
            if !json {
                println!("package written to {}", output.display());
            }
            ExitCode::SUCCESS
        }
        Err(Failed { failure, report }) => {
            if let Some(report) = &report {
                print(report);
            }
            eprintln!("error: {failure}");
            ExitCode::from(failure.reason.exit_code())
        }
    }
}

fn inputs(arguments: OptimizeArgs) -> Result<Inputs, Failure> {
    let mut optimize = match &arguments.recipe {
        Some(path) => read_recipe(path)?,
        None => Optimization::default(),
    };
    if let Some(amount) = arguments.prune {
        let prune = Prune {
            amount: Some(amount),
            ..Prune::default()
        };
        optimize.recipe.push(Technique {
            prune: Some(prune),
            ..Technique::default()
        });
    }
    if let Some(scheme) = arguments.quantize {
        optimize.recipe.push(Technique {
            quantize: Some(Quantize::of(scheme.into())),
            ..Technique::default()
        });
    }
    if let Some(epochs) = arguments.epochs {
        optimize.recipe.push(Technique {
            distill: Some(Distill::of(epochs)),
            ..Technique::default()
        });
    }
    if arguments.search {
        let search = optimize.search.get_or_insert_default();
        search.max_duration = arguments.search_time.or(search.max_duration.take());
    }
    let dataset = |uri| Dataset {
        uri,
        digest: None,
        credentials_secret: None,
    };
    if let Some(uri) = arguments.calibration {
        optimize.calibration = Some(dataset(uri));
    }
    if let Some(uri) = arguments.evaluation {
        optimize.evaluation = Some(Evaluation {
            dataset: dataset(uri),
            metric: None,
            labels: None,
        });
    }
    if let (Some(evaluation), Some(metric)) = (&mut optimize.evaluation, arguments.metric) {
        evaluation.metric = Some(metric);
    }
    let stated = Budget {
        max_accuracy_drop: arguments.max_accuracy_drop,
        max_class_accuracy_drop: arguments.max_class_accuracy_drop,
        min_fidelity: arguments.min_fidelity,
        max_size: arguments.max_size,
        max_latency: arguments.max_latency,
    };
    if stated != Budget::default() {
        let budget = optimize.budget.get_or_insert_with(Budget::default);
        *budget = Budget {
            max_accuracy_drop: stated.max_accuracy_drop.or(budget.max_accuracy_drop.take()),
            max_class_accuracy_drop: stated.max_class_accuracy_drop.or(budget.max_class_accuracy_drop.take()),
            min_fidelity: stated.min_fidelity.or(budget.min_fidelity.take()),
            max_size: stated.max_size.or(budget.max_size.take()),
            max_latency: stated.max_latency.or(budget.max_latency.take()),
        };
    }
    let model = |uri| SourceLocation {
        uri,
        digest: None,
        format: None,
    };
    Ok(Inputs {
        source: model(arguments.model),
        optimize,
        teacher: arguments.teacher.map(model),
        engine: arguments.engine.map(Into::into),
        toolchain: env!("CARGO_PKG_VERSION").to_owned(),
        // Nothing is published.
        repository: String::new(),
        max_fetch_size: arguments.max_fetch_size,
        plain_http_hosts: arguments.plain_http,
        annotations: Default::default(),
        no_gate: arguments.no_gate,
        run_tag: None,
    })
}

fn read_recipe(path: &Path) -> Result<Optimization, Failure> {
    let invalid = |why: String| failure(FailureReason::InvalidInputs, format!("{}: {why}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| invalid(error.to_string()))?;
    recipe_file::read(&text).map_err(|why| invalid(format!("is no recipe as in spec.optimize: {why}")))
}

fn run_step(arguments: &StepArgs) -> ExitCode {
    let console = Console::json();
    console.enter(arguments.step.into());
    match step_in_chain(arguments, &console) {
        Ok(code) => ExitCode::from(code),
        Err(failed) => fail(&failed, &console, &arguments.termination_log),
    }
}

fn fail(failed: &Failure, console: &Console, termination_log: &Path) -> ExitCode {
    console.error(&failed.message);
    terminate(&Termination::Failed(failed.clone()), console, termination_log);
    ExitCode::from(failed.reason.exit_code())
}

fn step_in_chain(arguments: &StepArgs, console: &Console) -> Result<u8, Failure> {
    let StepArgs { step, work, .. } = arguments;
    // The container's own file system is read-only.
    if let Err(default) = tempfile::env::override_temp_dir(work) {
        console.warn(&format!("large tensors spill to {}", default.display()));
    }
    let ended = {
        let (console, termination_log, step) = (console.clone(), arguments.termination_log.clone(), *step);
        move |working: bool| {
            if !working {
                std::process::exit(i32::from(exit_code::EARLIER_STEP_FAILED));
            }
            let failed = failure(FailureReason::Interrupted, format!("the step {step} was ended from outside"));
            console.error(&failed.message);
            terminate(&Termination::Failed(failed), &console, &termination_log);
            std::process::exit(i32::from(exit_code::TRANSIENT));
        }
    };
    chain::on_termination(ended).map_err(|error| internal("cannot watch for signals", &error))?;
    let place = chain::Place::take(work, *step).map_err(disk("write", work))?;
    match place.wait().map_err(disk("watch", work))? {
        chain::Turn::EarlierFailed => return Ok(exit_code::EARLIER_STEP_FAILED),
        chain::Turn::Reused => {
            place.done(std::time::Duration::ZERO, true).map_err(disk("write", work))?;
            return Ok(exit_code::DONE);
        }
        chain::Turn::Work => chain::begin_work(),
    }
    let begun = Instant::now();
    let context = Context {
        inputs: read_inputs()?,
        work: work.clone(),
        secrets: arguments.secrets.clone(),
        claims: arguments.claims.clone(),
        extra_ca: extra_ca(),
        threads: threads(arguments.threads),
        console: console.clone(),
    };
    let result = step::run(*step, &context)?;
    let reused = matches!(&result, Some(Termination::Succeeded(summary)) if summary.reused);
    if let Some(termination) = result {
        terminate(&termination, console, &arguments.termination_log);
    }
    place.done(begun.elapsed(), reused).map_err(disk("write", work))?;
    Ok(exit_code::DONE)
}

fn read_inputs() -> Result<Inputs, Failure> {
    let invalid = |why: String| failure(FailureReason::InvalidInputs, format!("{INPUTS_ENV}: {why}"));
    let json = std::env::var(INPUTS_ENV).map_err(|error| invalid(error.to_string()))?;
    serde_json::from_str(&json).map_err(|error| invalid(error.to_string()))
}

fn terminate(termination: &Termination, console: &Console, path: &Path) {
    // Kubernetes makes the file; none is made in /dev of a machine without it.
    let file = File::options()
        .write(true)
        .truncate(true)
        .create(path != Path::new(TERMINATION_LOG))
        .open(path);
    if let Err(error) = file.and_then(|mut file| file.write_all(termination.to_message().as_bytes())) {
        console.warn(&format!("cannot write {}: {error}", path.display()));
    }
}
