//! What the demo measured: `demo.json`, and the tables.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use comfy_table::Table;
use plimsoll_package::report::Report;
use plimsoll_package::units::display_size;
use serde::Serialize;

use super::rollout::Served;
use super::timeline;
use super::traffic::Counted;
use crate::workspace;

/// The figures of one demo. Times in seconds, sizes in bytes, accuracies as ratios, latencies in microseconds.
#[derive(Serialize)]
pub(super) struct Record {
    apply_to_ready_s: f64,
    apply_to_first_prediction_s: f64,
    /// The same for a model that is applied again, whose artifact is there.
    reapply_to_first_prediction_s: f64,
    /// Whether the Job found the artifact of an earlier run.
    artifact_reused: bool,
    size_bytes_before: u64,
    size_bytes_after: u64,
    pulled_bytes_before: Option<u64>,
    pulled_bytes_after: Option<u64>,
    accuracy_before: Option<f64>,
    accuracy_after: Option<f64>,
    latency_us_before: Option<f64>,
    latency_us_after: Option<f64>,
    pub(super) seconds_by_phase: BTreeMap<&'static str, f64>,
    /// From the first step's beginning to the last one's end in the Job, with fetching and publishing; absent where the artifact was there.
    job_steps_s: Option<f64>,
    /// The bare optimiser on the same model, data and recipe: from local files to a package in a folder.
    bare_optimizer_s: Option<f64>,
    pub(super) nodes: String,
    endpoint: String,
    revisions: Vec<RevisionRecord>,
    pub(super) requests_total: u64,
    pub(super) requests_failed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) first_failure: Option<String>,
    #[serde(skip)]
    pub(super) report: Report,
}

/// A version that came to serve.
#[derive(Serialize)]
struct RevisionRecord {
    number: i64,
    name: String,
    artifact: String,
    apply_to_ready_s: f64,
}

impl Record {
    /// What the first version gave; `answered_at` is when its first answer came.
    pub(super) fn new(first: &Served, answered_at: Instant, report: Report) -> Self {
        let summary = &report.summary;
        Self {
            apply_to_ready_s: first.ready_s,
            apply_to_first_prediction_s: (answered_at - first.begun).as_secs_f64(),
            reapply_to_first_prediction_s: 0.0,
            artifact_reused: !first.published(),
            size_bytes_before: summary.size_before,
            size_bytes_after: summary.size_after,
            pulled_bytes_before: summary.size_layer_before,
            pulled_bytes_after: summary.size_layer_after,
            accuracy_before: summary.metric.map(|metric| metric.before),
            accuracy_after: summary.metric.map(|metric| metric.after),
            latency_us_before: summary.latency.map(|latency| latency.before_us),
            latency_us_after: summary.latency.map(|latency| latency.after_us),
            seconds_by_phase: BTreeMap::new(),
            job_steps_s: None,
            bare_optimizer_s: None,
            nodes: String::new(),
            endpoint: first.endpoint.clone(),
            revisions: vec![RevisionRecord::of(first)],
            requests_total: 0,
            requests_failed: 0,
            first_failure: None,
            report,
        }
    }

    /// Adds what the Job's steps took, and the bare optimiser.
    pub(super) fn compared(&mut self, job_s: f64, bare_s: f64) {
        self.job_steps_s = Some(job_s);
        self.bare_optimizer_s = Some(bare_s);
    }

    /// Adds the second version, the way back, and what the clients saw meanwhile.
    pub(super) fn moved(&mut self, second: &Served, undone: &Served, counted: Counted) {
        self.revisions.extend([RevisionRecord::of(second), RevisionRecord::of(undone)]);
        self.requests_total = counted.total;
        self.requests_failed = counted.failed;
        self.first_failure = counted.first_failure;
    }

    /// Adds the model that was deleted and applied again, and when its first answer came.
    pub(super) fn applied_again(&mut self, again: &Served, answered_at: Instant) {
        self.revisions.push(RevisionRecord::of(again));
        self.reapply_to_first_prediction_s = (answered_at - again.begun).as_secs_f64();
    }

    /// Before and after, where it serves, and where the time went.
    pub(super) fn table(&self) -> String {
        let mut table = before_and_after(&self.report);
        let revision = self
            .revisions
            .first()
            .map(|revision| format!("{} ({})", revision.number, revision.name));
        table.add_row(["revision", "", &revision.unwrap_or_default()]);
        table.add_row(["node", "", &self.nodes]);
        table.add_row(["endpoint", "", &self.endpoint]);
        let found = if self.artifact_reused { ", artifact of an earlier run" } else { "" };
        table.add_row(["apply to Ready", "", &format!("{:.2} s{found}", self.apply_to_ready_s)]);
        for (share, seconds) in timeline::shares(&self.seconds_by_phase) {
            table.add_row([&format!("  {share}"), "", &format!("{seconds:.2} s")]);
        }
        if let (Some(job), Some(bare)) = (self.job_steps_s, self.bare_optimizer_s) {
            let over = format!("{:+.2} s ({job:.2} s, bare {bare:.2} s)", job - bare);
            table.add_row(["the Job's steps over the bare optimiser", "", &over]);
        }
        table.add_row([
            "first prediction",
            "",
            &format!("{:.2} s after apply", self.apply_to_first_prediction_s),
        ]);
        table.to_string()
    }

