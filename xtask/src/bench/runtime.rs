//! The runtime beside Triton, MLServer and ONNX Runtime in one's own process: requests a second, their times, starting, memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use comfy_table::Table;
use plimsoll_package::units::display_size;
use serde::Serialize;
use serde_json::{Value, json};

use super::load::{Request, Served, answers, load};
use super::process::{Peers, median};
use crate::{images, models, onnxruntime, progress, workspace};

/// Longest wait for a server to be ready.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Times that each server is loaded; they take turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of load on each, each time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Minutes of load with 1,000 idle connections beside it; 0 leaves it out.
    #[arg(long, default_value_t = 0)]
    soak: u32,
    /// Leaves the peers out.
    #[arg(long)]
    alone: bool,
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
    /// Starting and memory.
    Start,
}

/// What a server did with a piece of work: medians of the rounds.
#[derive(Serialize)]
struct Row {
    work: String,
    server: String,
    #[serde(flatten)]
    served: Served,
    /// Median, round by round, of its requests a second to those of the first server of this work.
    ratio: f64,
}

/// How a server starts.
#[derive(Serialize)]
struct Start {
    server: String,
    /// From the start of its process to the first answer to an inference, in seconds; the median.
    seconds: f64,
    /// Resident after the load, in bytes, its children included.
    resident_bytes: u64,
}

/// What a soak showed, minute by minute.
#[derive(Serialize)]
struct Minute {
    minute: u32,
    #[serde(flatten)]
    served: Served,
    resident_bytes: u64,
}

#[derive(Default, Serialize)]
struct Results {
    load: Vec<Row>,
    start: Vec<Start>,
    soak: Vec<Minute>,
}

/// Runs it.
///
/// # Errors
/// Where a program or a peer cannot be had, or fails.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let folder = workspace::target().join("bench").join("runtime");
    fs::create_dir_all(&folder)?;
    let programs = images::programs(&["plimsoll-runtime"])?;
    let mut bench = Bench {
        peers: Peers::install("bench/runtime", &folder.join("peers.log"))?,
        runtime: programs.into_iter().next().context("one program was asked for")?,
        library: onnxruntime::library()?,
        folder: folder.clone(),
        rounds: arguments.rounds,
        time: Duration::from_secs(arguments.seconds.into()),
        alone: arguments.alone,
        results: Results::default(),
    };
    let done = bench.all(arguments);
    // What was measured before something failed took its time, too.
    println!("\n{}", bench.results.load_table());
    println!("{}", bench.results.start_table());
    if !bench.results.soak.is_empty() {
        println!("{}", bench.results.soak_table());
    }
    let path = folder.join("runtime.json");
    fs::write(&path, serde_json::to_vec_pretty(&bench.results)?)?;
    println!("written to {}", path.display());
    done
}

struct Bench {
    peers: Peers,
    runtime: PathBuf,
    library: PathBuf,
    folder: PathBuf,
    rounds: u32,
    time: Duration,
    alone: bool,
    results: Results,
}

/// A model, and the inputs of one request.
struct Model {
    name: &'static str,
    path: PathBuf,
    inputs: BTreeMap<&'static str, (&'static str, Vec<usize>)>,
    outputs: BTreeMap<&'static str, (&'static str, Vec<usize>)>,
}

impl Model {
    /// The request as JSON.
    fn json(&self) -> Request {
        let inputs: Vec<Value> = self
            .inputs
            .iter()
            .map(|(name, (datatype, shape))| {
                let count: usize = shape.iter().product();
                let data: Vec<Value> = (0..count)
                    .map(|i| {
                        if *datatype == "FP32" {
                            json!((i % 97) as f32 / 97.0)
                        } else {
                            json!(1)
                        }
                    })
                    .collect();
                json!({"name": name, "datatype": datatype, "shape": shape, "data": data})
            })
            .collect();
        let body = json!({"inputs": inputs}).to_string();
        Request::post(&self.infer(), "content-type: application/json\r\n", body.as_bytes())
    }

