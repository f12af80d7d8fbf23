//! Loads models into engines and runs samples, and nothing else: what `cargo xtask bench optimizer` sets beside the gate, which does so, too.
//!
//! `bare ENGINES SAMPLES MODEL...`: `ENGINES` are `OnnxRuntime`, `Tract` or both with a comma between them, `SAMPLES` is an npz.

use std::path::Path;

use plimsoll_optimizer::evaluate::dataset::Dataset;
use plimsoll_package::manifest::Engine;
use plimsoll_runtime::engine::{self, LoadOptions};

/// Most bytes of the file of samples.
const SAMPLES_BYTES_MAX: u64 = 1 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [engines, samples, models @ ..] = arguments.as_slice() else {
        return Err("bare ENGINES SAMPLES MODEL...".into());
    };
    for model in models {
        for kind in engines.split(',') {
            let kind: Engine = serde_json::from_value(kind.into())?;
            let options = LoadOptions {
                fold_dequantize: true,
                threads: std::thread::available_parallelism()?.get(),
                ..LoadOptions::default()
            };
            let engine = engine::load(kind, Path::new(model), &options)?;
            let samples = Dataset::read(Path::new(samples), engine.inputs(), None, SAMPLES_BYTES_MAX)?;
            for range in samples.batches() {
                engine.run(&samples.batch(range).map_err(|failure| failure.to_string())?)?;
            }
        }
    }
    Ok(())
}
