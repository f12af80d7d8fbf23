//! The runtime beside Triton, MLServer, KServe's server and ONNX Runtime in one's own process: requests a second, their times, starting,
//! memory; and what watching costs.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use self::model::{Model, Wire};
use self::results::{Minute, Results, Row, Start};
use self::server::{Candidate, Kind, Servers};
use super::load::{Served, load};
use super::process::{Peers, median};
use crate::onnxruntime::Library;
use crate::{images, models, progress, python, workspace};

mod model;
mod results;
mod server;

const PROGRAMS: [&str; 2] = ["plimsoll-runtime", "plimsoll-optimizer"];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Times that each server is loaded; they take turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of load on each, each time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Minutes of load with 1,000 idle connections beside it.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    minutes: u32,
    /// Leaves the peers out.
    #[arg(long)]
    alone: bool,
    /// Folder of programs that are measured instead of being built, as to compare two versions.
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Only this work; may be given several times.
    #[arg(long)]
    only: Vec<Work>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Work {
    /// A small net, 16 connections and one.
    Mlp,
    /// A sentence encoder, one connection.
    Minilm,
    /// A sentence encoder with batching and without, 1 to 64 connections.
    Batching,
    /// A small net with drift, traces and samples.
    Watching,
    /// Starting and memory.
    Start,
    /// A small net at 80 % of the load that it takes, with 1,000 idle connections.
    Soak,
    /// A text model of 90 MB on the first CUDA device beside the processor, with 1 to 64 connections; done only where it is asked for.
    Cuda,
    /// The same on the processor with OpenVINO beside ONNX Runtime's own kernels; done only where it is asked for.
    #[value(name = "openvino")]
    OpenVino,
}

impl Work {
    /// The package of ONNX Runtime that it is measured with.
    fn library(self) -> Library {
        match self {
            Self::Cuda => Library::Gpu,
            Self::OpenVino => Library::OpenVino,
            _ => Library::Cpu,
        }
    }
}

/// Runs it.
///
/// # Errors
/// Where a program or a peer cannot be had, or fails.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let library = arguments.only.first().map_or(Library::Cpu, |work| work.library());
    ensure!(
        arguments.only.iter().all(|work| work.library() == library),
        "a device is measured with ONNX Runtime's package for it: give `--only cuda` or `--only openvino` by itself"
    );
    let device = library != Library::Cpu;
    let folder = workspace::target().join("bench").join("runtime");
    fs::create_dir_all(&folder)?;
    let [runtime, optimizer] = match &arguments.programs {
        Some(folder) => PROGRAMS.map(|name| folder.join(name)),
        None => <[PathBuf; 2]>::try_from(images::programs(&PROGRAMS)?)
            .ok()
            .context("two programs were asked for")?,
    };
    let kserve = workspace::root().join("tests/bench/runtime/kserve/requirements.txt");
    let log = folder.join("peers.log");
    let servers = Servers {
        runtime,
        library: library.path()?,
        // What is measured beside itself needs none.
        peers: match device {
            true => None,
            false => Some(Peers::install("bench/runtime", &log)?),
        },
        kserve: match arguments.alone || device {
            true => None,
            false => Some(python::environment("bench-runtime-kserve", &kserve, &log)?),
        },
        folder: folder.clone(),
    };
    let mut bench = Bench {
        servers,
        optimizer,
        rounds: arguments.rounds,
        time: Duration::from_secs(arguments.seconds.into()),
        alone: arguments.alone,
        results: Results::default(),
    };
    let done = bench.all(arguments);
    // What was measured before something failed took its time, too.
    println!("{}", bench.results);
    let path = folder.join("runtime.json");
    fs::write(&path, serde_json::to_vec_pretty(&bench.results)?)?;
    println!("written to {}", path.display());
    done
}

struct Bench {
    servers: Servers,
    optimizer: PathBuf,
    rounds: u32,
    time: Duration,
    alone: bool,
    results: Results,
}

fn ours(name: &'static str, flags: &str, wire: Wire) -> Candidate {
    let kind = Kind::ours(flags);
    Candidate { name, kind, wire }
}

impl Bench {
    fn all(&mut self, arguments: &Arguments) -> Result<()> {
        let wants = |work| arguments.only.is_empty() || arguments.only.contains(&work);
        if wants(Work::Mlp) {
            let mlp = self.mlp()?;
            for connections in [16, 1] {
                self.compare(&mlp, connections, &self.candidates())?;
            }
        }
        if wants(Work::Minilm) {
            self.compare(&minilm()?, 1, &self.candidates())?;
        }
        if wants(Work::Batching) {
            let minilm = minilm()?;
            for connections in [1, 2, 4, 8, 16, 32, 64] {
                let candidates = [
                    ours("Plimsoll, no batching", "--max-batch 1 --max-concurrency 128", Wire::Binary),
                    ours("Plimsoll, batching", "--max-concurrency 128", Wire::Binary),
                ];
                self.compare(&minilm, connections, &candidates)?;
            }
        }
        if wants(Work::Watching) {
            self.watching(&self.mlp()?)?;
        }
        if wants(Work::Start) {
            self.starts(&self.mlp()?)?;
        }
        if wants(Work::Soak) {
            self.soak(&self.mlp()?, arguments.minutes)?;
        }
        // Each asked for by name alone.
        for (work, name, device) in [
            (Work::Cuda, "Plimsoll on CUDA", "cuda:0"),
            (Work::OpenVino, "Plimsoll on OpenVINO", "openvino"),
        ] {
            if arguments.only.contains(&work) {
                self.on_device(name, device)?;
            }
        }
        Ok(())
    }