    /// The versions as they came, and what the clients noticed of it.
    pub(super) fn story(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(comfy_table::presets::UTF8_FULL_CONDENSED)
            .set_header(["", "revision", "name", "apply to Ready"]);
        for (what, revision) in ["first version", "second version", "undo", "deleted, applied again"]
            .iter()
            .zip(&self.revisions)
        {
            table.add_row([
                *what,
                &revision.number.to_string(),
                &revision.name,
                &format!("{:.2} s", revision.apply_to_ready_s),
            ]);
        }
        format!(
            "{table}\n  {} requests during the rollout and the undo, {} failed; applied again, the first prediction came after {:.2} s",
            self.requests_total, self.requests_failed, self.reapply_to_first_prediction_s
        )
    }

    /// Writes `demo.json` to the target folder.
    ///
    /// # Errors
    /// Where the disk does not take it.
    pub(super) fn write(&self) -> Result<PathBuf> {
        let path = workspace::target().join("demo.json");
        let json = serde_json::to_string_pretty(self)?;
        fs::write(&path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

impl RevisionRecord {
    fn of(served: &Served) -> Self {
        Self {
            number: served.revision,
            name: served.revision_name.clone(),
            artifact: served.artifact.clone(),
            apply_to_ready_s: served.ready_s,
        }
    }
}

/// The table of an optimisation.
pub(super) fn before_and_after(report: &Report) -> Table {
    let summary = &report.summary;
    let mut table = Table::new();
    table
        .load_style(comfy_table::presets::UTF8_FULL_CONDENSED)
        .set_header(["", "before", "after"]);
    let mut size = |what: &str, before: u64, after: u64| {
        let smaller = format!("{} ({:.2}x smaller)", display_size(after), before as f64 / after as f64);
        table.add_row([what.to_owned(), display_size(before), smaller]);
    };
    size("size", summary.size_before, summary.size_after);
    if let (Some(before), Some(after)) = (summary.size_layer_before, summary.size_layer_after) {
        size("size as pulled", before, after);
    }
    if let Some(metric) = summary.metric {
        let name = format!("{} ({} samples)", metric.name.to_string().to_lowercase(), metric.samples);
        table.add_row([name, metric.name.display(metric.before), metric.name.display(metric.after)]);
    }
    if let Some(latency) = summary.latency {
        table.add_row([
            "latency".to_owned(),
            format!("{:.0} us", latency.before_us),
            format!("{:.0} us ({})", latency.after_us, summary.engine),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use plimsoll_package::digest::Digest;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_file_and_the_tables_hold_what_was_measured() {
        let report = json!({
            "schemaVersion": 1, "steps": [], "outputs": [], "engines": [], "skipped": [], "stepMs": {},
            "inputs": {"source": {"uri": "m"}, "toolchain": "0", "repository": "r", "maxFetchSize": "1Gi"},
            "summary": {
                "sourceDigest": Digest::of(b"m").to_string(), "sizeBefore": 4000, "sizeAfter": 1000, "sparsity": 0.5,
                "metric": {"name": "Accuracy", "before": 0.984, "after": 0.98, "samples": 450},
                "latency": {"beforeUs": 40.0, "afterUs": 30.0}, "engine": "Tract", "toolchain": "0",
            },
        });
        let (begun, now) = (Instant::now(), SystemTime::now());
        let served = Served {
            begun,
            applied_at: now,
            ready_s: 1.0,
            ready_at: now,
            revision: 1,
            revision_name: "digits-a".into(),
            endpoint: "http://digits".into(),
            artifact: "sha256:0".into(),
            seen: vec![],
        };
        let mut record = Record::new(&served, begun, serde_json::from_value(report).unwrap());
        record.nodes = "node1".into();
        let counted = Counted {
            total: 7,
            ..Counted::default()
        };
        record.moved(&served, &served, counted);
        let json = serde_json::to_value(&record).unwrap();
        for field in [
            "apply_to_ready_s",
            "size_bytes_before",
            "size_bytes_after",
            "accuracy_before",
            "accuracy_after",
            "requests_total",
            "requests_failed",
            "revisions",
            "seconds_by_phase",
        ] {
            assert!(!json[field].is_null(), "{field} is not in {json}");
        }
        let table = record.table();
        for part in ["4.00x smaller", "98.4", "40 us", "30 us", "1 (digits-a)", "node1", "http://digits"] {
            assert!(table.contains(part), "{part} is not in\n{table}");
        }
        assert!(record.story().contains("7 requests during the rollout and the undo, 0 failed"));
    }
}
