//! The server's process, and the packages that it serves.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use plimsoll_package::digest::Digest;
use plimsoll_package::drift::DRIFT_FILE;
use plimsoll_package::manifest::{Engine, File, MANIFEST_FILE, MODEL_FILE, Manifest, PROBE_FILE};
use plimsoll_runtime::{engine, onnx};
use serde_json::Value;
use tempfile::TempDir;

/// Longest wait for anything that a test expects.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/models")
        .join(format!("{name}.onnx"))
}

/// What `cargo xtask onnxruntime` installs, where the environment names none.
pub(crate) fn library() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
    let pin = include_str!("../../../xtask/onnxruntime.txt");
    let version = pin
        .lines()
        .find_map(|line| line.strip_prefix("onnxruntime=="))
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    let path = engine::default_library().unwrap_or_else(|| cache.join("plimsoll/onnxruntime").join(version).join("libonnxruntime.so"));
    assert!(path.is_file(), "{} is missing: run `cargo xtask onnxruntime`", path.display());
    path
}

/// The variable of `--device`.
const DEVICE_VARIABLE: &str = "PLIMSOLL_DEVICE";

/// What ONNX Runtime computes on in these tests, where it is not the processor.
pub(crate) fn device() -> Option<String> {
    std::env::var(DEVICE_VARIABLE).ok()
}

/// A package of one of the models, with the probe that lies beside it.
pub(crate) fn package(name: &str, engine: Engine) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(model(name), dir.path().join(MODEL_FILE)).unwrap();
    std::fs::copy(model(name).with_extension("probe.json"), dir.path().join(PROBE_FILE)).unwrap();
    seal(dir.path(), name, engine);
    dir
}

/// Writes the manifest of what lies in `dir`.
pub(crate) fn seal(dir: &Path, name: &str, engine: Engine) {
    let (inputs, outputs) = onnx::signature(&onnx::read(&model(name)).unwrap()).unwrap();
    let file = |path: &str| {
        let bytes = std::fs::read(dir.join(path)).unwrap();
        (
            path.to_owned(),
            File {
                digest: Digest::of(&bytes),
                size: bytes.len() as u64,
            },
        )
    };
    let files = [MODEL_FILE, PROBE_FILE, DRIFT_FILE]
        .into_iter()
        .filter(|name| dir.join(name).is_file());
    let manifest = Manifest {
        schema_version: 1,
        inputs,
        outputs,
        engine,
        fold_dequantize: true,
        files: files.map(file).collect(),
        source_digest: Digest::of(b"source"),
        toolchain: "0.0.0-test".into(),
    };
    std::fs::write(dir.join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    lines: Receiver<Value>,
    pub(crate) http: SocketAddr,
    pub(crate) grpc: SocketAddr,
    pub(crate) metrics: Option<SocketAddr>,
}

impl Server {
    /// Starts `serve PATH ARGUMENTS` with ONNX Runtime at hand and waits until it is ready. ONNX Runtime computes on the device that
    /// `PLIMSOLL_DEVICE` names, where it does.
    pub(crate) fn ready(path: &Path, arguments: &[&str]) -> Self {
        let mut command = command(path, arguments);
        let is_tracts = || Manifest::read(path).is_ok_and(|manifest| manifest.engine == Engine::Tract);
        // The slow model is slow on the processor alone.
        let is_settled = arguments.contains(&"tract") || path == model("slow");
        if let Some(device) = device().filter(|_| !is_settled && !is_tracts()) {
            command.args(["--device", &device]);
        }
        let mut server = Self::listening(command.env(engine::LIBRARY_VARIABLE, library()));
        server.line("ready");
        server
    }

    pub(crate) fn listening(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or_else(|_| panic!("a log line is JSON: {line}"));
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut server = Self {
            child,
            lines,
            http: "0.0.0.0:0".parse().unwrap(),
            grpc: "0.0.0.0:0".parse().unwrap(),
            metrics: None,
        };
        let line = server.line("listening");
        let address = |name: &str| line[name].as_str().and_then(|address| address.parse().ok());
        server.http = address("http").unwrap();
        server.grpc = address("grpc").unwrap_or(server.grpc);
        server.metrics = address("metrics");
        server
    }

    /// Waits for a log line with that message.
    pub(crate) fn line(&mut self, message: &str) -> Value {
        self.lines_to(message).pop().unwrap()
    }

    /// The log lines up to one with that message, which is the last of them.
    pub(crate) fn lines_to(&mut self, message: &str) -> Vec<Value> {
        let mut seen = vec![];
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            seen.push(line);
            if seen.last().is_some_and(|line| line["message"] == message) {
                return seen;
            }
        }
        panic!("no line `{message}` in {seen:?}");
    }

    pub(crate) fn terminate(&self) {
        let status = Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }

    /// Resident pages of code, in bytes.
    pub(crate) fn resident_code(&self) -> u64 {
        let mappings = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id())).unwrap();
        let (mut total, mut code) = (0, false);
        for line in mappings.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("Rss:"), Some(kilobytes)) if code => total += kilobytes.parse::<u64>().unwrap() * 1024,
                (Some(range), Some(access)) if range.contains('-') => code = access == "r-xp",
                _ => {}
            }
        }
        total
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `serve PATH ARGUMENTS` on ports of its own, without ONNX Runtime.
pub(crate) fn command(path: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll-runtime"));
    command
        .arg("serve")
        .arg(path)
        .args(["--http", "127.0.0.1:0", "--threads", "1"])
        .args(arguments);
    if !arguments.contains(&"--grpc") {
        command.args(["--grpc", "127.0.0.1:0"]);
    }
    command.env_remove(engine::LIBRARY_VARIABLE).env_remove(DEVICE_VARIABLE);
    command
}

/// Runs a command that is expected to fail; gives its exit code and the reason that it leaves for Kubernetes.
pub(crate) fn failure(command: &mut Command) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let reason = dir.path().join("termination-log");
    let mut child = command.arg("--termination-log").arg(&reason).stderr(Stdio::null()).spawn().unwrap();
    let status = wait(&mut child);
    (status.code(), std::fs::read_to_string(reason).unwrap_or_default())
}

fn wait(child: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(started.elapsed() < PATIENCE, "the process did not end");
        thread::sleep(Duration::from_millis(5));
    }
}
