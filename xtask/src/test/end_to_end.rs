//! The end-to-end tests: cluster, images, chart, and what is left where this machine can run no containers.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::log;
use super::tally::Tally;
use crate::cluster::{self, Traces};
use crate::progress::{phase, run_logged};
use crate::{images, python, workspace};
use installation::Installation;

mod installation;

/// Namespaces of tests with a file server of their own, which is spoken to in plain HTTP.
const FILE_SERVER_NAMESPACES: [&str; 8] = [
    "unreachable",
    "too-large",
    "refused",
    "resumed",
    "registry-publish",
    "killed",
    "deleted",
    "deadline",
];

/// The module of the tests that need an apiserver and the operator, and no container.
const CONTROL_PLANE_TESTS: &str = "control_plane::";
/// Nodes that kwok plays beside the control plane alone.
const FAKE_NODES: u32 = 2;
/// Where images and artifacts would lie, if a container ran there.
const NOWHERE: &str = "registry.invalid/plimsoll";

/// Runs the tests whose name contains `filter`, or all. A cluster that was up before stays up, with what was in it.
///
/// # Errors
/// Where the cluster, an image or the chart does not come up.
pub(super) fn run(filter: Option<&str>, keep: bool, tally: &mut Tally) -> Result<()> {
    if let Err(reasons) = cluster::can_run() {
        eprintln!("{}", cluster::ways_out(&reasons));
        return run_control_plane(filter, keep, Some(&reasons), tally);
    }
    if cluster::is_running() {
        eprintln!("  a cluster runs already: it stays up, and so does what is in it");
        let kubeconfig = cluster::up()?;
        let earlier = Installation::observe(&kubeconfig)?;
        let result = run_on(&kubeconfig, filter, tally);
        let restored = if keep { Ok(()) } else { earlier.restore(&kubeconfig) };
        return result.and(restored);
    }
    let before = Traces::observe();
    let result = cluster::up().and_then(|kubeconfig| run_on(&kubeconfig, filter, tally));
    if keep {
        return result;
    }
    cluster::down_node()?;
    let differences = Traces::left_since(&before);
    if differences.is_empty() {
        eprintln!("  ok  the machine is as it was before the cluster");
        tally.passed += 1;
    } else {
        tally.fail(format!(
            "the machine is not as it was before the cluster: {}",
            differences.join("; ")
        ));
    }
    result
}

fn run_on(kubeconfig: &Path, filter: Option<&str>, tally: &mut Tally) -> Result<()> {
    install(kubeconfig)?;
    let magika = workspace::cache().join("magika");
    let mut fetch = python::with_pip()?;
    fetch.arg(workspace::root().join("tests/models/magika/fetch.py")).arg(&magika);
    phase("magika's model", |bar| run_logged(&mut fetch, &log("magika"), bar))?;
    let mut tests = tests(kubeconfig)?;
    tests
        .env("PLIMSOLL_TRITON_CLIENT", super::client_environment("triton")?)
        .env("PLIMSOLL_MAGIKA", magika.join("magika.onnx"))
        .env("PLIMSOLL_FIXTURE_SERVER_IMAGE", cluster::FIXTURE_SERVER_IMAGE);
    for (variable, tool) in [("PLIMSOLL_HELM", "helm"), ("PLIMSOLL_CRANE", "crane")] {
        tests.env(variable, cluster::tool(tool)?);
    }
    tests.arg("--").args(filter).args(["--test-threads", "4"]);
    tally.cargo_test("end-to-end tests on the cluster", &mut tests, &log("end-to-end"))
}

fn tests(kubeconfig: &Path) -> Result<Command> {
    forget_discovery(kubeconfig)?;
    let mut command = workspace::cargo();
    command
        .args(["test", "--locked", "--package", "plimsoll-tests", "--test", "e2e"])
        .env("KUBECONFIG", kubeconfig)
        .env("KUBECACHEDIR", discovery_cache(kubeconfig))
        .env("PLIMSOLL_KUBECTL", cluster::tool("kubectl")?);
    Ok(command)
}

/// Images on the node and the chart installed, with limits that the tests can reach.
fn install(kubeconfig: &Path) -> Result<()> {
    let archives = images::build(&["operator", "optimizer", "runtime", "registry"])?;
    phase("images onto the node", |bar| cluster::import_images(&archives, bar))?;
    let hosts: Vec<String> = FILE_SERVER_NAMESPACES
        .iter()
        .map(|name| format!("fixtures.e2e-{name}.svc.cluster.local"))
        .collect();
    let mut helm = installation::helm(kubeconfig)?;
    helm.args(["upgrade", "--install", installation::RELEASE])
        .arg(workspace::root().join("charts/plimsoll"));
    helm.args(["--create-namespace", "--wait", "--timeout", "5m"]);
    helm.args(["--set", "models.maxFetchSize=64Mi"]);
    helm.arg("--set-json")
        .arg(format!("models.plainHttpHosts={}", serde_json::to_string(&hosts)?));
    for (image, key) in [("operator", "operator"), ("registry", "registry.internal")] {
        helm.arg("--set-string").arg(images::pod_annotation(&archives, image, key)?);
    }
    phase("installing the Helm chart", |bar| run_logged(&mut helm, &log("helm"), bar))
}

