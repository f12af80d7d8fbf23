//! Installing the project into a cluster, and taking away what the demo put there, and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::NAMESPACE;
use super::target::{Delivery, Target, text_of};
use crate::progress::{phase, run_logged};
use crate::{cluster, images, workspace};

/// The images that the chart runs.
pub(super) const IMAGES: [&str; 4] = ["operator", "optimizer", "runtime", "registry"];
/// The namespace of the chart's release.
pub(super) const SYSTEM_NAMESPACE: &str = "plimsoll-system";
const RELEASE: &str = "plimsoll";
const CRDS: [&str; 2] = ["modeldeployments.plimsoll.dev", "modelrevisions.plimsoll.dev"];

/// The annotation of the demo's namespace that lists what the cluster did not have before the demo.
const MADE: &str = "plimsoll.dev/made-by-demo";

/// Puts the images on the nodes and installs the chart; an installation of an earlier run is upgraded.
///
/// # Errors
/// Where the cluster has an installation that is not the demo's, or a step fails.
pub(super) fn install(target: &Target, delivery: &Delivery, archives: &[PathBuf]) -> Result<()> {
    remember(target)?;
    deliver(delivery, archives)?;
    let values = values(delivery, archives)?;
    let log = workspace::target().join("demo/helm.log");
    phase("installing the Helm chart", |bar| {
        end_interrupted(target)?;
        let mut helm = target.helm()?;
        helm.args([
            "upgrade",
            "--install",
            RELEASE,
            "charts/plimsoll",
            "--namespace",
            SYSTEM_NAMESPACE,
            "--create-namespace",
        ]);
        helm.args(["--wait", "--timeout", "5m"]);
        for value in &values {
            helm.arg("--set-string").arg(value);
        }
        helm.args(["--set", "registry.internal.persistence.enabled=false"]);
        run_logged(&mut helm, &log, bar)
    })
}

fn values(delivery: &Delivery, archives: &[PathBuf]) -> Result<Vec<String>> {
    let mut values = Vec::new();
    if let Delivery::Registry(registry) = delivery {
        values.push(format!("images.repository={registry}"));
    }
    for (image, key) in [("operator", "operator"), ("registry", "registry.internal")] {
        values.push(images::pod_annotation(archives, image, key)?);
    }
    Ok(values)
}

/// Makes the demo's namespace, which notes what was there before.
fn remember(target: &Target) -> Result<()> {
    let lacks = |arguments: &[&str]| -> Result<bool> { Ok(target.kubectl_json(&[arguments, &["--ignore-not-found"]].concat())?.is_null()) };
    let namespace = target.kubectl_json(&["get", "namespace", NAMESPACE, "--ignore-not-found"])?;
    if namespace.is_null() {
        let mut made = Vec::new();
        if lacks(&["get", "crd", CRDS[0]])? {
            made.push("crds");
        }
        if lacks(&["get", "namespace", SYSTEM_NAMESPACE])? {
            made.push("namespace");
        }
        if release_status(target)?.is_none() {
            made.push("release");
        } else if !target.is_embedded() {
            bail!(
                "this cluster has a release `{RELEASE}` in {SYSTEM_NAMESPACE} that is not the demo's, which would change it; show the demo on another cluster"
            );
        }
        let object = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": NAMESPACE,
                "annotations": {MADE: made.join(",")},
                // What the operator makes runs under the strictest standard.
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        });
        return target.apply(&object.to_string()).map(drop);
    }
    if made(&namespace).is_none() {
        bail!("this cluster has a namespace {NAMESPACE} that is not the demo's; remove it, or show the demo on another cluster");
    }
    if namespace["metadata"]["deletionTimestamp"].is_string() {
        let selector = format!("namespace/{NAMESPACE}");
        phase("waiting for an earlier demo to be gone", |_| {
            target.kubectl_text(&["wait", &selector, "--for=delete", "--timeout=180s"])
        })?;
        return remember(target);
    }
    Ok(())
}

fn made(namespace: &Value) -> Option<Vec<String>> {
    let list = namespace["metadata"]["annotations"][MADE].as_str()?;
    Some(list.split(',').map(str::to_owned).collect())
}

fn release_status(target: &Target) -> Result<Option<String>> {
    let mut helm = target.helm()?;
    // Helm 3 lists a pending release only when asked for it.
    helm.args(["list", "--deployed", "--failed", "--pending", "--uninstalling", "--output", "json"]);
    let list = text_of(helm.args(["--namespace", SYSTEM_NAMESPACE]))?;
    let list: Value = serde_json::from_str(&list).context("helm's answer is no JSON")?;
    let release = list.as_array().into_iter().flatten().find(|release| release["name"] == RELEASE);
    Ok(release.and_then(|release| release["status"].as_str()).map(str::to_owned))
}

