//! Benchmarks: each sets a part of Plimsoll beside what people use today, on this machine, in the same run.

use anyhow::Result;
use clap::{Args, Subcommand};

mod load;
mod optimizer;
mod process;
mod real;
mod runtime;

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Pruning and quantisation beside torch and onnxruntime; writes target/bench/optimizer.json.
    Optimizer(optimizer::Arguments),
    /// Serving beside Triton, MLServer and ONNX Runtime in process; writes target/bench/runtime/runtime.json.
    Runtime(runtime::Arguments),
    /// The optimiser on real models; prints the table of docs/benchmarks.md.
    Real(real::Arguments),
    /// The same on models that it was not tuned on.
    Heldout(real::Arguments),
}

/// Runs a benchmark.
///
/// # Errors
/// Where a peer cannot be installed or a program fails.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.bench {
        Bench::Optimizer(arguments) => optimizer::run(arguments),
        Bench::Runtime(arguments) => runtime::run(arguments),
        Bench::Real(arguments) => real::run(real::Which::Tested, arguments),
        Bench::Heldout(arguments) => real::run(real::Which::HeldOut, arguments),
    }
}
