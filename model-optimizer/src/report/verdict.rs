//! The verdict: what came of it in a sentence, and every limit with what was measured.

use plimsoll_package::report::{LimitCheck, Report, Verdict};
use plimsoll_package::units::display_size;

use super::figure;
use super::html::{Html, element, labelled, numbers, section, table, text, words};

/// Most limits that are shown unfolded.
const LIMITS_SHOWN: usize = 24;

/// The word and colour of the verdict, with what came of it in one sentence.
pub(super) fn banner(report: &Report) -> Html {
    let (class, word) = match report.gate.verdict {
        Verdict::WithinBudget => ("verdict good", "✓ Within the budget"),
        Verdict::BudgetExceeded => ("verdict bad", "✗ Outside of the budget"),
        Verdict::NotGated => ("verdict unknown", "? Not measured"),
    };
    element(
        "div",
        &[("class", &class)],
        [labelled("strong", "word", word), labelled("p", "sentence", sentence(report))],
    )
}

fn sentence(report: &Report) -> String {
    match report.gate.verdict {
        Verdict::WithinBudget => format!("{}.", result(report)),
        Verdict::BudgetExceeded => {
            let exceeded = report.gate.limits.iter().filter_map(|limit| limit.message.as_deref());
            format!("The model is not handed out: {}.", exceeded.collect::<Vec<_>>().join("; "))
        }
        Verdict::NotGated => format!("{}; the gate was turned off, so that nobody knows what it lost.", result(report)),
    }
}

/// What came out: its size, its speed and what it lost.
fn result(report: &Report) -> String {
    let summary = &report.summary;
    let (before, after) = (summary.size_before, summary.size_after);
    let mut parts = vec![format!(
        "The model is {} ({} to {})",
        figure::smaller(before, after),
        display_size(before),
        display_size(after)
    )];
    if let Some(latency) = summary.latency {
        let chosen = report.engines.iter().find(|measured| measured.engine == summary.engine);
        let paired = chosen.and_then(|measured| measured.latency_ratio).map(|ratio| ratio.median);
        let ratio = paired.unwrap_or(latency.after_us / latency.before_us);
        parts.push(format!("takes {ratio:.2} times as long as the original on {}", summary.engine));
    }
    match (summary.metric, summary.fidelity) {
        (Some(metric), _) => parts.push(format!(
            "has {} {} where the original has {}",
            figure::metric_name(metric.name),
            metric.name.display(metric.after),
            metric.name.display(metric.before)
        )),
        (None, Some(fidelity)) => parts.push(format!("keeps a fidelity of {fidelity:.5}")),
        (None, None) => {}
    }
    match parts.as_slice() {
        [all @ .., last] if !all.is_empty() => format!("{} and {last}", all.join(", ")),
        _ => parts.concat(),
    }
}

/// The limits, those that are exceeded first; nothing where none binds.
pub(super) fn limits(report: &Report) -> Option<Html> {
    if report.gate.limits.is_empty() {
        return None;
    }
    let mut limits: Vec<&LimitCheck> = report.gate.limits.iter().collect();
    limits.sort_by_key(|limit| limit.passed);
    let row = |limit: &LimitCheck| {
        let (class, word) = if limit.passed {
            ("good", "✓ holds")
        } else {
            ("bad", "✗ exceeded")
        };
        let default = if limit.default { ", the default" } else { "" };
        vec![
            text(format_args!("{}{default}", limit.limit)),
            text(&limit.of),
            text(bound(limit, limit.allowed)),
            text(bound(limit, limit.measured)),
            labelled("span", class, word),
        ]
    };
    let columns = [words("limit"), words("of"), numbers("allowed"), numbers("measured"), words("")];
    let says = "Every limit that binds, with what was measured; one that the budget does not state is the default.";
    Some(section(
        "Limits",
        says,
        [table(&columns, limits.into_iter().map(row).collect(), LIMITS_SHOWN)],
    ))
}

/// An amount in the unit of the limit's field.
fn bound(limit: &LimitCheck, amount: f64) -> String {
    match limit.limit.as_str() {
        "maxSize" => display_size(amount as u64),
        "maxLatency" if limit.of == "model" => figure::time(amount),
        "maxLatency" => format!("{amount:.2} times"),
        "maxAccuracyDrop" | "maxClassAccuracyDrop" if amount == f64::MAX => "infinite".to_owned(),
        "maxAccuracyDrop" | "maxClassAccuracyDrop" => format!("{:.2}%", amount * 100.0),
        _ => figure::fidelity(amount),
    }
}