/// helm refuses to go on where it was once interrupted. The models stay, as the CRDs do.
fn end_interrupted(target: &Target) -> Result<()> {
    match release_status(target)? {
        Some(status) if status != "deployed" && status != "failed" => uninstall(target),
        _ => Ok(()),
    }
}

fn uninstall(target: &Target) -> Result<()> {
    text_of(target.helm()?.args([
        "uninstall",
        RELEASE,
        "--namespace",
        SYSTEM_NAMESPACE,
        "--ignore-not-found",
        "--wait",
        "--timeout",
        "3m",
    ]))
    .map(drop)
}

fn deliver(delivery: &Delivery, archives: &[PathBuf]) -> Result<()> {
    match delivery {
        Delivery::Embedded => phase("putting the images on the node", |bar| cluster::import_images(archives, bar)),
        Delivery::Loader { program, before, after } => {
            let log = workspace::target().join("demo/images.log");
            phase(&format!("putting the images on the nodes with {program}"), |bar| {
                for archive in archives {
                    let mut command = Command::new(program);
                    command.args(*before).arg(archive).args(after);
                    run_logged(&mut command, &log, bar)?;
                }
                Ok(())
            })
        }
        Delivery::Registry(registry) => phase(&format!("pushing the images to {registry}"), |bar| {
            for archive in archives {
                let name = archive.file_stem().context("an archive has a name")?.to_string_lossy();
                let (_, reference) = images::references()
                    .into_iter()
                    .find(|(image, _)| *image == name)
                    .context("an archive is of an image")?;
                let (_, tag) = reference.rsplit_once(':').context("a reference has a tag")?;
                push(archive, &format!("{registry}/{name}:{tag}"), bar)?;
            }
            Ok(())
        }),
    }
}

fn push(archive: &Path, reference: &str, bar: &indicatif::ProgressBar) -> Result<()> {
    let layout = tempfile::tempdir()?;
    tar::Archive::new(fs::File::open(archive)?)
        .unpack(layout.path())
        .with_context(|| format!("cannot unpack {}", archive.display()))?;
    let mut crane = Command::new(cluster::tool("crane")?);
    crane.arg("push").arg(layout.path()).arg(reference);
    run_logged(&mut crane, &workspace::target().join("demo/images.log"), bar)
}

/// Takes away what the demo made in a cluster that is not its own.
///
/// # Errors
/// Where something does not go.
pub(super) fn remove(target: &Target) -> Result<()> {
    let namespace = target.kubectl_json(&["get", "namespace", NAMESPACE, "--ignore-not-found"])?;
    let Some(made) = made(&namespace) else {
        eprintln!("  nothing of the demo is in the cluster of {}", target.kubeconfig_text());
        return Ok(());
    };
    let was_made = |what: &str| made.iter().any(|made| made == what);
    let delete = |arguments: &[&str]| {
        target
            .kubectl_text(&[&["delete", "--ignore-not-found", "--wait", "--timeout=180s"], arguments].concat())
            .map(drop)
    };
    phase("removing the demo's model", |_| {
        if target.kubectl_json(&["get", "crd", CRDS[0], "--ignore-not-found"])?.is_null() {
            return Ok(());
        }
        delete(&["modeldeployments.plimsoll.dev", "--all", "--namespace", NAMESPACE])
    })?;
    if was_made("release") {
        phase("uninstalling the chart", |_| uninstall(target))?;
    }
    if was_made("crds") {
        phase("removing the CRDs", |_| remove_crds(target, delete))?;
    }
    phase("removing the namespaces", |_| {
        if was_made("namespace") {
            delete(&["namespace", SYSTEM_NAMESPACE])?;
        }
        // Last, for it holds the list of what is to be removed.
        delete(&["namespace", NAMESPACE])
    })
}

fn remove_crds(target: &Target, delete: impl Fn(&[&str]) -> Result<()>) -> Result<()> {
    if target.kubectl_json(&["get", "crd", CRDS[0], "--ignore-not-found"])?.is_null() {
        return Ok(());
    }
    let models = target.kubectl_json(&["get", CRDS[0], "--all-namespaces"])?;
    if models["items"].as_array().is_some_and(|models| !models.is_empty()) {
        eprintln!("  the CRDs stay: there are models of yours");
        return Ok(());
    }
    delete(&["crd", CRDS[0], CRDS[1]])
}
