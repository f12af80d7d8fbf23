//! The cluster that the demo uses: the user's, or the embedded one.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{MODEL, NAMESPACE, manifest};
use crate::{cluster, workspace};

/// How images get to the nodes.
pub(super) enum Delivery {
    /// Straight into the embedded node's containerd.
    Embedded,
    /// By a program that knows the nodes: its name, and the arguments that stand before and after the archives.
    Loader {
        program: &'static str,
        before: &'static [&'static str],
        after: [String; 2],
    },
    /// Through a registry, `HOST/PATH`.
    Registry(String),
}

/// A cluster.
pub(super) struct Target {
    embedded: bool,
    /// What KUBECONFIG is set to for kubectl and helm; of the embedded cluster known once it runs.
    kubeconfig: OsString,
}

impl Target {
    /// The user's cluster where one is named and answers, else the embedded one.
    ///
    /// # Errors
    /// Where the named one does not answer, or none is named and this machine can run none.
    pub(super) fn choose(kubeconfig: Option<&Path>) -> Result<Self> {
        if let Some(target) = Self::existing(kubeconfig)? {
            eprintln!("  using the cluster of {}", target.kubeconfig_text());
            return Ok(target);
        }
        cluster::can_run().map_err(|reasons| anyhow::anyhow!(cluster::ways_out(&reasons)))?;
        Ok(Self {
            embedded: true,
            kubeconfig: embedded_kubeconfig().into(),
        })
    }

    /// The user's cluster, where one is named that is not the embedded one and that answers.
    ///
    /// # Errors
    /// Where the one named on the command line does not answer.
    pub(super) fn existing(kubeconfig: Option<&Path>) -> Result<Option<Self>> {
        let named = kubeconfig
            .map(|path| std::path::absolute(path).map(PathBuf::into_os_string))
            .transpose()?;
        let environment = std::env::var_os("KUBECONFIG").filter(|value| !value.is_empty());
        let Some(chosen) = named.clone().or(environment) else {
            return Ok(None);
        };
        if Path::new(&chosen) == embedded_kubeconfig() {
            return Ok(None);
        }
        let target = Self {
            embedded: false,
            kubeconfig: chosen,
        };
        match target.kubectl_text(&["version", "--request-timeout=10s"]) {
            Ok(_) => Ok(Some(target)),
            Err(error) if named.is_some() => Err(error.context(format!("the cluster of {} does not answer", target.kubeconfig_text()))),
            Err(_) => {
                eprintln!(
                    "  the cluster of KUBECONFIG={} does not answer: the embedded one is meant",
                    target.kubeconfig_text()
                );
                Ok(None)
            }
        }
    }

    /// Starts the embedded cluster, where that is the one.
    ///
    /// # Errors
    /// Where it does not start.
    pub(super) fn start(self) -> Result<Self> {
        Ok(if self.embedded {
            Self {
                embedded: true,
                kubeconfig: cluster::up()?.into(),
            }
        } else {
            self
        })
    }

    pub(super) fn is_embedded(&self) -> bool {
        self.embedded
    }

    /// How images get to this cluster's nodes.
    ///
    /// # Errors
    /// Where there is no way that is known.
    pub(super) fn delivery(&self, registry: Option<&str>) -> Result<Delivery> {
        if let Some(registry) = registry {
            return Ok(Delivery::Registry(registry.trim_end_matches('/').to_owned()));
        }
        if self.embedded {
            return Ok(Delivery::Embedded);
        }
        let context = self.kubectl_text(&["config", "current-context"])?;
        let context = context.trim();
        if let Some(name) = context.strip_prefix("kind-") {
            return Ok(Delivery::Loader {
                program: "kind",
                before: &["load", "image-archive"],
                after: ["--name".into(), name.into()],
            });
        }
        if let Some(name) = context.strip_prefix("k3d-") {
            return Ok(Delivery::Loader {
                program: "k3d",
                before: &["image", "import"],
                after: ["--cluster".into(), name.into()],
            });
        }
        bail!(
            "the demo's images cannot be put on the nodes of {context}, which is no kind or k3d cluster: \
             name a registry that you can push to and that they pull from, with --image-registry HOST/PATH"
        )
    }

    /// A call of kubectl for this cluster.
    ///
    /// # Errors
    /// Where there is no kubectl and none can be built.
    pub(super) fn kubectl(&self) -> Result<Command> {
        self.tool("kubectl")
    }

    /// A call of helm for this cluster.
    ///
    /// # Errors
    /// Where there is no helm and none can be built.
    pub(super) fn helm(&self) -> Result<Command> {
        self.tool("helm")
    }

