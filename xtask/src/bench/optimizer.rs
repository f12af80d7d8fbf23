//! The optimiser beside torch and onnxruntime: seconds, memory, and what quantisation loses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use comfy_table::Table;
use plimsoll_package::units::display_size;
use serde::Serialize;

use super::process::{Peers, Run, Took, median};
use crate::images::{self, program};
use crate::{models, onnxruntime, progress, workspace};

/// The Python that Debian's package python3-torch belongs to.
const TORCH_PYTHON: &str = "/usr/bin/python3";

/// Memory that a peer may have for the synthetic transformer, to the model's size: it would take all that there is.
const PEER_MEMORY_TO_FILE: f64 = 1.7;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Times that each program runs; ours and its peer take turns.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Size of the synthetic transformer in gigabytes; 0 leaves it out. Three times as much disk is needed.
    #[arg(long, default_value_t = 10)]
    gigabytes: u32,
    /// Only this work; may be given several times.
    #[arg(long)]
    only: Vec<Work>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Work {
    /// Pruning of weights in memory.
    Prune,
    /// A sentence encoder of 90 MB.
    Minilm,
    /// Half precision of real models: whether what comes of it loads and agrees.
    Half,
    /// A transformer larger than memory.
    Synthetic,
}

/// A piece of work, done by us and, where it has one, by a peer.
#[derive(Serialize)]
struct Row {
    work: String,
    peer: Option<String>,
    ours: Took,
    theirs: Option<Took>,
    /// Median of the peer's seconds to ours, round by round; above 1 is ours faster.
    speedup: Option<f64>,
    /// The last that a peer said that came to no end.
    failure: Option<String>,
    /// Peak memory to the size of the model's file.
    memory_to_file: Option<f64>,
    /// Signal to noise of our result and of the peer's, in dB.
    sqnr_db: Option<(f64, Option<f64>)>,
    /// Of how many models the results load and agree with the original: ours, the peer's, and of how many there are.
    agreeing: Option<[usize; 3]>,
}

/// Runs it.
///
/// # Errors
/// Where a program or a peer cannot be had, or fails.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let folder = workspace::target().join("bench");
    fs::create_dir_all(&folder)?;
    let programs = images::programs(&["plimsoll-optimizer"])?;
    progress::phase("compiling the examples magnitude and bare", |bar| {
        let mut command = program::release("build")?;
        command.args([
            "--locked",
            "--package",
            "plimsoll-optimizer",
            "--example",
            "magnitude",
            "--example",
            "bare",
        ]);
        progress::run_logged(&mut command, &folder.join("examples.log"), bar)
    })?;
    let mut bench = Bench {
        peers: Peers::install("bench", &folder.join("peers.log"))?,
        neural_compressor: Peers::install("bench/neural-compressor", &folder.join("neural-compressor.log"))?,
        optimizer: programs.into_iter().next().context("one program was asked for")?,
        library: onnxruntime::Library::Cpu.path()?,
        models: models::fetch(&models::TESTED)?,
        work: tempfile::tempdir_in(&folder)?,
        rounds: arguments.rounds,
        rows: Vec::new(),
    };
    let done = bench.all(arguments);
    // What was measured before something failed took its time, too.
    println!("\n{}", table(&bench.rows));
    let path = folder.join("optimizer.json");
    fs::write(&path, serde_json::to_vec_pretty(&bench.rows)?)?;
    println!("written to {}", path.display());
    done
}

struct Bench {
    peers: Peers,
    neural_compressor: Peers,
    optimizer: PathBuf,
    library: PathBuf,
    /// The folder of the real models.
    models: PathBuf,
    work: tempfile::TempDir,
    rounds: u32,
    rows: Vec<Row>,
}

/// What the work is done on, and what comes of it.
struct Files<'a> {
    /// The model.
    model: &'a Path,
    /// Our package.
    ours: &'a Path,
    /// The peer's model.
    theirs: &'a Path,
    /// The samples to compare outputs on.
    samples: Option<&'a Path>,
}

