//! The demo as a new user has it.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::check;
use super::tally::Tally;
use crate::cluster::{self, Traces};
use crate::workspace;

/// How long the demo runs that is broken off: long enough to have a cluster.
const BROKEN_OFF_AFTER: Duration = Duration::from_secs(20);

/// Runs the demo without a cluster; then with one, broken off, whole and once more, and takes it away.
///
/// # Errors
/// Where one of them fails, or a request failed while versions changed.
pub(super) fn run(tally: &mut Tally) -> Result<()> {
    check("demo --local", &mut task(&["demo", "--local"]), tally)?;
    if let Err(reasons) = cluster::can_run() {
        tally.skip(format!("the demo: this machine can run no cluster ({reasons})"));
        return Ok(());
    }
    if cluster::is_running() {
        tally.skip("the demo, which ends with its cluster taken away: a cluster runs already".to_owned());
        return Ok(());
    }
    let before = Traces::observe();
    let shown = show(tally);
    let down = check("demo --down", &mut task(&["demo", "--down"]), tally);
    shown.and(down)?;
    let differences = Traces::left_since(&before);
    ensure!(
        differences.is_empty(),
        "the machine is not as it was before the demo: {}",
        differences.join("; ")
    );
    tally.passed += 1;
    Ok(())
}

fn show(tally: &mut Tally) -> Result<()> {
    break_off()?;
    for what in ["the demo after one that was broken off", "the demo once more"] {
        check(what, &mut task(&["demo"]), tally)?;
        let path = workspace::target().join("demo.json");
        let text = fs::read(&path).with_context(|| format!("{what} wrote no {}", path.display()))?;
        let record: Value = serde_json::from_slice(&text)?;
        let requests = (record["requests_total"].as_u64(), record["requests_failed"].as_u64());
        ensure!(requests.0 > Some(100) && requests.1 == Some(0), "{what}: {record}");
    }
    check("cluster status", &mut task(&["cluster", "status"]), tally)?;
    check("cluster logs", &mut task(&["cluster", "logs", "kubelet"]), tally)
}

/// Starts the demo and breaks it off as Ctrl-C does at a terminal: all of the group of processes that stands there.
fn break_off() -> Result<()> {
    let mut demo = task(&["demo"]);
    let mut demo = demo.process_group(0).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    std::thread::sleep(BROKEN_OFF_AFTER);
    let group = format!("-{}", demo.id());
    Command::new("kill").args(["-INT", "--", &group]).status()?;
    demo.wait()?;
    Ok(())
}

/// A task as a user calls it, on a cluster of its own.
fn task(arguments: &[&str]) -> Command {
    let mut command = workspace::cargo();
    command.arg("xtask").args(arguments).env_remove("KUBECONFIG");
    command
}
