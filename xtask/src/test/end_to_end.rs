//! The end-to-end tests: cluster, images, chart, and what is left where this machine can run no containers.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::log;
use super::tally::Tally;
use crate::progress::{phase, run_logged};
use crate::{cluster, images, workspace};

const SYSTEM_NAMESPACE: &str = "plimsoll-system";

/// Namespaces of tests with a file server of their own, which is spoken to in plain HTTP.
const FILE_SERVER_NAMESPACES: [&str; 6] = ["unreachable", "too-large", "refused", "resumed", "registry-publish", "deleted"];

/// The tests that need an apiserver and no container.
const CONTROL_PLANE_TESTS: [&str; 3] = [
    "refusal::every_rule_of_the_api_says_what_to_write_instead",
    "refusal::the_valid_fixtures_are_accepted",
    "commands::kubectl_explain_tells_what_a_field_means",
];

/// Runs the tests whose name contains `filter`, or all.
///
/// # Errors
/// Where the cluster, an image or the chart does not come up.
pub(super) fn run(filter: Option<&str>, keep: bool, tally: &mut Tally) -> Result<()> {
    if let Err(reasons) = cluster::can_run() {
        return run_control_plane(&reasons, tally);
    }
    let kubeconfig = cluster::up()?;
    let result = install(&kubeconfig).and_then(|()| {
        let mut tests = tests(&kubeconfig)?;
        tests.arg("--").args(filter).args(["--test-threads", "4"]);
        tally.cargo_test("end-to-end tests on the cluster", &mut tests, &log("end-to-end"))
    });
    if !keep {
        cluster::down()?;
    }
    result
}

fn tests(kubeconfig: &Path) -> Result<Command> {
    let magika = workspace::cache().join("magika");
    let mut fetch = Command::new("python3");
    fetch.arg(workspace::root().join("tests/models/magika/fetch.py")).arg(&magika);
    phase("magika's model", |bar| run_logged(&mut fetch, &log("magika"), bar))?;
    let mut command = images::program::release("test")?;
    command
        .args(["--locked", "--package", "plimsoll-tests", "--test", "e2e"])
        .env("KUBECONFIG", kubeconfig)
        .env("KUBECACHEDIR", discovery_cache(kubeconfig));
    for (variable, tool) in [
        ("PLIMSOLL_KUBECTL", "kubectl"),
        ("PLIMSOLL_HELM", "helm"),
        ("PLIMSOLL_CRANE", "crane"),
    ] {
        command.env(variable, cluster::tool(tool)?);
    }
    command
        .env("PLIMSOLL_MAGIKA", magika.join("magika.onnx"))
        .env("PLIMSOLL_FIXTURE_SERVER_IMAGE", cluster::FIXTURE_SERVER_IMAGE);
    Ok(command)
}

/// Images on the node and the chart installed, with limits that the tests can reach.
fn install(kubeconfig: &Path) -> Result<()> {
    let archives = images::build(&["operator", "optimizer", "runtime", "registry"])?;
    phase("images onto the node", |_| cluster::import_images(&archives))?;
    let hosts: Vec<String> = FILE_SERVER_NAMESPACES
        .iter()
        .map(|name| format!("fixtures.e2e-{name}.svc.cluster.local"))
        .collect();
    let mut helm = Command::new(cluster::tool("helm")?);
    helm.env("KUBECONFIG", kubeconfig)
        .args(["upgrade", "--install", "plimsoll"])
        .arg(workspace::root().join("charts/plimsoll"));
    helm.args(["--namespace", SYSTEM_NAMESPACE, "--create-namespace", "--wait", "--timeout", "5m"]);
    helm.args([
        "--set",
        "registry.internal.persistence.enabled=false",
        "--set",
        "models.maxFetchSize=64Mi",
    ]);
    helm.arg("--set-json")
        .arg(format!("models.plainHttpHosts={}", serde_json::to_string(&hosts)?));
    for (image, key) in [("operator", "operator"), ("registry", "registry.internal")] {
        helm.arg("--set-string").arg(images::pod_annotation(&archives, image, key)?);
    }
    phase("installing the Helm chart", |bar| run_logged(&mut helm, &log("helm"), bar))?;
    match std::fs::remove_dir_all(discovery_cache(kubeconfig)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Where kubectl keeps what the apiserver serves, for six hours: the tests start with an empty one, since what was
/// discovered before the chart was in lacks the kinds of Plimsoll, and `kubectl explain md` never looks twice.
fn discovery_cache(kubeconfig: &Path) -> PathBuf {
    kubeconfig.with_file_name("kubectl-cache")
}

/// What can be tested with an apiserver alone; the rest is counted and named.
fn run_control_plane(reasons: &str, tally: &mut Tally) -> Result<()> {
    eprintln!("no containers on this machine: {reasons}");
    let kubeconfig = cluster::up_control_plane(1)?;
    let mut crds = Command::new(cluster::tool("kubectl")?);
    crds.env("KUBECONFIG", &kubeconfig)
        .args(["apply", "--server-side", "-f"])
        .arg(workspace::root().join("crds/yaml"));
    phase("installing the CRDs", |bar| run_logged(&mut crds, &log("crds"), bar))?;
    let mut command = tests(&kubeconfig)?;
    command.args(["--", "--exact"]).args(CONTROL_PLANE_TESTS);
    tally.cargo_test("end-to-end tests on the control plane", &mut command, &log("end-to-end"))?;
    let output = tests(&kubeconfig)?.args(["--", "--list"]).output()?;
    if !output.status.success() {
        bail!("cannot list the end-to-end tests: {}", String::from_utf8_lossy(&output.stderr));
    }
    for test in String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
    {
        if !CONTROL_PLANE_TESTS.contains(&test) {
            tally.skip(format!("{test}: it needs containers ({reasons})"));
        }
    }
    cluster::down()
}
