//! What a running cluster has of Plimsoll, so that tests on it can leave it as it was.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::cluster;
use crate::progress::phase;

/// The chart's release in these tests, as in the demo.
pub(super) const RELEASE: &str = "plimsoll";
const NAMESPACE: &str = "plimsoll-system";
const CRDS: [&str; 2] = ["modeldeployments.plimsoll.dev", "modelrevisions.plimsoll.dev"];

/// What is installed.
#[derive(Debug, PartialEq)]
pub(super) struct Installation {
    /// The revision of the release, where there is one.
    release: Option<String>,
    crds: bool,
    namespace: bool,
}

/// A call of helm for the release's namespace.
pub(super) fn helm(kubeconfig: &Path) -> Result<Command> {
    let mut command = Command::new(cluster::tool("helm")?);
    command.env("KUBECONFIG", kubeconfig).args(["--namespace", NAMESPACE]);
    Ok(command)
}

impl Installation {
    /// # Errors
    /// Where the cluster does not answer.
    pub(super) fn observe(kubeconfig: &Path) -> Result<Self> {
        let list = text(helm(kubeconfig)?.args(["list", "--output", "json"]))?;
        Ok(Self {
            release: revision_of(&list)?,
            crds: exists(kubeconfig, &["crd", CRDS[0]])?,
            namespace: exists(kubeconfig, &["namespace", NAMESPACE])?,
        })
    }

    /// Brings back the release that was there, or removes the tests' own. Models, and the registry with its artifacts, stay.
    ///
    /// # Errors
    /// Where the cluster refuses.
    pub(super) fn restore(&self, kubeconfig: &Path) -> Result<()> {
        let helm = |arguments: &[&str]| text(helm(kubeconfig)?.args(arguments)).map(drop);
        let delete = |arguments: &[&str]| {
            text(
                kubectl(kubeconfig)?
                    .args(["delete", "--ignore-not-found", "--timeout=180s"])
                    .args(arguments),
            )
            .map(drop)
        };
        if let Some(revision) = &self.release {
            return phase("bringing back the release that was there", |_| {
                helm(&["rollback", RELEASE, revision, "--wait", "--timeout", "5m"])
            });
        }
        phase("uninstalling the tests' release", |_| {
            if !self.crds {
                // While the operator is there to follow.
                delete(&["crd", CRDS[0], CRDS[1]])?;
            }
            helm(&["uninstall", RELEASE, "--wait", "--timeout", "3m"])?;
            if self.namespace {
                Ok(())
            } else {
                delete(&["namespace", NAMESPACE])
            }
        })
    }
}

/// The release's revision in a list of helm's.
fn revision_of(list: &str) -> Result<Option<String>> {
    let list: Value = serde_json::from_str(list).context("helm's answer is no JSON")?;
    let release = list.as_array().into_iter().flatten().find(|release| release["name"] == RELEASE);
    Ok(release.and_then(|release| release["revision"].as_str()).map(str::to_owned))
}

fn kubectl(kubeconfig: &Path) -> Result<Command> {
    let mut command = Command::new(cluster::tool("kubectl")?);
    command.env("KUBECONFIG", kubeconfig);
    Ok(command)
}

fn exists(kubeconfig: &Path, what: &[&str]) -> Result<bool> {
    let mut command = kubectl(kubeconfig)?;
    command.args(["get", "--ignore-not-found", "--output", "name"]).args(what);
    Ok(!text(&mut command)?.trim().is_empty())
}

fn text(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_revision_of_the_release_is_found() {
        let list = r#"[{"name":"other","revision":"7"},{"name":"plimsoll","revision":"3","status":"deployed"}]"#;
        assert_eq!(revision_of(list).unwrap().as_deref(), Some("3"));
        assert_eq!(revision_of("[]").unwrap(), None);
        assert!(revision_of("Error: no cluster").is_err());
    }
}
