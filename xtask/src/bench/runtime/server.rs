//! The servers: how each is started, and what it takes.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::model::{Model, Wire};
use crate::bench::load::{Request, answers};
use crate::bench::process::Peers;

/// Longest wait for a server to be ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// What serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// With more flags.
    Ours(Vec<String>),
    Triton,
    MlServer,
    KServe,
}

impl Kind {
    /// Ours, with flags that are written as on a command line; with one thread where they say nothing of it.
    pub(super) fn ours(flags: &str) -> Self {
        let threads = if flags.contains("--threads") { "" } else { "--threads 1" };
        Self::Ours(format!("{threads} {flags}").split_whitespace().map(str::to_owned).collect())
    }
}

/// A server, and how it is asked.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub name: &'static str,
    pub kind: Kind,
    pub wire: Wire,
}

/// What servers are started from.
pub(super) struct Servers {
    pub runtime: PathBuf,
    /// ONNX Runtime's.
    pub library: PathBuf,
    /// `None` where nothing is asked of them.
    pub peers: Option<Peers>,
    /// The Python with KServe's packages, which do not fit into one environment with the others'.
    pub kserve: Option<PathBuf>,
    pub folder: PathBuf,
}

impl Servers {
    /// # Errors
    /// Where they were not installed.
    pub(super) fn peers(&self) -> Result<&Peers> {
        self.peers.as_ref().context("the peers are not installed")
    }

    /// Starts a server of the model, and waits until it answers.
    ///
    /// # Errors
    /// Where it cannot be started, or does not answer within a minute.
    pub(super) fn start(&self, candidate: &Candidate, model: &Model) -> Result<Server> {
        let port = free_port()?;
        let name = format!("{}-{}", candidate.name, model.name).replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let folder = self.folder.join(name);
        let mut command = self.command(candidate, model, port, &folder)?;
        Server::start(&mut command, port, &model.request(candidate.wire), &folder.with_extension("log"))
    }

    fn command(&self, candidate: &Candidate, model: &Model, port: u16, folder: &Path) -> Result<Command> {
        let script = || Ok::<_, anyhow::Error>(self.peers()?.script("bench/runtime/peer.py"));
        Ok(match &candidate.kind {
            Kind::Ours(flags) => {
                let (here, none) = (format!("127.0.0.1:{port}"), "127.0.0.1:0".to_owned());
                let (http, grpc) = if candidate.wire == Wire::Grpc {
                    (none, here)
                } else {
                    (here, "none".to_owned())
                };
                let mut command = Command::new(&self.runtime);
                command
                    .arg("serve")
                    .arg(&model.path)
                    .args(["--name", model.name, "--engine", "onnxruntime", "--http", &http, "--grpc", &grpc])
                    .args(flags)
                    .env("ORT_DYLIB_PATH", &self.library);
                command
            }
            Kind::Triton => {
                let mut script = script()?;
                let specs = json!({"inputs": model.inputs, "outputs": model.outputs}).to_string();
                script
                    .arg("triton")
                    .arg(folder)
                    .arg(model.name)
                    .arg(&model.path)
                    .args([specs, port.to_string()]);
                let words: Vec<String> = serde_json::from_str(&self.peers()?.ask(&mut script)?)?;
                let (program, arguments) = words.split_first().context("a command has a program")?;
                let mut command = Command::new(program);
                command.args(arguments);
                command
            }
            Kind::MlServer => {
                let mut script = script()?;
                script
                    .arg("mlserver")
                    .arg(folder)
                    .arg(model.name)
                    .arg(&model.path)
                    .arg(port.to_string());
                self.peers()?.ask(&mut script)?;
                let mut command = Command::new(self.peers()?.python().with_file_name("mlserver"));
                command.arg("start").arg(".").current_dir(folder);
                command
            }
            Kind::KServe => {
                let mut command = Command::new(self.kserve.as_ref().context("KServe's packages are not installed")?);
                command
                    .args(script()?.get_args())
                    .arg("kserve")
                    .arg(model.name)
                    .arg(&model.path)
                    .arg(port.to_string());
                command
            }
        })
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A server's process; killed when dropped.
pub(super) struct Server {
    child: Child,
    pub address: SocketAddr,
    /// From the start of its process to the first answer.
    pub started: Duration,
}

impl Server {
    fn start(command: &mut Command, port: u16, request: &Request, log: &Path) -> Result<Self> {
        let file = File::create(log)?;
        let begun = Instant::now();
        let child = command.stdout(file.try_clone()?).stderr(file).stdin(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let mut server = Self {
            child,
            address: ([127, 0, 0, 1], port).into(),
            started: Duration::ZERO,
        };
        while !answers(server.address, request) {
            if begun.elapsed() > PATIENCE || server.child.try_wait()?.is_some() {
                bail!("{:?} does not serve; see {}", command.get_program(), log.display());
            }
            thread::sleep(Duration::from_millis(2));
        }
        server.started = begun.elapsed();
        Ok(server)
    }

    /// Resident memory of the process and its children, in bytes.
    pub(super) fn resident(&self) -> u64 {
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
