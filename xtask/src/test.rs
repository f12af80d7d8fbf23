//! `cargo xtask test`: every check and test there is, and one line that sums them up.

mod demo;
mod end_to_end;
mod tally;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::progress::{phase, run_logged};
use crate::{chart, cluster, conformance, images, models, onnxruntime, python, workspace};
use tally::Tally;

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Runs only these parts; may be repeated.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Runs only the tests whose name contains this.
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
    /// Leaves the embedded cluster running, with the chart installed.
    #[arg(long)]
    keep: bool,
}

/// A part of the whole, in the order in which they run: the quick ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Formatting of Rust and Go.
    Format,
    /// Generated files are fresh.
    Generated,
    /// The Helm chart: lint and the manifests that it renders.
    Chart,
    /// Clippy, with warnings denied.
    Clippy,
    /// Licences, bans, sources and advisories of dependencies.
    Dependencies,
    /// Unit, property and integration tests.
    Unit,
    /// ONNX's node tests: what passed passes.
    Conformance,
    /// Clients of the protocol from PyPI against the runtime.
    Clients,
    /// The embedded cluster's own Go tests.
    Go,
    /// The end-to-end tests that need no container, beside a control plane alone.
    ControlPlane,
    /// The end-to-end tests on the cluster.
    EndToEnd,
    /// The demo: without a cluster, broken off, whole, again, and taken away.
    Demo,
}

const PARTS: [Part; 12] = [
    Part::Format,
    Part::Generated,
    Part::Chart,
    Part::Clippy,
    Part::Dependencies,
    Part::Unit,
    Part::Conformance,
    Part::Clients,
    Part::Go,
    Part::ControlPlane,
    Part::EndToEnd,
    Part::Demo,
];

/// Folders of `model-runtime/tests/clients`, each with packages of its own: they do not fit into one environment.
const CLIENTS: [&str; 7] = ["triton", "kserve", "mlserver", "openai", "schemathesis", "opentelemetry", "s3"];

/// Version of cargo-deny, installed into the user's cache.
const CARGO_DENY: &str = "0.20.2";

pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let mut tally = Tally::default();
    for part in PARTS {
        if !arguments.only.is_empty() && !arguments.only.contains(&part) {
            continue;
        }
        let result = match part {
            Part::Format => format(&mut tally),
            Part::Generated => generated(&mut tally),
            Part::Chart => phase("the Helm chart", |_| chart::check()).map(|checks| tally.passed += checks),
            Part::Clippy => clippy(&mut tally),
            Part::Dependencies => dependencies(&mut tally),
            Part::Unit => unit(arguments, &mut tally),
            Part::Conformance => conformance::check(&conformance::Arguments::default()).map(|cases| tally.passed += cases),
            Part::Clients => clients(arguments, &mut tally),
            Part::Go => go(&mut tally),
            Part::ControlPlane => end_to_end::run_beside_control_plane(arguments.filter.as_deref(), arguments.keep, &mut tally),
            Part::EndToEnd => end_to_end::run(arguments.filter.as_deref(), arguments.keep, &mut tally),
            // It has no tests to choose among.
            Part::Demo if arguments.filter.is_some() => Ok(()),
            Part::Demo => demo::run(&mut tally),
        };
        if let Err(error) = result {
            tally.fail(format!("{part:?}: {error:#}"));
        }
    }
    tally.print();
    if tally.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn log(name: &str) -> PathBuf {
    workspace::target().join("test").join(format!("{name}.log"))
}

fn check(what: &str, command: &mut Command, tally: &mut Tally) -> Result<()> {
    let name: String = what.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    phase(what, |bar| run_logged(command, &log(&name), bar))?;
    tally.passed += 1;
    Ok(())
}

fn format(tally: &mut Tally) -> Result<()> {
    check("rustfmt", workspace::cargo().args(["fmt", "--all", "--check"]), tally)?;
    let folder = workspace::root().join("tests/cluster");
    let output = Command::new("gofmt")
        .arg("-l")
        .arg(&folder)
        .output()
        .context("cannot start gofmt")?;
    let unformatted = String::from_utf8_lossy(&output.stdout).into_owned();
    anyhow::ensure!(
        output.status.success() && unformatted.is_empty(),
        "gofmt would change:\n{unformatted}"
    );
    tally.passed += 1;
    Ok(())
}

fn generated(tally: &mut Tally) -> Result<()> {
    phase("generated files are fresh", |_| crate::crds::check())?;
    tally.passed += 1;
    Ok(())
}

fn clippy(tally: &mut Tally) -> Result<()> {
    let mut command = workspace::cargo();
    command.args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]);
    check("clippy", &mut command, tally)?;
    // The fuzz targets are no part of the workspace, for a nightly compiler builds them; here of the same dependencies and without libFuzzer.
    let folder = workspace::root().join("fuzz");
    std::fs::copy(workspace::root().join("Cargo.lock"), folder.join("Cargo.lock")).context("cannot copy Cargo.lock")?;
    let mut command = workspace::cargo();
    command.args(["check", "--no-default-features", "--manifest-path", "fuzz/Cargo.toml"]);
    command.env("CARGO_TARGET_DIR", workspace::target());
    check("the fuzz targets compile", &mut command, tally)
}

