//! Where the time from apply to Ready goes: what is the optimiser, what is pods starting, what is waiting.
//!
//! Kubernetes writes its own times in whole seconds, so the moments are those at which a watch saw a change, and those that the node's
//! container runtime put before each line of a log; on a cluster elsewhere the two clocks may differ, and what they make negative is 0.

use std::collections::BTreeMap;
use std::time::SystemTime;

use anyhow::Result;
use jiff::Timestamp;
use plimsoll_package::report::Report;
use serde_json::Value;

use super::NAMESPACE;
use super::rollout::{Seen, Served, Watched};
use super::target::Target;

/// A line of a pod's log.
struct Line {
    at: Timestamp,
    content: Value,
}

/// Seconds of each phase, in a name's order: see the source for what each covers. A phase that did not happen is missing.
///
/// # Errors
/// Where the cluster does not give the pods' logs.
pub(super) fn seconds_by_phase(target: &Target, served: &Served, report: &Report) -> Result<BTreeMap<&'static str, f64>> {
    let mut phases = BTreeMap::new();
    let mut moment = Timestamp::try_from(served.applied_at)?;
    let mut until = |phases: &mut BTreeMap<&'static str, f64>, name, next: Timestamp| {
        phases.insert(name, seconds(moment, next));
        moment = moment.max(next);
    };
    if let Some(model) = first_seen(&served.seen, Watched::Model, |_| true) {
        until(&mut phases, "1_kubectl_and_apiserver", model.try_into()?);
    }
    if let Some((pod, seen)) = newest_pod(&served.seen, "optimizer") {
        let lines = lines(target, &pod)?;
        until(&mut phases, "2_operator_makes_the_job", seen.try_into()?);
        if let Some(last) = lines.last() {
            let optimiser = optimiser_seconds(&lines, report);
            let whole = seconds(seen.try_into()?, last.at);
            phases.insert("3_job_pod_starting", (whole - optimiser).max(0.0));
            phases.insert("4_optimiser", optimiser.min(whole));
            moment = moment.max(last.at);
        }
    }
    let mut until = |phases: &mut BTreeMap<&'static str, f64>, name, next: Timestamp| {
        phases.insert(name, seconds(moment, next));
        moment = moment.max(next);
    };
    if let Some((pod, seen)) = newest_pod(&served.seen, "runtime") {
        until(&mut phases, "5_operator_makes_the_deployment", seen.try_into()?);
        let lines = lines(target, &pod)?;
        if let Some(first) = lines.first() {
            until(&mut phases, "6_serving_pods_starting", first.at);
        }
        if let Some(ready) = lines.iter().find(|line| line.content["message"] == "ready") {
            until(&mut phases, "7_runtime_loading_and_probe", ready.at);
        }
    }
    until(&mut phases, "8_readiness_reaches_status", served.ready_at.try_into()?);
    Ok(phases)
}

/// From the first line of the Job's steps to the last, in seconds; `None` where they published nothing.
///
/// # Errors
/// Where the cluster does not give the pod's logs.
pub(super) fn job_seconds(target: &Target, served: &Served) -> Result<Option<f64>> {
    let Some((pod, _)) = newest_pod(&served.seen, "optimizer").filter(|_| served.published()) else {
        return Ok(None);
    };
    let lines = lines(target, &pod)?;
    Ok(lines.first().zip(lines.last()).map(|(first, last)| seconds(first.at, last.at)))
}

/// What the phases come to: the optimiser, pods starting (kubelet and container runtime, the model's load among it), and waiting.
pub(super) fn shares(phases: &BTreeMap<&'static str, f64>) -> [(&'static str, f64); 3] {
    let sum = |names: &[&str]| {
        phases
            .iter()
            .filter(|(name, _)| names.iter().any(|wanted| name.starts_with(wanted)))
            .map(|(_, seconds)| seconds)
            .sum()
    };
    [
        ("optimiser", sum(&["4_"])),
        ("pods starting", sum(&["3_", "6_", "7_"])),
        ("waiting", sum(&["1_", "2_", "5_", "8_"])),
    ]
}