impl Bench {
    fn all(&mut self, arguments: &Arguments) -> Result<()> {
        let wants = |work| arguments.only.is_empty() || arguments.only.contains(&work);
        if wants(Work::Prune) {
            self.prune()?;
        }
        if wants(Work::Minilm) {
            self.minilm()?;
        }
        if wants(Work::Half) {
            self.half()?;
        }
        if wants(Work::Synthetic) && arguments.gigabytes > 0 {
            self.synthetic(arguments.gigabytes)?;
        }
        Ok(())
    }

    fn prune(&mut self) -> Result<()> {
        let ours = self.example("magnitude")?;
        let torch = Peers::has(TORCH_PYTHON, "torch");
        if !torch {
            eprintln!("  torch is left out (Debian: apt install python3-torch)");
        }
        for count in [22_300_000_u64, 100_700_000] {
            let count = (count / 8192 * 8192).to_string();
            let work = format!("prune 50% of {:.1} M weights in memory", count.parse::<f64>()? / 1e6);
            let mut program = Command::new(&ours);
            program.arg(&count);
            let mut peer = Command::new(TORCH_PYTHON);
            peer.arg(workspace::root().join("tests/bench/peer.py")).args(["prune", &count]);
            // Both say how long the pruning alone took; memory is the whole process's.
            let (mut own, mut others) = (vec![], vec![]);
            let label = work.clone();
            let (own_memory, other_memory) = progress::phase(&label, |_| {
                for _ in 0..self.rounds {
                    own.push(self.peers.ask(&mut program)?.parse::<f64>()?);
                    if torch {
                        others.push(self.peers.ask(&mut peer)?.parse::<f64>()?);
                    }
                }
                let other = torch.then(|| self.peers.measure(&peer)).transpose()?;
                Ok((self.peers.measure(&program)?.peak_bytes, other.map(|run| run.peak_bytes)))
            })?;
            let speedup = median(others.iter().zip(&own).map(|(other, own)| other / own).collect());
            self.rows.push(Row {
                work,
                peer: torch.then(|| "torch global_unstructured".to_owned()),
                ours: Took {
                    seconds: median(own),
                    peak_bytes: own_memory,
                },
                theirs: other_memory.map(|peak_bytes| Took {
                    seconds: median(others),
                    peak_bytes,
                }),
                speedup: torch.then_some(speedup),
                failure: None,
                memory_to_file: Some(own_memory as f64 / (count.parse::<f64>()? * 4.0)),
                sqnr_db: None,
                agreeing: None,
            });
        }
        Ok(())
    }