fn dependencies(tally: &mut Tally) -> Result<()> {
    let folder = workspace::cache().join(format!("cargo-deny-{CARGO_DENY}"));
    let program = folder.join("bin/cargo-deny");
    if !program.is_file() {
        let mut install = workspace::cargo();
        install
            .args([
                "install",
                "cargo-deny",
                "--locked",
                "--version",
                CARGO_DENY,
                "--no-default-features",
                "--root",
            ])
            .arg(&folder);
        install.arg("--target-dir").arg(workspace::cache().join("cargo-deny-build"));
        // Its own profile is for those who run it all day; here it runs for seconds.
        for (setting, value) in [("LTO", "off"), ("CODEGEN_UNITS", "16"), ("OPT_LEVEL", "1")] {
            install.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
        }
        phase("building cargo-deny", |bar| run_logged(&mut install, &log("cargo-deny-build"), bar))?;
        let _ = std::fs::remove_dir_all(workspace::cache().join("cargo-deny-build"));
    }
    let deny = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command
            .current_dir(workspace::root())
            .args(["--all-features", "check"])
            .args(arguments);
        command
    };
    for what in ["licenses", "bans", "sources"] {
        check(&format!("cargo deny {what}"), &mut deny(&[what]), tally)?;
    }
    let advisories = phase("cargo deny advisories", |bar| {
        run_logged(&mut deny(&["advisories"]), &log("advisories"), bar)
    });
    match advisories {
        Ok(()) => tally.passed += 1,
        Err(error) => {
            let text = std::fs::read_to_string(log("advisories")).unwrap_or_default();
            // Without the database nothing can be said; with it, what it says counts.
            if text.contains("failed to fetch advisory database")
                || text.contains("unable to fetch")
                || text.contains("failed to load advisory")
            {
                tally.skip("cargo deny advisories: the advisory database cannot be reached".to_owned());
            } else {
                return Err(error);
            }
        }
    }
    Ok(())
}

fn unit(arguments: &Arguments, tally: &mut Tally) -> Result<()> {
    let library = onnxruntime::Library::Cpu.path()?;
    let registry = cluster::tool("registry")?;
    let models = models::fetch(&models::TESTED)?;
    for group in images::program::TEST_GROUPS {
        let mut command = of_group(group, &library, &models)?;
        command.env("PLIMSOLL_REGISTRY_BINARY", &registry).args(arguments.filter.as_deref());
        tally.cargo_test(&format!("tests of {}", group.join(", ")), &mut command, &log(group[0]))?;
    }
    on_openvino(arguments, &models, tally)?;
    // As the task that runs was compiled, so that hardly anything is compiled again.
    let mut command = workspace::cargo();
    command
        .args(["test", "--locked", "--no-fail-fast", "--package", "xtask"])
        .args(arguments.filter.as_deref());
    tally.cargo_test("tests of xtask", &mut command, &log("xtask"))
}

/// The tests of packages that are compiled together, with that library of ONNX Runtime.
fn of_group(group: &[&str], library: &Path, models: &Path) -> Result<Command> {
    let mut command = images::program::release("test")?;
    command
        .args(["--locked", "--no-fail-fast"])
        .env("ORT_DYLIB_PATH", library)
        .env("PLIMSOLL_MODELS", models);
    for package in group {
        command.args(["--package", package]);
    }
    Ok(command)
}

/// The tests of the runtime's engines and server once more, as they were compiled, with ONNX Runtime computing on OpenVINO.
fn on_openvino(arguments: &Arguments, models: &Path, tally: &mut Tally) -> Result<()> {
    let library = onnxruntime::Library::OpenVino;
    if !library.is_for_this_machine() {
        tally.skip("tests on OpenVINO: its package is for x86_64".to_owned());
        return Ok(());
    }
    let library = library.path()?;
    let package = "plimsoll-runtime";
    let group = images::program::TEST_GROUPS.iter().find(|group| group.contains(&package));
    let group = group.context("the runtime is in no set of packages")?;
    for (what, tests) in [("engines", &["--lib", "engine::"][..]), ("server", &["--test", "server"])] {
        let mut command = of_group(group, &library, models)?;
        command
            .env("PLIMSOLL_DEVICE", "openvino")
            .args(tests)
            .args(arguments.filter.as_deref());
        tally.cargo_test(
            &format!("tests of {what} on OpenVINO"),
            &mut command,
            &log(&format!("openvino-{what}")),
        )?;
    }
    Ok(())
}

fn clients(arguments: &Arguments, tally: &mut Tally) -> Result<()> {
    let library = onnxruntime::Library::Cpu.path()?;
    let runtime = images::program::build(&["plimsoll-runtime"], images::Profile::Release)?;
    let folder = workspace::root().join("model-runtime/tests/clients");
    for client in CLIENTS {
        let mut command = Command::new(client_environment(client)?);
        command
            .current_dir(&folder)
            .args(["run.py", client])
            .args(arguments.filter.as_deref())
            .envs(runtime.first().map(|runtime| ("PLIMSOLL_RUNTIME", runtime)))
            .env("ORT_DYLIB_PATH", &library);
        tally.cargo_test(&format!("clients of {client}"), &mut command, &log(&format!("clients-{client}")))?;
    }
    Ok(())
}

/// The Python that has the packages of one of [`CLIENTS`].
fn client_environment(client: &str) -> Result<PathBuf> {
    let name = format!("clients-{client}");
    let requirements = workspace::root()
        .join("model-runtime/tests/clients")
        .join(client)
        .join("requirements.txt");
    python::environment(&name, &requirements, &log(&format!("{name}-installation")))
}

fn go(tally: &mut Tally) -> Result<()> {
    let mut command = Command::new("go");
    command
        .current_dir(workspace::root().join("tests/cluster"))
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-mod=readonly -buildvcs=false")
        // As the programs are built, so that nothing is compiled again.
        .args(["test", "-v", "-trimpath", "./fixture-server", "./bootstrap"]);
    tally.go_test("tests of the cluster's own programs", &mut command, &log("go"))
}