/// The steps' own times by the report, and publication by the log, since the report is written before it. Where the artifact was found,
/// the report is of an earlier run: then what the log spans.
fn optimiser_seconds(lines: &[Line], report: &Report) -> f64 {
    let last_of = |step: &str| lines.iter().rev().find(|line| line.content["step"] == step).map(|line| line.at);
    match (last_of("evaluate"), last_of("publish")) {
        (Some(evaluated), Some(published)) => report.step_ms.values().sum::<f64>() / 1e3 + seconds(evaluated, published),
        _ => lines
            .first()
            .zip(lines.last())
            .map_or(0.0, |(first, last)| seconds(first.at, last.at)),
    }
}

fn first_seen(seen: &[Seen], what: Watched, which: impl Fn(&Value) -> bool) -> Option<SystemTime> {
    seen.iter()
        .find(|seen| seen.what == what && which(&seen.object))
        .map(|seen| seen.at)
}

/// The pod of `component` that appeared last, for it is the one that was waited for; and when.
fn newest_pod(seen: &[Seen], component: &str) -> Option<(String, SystemTime)> {
    let of_component = |pod: &Value| pod["metadata"]["labels"]["app.kubernetes.io/component"] == component;
    let pods = seen.iter().filter(|seen| seen.what == Watched::Pod && of_component(&seen.object));
    let names = pods.filter_map(|seen| seen.object["metadata"]["name"].as_str());
    let name = names.max_by_key(|name| first_seen(seen, Watched::Pod, |pod| pod["metadata"]["name"] == **name))?;
    Some((
        name.to_owned(),
        first_seen(seen, Watched::Pod, |pod| pod["metadata"]["name"] == name)?,
    ))
}

fn lines(target: &Target, pod: &str) -> Result<Vec<Line>> {
    let text = target.kubectl_text(&["logs", pod, "--namespace", NAMESPACE, "--all-containers", "--timestamps"])?;
    Ok(parse(&text))
}

fn parse(text: &str) -> Vec<Line> {
    let line = |line: &str| {
        let (at, content) = line.split_once(' ')?;
        Some(Line {
            at: at.parse().ok()?,
            content: serde_json::from_str(content).unwrap_or(Value::Null),
        })
    };
    let mut lines: Vec<Line> = text.lines().filter_map(line).collect();
    // kubectl gives one container after the other.
    lines.sort_by_key(|line| line.at);
    lines
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    let milliseconds = (to.as_millisecond() - from.as_millisecond()).max(0);
    milliseconds as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_several_containers_are_put_in_order() {
        let lines = parse(
            "2026-01-02T03:04:06.5Z {\"step\":\"publish\"}\n2026-01-02T03:04:05.25Z {\"step\":\"fetch\"}\nno time here\n2026-01-02T03:04:06Z plain\n",
        );
        assert_eq!(
            lines.iter().map(|line| line.content["step"].as_str()).collect::<Vec<_>>(),
            [Some("fetch"), None, Some("publish")]
        );
        assert_eq!(seconds(lines[0].at, lines[2].at), 1.25);
        assert_eq!(seconds(lines[2].at, lines[0].at), 0.0, "clocks that differ make nothing negative");
    }

    #[test]
    fn every_phase_belongs_to_one_share() {
        let names = [
            "1_kubectl_and_apiserver",
            "2_operator_makes_the_job",
            "3_job_pod_starting",
            "4_optimiser",
            "5_operator_makes_the_deployment",
            "6_serving_pods_starting",
            "7_runtime_loading_and_probe",
            "8_readiness_reaches_status",
        ];
        let phases = names.map(|name| (name, 1.0)).into();
        assert_eq!(shares(&phases).iter().map(|(_, seconds)| seconds).sum::<f64>(), 8.0);
    }
}