    /// The request with tensors as bytes, both ways.
    fn binary(&self) -> Request {
        let mut bytes = vec![];
        let inputs: Vec<Value> = self
            .inputs
            .iter()
            .map(|(name, (datatype, shape))| {
                let before = bytes.len();
                for i in 0..shape.iter().product::<usize>() {
                    match *datatype {
                        "FP32" => bytes.extend(((i % 97) as f32 / 97.0).to_le_bytes()),
                        _ => bytes.extend(1_i64.to_le_bytes()),
                    }
                }
                json!({"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": bytes.len() - before}})
            })
            .collect();
        let json = json!({"inputs": inputs, "parameters": {"binary_data_output": true}}).to_string();
        let headers = format!("inference-header-content-length: {}\r\n", json.len());
        Request::post(&self.infer(), &headers, &[json.as_bytes(), &bytes].concat())
    }

    fn infer(&self) -> String {
        format!("/v2/models/{}/infer", self.name)
    }
}

/// A server's process; killed when dropped.
struct Server {
    child: Child,
    address: SocketAddr,
    /// From the start of its process to the first answer.
    started: Duration,
}

impl Server {
    fn start(command: &mut Command, port: u16, request: &Request, log: &Path) -> Result<Self> {
        let log = File::create(log)?;
        let begun = Instant::now();
        let child = command.stdout(log.try_clone()?).stderr(log).stdin(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let mut server = Self {
            child,
            address: ([127, 0, 0, 1], port).into(),
            started: Duration::ZERO,
        };
        while !answers(server.address, request) {
            if begun.elapsed() > PATIENCE || server.child.try_wait()?.is_some() {
                bail!("{:?} does not serve", command.get_program());
            }
            thread::sleep(Duration::from_millis(2));
        }
        server.started = begun.elapsed();
        Ok(server)
    }

    /// Resident memory of the process and its children, in bytes.
    fn resident(&self) -> u64 {
        let mut total = 0;
        let mut processes = vec![self.child.id().to_string()];
        while let Some(process) = processes.pop() {
            let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
            let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let kilobytes = resident.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
            total += kilobytes.unwrap_or_default() * 1024;
            let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
            processes.extend(children.split_whitespace().map(str::to_owned));
        }
        total
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Bench {
    fn all(&mut self, arguments: &Arguments) -> Result<()> {
        let wants = |work| arguments.only.is_empty() || arguments.only.contains(&work);
        let mlp = self.mlp()?;
        if wants(Work::Mlp) {
            for connections in [16, 1] {
                self.compare(&mlp, connections, &[("Plimsoll", Kind::Ours(&[]), false)], !self.alone)?;
            }
        }
        if wants(Work::Minilm) {
            let minilm = self.minilm()?;
            let ours = [
                ("Plimsoll", Kind::Ours(&[]), false),
                ("Plimsoll, binary tensors", Kind::Ours(&[]), true),
            ];
            self.compare(&minilm, 1, &ours, !self.alone)?;
        }
        if wants(Work::Batching) {
            let minilm = self.minilm()?;
            for connections in [1, 2, 4, 8, 16, 32, 64] {
                let servers = [
                    (
                        "Plimsoll, no batching",
                        Kind::Ours(&["--max-batch", "1", "--max-concurrency", "128"]),
                        true,
                    ),
                    ("Plimsoll, batching", Kind::Ours(&["--max-concurrency", "128"]), true),
                ];
                self.compare(&minilm, connections, &servers, false)?;
            }
        }
        if wants(Work::Start) {
            self.starts(&mlp)?;
        }
        if arguments.soak > 0 {
            self.soak(&mlp, arguments.soak)?;
        }
        Ok(())
    }

    fn mlp(&self) -> Result<Model> {
        let path = self.folder.join("mlp.onnx");
        self.peers.ask(self.peers.script("bench/runtime/peer.py").arg("mlp").arg(&path))?;
        Ok(Model {
            name: "mlp",
            path,
            inputs: [("x", ("FP32", vec![1, 128]))].into(),
            outputs: [("y", ("FP32", vec![1, 10]))].into(),
        })
    }

    fn minilm(&self) -> Result<Model> {
        let path = models::fetch(&models::TESTED)?.join("minilm.onnx");
        let ids = || ("INT64", vec![1, 64]);
        Ok(Model {
            name: "minilm",
            path,
            inputs: [("input_ids", ids()), ("attention_mask", ids()), ("token_type_ids", ids())].into(),
            outputs: [("last_hidden_state", ("FP32", vec![1, 64, 384]))].into(),
        })
    }

    /// Loads ours and, where `peers`, Triton, MLServer and ONNX Runtime alone, in turns.
    fn compare(&mut self, model: &Model, connections: usize, ours: &[(&str, Kind, bool)], peers: bool) -> Result<()> {
        let work = format!(
            "{}, {connections} connection{}",
            model.name,
            if connections == 1 { "" } else { "s" }
        );
        let mut servers = vec![];
        for &(name, kind, binary) in ours {
            let request = if binary { model.binary() } else { model.json() };
            servers.push((name.to_owned(), self.start(kind, model, &request)?, request));
        }
        if peers {
            for (name, kind) in [("Triton", Kind::Triton), ("MLServer", Kind::MlServer)] {
                servers.push((name.to_owned(), self.start(kind, model, &model.json())?, model.json()));
            }
        }
        let mut rounds: Vec<Vec<Served>> = servers.iter().map(|_| vec![]).collect();
        let mut alone = vec![];
        let label = work.clone();
        progress::phase(&label, |bar| {
            for round in 1..=self.rounds {
                for ((name, server, request), rounds) in servers.iter().zip(&mut rounds) {
                    bar.set_message(format!("round {round} of {}: {name}", self.rounds));
                    rounds.push(load(server.address, request, connections, self.time, None)?);
                }
                if connections == 1 {
                    bar.set_message(format!("round {round} of {}: ONNX Runtime in process", self.rounds));
                    alone.push(self.in_process(model)?);
                }
            }
            Ok(())
        })?;
        if !alone.is_empty() {
            rounds.push(alone);
        }
        let names = servers
            .iter()
            .map(|(name, _, _)| name.clone())
            .chain(["ONNX Runtime in process".to_owned()]);
        for (server, served) in names.zip(&rounds) {
            let of = |value: fn(&Served) -> f64| median(served.iter().map(value).collect());
            let ratio = median(served.iter().zip(&rounds[0]).map(|(this, first)| this.rps / first.rps).collect());
            self.results.load.push(Row {
                work: work.clone(),
                server,
                served: Served {
                    rps: of(|served| served.rps),
                    p50_us: of(|served| served.p50_us),
                    p99_us: of(|served| served.p99_us),
                    failed: served.iter().map(|served| served.failed).sum(),
                },
                ratio,
            });
        }
        Ok(())
    }

    fn in_process(&self, model: &Model) -> Result<Served> {
        let mut script = self.peers.script("bench/runtime/peer.py");
        script
            .arg("alone")
            .arg(&model.path)
            .arg(serde_json::to_string(&model.inputs)?)
            .arg(self.time.as_secs_f64().to_string());
        let told: Value = serde_json::from_str(&self.peers.ask(&mut script)?)?;
        let number = |name: &str| told[name].as_f64().unwrap_or(f64::NAN);
        Ok(Served {
            rps: number("rps"),
            p50_us: number("p50_us"),
            p99_us: f64::NAN,
            failed: 0,
        })
    }

    fn start(&self, kind: Kind, model: &Model, request: &Request) -> Result<Server> {
        let port = free_port()?;
        let folder = self
            .folder
            .join(format!("{kind:?}-{}", model.name).replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
        let script = || self.peers.script("bench/runtime/peer.py");
        let mut command = match kind {
            Kind::Ours(arguments) => {
                let mut command = Command::new(&self.runtime);
                command
                    .arg("serve")
                    .arg(&model.path)
                    .args(["--name", model.name, "--threads", "1", "--engine", "onnxruntime"]);
                command
                    .args(["--http", &format!("127.0.0.1:{port}"), "--grpc", "none"])
                    .args(arguments)
                    .env("ORT_DYLIB_PATH", &self.library);
                command
            }
            Kind::Triton => {
                let specs = json!({"inputs": model.inputs, "outputs": model.outputs}).to_string();
                let mut script = script();
                script
                    .arg("triton")
                    .arg(&folder)
                    .args([model.name])
                    .arg(&model.path)
                    .args([specs, port.to_string()]);
                let words: Vec<String> = serde_json::from_str(&self.peers.ask(&mut script)?)?;
                let (program, arguments) = words.split_first().context("a command has a program")?;
                let mut command = Command::new(program);
                command.args(arguments);
                command
            }
            Kind::MlServer => {
                let mut script = script();
                script
                    .arg("mlserver")
                    .arg(&folder)
                    .args([model.name])
                    .arg(&model.path)
                    .arg(port.to_string());
                self.peers.ask(&mut script)?;
                let mut command = Command::new(self.peers.python().with_file_name("mlserver"));
                command.arg("start").arg(".").current_dir(&folder);
                command
            }
        };
        Server::start(&mut command, port, request, &folder.with_extension("log"))
    }

    fn starts(&mut self, model: &Model) -> Result<()> {
        let mut kinds = vec![("Plimsoll", Kind::Ours(&[]))];
        if !self.alone {
            kinds.extend([("Triton", Kind::Triton), ("MLServer", Kind::MlServer)]);
        }
        for (name, kind) in kinds {
            let (mut seconds, mut resident_bytes) = (vec![], 0);
            progress::phase(&format!("starting {name}"), |_| {
                for _ in 0..self.rounds {
                    let server = self.start(kind, model, &model.json())?;
                    seconds.push(server.started.as_secs_f64());
                    load(server.address, &model.json(), 16, self.time, None)?;
                    resident_bytes = resident_bytes.max(server.resident());
                }
                Ok(())
            })?;
            self.results.start.push(Start {
                server: name.to_owned(),
                seconds: median(seconds),
                resident_bytes,
            });
        }
        Ok(())
    }

    fn soak(&mut self, model: &Model, minutes: u32) -> Result<()> {
        const CONNECTIONS: usize = 16;
        let request = model.json();
        let server = self.start(Kind::Ours(&["--max-connections", "2000"]), model, &request)?;
        let most = load(server.address, &request, CONNECTIONS, self.time, None)?.rps;
        let idle: Vec<std::net::TcpStream> = (0..1000)
            .map(|_| std::net::TcpStream::connect(server.address))
            .collect::<std::io::Result<_>>()?;
        progress::phase("1,000 idle connections, and load at 80 %", |bar| {
            for minute in 1..=minutes {
                bar.set_message(format!("minute {minute} of {minutes}"));
                let pace = 0.8 * most / CONNECTIONS as f64;
                let served = load(server.address, &request, CONNECTIONS, Duration::from_secs(60), Some(pace))?;
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

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// With more flags.
    Ours(&'static [&'static str]),
    Triton,
    MlServer,
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(header);
    table
}

fn display_micros(micros: f64) -> String {
    match micros {
        micros if micros.is_nan() => "-".to_owned(),
        micros if micros < 1e4 => format!("{micros:.0} µs"),
        micros => format!("{:.1} ms", micros / 1e3),
    }
}

impl Results {
    fn load_table(&self) -> Table {
        let mut table = table(&["work", "server", "requests/s", "ratio", "p50", "p99", "failed"]);
        for row in &self.load {
            table.add_row([
                row.work.clone(),
                row.server.clone(),
                format!("{:.0}", row.served.rps),
                format!("{:.2}x", row.ratio),
                display_micros(row.served.p50_us),
                display_micros(row.served.p99_us),
                row.served.failed.to_string(),
            ]);
        }
        table
    }

    fn start_table(&self) -> Table {
        let mut table = table(&["server", "start to the first answer", "resident after load"]);
        for row in &self.start {
            table.add_row([
                row.server.clone(),
                format!("{:.2} s", row.seconds),
                display_size(row.resident_bytes),
            ]);
        }
        table
    }

    fn soak_table(&self) -> Table {
        let mut table = table(&["minute", "requests/s", "p50", "p99", "failed", "resident"]);
        for row in &self.soak {
            table.add_row([
                row.minute.to_string(),
                format!("{:.0}", row.served.rps),
                display_micros(row.served.p50_us),
                display_micros(row.served.p99_us),
                row.served.failed.to_string(),
                display_size(row.resident_bytes),
            ]);
        }
        table
    }
}
