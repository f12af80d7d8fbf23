//! The gate: whether what was measured is within the budget.

use plimsoll_package::recipe::Budget;
use plimsoll_package::report::{Failure, FailureReason, OutputFidelity, Summary};
use plimsoll_package::units::{Percentage, Ratio, Size, display_percent, display_size};

use crate::failure::failure;

/// Least fidelity of each output where no budget is set.
const FIDELITY_DEFAULT: f64 = 0.99;
/// Room for the rounding of a difference of two ratios.
const ROUNDING: f64 = 1e-9;

/// Holds a result against the budget.
///
/// # Errors
/// [`FailureReason::BudgetExceeded`] with every limit that is exceeded, what was measured, and what to change.
pub fn check(budget: Option<&Budget>, summary: &Summary, outputs: &[OutputFidelity]) -> Result<(), Failure> {
    let limits = Limits::of(budget)?;
    let mut exceeded = Vec::new();
    if let (Some(limit), Some(metric)) = (limits.accuracy_drop, &summary.metric)
        && metric.before - metric.after > limit + ROUNDING
    {
        let (before, after) = (display_percent(metric.before), display_percent(metric.after));
        let drop = (metric.before - metric.after) * 100.0;
        exceeded.push(format!(
            "accuracy fell by {drop:.2} points ({before} -> {after} on {} samples), maxAccuracyDrop allows {:.2}",
            metric.samples,
            limit * 100.0
        ));
    }
    if let Some(limit) = limits.fidelity
        && let Some(worst) = outputs
            .iter()
            .min_by(|a, b| a.cosine.total_cmp(&b.cosine))
            .filter(|worst| worst.cosine < limit)
    {
        let name = if budget.is_some() {
            "minFidelity"
        } else {
            "the default minFidelity"
        };
        exceeded.push(format!(
            "output `{}` has fidelity {:.4} to the original, {name} asks for {limit}",
            worst.name, worst.cosine
        ));
    }
    if let Some(limit) = limits.size.filter(|limit| summary.size_after > *limit) {
        let (after, limit) = (display_size(summary.size_after), display_size(limit));
        exceeded.push(format!(
            "the model has {after} ({} bytes), maxSize allows {limit}",
            summary.size_after
        ));
    }
    if exceeded.is_empty() {
        return Ok(());
    }
    let advice = "compress less (a smaller prune amount, a gentler quantize scheme), or raise the limit in optimize.budget";
    let advice = if limits.size.is_some_and(|limit| summary.size_after > limit) {
        "compress more, or raise the limit in optimize.budget"
    } else {
        advice
    };
    let mut failed = failure(FailureReason::BudgetExceeded, format!("{}; {advice}", exceeded.join("; ")));
    failed.measured = Some(Box::new(summary.clone()));
    Err(failed)
}

struct Limits {
    accuracy_drop: Option<f64>,
    fidelity: Option<f64>,
    size: Option<u64>,
}

impl Limits {
    fn of(budget: Option<&Budget>) -> Result<Self, Failure> {
        let Some(budget) = budget else {
            return Ok(Self {
                accuracy_drop: None,
                fidelity: Some(FIDELITY_DEFAULT),
                size: None,
            });
        };
        let invalid =
            |error: plimsoll_package::units::UnitError| failure(FailureReason::InvalidInputs, format!("optimize.budget: {error}"));
        Ok(Self {
            accuracy_drop: budget
                .max_accuracy_drop
                .as_ref()
                .map(Percentage::value)
                .transpose()
                .map_err(invalid)?,
            fidelity: budget.min_fidelity.as_ref().map(Ratio::value).transpose().map_err(invalid)?,
            size: budget.max_size.as_ref().map(Size::value).transpose().map_err(invalid)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_package::digest::Digest;
    use plimsoll_package::manifest::Engine;
    use plimsoll_package::recipe::Metric;
    use plimsoll_package::report::MetricChange;

    fn summary(after: f64, size_after: u64) -> Summary {
        Summary {
            artifact: None,
            reused: false,
            source_digest: Digest::of(b""),
            evaluation_digest: None,
            size_before: 4096,
            size_after,
            sparsity: 0.0,
            metric: Some(MetricChange {
                name: Metric::Accuracy,
                before: 0.98,
                after,
                samples: 450,
            }),
            fidelity: None,
            latency: None,
            engine: Engine::Tract,
            toolchain: "0".into(),
        }
    }

    fn output(cosine: f64) -> OutputFidelity {
        OutputFidelity {
            name: "y".into(),
            cosine,
            sqnr_db: None,
            max_abs_error: 0.0,
        }
    }

    #[test]
    fn a_drop_of_exactly_the_limit_passes_and_one_more_sample_does_not() {
        let budget = Budget {
            max_accuracy_drop: Some("1%".parse().unwrap()),
            ..Budget::default()
        };
        check(Some(&budget), &summary(0.97, 1), &[output(0.5)]).unwrap();
        let failed = check(Some(&budget), &summary(0.9677, 1), &[]).unwrap_err();
        assert_eq!(failed.reason, FailureReason::BudgetExceeded);
        assert!(
            failed
                .message
                .starts_with("accuracy fell by 1.23 points (98.0% -> 96.8% on 450 samples), maxAccuracyDrop allows 1.00")
        );
        assert!(failed.measured.is_some());
    }

    #[test]
    fn without_a_budget_every_output_must_be_faithful() {
        check(None, &summary(0.5, 1), &[output(0.991)]).unwrap();
        let failed = check(None, &summary(0.98, 1), &[output(1.0), output(0.98)]).unwrap_err();
        assert!(
            failed
                .message
                .contains("output `y` has fidelity 0.9800 to the original, the default minFidelity asks for 0.99")
        );
    }

    #[test]
    fn a_budget_binds_only_where_it_says_so_and_all_that_is_exceeded_is_named() {
        let budget = Budget {
            max_size: Some("1Ki".parse().unwrap()),
            min_fidelity: Some("0.9".parse().unwrap()),
            ..Budget::default()
        };
        check(Some(&budget), &summary(0.1, 1024), &[output(0.95)]).unwrap();
        let failed = check(Some(&budget), &summary(0.1, 2048), &[output(0.5)]).unwrap_err();
        assert!(
            failed.message.contains("minFidelity asks for 0.9")
                && failed.message.contains("the model has 2Ki (2048 bytes), maxSize allows 1Ki"),
            "{failed}"
        );
    }
}
