//! Checks of the Helm chart that need no cluster.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{cluster, workspace};

mod manifest;
mod permissions;
mod release;

/// The release that the chart is rendered for.
const NAMESPACE: &str = "plimsoll-system";

/// Lints and renders the chart with each file of its `ci/`, and checks what comes out: every field is one that Kubernetes has, pods fit the
/// restricted Pod Security Standard, roles grant what is used and never Secrets, a namespaced release has nothing cluster-wide, and the release
/// is what its values say. Returns the number of checks.
///
/// # Errors
/// Names everything that is wrong.
pub(crate) fn check() -> Result<usize> {
    let chart = workspace::root().join("charts/plimsoll");
    let helm = cluster::tool("helm")?;
    let mut checks = Checks::default();
    checks.add("the chart's versions are the workspace's", versions(&chart));
    checks.add(
        "the chart's CRDs are those of crds/yaml",
        same_files(&workspace::root().join("crds/yaml"), &chart.join("files/crds")),
    );
    let defaults = yaml(&chart.join("values.yaml"))?;
    for values in values_files(&chart)? {
        let name = values.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        checks.add(
            &format!("{name}: lint"),
            run(Command::new(&helm).arg("lint").arg("--strict").arg(&chart).arg("-f").arg(&values)).map(drop),
        );
        checks.add(&format!("{name}: the notes tell the next commands"), notes(&helm, &chart, &values));
        match render(&helm, &chart, &["-f", &values.to_string_lossy()]) {
            Ok(manifests) => {
                check_manifests(&mut checks, &name, &manifests);
                let values = release::merged(&defaults, &yaml(&values)?);
                checks.add(
                    &format!("{name}: the operator may do what it does"),
                    permissions::check(&chart, &values, &manifests),
                );
                let release = release::Release { values, manifests };
                for (proves, check) in release::CHECKS {
                    checks.add(&format!("{name}: {proves}"), check(&release));
                }
            }
            Err(error) => checks.add(&format!("{name}: render"), Err(error)),
        }
    }
    for (set, message) in [
        ("operator.replica=3", "additional properties"),
        ("registry.internal.enabled=false", "registry.external.repository"),
        (
            "registry.external.repository=registry.example.org/models",
            "registry.internal.enabled=false",
        ),
        ("models.maxFetchSize=lots", "does not match pattern"),
        ("models.imagePullSecrets={Not_A_Name}", "does not match pattern"),
        ("metrics.podMonitor.interval=often", "does not match pattern"),
    ] {
        checks.add(&format!("--set {set} is refused"), refused(&helm, &chart, set, message));
    }
    checks.finish()
}

#[derive(Default)]
struct Checks {
    count: usize,
    failures: Vec<String>,
}

impl Checks {
    fn add(&mut self, what: &str, result: Result<()>) {
        self.count += 1;
        if let Err(error) = result {
            self.failures.push(format!("{what}: {error:#}"));
        }
    }

    fn finish(self) -> Result<usize> {
        ensure!(
            self.failures.is_empty(),
            "{} of {} checks of the chart failed:\n{}",
            self.failures.len(),
            self.count,
            self.failures.join("\n")
        );
        Ok(self.count)
    }
}

fn check_manifests(checks: &mut Checks, values: &str, manifests: &[Value]) {
    let mut names = BTreeMap::new();
    for object in manifests {
        let name = manifest::name(object);
        checks.add(
            &format!("{values}: {name}"),
            manifest::known_fields(object)
                .and_then(|()| manifest::restricted(object))
                .and_then(|()| manifest::no_secrets(object)),
        );
        *names.entry(name).or_insert(0) += 1;
    }
    let twice: Vec<_> = names
        .iter()
        .filter(|(_, count)| **count > 1)
        .map(|(name, _)| name.clone())
        .collect();
    checks.add(
        &format!("{values}: no object twice"),
        if twice.is_empty() {
            Ok(())
        } else {
            Err(anyhow::anyhow!("{twice:?}"))
        },
    );
    let needed = |kind: &str| {
        if names.keys().any(|name| name.starts_with(kind)) {
            Ok(())
        } else {
            Err(anyhow::anyhow!("no {kind}"))
        }
    };
    for kind in ["Deployment", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "Role"] {
        checks.add(&format!("{values}: has a {kind}"), needed(kind));
    }
    if values.starts_with("namespaced") {
        let wide: Vec<_> = names.keys().filter(|name| manifest::is_cluster_wide(name)).collect();
        checks.add(
            &format!("{values}: nothing cluster-wide"),
            if wide.is_empty() {
                Ok(())
            } else {
                Err(anyhow::anyhow!("{wide:?}"))
            },
        );
    } else {
        checks.add(&format!("{values}: has the CRDs"), needed("CustomResourceDefinition"));
    }
}

fn yaml(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_yaml_ng::from_str(&text).with_context(|| format!("{} is no YAML", path.display()))
}

fn versions(chart: &Path) -> Result<()> {
    let parsed = yaml(&chart.join("Chart.yaml"))?;
    for key in ["version", "appVersion"] {
        ensure!(
            parsed[key] == env!("CARGO_PKG_VERSION"),
            "{key} is {}, the workspace's is {}",
            parsed[key],
            env!("CARGO_PKG_VERSION")
        );
    }
    Ok(())
}

fn same_files(source: &Path, copy: &Path) -> Result<()> {
    let read = |folder: &Path| -> Result<BTreeMap<PathBuf, String>> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                files.insert(PathBuf::from(path.file_name().unwrap_or_default()), fs::read_to_string(&path)?);
            }
        }
        Ok(files)
    };
    let (source, copy) = (read(source)?, read(copy)?);
    ensure!(!source.is_empty(), "crds/yaml is empty: run `cargo xtask crds`");
    ensure!(source == copy, "they differ: run `cargo xtask crds`");
    Ok(())
}

fn values_files(chart: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(chart.join("ci"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .collect();
    files.sort();
    Ok(files)
}

/// Whether what helm says after an installation can be pasted into a shell as it stands: a here-document ends at the line's beginning.
fn notes(helm: &Path, chart: &Path, values: &Path) -> Result<()> {
    let mut command = Command::new(helm);
    command
        .args(["install", "plimsoll"])
        .arg(chart)
        .args(["--namespace", NAMESPACE, "--dry-run=client", "-f"])
        .arg(values);
    let text = run(&mut command)?;
    let (_, notes) = text.split_once("NOTES:").context("helm says nothing after the installation")?;
    for words in [
        "rollout status deployment/",
        "apply -f - <<EOF\napiVersion: plimsoll.dev/v1alpha1",
        "\nEOF\n",
        "get modeldeployment first --watch",
    ] {
        ensure!(notes.contains(words), "`{words}` is not in:{notes}");
    }
    Ok(())
}

fn render(helm: &Path, chart: &Path, arguments: &[&str]) -> Result<Vec<Value>> {
    let mut command = Command::new(helm);
    command
        .args(["template", "plimsoll"])
        .arg(chart)
        .args(["--namespace", NAMESPACE])
        .args(arguments);
    manifest::parse(&run(&mut command)?)
}

fn refused(helm: &Path, chart: &Path, set: &str, message: &str) -> Result<()> {
    match render(helm, chart, &["--set", set]) {
        Ok(_) => bail!("it was taken"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(text.contains(message), "the message has no `{message}`: {text}");
            Ok(())
        }
    }
}

fn run(command: &mut Command) -> Result<String> {
    let output = command
        .env_remove("KUBECONFIG")
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stderr), text);
    Ok(text)
}