    fn minilm(&mut self) -> Result<()> {
        let model = self.models.join("minilm.onnx");
        let (calibration, evaluation) = (self.models.join("calibration.npz"), self.models.join("evaluation.npz"));
        let (package, other) = (self.work.path().join("package"), self.work.path().join("peer.onnx"));
        let files = Files {
            model: &model,
            ours: &package,
            theirs: &other,
            samples: Some(&evaluation),
        };
        let ungated = ["--no-gate"];

        let technique = "quantize: {scheme: Int8Dynamic, granularity: PerTensor}";
        let ours = self.apply(&files, "per-tensor", technique, &ungated)?;
        let mut peer = self.peers.task("dynamic");
        peer.arg(&model).arg(&other).arg("per-tensor");
        self.compare(
            "minilm int8 dynamic per tensor, no gate",
            &ours,
            Some(("onnxruntime quantize_dynamic", &peer)),
            &files,
        )?;
        let ours = self.optimize(&files, "Int8Dynamic", &ungated)?;
        let peers = [
            ("onnxruntime quantize_dynamic", self.peers.task("dynamic")),
            ("Neural Compressor, dynamic", self.neural_compressor.task("dynamic")),
        ];
        for (name, mut peer) in peers {
            peer.arg(&model).arg(&other);
            self.compare("minilm int8 dynamic, no gate", &ours, Some((name, &peer)), &files)?;
        }

        let silent = Files { samples: None, ..files };
        // Where it is not settled which engine serves, both run.
        let judged = ["--min-fidelity", "0.5"];
        for (work, engines, flags) in [
            ("one engine", "OnnxRuntime", &[&judged[..], &["--engine", "onnxruntime"]].concat()),
            ("both engines", "OnnxRuntime,Tract", &judged.to_vec()),
        ] {
            let mut ours = self.optimize(&files, "Int8Dynamic", flags)?;
            ours.arg("--evaluation").arg(&evaluation);
            let mut bare = Command::new(self.example("bare")?);
            bare.arg(engines).arg(&evaluation).arg(&model).arg(package.join("model.onnx"));
            bare.env("ORT_DYLIB_PATH", &self.library);
            self.compare(
                &format!("minilm int8 dynamic, gated on 32 samples by {work}"),
                &ours,
                Some(("both models loaded and run there", &bare)),
                &silent,
            )?;
        }

        let mut peer = self.peers.task("static");
        peer.arg(&model).arg(&other).arg(&calibration);
        let mut ours = self.optimize(&files, "Int8Static", &ungated)?;
        ours.arg("--calibration").arg(&calibration);
        self.compare(
            "minilm int8 static, 32 samples",
            &ours,
            Some(("onnxruntime quantize_static", &peer)),
            &files,
        )?;
        let mut peer = self.neural_compressor.task("static");
        peer.arg(&model).arg(&other).arg(&calibration);
        self.compare(
            "minilm int8 static, 32 samples",
            &ours,
            Some(("Neural Compressor, static", &peer)),
            &files,
        )?;
        let mut infer = self.peers.task("infer");
        infer.arg(&model).arg(&calibration);
        self.compare(
            "minilm int8 static, 32 samples again",
            &ours,
            Some(("the calibration run alone in onnxruntime", &infer)),
            &silent,
        )?;
        let many = self.work.path().join("many.npz");
        let mut repeat = self.peers.task("repeat");
        self.peers.ask(repeat.arg(&calibration).arg(&many).arg("3200"))?;
        let mut ours = self.optimize(&files, "Int8Static", &ungated)?;
        ours.arg("--calibration").arg(&many);
        // What is looked at is memory.
        let rounds = std::mem::replace(&mut self.rounds, 1);
        self.compare("minilm int8 static, 3,200 samples", &ours, None, &silent)?;
        self.rounds = rounds;

        let mut peer = self.peers.task("int4");
        peer.arg(&model).arg(&other);
        let ours = self.optimize(&files, "Int4", &ungated)?;
        self.compare("minilm int4, no gate", &ours, Some(("onnxruntime MatMulNBits", &peer)), &files)?;
        let mut peer = self.neural_compressor.task("int4");
        peer.arg(&model).arg(&other);
        self.compare("minilm int4, no gate", &ours, Some(("Neural Compressor, int4", &peer)), &files)?;

        for (scheme, name) in [("Int8Weights", "int8 weights"), ("Float16", "fp16")] {
            let ours = self.optimize(&files, scheme, &ungated)?;
            self.compare(&format!("minilm {name}, no gate"), &ours, None, &files)?;
        }
        Ok(())
    }

