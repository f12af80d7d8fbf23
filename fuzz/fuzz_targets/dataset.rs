//! `cargo +nightly fuzz run dataset`; the corpus of the bounded test is a good one to start from: see `model-optimizer/tests/corpus`.
#![no_main]

#[allow(dead_code)]
#[path = "../../model-optimizer/tests/fuzz/targets.rs"]
mod targets;

use std::sync::LazyLock;

use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("there is a place for temporary files");
    std::fs::write(folder.path().join("weights"), [7; 4096]).expect("it takes a small file");
    folder
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::dataset(bytes, FOLDER.path()));