/// Where kubectl keeps what the apiserver serves, for six hours.
fn discovery_cache(kubeconfig: &Path) -> PathBuf {
    kubeconfig.with_file_name("kubectl-cache")
}

/// The tests start with an empty one, since what was discovered before the CRDs were in lacks the kinds of Plimsoll, and `kubectl explain md`
/// never looks twice.
fn forget_discovery(kubeconfig: &Path) -> Result<()> {
    match std::fs::remove_dir_all(discovery_cache(kubeconfig)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Runs the tests that need no container as a machine does that can run none. Where this is one, [`run`] does it.
///
/// # Errors
/// Where the control plane or the operator does not come up.
pub(super) fn run_beside_control_plane(filter: Option<&str>, keep: bool, tally: &mut Tally) -> Result<()> {
    if cluster::can_run().is_err() {
        return Ok(());
    }
    if cluster::is_running() {
        tally.skip("the control plane alone: a cluster with a node runs already".to_owned());
        return Ok(());
    }
    run_control_plane(filter, keep, None, tally)
}

/// What can be tested with the control plane and the operator as processes of this machine; for `reasons` to run nothing else, the rest is
/// counted and named.
fn run_control_plane(filter: Option<&str>, keep: bool, reasons: Option<&str>, tally: &mut Tally) -> Result<()> {
    let operator = images::programs(&["plimsoll-operator"])?.remove(0);
    let was_running = cluster::is_control_plane_running();
    let result = cluster::up_control_plane(FAKE_NODES).and_then(|kubeconfig| {
        let mut crds = Command::new(cluster::tool("kubectl")?);
        crds.env("KUBECONFIG", &kubeconfig)
            .args(["apply", "--server-side", "-f"])
            .arg(workspace::root().join("crds/yaml"));
        phase("installing the CRDs", |bar| run_logged(&mut crds, &log("crds"), bar))?;
        cluster::start_operator(&operator_command(&operator, &kubeconfig))?;
        let (here, elsewhere): (Vec<String>, Vec<String>) = names(&kubeconfig, filter)?
            .into_iter()
            .partition(|name| name.starts_with(CONTROL_PLANE_TESTS));
        if let Some(reasons) = reasons {
            for name in elsewhere {
                tally.skip(format!("{name}: it needs containers ({reasons})"));
            }
        }
        if here.is_empty() {
            return Ok(());
        }
        let mut command = tests(&kubeconfig)?;
        command.args(["--", "--test-threads", "4", "--exact"]).args(here);
        tally.cargo_test("end-to-end tests on the control plane", &mut command, &log("control-plane"))
    });
    cluster::stop_operator();
    if was_running {
        eprintln!("  the control plane ran already: it stays up");
    } else if !keep {
        cluster::down_control_plane()?;
    }
    result
}

fn operator_command(program: &Path, kubeconfig: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("KUBECONFIG", kubeconfig);
    for (flag, value) in [
        ("registry-push", format!("{NOWHERE}/models")),
        ("optimizer-image", format!("{NOWHERE}/optimizer:test")),
        ("runtime-image", format!("{NOWHERE}/runtime:test")),
        ("health-address", "127.0.0.1:0".to_owned()),
        ("metrics-address", "127.0.0.1:0".to_owned()),
    ] {
        command.arg(format!("--{flag}={value}"));
    }
    command
}

/// The end-to-end tests whose name contains `filter`, or all.
fn names(kubeconfig: &Path, filter: Option<&str>) -> Result<Vec<String>> {
    let mut compile = tests(kubeconfig)?;
    phase("compiling the end-to-end tests", |bar| {
        run_logged(compile.arg("--no-run"), &log("end-to-end-compilation"), bar)
    })?;
    let output = tests(kubeconfig)?.args(["--", "--list"]).args(filter).output()?;
    if !output.status.success() {
        bail!("cannot list the end-to-end tests: {}", String::from_utf8_lossy(&output.stderr));
    }
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(list
        .lines()
        .filter_map(|line| Some(line.strip_suffix(": test")?.to_owned()))
        .collect())
}