    fn half(&mut self) -> Result<()> {
        let digits = workspace::root().join("tests/models/digits");
        let fetched = |model: &str, samples: &str| (self.models.join(model), self.models.join(samples));
        let models = [
            (digits.join("digits-v2.onnx"), digits.join("digits-heldout.npz")),
            fetched("minilm.onnx", "evaluation.npz"),
            fetched("magika.onnx", "magika-inputs.npz"),
            fetched("recogniser.onnx", "recogniser-inputs.npz"),
            fetched("detector.onnx", "detector-inputs.npz"),
        ];
        let (package, other) = (self.work.path().join("half"), self.work.path().join("half.onnx"));
        let mut agreeing = [0, 0, models.len()];
        let (mut own, mut others) = (vec![], vec![]);
        progress::phase("fp16 of real models", |_| {
            for (model, samples) in &models {
                let files = Files {
                    model,
                    ours: &package,
                    theirs: &other,
                    samples: None,
                };
                own.push(self.peers.measure(&self.optimize(&files, "Float16", &["--no-gate"])?)?);
                let mut peer = self.peers.task("fp16");
                peer.arg(model).arg(&other);
                // What the peer cannot convert does not agree either.
                let converted = self.peers.measure(&peer);
                let agrees = |result: &Path| -> Result<usize> {
                    let mut agree = self.peers.task("agree");
                    Ok(self.peers.ask(agree.arg(model).arg(result).arg(samples))?.parse()?)
                };
                agreeing[0] += agrees(&package.join("model.onnx"))?;
                if let Ok(run) = converted {
                    others.push(run);
                    agreeing[1] += agrees(&other)?;
                }
            }
            Ok(())
        })?;
        let total = |runs: &[Run]| Took {
            seconds: runs.iter().map(|run| run.seconds).sum(),
            peak_bytes: Took::of(runs).peak_bytes,
        };
        self.rows.push(Row {
            work: format!("fp16 of {} models, no gate", models.len()),
            peer: Some("onnxruntime.transformers.float16".to_owned()),
            ours: total(&own),
            theirs: Some(total(&others)),
            speedup: None,
            failure: None,
            memory_to_file: None,
            sqnr_db: None,
            agreeing: Some(agreeing),
        });
        Ok(())
    }

    fn synthetic(&mut self, gigabytes: u32) -> Result<()> {
        let model = self.work.path().join("synthetic.onnx");
        progress::phase(&format!("writing a transformer of {gigabytes} GB"), |_| {
            let mut synthesize = self.peers.task("synthesize");
            self.peers.ask(synthesize.arg(&model).arg(gigabytes.to_string())).map(drop)
        })?;
        let package = self.work.path().join("synthetic");
        let files = Files {
            model: &model,
            ours: &package,
            theirs: &package,
            samples: None,
        };
        let memory_bytes = (f64::from(gigabytes) * 1e9 * PEER_MEMORY_TO_FILE) as u64;
        let peer = format!("onnxruntime quantize_dynamic within {}", display_size(memory_bytes));
        let output = self.work.path().join("peer.onnx");
        let task = self.peers.task("dynamic");
        let mut limited = Command::new("prlimit");
        limited
            .arg(format!("--data={memory_bytes}"))
            .arg(task.get_program())
            .args(task.get_args())
            .arg(&model)
            .arg(&output)
            .arg("external");
        let rounds = std::mem::replace(&mut self.rounds, 1);
        for (name, technique) in [
            ("int8", "quantize: {scheme: Int8}"),
            ("int4", "quantize: {scheme: Int4}"),
            ("fp16", "quantize: {scheme: Float16}"),
            ("half of the weights pruned", "prune: {amount: \"50%\"}"),
            ("pruned 2:4", "prune: {structure: SemiStructured, pattern: \"2:4\"}"),
        ] {
            let ours = self.apply(&files, name, technique, &["--no-gate"])?;
            let peer = (name == "int8").then_some((peer.as_str(), &limited));
            let work = format!("synthetic transformer of {gigabytes} GB, {name}, no gate");
            self.compare(&work, &ours, peer, &files)?;
        }
        self.rounds = rounds;
        Ok(())
    }

    /// An example of the optimiser's.
    fn example(&self, name: &str) -> Result<PathBuf> {
        let folder = self.optimizer.parent().context("a program lies in a folder")?;
        Ok(folder.join("examples").join(name))
    }

    /// The optimiser, told to quantise by `scheme`.
    fn optimize(&self, files: &Files, scheme: &str, flags: &[&str]) -> Result<Command> {
        self.apply(files, scheme, &format!("quantize: {{scheme: {scheme}}}"), flags)
    }

