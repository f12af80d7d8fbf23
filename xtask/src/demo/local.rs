//! The demonstration without a cluster: the same model is optimised, served and asked on this machine.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use plimsoll_package::report::Report;
use serde_json::Value;

use super::digit::HeldOut;
use super::gateway::Client;
use super::{MODEL, manifest, record, seconds_since};
use crate::progress::phase;
use crate::{images, onnxruntime, workspace};

/// Runs of the bare optimiser, of which the median counts.
const BARE_RUNS: usize = 3;

/// Shows it.
///
/// # Errors
/// Where a program does not compile or fails.
pub(super) fn run() -> Result<()> {
    let held_out = HeldOut::read(&data())?;
    let programs = images::programs(&["plimsoll-optimizer", "plimsoll-runtime"])?;
    let [optimizer, runtime] = &programs[..] else {
        bail!("two programs were asked for")
    };
    let library = library();
    let work = work()?;
    let package = work.join(MODEL);
    let report = phase("optimising digits-v1.onnx", |_| {
        optimise(optimizer, library.as_deref(), &work, &package)
    })?;

    let mut command = program(runtime, library.as_deref());
    command
        .arg("serve")
        .arg(&package)
        .args(["--name", MODEL, "--http", "127.0.0.1:0", "--grpc", "none", "--drain-delay", "0"]);
    let server = phase("starting the server", |_| Server::start(&mut command))?;
    let answer = held_out.ask(&Client::of(&server.address), &format!("/v2/models/{MODEL}/infer"), held_out.any())?;
    let mut table = record::before_and_after(&report);
    table.add_row(["endpoint", "", &format!("http://{}/v2/models/{MODEL}", server.address)]);
    println!("\n{table}\n\n{answer}");
    println!("The package is {}. To go on playing:\n", package.display());
    let library = library
        .map(|library| format!("ORT_DYLIB_PATH={} ", library.display()))
        .unwrap_or_default();
    println!("  {library}{} serve {} --name {MODEL}", runtime.display(), package.display());
    println!("  {library}{} optimize --help", optimizer.display());
    Ok(())
}

/// Seconds that the optimiser takes on the first version of the model, from its start to its end: without a Job, a registry or a network.
///
/// # Errors
/// Where it does not compile or fails.
pub(super) fn bare_seconds() -> Result<f64> {
    let optimizer = images::programs(&["plimsoll-optimizer"])?.remove(0);
    let (library, work) = (library(), work()?);
    let mut seconds = phase("the bare optimiser, to compare", |_| {
        let run = |_| {
            let begun = Instant::now();
            optimise(&optimizer, library.as_deref(), &work, &work.join("bare"))?;
            Ok(seconds_since(begun))
        };
        (0..BARE_RUNS).map(run).collect::<Result<Vec<f64>>>()
    })?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[BARE_RUNS / 2])
}

fn data() -> PathBuf {
    workspace::root().join("tests/models/digits/digits-heldout.npz")
}

/// ONNX Runtime's library. Models run without it, too: on tract alone.
fn library() -> Option<PathBuf> {
    onnxruntime::Library::Cpu
        .path()
        .map_err(|error| eprintln!("  without ONNX Runtime: {error:#}"))
        .ok()
}

/// The folder of what is made here.
fn work() -> Result<PathBuf> {
    let work = workspace::target().join("demo");
    fs::create_dir_all(&work)?;
    Ok(work)
}

fn program(path: &Path, library: Option<&Path>) -> Command {
    let mut command = Command::new(path);
    if let Some(library) = library {
        command.env("ORT_DYLIB_PATH", library);
    }
    command
}

/// Optimises the first version of the model as the example says, into `package`.
fn optimise(optimizer: &Path, library: Option<&Path>, work: &Path, package: &Path) -> Result<Report> {
    let (recipe, log) = (work.join("recipe.yaml"), work.join("optimizer.log"));
    fs::write(&recipe, manifest::recipe(&data().to_string_lossy())?)?;
    let mut command = program(optimizer, library);
    command
        .arg("optimize")
        .arg(workspace::root().join("tests/models/digits/digits-v1.onnx"))
        .arg("--recipe")
        .arg(&recipe)
        .arg("--output")
        .arg(package)
        .arg("--json");
    let output = command.stderr(File::create(&log)?).output().context("cannot start the optimiser")?;
    if !output.status.success() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        bail!(
            "the optimiser failed with {}: {}",
            output.status,
            text.lines().last().unwrap_or_default()
        );
    }
    serde_json::from_slice(&output.stdout).context("the optimiser's report does not parse")
}

/// A running server; it ends with this.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    /// Starts it and waits until it is ready.
    fn start(command: &mut Command) -> Result<Self> {
        let mut process = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the server")?;
        let log = BufReader::new(process.stderr.take().context("stderr is piped")?);
        let mut server = Self {
            process,
            address: String::new(),
        };
        let mut lines = log.lines().map_while(Result::ok);
        let mut last = String::new();
        for line in lines.by_ref() {
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(address) = event["http"].as_str() {
                server.address = address.to_owned();
            }
            if event["message"] == "ready" {
                // Read on, or a full pipe would stop the server.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(server);
            }
            last = line;
        }
        bail!("the server ended before it was ready: {last}")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