    /// A text model on a device beside the processor, which has as many threads.
    fn on_device(&mut self, name: &'static str, device: &str) -> Result<()> {
        let minilm = minilm()?;
        let threads = format!("--threads {}", thread::available_parallelism()?);
        for connections in [1, 4, 16, 64] {
            let candidates = [
                ours("Plimsoll on the processor", &threads, Wire::Binary),
                ours(name, &format!("{threads} --device {device}"), Wire::Binary),
            ];
            self.compare(&minilm, connections, &candidates)?;
        }
        Ok(())
    }

    /// Ours, however it is asked, and the peers.
    fn candidates(&self) -> Vec<Candidate> {
        let mut candidates = vec![
            ours("Plimsoll", "", Wire::Json),
            ours("Plimsoll, binary tensors", "", Wire::Binary),
            ours("Plimsoll, gRPC", "", Wire::Grpc),
        ];
        candidates.extend(self.peers());
        candidates
    }

    fn peers(&self) -> Vec<Candidate> {
        let peers = [("Triton", Kind::Triton), ("MLServer", Kind::MlServer), ("KServe", Kind::KServe)];
        let wire = Wire::Json;
        let peers = peers.into_iter().filter(|_| !self.alone);
        peers.map(|(name, kind)| Candidate { name, kind, wire }).collect()
    }

    /// The file of a small net's inputs.
    fn samples(&self) -> PathBuf {
        self.servers.folder.join("mlp.npz")
    }

    fn mlp(&self) -> Result<Model> {
        let path = self.servers.folder.join("mlp.onnx");
        let mut script = self.servers.peers()?.script("bench/runtime/peer.py");
        self.servers.peers()?.ask(script.arg("mlp").arg(&path).arg(self.samples()))?;
        Ok(Model {
            name: "mlp",
            path,
            inputs: [("x", ("FP32", vec![1, 128]))].into(),
            outputs: [("y", ("FP32", vec![1, 10]))].into(),
        })
    }

    /// Loads the candidates, and with one connection ONNX Runtime alone, in turns.
    fn compare(&mut self, model: &Model, connections: usize, candidates: &[Candidate]) -> Result<()> {
        let plural = if connections == 1 { "" } else { "s" };
        let work = format!("{}, {connections} connection{plural}", model.name);
        let servers: Vec<_> = candidates
            .iter()
            .map(|candidate| Ok((candidate, self.servers.start(candidate, model)?, model.request(candidate.wire))))
            .collect::<Result<_>>()?;
        let mut rounds: Vec<Vec<Served>> = servers.iter().map(|_| vec![]).collect();
        let mut alone = vec![];
        progress::phase(&work, |bar| {
            for round in 1..=self.rounds {
                for ((candidate, server, request), rounds) in servers.iter().zip(&mut rounds) {
                    bar.set_message(format!("round {round} of {}: {}", self.rounds, candidate.name));
                    rounds.push(load(server.address, request, connections, self.time, None)?);
                }
                if connections == 1 && self.servers.peers.is_some() {
                    bar.set_message(format!("round {round} of {}: ONNX Runtime in process", self.rounds));
                    alone.push(self.in_process(model)?);
                }
            }
            Ok(())
        })?;
        let of_first = |served: &[Served]| ratio(served, &rounds[0]);
        let mut add = |name: &str, served: &[Served], first: f64| {
            let of_in_process = (!alone.is_empty()).then(|| ratio(served, &alone));
            self.results.load.push(Row::new(&work, name, served, first, of_in_process));
        };
        for ((candidate, ..), served) in servers.iter().zip(&rounds) {
            add(candidate.name, served, of_first(served));
        }
        if !alone.is_empty() {
            add("ONNX Runtime in process", &alone, of_first(&alone));
        }
        Ok(())
    }

    fn in_process(&self, model: &Model) -> Result<Served> {
        let mut script = self.servers.peers()?.script("bench/runtime/peer.py");
        script
            .arg("alone")
            .arg(model.file())
            .arg(serde_json::to_string(&model.inputs)?)
            .arg(self.time.as_secs_f64().to_string());
        let told: Value = serde_json::from_str(&self.servers.peers()?.ask(&mut script)?)?;
        let number = |name: &str| told[name].as_f64().unwrap_or(f64::NAN);
        Ok(Served {
            rps: number("rps"),
            p50_us: number("p50_us"),
            p99_us: f64::NAN,
            failed: 0,
        })
    }

