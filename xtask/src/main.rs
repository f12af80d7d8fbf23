//! The project's tasks: demo, tests, embedded cluster, images, generated files.

use clap::{Parser, Subcommand};
use onnxruntime::Library;

mod bench;
mod chart;
mod cluster;
mod conformance;
mod crds;
mod debian;
mod demo;
mod images;
mod models;
mod onnxruntime;
mod progress;
mod python;
mod test;
mod workspace;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "The project's tasks",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Shows the whole way of a model on a cluster (or, with --local, without one).
    Demo(demo::Arguments),
    /// Runs every check and test; ends with `N passed, N failed`.
    Test(test::Arguments),
    /// Starts, stops and inspects the embedded Kubernetes.
    Cluster(cluster::Arguments),
    /// Builds the container images as OCI archives, without Docker.
    Images(images::Arguments),
    /// Writes the CRDs' YAML and the report's JSON schema from the Rust types.
    Crds(crds::Arguments),
    /// Runs ONNX's tests of every operator on each engine and writes what came of them to docs/onnx-conformance.md.
    Conformance(conformance::Arguments),
    /// Measures a part of Plimsoll beside what people use today.
    Bench(bench::Arguments),
    /// Installs ONNX Runtime's shared library from its pinned wheel and prints its path.
    Onnxruntime {
        /// The device that it is for.
        #[arg(long, value_enum, default_value = "cpu")]
        device: Library,
    },
    /// Fetches the real models that tests run on and prints their folder.
    Models,
}

fn main() -> std::process::ExitCode {
    let result = match Arguments::parse().task {
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Test(arguments) => return test::run(&arguments),
        Task::Cluster(arguments) => cluster::run(&arguments),
        Task::Images(arguments) => images::run(&arguments),
        Task::Crds(arguments) => crds::run(&arguments),
        Task::Conformance(arguments) => conformance::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Onnxruntime { device } => device.path().map(|path| println!("{}", path.display())),
        Task::Models => models::fetch(&models::TESTED).map(|path| println!("{}", path.display())),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
