//! `cargo +nightly fuzz run binary`; the corpus of the bounded test is a good one to start from: see `model-runtime/tests/corpus`.
#![no_main]

#[allow(dead_code)]
#[path = "../../model-runtime/tests/fuzz/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::binary(bytes));
