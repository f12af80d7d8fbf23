//! What a person is told of a cluster: how its components are, and their logs.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::components::{self, Component, Health, Kind, cluster_program};
use super::lifecycle::Cluster;
use super::process;

impl Cluster {
    pub(super) fn status(&self) -> Result<()> {
        let network = self.network()?;
        let supervisor = self.supervisor();
        let mut all = components::components(self.kind, &self.run, &network)?;
        if supervisor.was_started(components::KWOK) {
            all.push(components::kwok(&self.run)?);
        }
        let mut probe = cluster_program("health")?;
        let probed = probe.args(all.iter().filter_map(Component::probe)).output()?;
        let answers = String::from_utf8_lossy(&probed.stdout);
        let mut table = comfy_table::Table::new();
        table
            .load_style(comfy_table::presets::NOTHING)
            .set_header(["COMPONENT", "PID", "MEMORY", "HEALTH"]);
        let mut memory_bytes = 0;
        for component in &all {
            let process = supervisor.find(component.name);
            let memory = process.map_or(0, process::Process::memory_bytes);
            memory_bytes += memory;
            let health = match (process, &component.health) {
                (None, _) if supervisor.was_started(component.name) => format!("died; see {}", supervisor.log(component.name).display()),
                (None, _) => "not started".to_owned(),
                (Some(_), Health::Process) => "ok".to_owned(),
                (Some(_), Health::Socket(path)) => UnixStream::connect(path).map_or_else(|error| error.to_string(), |_| "ok".to_owned()),
                (Some(_), Health::Url(_)) => {
                    let answer = answers
                        .lines()
                        .find_map(|line| line.strip_prefix(component.name)?.strip_prefix(' '));
                    answer.unwrap_or("no answer").to_owned()
                }
            };
            let pid = process.map_or_else(|| "-".to_owned(), |process| process.pid.to_string());
            table.add_row([component.name.to_owned(), pid, format!("{} MiB", memory >> 20), health]);
        }
        println!("{table}");
        println!(
            "{} MiB in all; pods {}, services {}; state in {}",
            memory_bytes >> 20,
            network.pod_subnet(),
            network.service_subnet(),
            self.run.display()
        );
        if self.kind == Kind::Node {
            println!("NetworkPolicies are accepted but not enforced: the bridge that connects the pods knows none.");
        }
        println!("export KUBECONFIG={}", self.kubeconfig().display());
        Ok(())
    }

    pub(super) fn logs(&self, component: Option<&str>, follow: bool) -> Result<()> {
        let mut command = Command::new("tail");
        if follow {
            command.arg("--follow=name");
        }
        let folder = self.run.join("log");
        let mut logs: Vec<PathBuf> = fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.sort();
        let names = logs
            .iter()
            .filter_map(|path| path.file_stem())
            .map(|name| name.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(", ");
        match component {
            Some(name) => {
                logs.retain(|path| path.file_stem().is_some_and(|stem| stem == name));
                command.arg("--lines=200");
            }
            None => {
                command.arg("--lines=10");
            }
        }
        if logs.is_empty() {
            bail!("no such log in {}; there are: {names}", folder.display());
        }
        command.args(logs).status().context("cannot start `tail`")?;
        Ok(())
    }
}