    /// For a foreign cluster the user's own program is taken, which fits its version and its ways of signing in.
    fn tool(&self, name: &'static str) -> Result<Command> {
        let own = (!self.embedded).then(|| workspace::find_program(name)).flatten();
        Ok(self.command(own.map_or_else(|| cluster::tool(name), Ok)?))
    }

    fn command(&self, program: PathBuf) -> Command {
        let mut command = Command::new(program);
        command.env("KUBECONFIG", &self.kubeconfig).current_dir(workspace::root());
        if let [file] = &std::env::split_paths(&self.kubeconfig).collect::<Vec<_>>()[..] {
            // For whoever looks at the processes; KUBECONFIG can name several files, the flag one.
            command.arg("--kubeconfig").arg(file);
        }
        command
    }

    /// What a call of kubectl prints.
    ///
    /// # Errors
    /// Where it fails; its words are in the error.
    pub(super) fn kubectl_text(&self, arguments: &[&str]) -> Result<String> {
        text_of(self.kubectl()?.args(arguments))
    }

    /// What a call of kubectl answers in JSON; `Null` where what is asked for is not there.
    ///
    /// # Errors
    /// Where it fails.
    pub(super) fn kubectl_json(&self, arguments: &[&str]) -> Result<Value> {
        let text = text_of(self.kubectl()?.args(arguments).args(["--output", "json"]))?;
        if text.trim().is_empty() {
            Ok(Value::Null)
        } else {
            serde_json::from_str(&text).context("kubectl's answer is no JSON")
        }
    }

    /// Applies a manifest; gives the object as the cluster has it.
    ///
    /// # Errors
    /// Where the cluster refuses it.
    pub(super) fn apply(&self, manifest: &str) -> Result<Value> {
        let mut command = self.kubectl()?;
        command.args(["apply", "--filename", "-", "--output", "json"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start kubectl")?;
        child.stdin.take().context("stdin is piped")?.write_all(manifest.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("kubectl apply failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("kubectl's answer is no JSON")
    }

    /// Whether a node offers the accelerator that the manifest asks for.
    ///
    /// # Errors
    /// Where the cluster does not answer.
    pub(super) fn has_gpus(&self) -> Result<bool> {
        let nodes = self.kubectl_json(&["get", "nodes"])?;
        let offers = |node: &Value| {
            let amount = &node["status"]["allocatable"][manifest::GPU];
            amount.as_str().is_some_and(|amount| amount != "0") && node["metadata"]["labels"]["nvidia.com/gpu.present"] == "true"
        };
        Ok(nodes["items"].as_array().is_some_and(|nodes| nodes.iter().any(offers)))
    }

    /// The nodes on which the model's pods run, in words.
    ///
    /// # Errors
    /// Where the cluster does not answer.
    pub(super) fn nodes_of_pods(&self) -> Result<String> {
        let selector = format!("plimsoll.dev/model={MODEL},app.kubernetes.io/component=runtime");
        let pods = self.kubectl_json(&["get", "pods", "--namespace", NAMESPACE, "--selector", &selector])?;
        let mut nodes: Vec<&str> = pods["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|pod| pod["spec"]["nodeName"].as_str())
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        Ok(nodes.join(", "))
    }

    /// What to set KUBECONFIG to.
    pub(super) fn kubeconfig_text(&self) -> String {
        self.kubeconfig.to_string_lossy().into_owned()
    }

    /// The folder of the kubectl that the demo built, where the user may have none.
    pub(super) fn kubectl_folder(&self) -> Option<PathBuf> {
        let built = self.embedded.then(|| cluster::tool("kubectl").ok()).flatten()?;
        built.parent().map(Path::to_path_buf)
    }
}

/// What a short command prints.
///
/// # Errors
/// Where it cannot start or fails; its words are in the error.
pub(super) fn text_of(command: &mut Command) -> Result<String> {
    let shown = format!("{:?}", &command).replace('"', "");
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn embedded_kubeconfig() -> PathBuf {
    workspace::cache().join("cluster/run/admin.conf")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments_of(kubeconfig: &str) -> Vec<OsString> {
        let target = Target {
            embedded: false,
            kubeconfig: kubeconfig.into(),
        };
        // Of a cluster that is not the embedded one the user's own program is taken, whatever it is.
        let command = target.command("kubectl".into());
        command.get_args().map(ToOwned::to_owned).collect()
    }

    #[test]
    fn every_call_names_the_file_of_the_cluster() {
        assert_eq!(arguments_of("/tmp/one.yaml"), ["--kubeconfig", "/tmp/one.yaml"]);
        assert!(
            arguments_of("/tmp/one.yaml:/tmp/two.yaml").is_empty(),
            "a list of files is in the environment alone"
        );
    }
}
