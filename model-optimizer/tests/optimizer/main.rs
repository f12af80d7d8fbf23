//! The optimiser as its users meet it: fetching from real servers, steps as real processes, real models on both engines.

mod agreement;
mod chain;
mod companions;
mod custom;
mod distill;
mod drift;
mod external;
mod fetch;
#[path = "../../../tests/models/fetched.rs"]
mod fetched;
mod https;
// What only the unit tests build with is unused here.
#[allow(dead_code)]
#[path = "../../src/graph/generator.rs"]
mod generator;
mod job;
mod laptop;
mod parity;
mod property;
#[path = "../../../model-package/tests/registry/proxy.rs"]
mod proxy;
mod real;
mod refusals;
mod report;
mod search;
#[path = "../../../model-package/tests/registry/server.rs"]
mod server;

use std::path::PathBuf;
use std::process::Command;

use fetched::real_model;
use plimsoll_package::recipe::{Inputs, Optimization, SourceLocation};

/// A file of the repository's models.
fn model(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/models").join(name)
}

/// The optimiser's program, with ONNX Runtime's library.
fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll-optimizer"));
    command.env("ORT_DYLIB_PATH", onnxruntime());
    command
}

fn onnxruntime() -> PathBuf {
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from) {
        return path;
    }
    let pins = std::fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../xtask/onnxruntime.txt")).unwrap();
    let version = pins
        .lines()
        .find_map(|line| line.strip_prefix("onnxruntime=="))
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    let home = || std::env::home_dir().unwrap().join(".cache");
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    let library = cache.join("plimsoll/onnxruntime").join(version).join("libonnxruntime.so");
    assert!(library.is_file(), "{} is missing: run `cargo xtask onnxruntime`", library.display());
    library
}

fn inputs(uri: &str, repository: &str) -> Inputs {
    Inputs {
        source: SourceLocation {
            uri: uri.into(),
            digest: None,
            format: None,
        },
        optimize: Optimization::default(),
        teacher: None,
        engine: None,
        toolchain: "0.1.0".into(),
        repository: repository.into(),
        max_fetch_size: "100Mi".parse().unwrap(),
        plain_http_hosts: vec!["127.0.0.1".into()],
        annotations: Default::default(),
        no_gate: false,
        run_tag: None,
    }
}