    /// The optimiser, told to apply one technique.
    fn apply(&self, files: &Files, name: &str, technique: &str, flags: &[&str]) -> Result<Command> {
        let recipe = self.work.path().join(format!("{name}.yaml"));
        fs::write(&recipe, format!("recipe:\n- {technique}\n"))?;
        let mut command = Command::new(&self.optimizer);
        command
            .arg("optimize")
            .arg(files.model)
            .arg("--recipe")
            .arg(&recipe)
            .arg("--output")
            .arg(files.ours)
            .args(flags)
            .arg("--json")
            .env("ORT_DYLIB_PATH", &self.library);
        Ok(command)
    }

    /// Runs ours and the peer's in turns, and compares what they lose. A peer that comes to no end is not run again.
    fn compare(&mut self, work: &str, ours: &Command, peer: Option<(&str, &Command)>, files: &Files) -> Result<()> {
        let (mut own, mut others, mut failure) = (vec![], vec![], None);
        progress::phase(work, |_| {
            for _ in 0..self.rounds {
                own.push(self.peers.measure(ours)?);
                let ended = peer.filter(|_| failure.is_none()).map(|(_, peer)| self.peers.measure(peer));
                match ended.transpose() {
                    Ok(run) => others.extend(run),
                    Err(error) => failure = error.to_string().lines().last().map(str::to_owned),
                }
            }
            Ok(())
        })?;
        let ended = peer.filter(|_| failure.is_none());
        let signal = |model: &Path, samples: &Path| -> Result<f64> {
            let mut sqnr = self.peers.task("sqnr");
            Ok(self.peers.ask(sqnr.arg(files.model).arg(model).arg(samples))?.parse()?)
        };
        let sqnr_db = files.samples.map(|samples| -> Result<_> {
            let theirs = ended.map(|_| signal(files.theirs, samples)).transpose()?;
            Ok((signal(&files.ours.join("model.onnx"), samples)?, theirs))
        });
        let size = |path: &Path| fs::metadata(path).map(|metadata| metadata.len()).unwrap_or_default();
        let file = size(files.model) + size(&files.model.with_extension("onnx.data"));
        let took = Took::of(&own);
        self.rows.push(Row {
            work: work.to_owned(),
            peer: peer.map(|(name, _)| name.to_owned()),
            ours: took,
            theirs: ended.map(|_| Took::of(&others)),
            failure,
            speedup: ended.map(|_| median(others.iter().zip(&own).map(|(other, own)| other.seconds / own.seconds).collect())),
            memory_to_file: Some(took.peak_bytes as f64 / file as f64),
            sqnr_db: sqnr_db.transpose()?,
            agreeing: None,
        });
        Ok(())
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "work",
        "ours",
        "memory",
        "to the file",
        "peer",
        "takes",
        "memory",
        "speed-up",
        "SQNR",
        "peer's",
        "load and agree",
    ]);
    let dash = || "-".to_owned();
    for row in rows {
        let decibels = |value: f64| format!("{value:.1} dB");
        table.add_row([
            row.work.clone(),
            display_seconds(row.ours.seconds),
            display_size(row.ours.peak_bytes),
            row.memory_to_file.map_or_else(dash, |share| format!("{share:.2}x")),
            row.peer.clone().unwrap_or_else(dash),
            row.theirs.map_or_else(
                || row.failure.as_ref().map_or_else(dash, |why| format!("fails: {why}")),
                |took| display_seconds(took.seconds),
            ),
            row.theirs.map_or_else(dash, |took| display_size(took.peak_bytes)),
            row.speedup.map_or_else(dash, |speedup| format!("{speedup:.1}x")),
            row.sqnr_db.map_or_else(dash, |(ours, _)| decibels(ours)),
            row.sqnr_db.and_then(|(_, theirs)| theirs).map_or_else(dash, decibels),
            row.agreeing
                .map_or_else(dash, |[ours, theirs, all]| format!("{ours} of {all}, the peer's {theirs}")),
        ]);
    }
    table
}

fn display_seconds(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{seconds:.2} s")
    }
}