    /// What drift, traces and samples cost, each alone: a package that records how its inputs are distributed, and a collector that takes all.
    fn watching(&mut self, mlp: &Model) -> Result<()> {
        let package = self.servers.folder.join("mlp-package");
        let samples = self.servers.folder.join("samples");
        for folder in [&package, &samples] {
            if folder.exists() {
                fs::remove_dir_all(folder)?;
            }
        }
        fs::create_dir_all(&samples)?;
        let mut optimize = Command::new(&self.optimizer);
        optimize
            .arg("optimize")
            .arg(&mlp.path)
            .arg("--output")
            .arg(&package)
            .env("ORT_DYLIB_PATH", &self.servers.library);
        optimize
            .arg("--evaluation")
            .arg(self.samples())
            .args(["--engine", "onnxruntime", "--json"]);
        self.servers.peers()?.ask(&mut optimize)?;
        let collector = collector()?;
        let model = Model {
            path: package,
            inputs: mlp.inputs.clone(),
            outputs: mlp.outputs.clone(),
            ..*mlp
        };
        let traces = format!("--drift-window 0 --otlp-endpoint {collector}");
        let sampling = format!("--drift-window 0 --sample-to file://{} --sample-share 1%", samples.display());
        let candidates = [
            ours("Plimsoll, watching nothing", "--drift-window 0", Wire::Json),
            ours("Plimsoll, drift", "", Wire::Json),
            ours("Plimsoll, a trace of every request", &traces, Wire::Json),
            ours("Plimsoll, samples of 1 %", &sampling, Wire::Json),
        ];
        for connections in [16, 1] {
            self.compare(&model, connections, &candidates)?;
        }
        Ok(())
    }

    fn starts(&mut self, model: &Model) -> Result<()> {
        let mut candidates = vec![ours("Plimsoll", "", Wire::Json)];
        candidates.extend(self.peers());
        let size = fs::metadata(&model.path)?.len();
        for candidate in &candidates {
            let (mut seconds, mut resident) = (vec![], 0);
            progress::phase(&format!("starting {}", candidate.name), |_| {
                for _ in 0..self.rounds {
                    let server = self.servers.start(candidate, model)?;
                    seconds.push(server.started.as_secs_f64());
                    load(server.address, &model.request(candidate.wire), 16, self.time, None)?;
                    resident = resident.max(server.resident());
                }
                Ok(())
            })?;
            self.results.start.push(Start {
                server: candidate.name.to_owned(),
                seconds: median(seconds),
                resident_bytes: resident,
                over_model_bytes: resident.saturating_sub(size),
            });
        }
        Ok(())
    }

    fn soak(&mut self, model: &Model, minutes: u32) -> Result<()> {
        const CONNECTIONS: usize = 16;
        let candidate = ours("Plimsoll", "--max-connections 2000", Wire::Json);
        let request = model.request(candidate.wire);
        let server = self.servers.start(&candidate, model)?;
        let most = load(server.address, &request, CONNECTIONS, self.time, None)?.rps;
        let open = |_| TcpStream::connect(server.address);
        let idle: Vec<TcpStream> = (0..1000).map(open).collect::<std::io::Result<_>>()?;
        progress::phase("1,000 idle connections, and load at 80 %", |bar| {
            for minute in 1..=minutes {
                bar.set_message(format!("minute {minute} of {minutes}"));
                let pace = 0.8 * most / CONNECTIONS as f64;
                let served = load(server.address, &request, CONNECTIONS, Duration::from_secs(55), Some(pace))?;
                self.results.soak.push(Minute {
                    minute,
                    served,
                    resident_bytes: server.resident(),
                });
            }
            Ok(())
        })?;
        drop(idle);
        Ok(())
    }
}

/// Median, round by round, of the one's requests a second to the other's.
fn ratio(these: &[Served], those: &[Served]) -> f64 {
    median(these.iter().zip(those).map(|(this, that)| this.rps / that.rps).collect())
}

fn minilm() -> Result<Model> {
    let path: &Path = &models::fetch(&models::TESTED)?;
    let ids = || ("INT64", vec![1, 64]);
    Ok(Model {
        name: "minilm",
        path: path.join("minilm.onnx"),
        inputs: [("input_ids", ids()), ("attention_mask", ids()), ("token_type_ids", ids())].into(),
        outputs: [("last_hidden_state", ("FP32", vec![1, 64, 384]))].into(),
    })
}

/// The address of a collector that takes every trace and keeps none.
fn collector() -> Result<String> {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("http://{}", listener.local_addr()?);
    let answer = |stream: TcpStream| -> std::io::Result<()> {
        let mut reader = BufReader::new(stream);
        loop {
            let mut length = 0;
            let mut line = String::new();
            while reader.read_line(&mut line)? > 2 {
                let value = line.to_ascii_lowercase();
                let value = value.strip_prefix("content-length:").and_then(|value| value.trim().parse().ok());
                length = value.unwrap_or(length);
                line.clear();
            }
            if line.is_empty() {
                return Ok(());
            }
            std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
            reader.get_mut().write_all(head.as_bytes())?;
        }
    };
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    Ok(address)
}
