//! `plimsoll-runtime`: parse, resolve, run.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser as _;
use plimsoll_runtime::server::{self, log, pull};

mod flags;

use flags::{Command, Flags};

/// Where Kubernetes looks for the reason of a failure (`terminationMessagePath`).
const TERMINATION_LOG: &str = "/dev/termination-log";

/// Of ONNX Runtime, too, whose library takes its memory by the program's `malloc`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Sound: no other thread runs yet.
    #[allow(unsafe_code)]
    unsafe {
        plimsoll_runtime::engine::disable_telemetry();
    }
    let flags = Flags::parse();
    let termination_log = flags.termination_log;
    let result = log::start(flags.log_format, &flags.log_level).and_then(|()| run(flags.command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            tracing::error!("{reason}");
            write_reason(termination_log, &reason);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), String> {
    // What is not a connection's is little: it shares a thread.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    let result = match command {
        Command::Serve(serve) => runtime.block_on(server::serve(serve.resolve())).map_err(|error| error.to_string()),
        Command::Pull(flags) => {
            let pulled = pull::pull(&flags.reference, &flags.dir, flags.plain_http, flags.credentials.as_deref());
            runtime.block_on(pulled).map_err(|error| error.to_string())
        }
    };
    // A thread that is still loading or inferring must not hold up the exit.
    runtime.shutdown_background();
    result
}

fn write_reason(explicit: Option<PathBuf>, reason: &str) {
    let line = reason.replace('\n', " ");
    match explicit {
        Some(path) => {
            if let Err(error) = fs::write(&path, &line) {
                tracing::warn!(path = %path.display(), %error, "cannot write the reason");
            }
        }
        // Not made where it is missing: outside of Kubernetes, /dev is not ours.
        None => {
            if let Ok(mut file) = fs::OpenOptions::new().write(true).truncate(true).open(Path::new(TERMINATION_LOG)) {
                let _ = file.write_all(line.as_bytes());
            }
        }
    }
}
