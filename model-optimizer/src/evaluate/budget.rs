//! The gate: whether what was measured is within the budget. What a model gives is always bounded, by a limit that was stated or by a
//! default one.

use plimsoll_package::recipe::{Budget, Metric};
use plimsoll_package::report::{ClassChange, Failure, FailureReason, Gate, LimitCheck, MetricChange, OutputFidelity, Summary, Verdict};
use plimsoll_package::units::{UnitError, display_percent, display_size};

use super::judgement::Judgement;
use super::latency::Standing;
use crate::failure::failure;

/// Least fidelity of an output, where none is stated and no metric judges it.
const FIDELITY_DEFAULT: f64 = 0.99;
/// How much more a slice may lose than its output.
const SLICE_SLACK: f64 = 10.0;
/// Most that the accuracy of a class may fall, where none is stated.
const CLASS_DROP_DEFAULT: f64 = 0.5;
/// Fewest samples of a class that the default binds.
const CLASS_SAMPLES_MIN: u64 = 5;
/// Room for the rounding of a difference of two ratios.
const ROUNDING: f64 = 1e-9;

/// Holds a result against the budget. `standing` is its latency's against the original where that is fastest.
///
/// # Errors
/// [`FailureReason::InvalidInputs`] where a limit does not parse.
pub fn check(budget: Option<&Budget>, summary: &Summary, judgement: &Judgement, standing: Option<&Standing>) -> Result<Gate, Failure> {
    let default = Budget::default();
    let budget = budget.unwrap_or(&default);
    let drop = value(budget.max_accuracy_drop.as_ref().map(|drop| drop.value()))?;
    let class_drop = value(budget.max_class_accuracy_drop.as_ref().map(|drop| drop.value()))?;
    let fidelity = value(budget.min_fidelity.as_ref().map(|fidelity| fidelity.value()))?;
    let size = value(budget.max_size.as_ref().map(|size| size.value()))?;
    let latency = value(budget.max_latency.as_ref().map(|latency| latency.value()))?;
    let mut limits = Vec::new();
    if let (Some(limit), Some(metric)) = (drop, &judgement.metric) {
        limits.push(of_metric(limit, metric));
    }
    limits.extend(of_class(class_drop, &judgement.classes));
    for output in &judgement.outputs {
        // What a bounded metric judges may differ as long as it is right.
        let is_judged = judgement.judged.as_ref() == Some(&output.name) && (drop.is_some() || class_drop.is_some());
        match fidelity {
            None if is_judged => {}
            stated => limits.extend(of_output(stated, output)),
        }
    }
    if let Some(limit) = size {
        let (has, allowed) = (display_size(summary.size_after), display_size(limit));
        limits.push(LimitCheck {
            limit: "maxSize".into(),
            default: false,
            of: "model".into(),
            allowed: limit as f64,
            measured: summary.size_after as f64,
            passed: summary.size_after <= limit,
            message: (summary.size_after > limit)
                .then(|| format!("the model has {has} ({} bytes), maxSize allows {allowed}", summary.size_after)),
        });
    }
    if let (Some(limit), Some(measured)) = (latency, summary.latency) {
        limits.extend(of_latency(limit.as_secs_f64() * 1e6, measured.after_us, standing));
    }
    let verdict = match limits.iter().all(|limit| limit.passed) {
        true => Verdict::WithinBudget,
        false => Verdict::BudgetExceeded,
    };
    Ok(Gate { verdict, limits })
}

/// The failure of a result that is outside of its budget: every limit that is exceeded, what was measured, and what to change.
#[must_use]
pub fn exceeded(gate: &Gate, summary: &Summary) -> Option<Failure> {
    if gate.verdict != Verdict::BudgetExceeded {
        return None;
    }
    let exceeded = || gate.limits.iter().filter(|limit| !limit.passed);
    let words: Vec<&str> = exceeded().filter_map(|limit| limit.message.as_deref()).collect();
    let is_cost = |limit: &LimitCheck| matches!(limit.limit.as_str(), "maxSize" | "maxLatency");
    let advice = if exceeded().any(is_cost) {
        "compress more, or raise the limit in optimize.budget"
    } else if exceeded().all(|limit| limit.default) {
        "compress less (a smaller prune amount, a gentler quantize scheme), or state in optimize.budget what may be lost"
    } else {
        "compress less (a smaller prune amount, a gentler quantize scheme), or raise the limit in optimize.budget"
    };
    let mut failed = failure(FailureReason::BudgetExceeded, format!("{}; {advice}", words.join("; ")));
    failed.measured = Some(Box::new(summary.clone()));
    Some(failed)
}

fn value<T>(limit: Option<Result<T, UnitError>>) -> Result<Option<T>, Failure> {
    let invalid = |error: UnitError| failure(FailureReason::InvalidInputs, format!("optimize.budget: {error}"));
    limit.transpose().map_err(invalid)
}

fn of_metric(limit: f64, metric: &MetricChange) -> LimitCheck {
    let name = match metric.name {
        Metric::Accuracy => "accuracy".to_owned(),
        name => name.to_string(),
    };
    let drop = metric.name.drop(metric.before, metric.after);
    let passed = drop <= limit + ROUNDING;
    let (before, after) = (metric.name.display(metric.before), metric.name.display(metric.after));
    let message = if metric.name.is_error() {
        let (rise, limit) = (drop * 100.0, limit * 100.0);
        format!(
            "{name} rose by {rise:.2}% ({before} -> {after} on {} samples), maxAccuracyDrop allows {limit:.2}%",
            metric.samples
        )
    } else {
        let (points, limit) = (drop * 100.0, limit * 100.0);
        format!(
            "{name} fell by {points:.2} points ({before} -> {after} on {} samples), maxAccuracyDrop allows {limit:.2}",
            metric.samples
        )
    };
    LimitCheck {
        limit: "maxAccuracyDrop".into(),
        default: false,
        of: "model".into(),
        allowed: limit,
        // JSON has no infinity.
        measured: drop.min(f64::MAX),
        passed,
        message: (!passed).then_some(message),
    }
}

/// The class that lost most.
fn of_class(stated: Option<f64>, classes: &[ClassChange]) -> Option<LimitCheck> {
    let limit = stated.unwrap_or(CLASS_DROP_DEFAULT);
    let binding = || {
        classes
            .iter()
            .filter(|class| stated.is_some() || class.samples >= CLASS_SAMPLES_MIN)
    };
    let drop = |class: &ClassChange| class.before - class.after;
    let worst = binding().max_by(|a, b| drop(a).total_cmp(&drop(b)))?;
    let exceeding = binding().filter(|class| drop(class) > limit + ROUNDING).count();
    let more = match exceeding {
        0 | 1 => String::new(),
        several => format!(" and {} more classes too much", several - 1),
    };
    Some(LimitCheck {
        limit: "maxClassAccuracyDrop".into(),
        default: stated.is_none(),
        of: format!("class {}", worst.class),
        allowed: limit,
        measured: drop(worst),
        passed: exceeding == 0,
        message: (exceeding > 0).then(|| {
            format!(
                "class {} fell by {:.2} points ({} -> {} on {} samples){more}, {}maxClassAccuracyDrop allows {:.2}",
                worst.class,
                drop(worst) * 100.0,
                display_percent(worst.before),
                display_percent(worst.after),
                worst.samples,
                if stated.is_none() { "the default " } else { "" },
                limit * 100.0
            )
        }),
    })
}

/// Whether an output is within the default limits with a fifth to spare, since others than the samples that were looked at are judged.
#[must_use]
pub fn keeps_well(output: &OutputFidelity) -> bool {
    let well = |check: LimitCheck| 1.0 - check.measured <= 0.8 * (1.0 - check.allowed);
    of_output(None, output).into_iter().all(well)
}

/// The output as a whole, and the slice of it that lost most.
fn of_output(stated: Option<f64>, output: &OutputFidelity) -> Vec<LimitCheck> {
    let limit = stated.unwrap_or(FIDELITY_DEFAULT);
    let default = if stated.is_none() { "the default " } else { "" };
    let passed = output.cosine >= limit;
    let mut checks = vec![LimitCheck {
        limit: "minFidelity".into(),
        default: stated.is_none(),
        of: format!("output {}", output.name),
        allowed: limit,
        measured: output.cosine,
        passed,
        message: (!passed).then(|| {
            format!(
                "output `{}` has fidelity {:.4} to the original, {default}minFidelity asks for {limit}",
                output.name, output.cosine
            )
        }),
    }];
    if let Some(worst) = output.worst_slices.first() {
        let limit = slice_limit(limit);
        let passed = worst.cosine >= limit;
        let slice = format!("index {} of axis {}", worst.index, worst.axis);
        checks.push(LimitCheck {
            limit: "minFidelity".into(),
            default: stated.is_none(),
            of: format!("output {}, {slice}", output.name),
            allowed: limit,
            measured: worst.cosine,
            passed,
            message: (!passed).then(|| {
                format!(
                    "output `{}` has fidelity {:.4} at {slice}, {default}minFidelity asks for {limit:.4} of every slice that carries signal",
                    output.name, worst.cosine
                )
            }),
        });
    }
    checks
}

/// Least fidelity of a slice, of an output that must have `limit`.
fn slice_limit(limit: f64) -> f64 {
    (1.0 - SLICE_SLACK * (1.0 - limit)).max(0.0)
}

fn of_latency(limit_us: f64, after_us: f64, standing: Option<&Standing>) -> Vec<LimitCheck> {
    let passed = after_us <= limit_us;
    let mut checks = vec![LimitCheck {
        limit: "maxLatency".into(),
        default: false,
        of: "model".into(),
        allowed: limit_us,
        measured: after_us,
        passed,
        message: (!passed).then(|| format!("an inference takes {after_us:.0} us (median), maxLatency allows {limit_us:.0} us")),
    }];
    if let Some(Standing { engine, latency, ratio }) = standing {
        // Slower beyond doubt: in nine of ten neighbouring inferences.
        let passed = ratio.p10 <= 1.0;
        checks.push(LimitCheck {
            limit: "maxLatency".into(),
            default: false,
            of: format!("model against the original on {engine}"),
            allowed: 1.0,
            measured: ratio.median,
            passed,
            message: (!passed).then(|| {
                format!(
                    "the model is slower than the original where that is fastest, on {engine} ({:.0} us -> {:.0} us, {:.2} times, 10th to 90th percentile {:.2} to {:.2}), which maxLatency rules out",
                    latency.before_us, latency.after_us, ratio.median, ratio.p10, ratio.p90
                )
            }),
        });
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_package::digest::Digest;
    use plimsoll_package::manifest::Engine;
    use plimsoll_package::report::{LatencyChange, SliceFidelity, Spread};

    fn summary(size_after: u64) -> Summary {
        Summary {
            artifact: None,
            reused: false,
            source_digest: Digest::of(b""),
            evaluation_digest: None,
            size_before: 4096,
            size_after,
            size_layer_before: None,
            size_layer_after: None,
            sparsity: 0.0,
            metric: None,
            fidelity: None,
            latency: Some(LatencyChange {
                before_us: 100.0,
                after_us: 90.0,
            }),
            engine: Engine::Tract,
            toolchain: "0".into(),
        }
    }

    fn output(name: &str, cosine: f64) -> OutputFidelity {
        OutputFidelity {
            name: name.into(),
            cosine,
            sqnr_db: None,
            max_abs_error: 0.0,
            agreement: None,
            slices: 0,
            silent_slices: 0,
            worst_slices: vec![],
        }
    }

    fn judgement(metric: Option<(Metric, f64, f64)>, outputs: Vec<OutputFidelity>) -> Judgement {
        Judgement {
            metric: metric.map(|(name, before, after)| MetricChange {
                name,
                before,
                after,
                samples: 450,
            }),
            judged: metric.map(|_| "y".to_owned()),
            outputs,
            classes: vec![],
            samples: 450,
        }
    }

    /// What is said of the limits that are exceeded.
    fn said(budget: &Budget, judgement: &Judgement) -> Option<String> {
        let summary = summary(2048);
        let gate = check(Some(budget), &summary, judgement, None).unwrap();
        exceeded(&gate, &summary).map(|failed| {
            assert_eq!(failed.reason, FailureReason::BudgetExceeded);
            assert_eq!(failed.measured.as_deref(), Some(&summary));
            failed.message
        })
    }

    fn one_percent() -> Budget {
        Budget {
            max_accuracy_drop: Some("1%".parse().unwrap()),
            ..Budget::default()
        }
    }

    #[test]
    fn a_drop_of_exactly_the_limit_passes_and_one_more_sample_does_not() {
        let judged = |after| judgement(Some((Metric::Accuracy, 0.98, after)), vec![output("y", 0.5)]);
        assert_eq!(said(&one_percent(), &judged(0.97)), None);
        let said = said(&one_percent(), &judged(0.9677)).unwrap();
        assert!(
            said.starts_with("accuracy fell by 1.23 points (98.0% -> 96.8% on 450 samples), maxAccuracyDrop allows 1.00; compress less")
        );
    }

    #[test]
    fn an_error_may_rise_by_its_share() {
        let judged = |after| judgement(Some((Metric::Perplexity, 20.0, after)), vec![]);
        assert_eq!(said(&one_percent(), &judged(20.2)), None);
        assert_eq!(said(&one_percent(), &judged(10.0)), None);
        assert!(
            said(&one_percent(), &judged(21.0))
                .unwrap()
                .starts_with("Perplexity rose by 5.00% (20.00 -> 21.00 on 450 samples), maxAccuracyDrop allows 1.00%")
        );
    }

    #[test]
    fn without_a_budget_every_output_must_be_faithful() {
        let judged = |cosines: [f64; 2]| judgement(None, vec![output("x", cosines[0]), output("y", cosines[1])]);
        assert_eq!(said(&Budget::default(), &judged([0.991, 1.0])), None);
        let said = said(&Budget::default(), &judged([1.0, 0.98])).unwrap();
        assert!(
            said.starts_with("output `y` has fidelity 0.9800 to the original, the default minFidelity asks for 0.99; compress less"),
            "{said}"
        );
    }

    #[test]
    fn what_the_metric_does_not_judge_must_be_faithful_all_the_same() {
        let judged = |state| judgement(Some((Metric::Accuracy, 0.98, 0.98)), vec![output("y", 0.5), output("state", state)]);
        assert_eq!(said(&one_percent(), &judged(0.995)), None);
        assert!(
            said(&one_percent(), &judged(0.3))
                .unwrap()
                .contains("output `state` has fidelity 0.3000")
        );
    }

    #[test]
    fn a_dead_slice_fails_though_the_whole_is_faithful() {
        let with_slice = |cosine| OutputFidelity {
            worst_slices: vec![SliceFidelity {
                axis: 1,
                index: 4,
                cosine,
                sqnr_db: None,
            }],
            ..output("boxes", 0.9999)
        };
        assert_eq!(said(&Budget::default(), &judgement(None, vec![with_slice(0.91)])), None);
        let said = said(&Budget::default(), &judgement(None, vec![with_slice(0.0)])).unwrap();
        assert!(
            said.starts_with(
                "output `boxes` has fidelity 0.0000 at index 4 of axis 1, the default minFidelity asks for 0.9000 of every slice that carries signal"
            ),
            "{said}"
        );
    }

    #[test]
    fn a_class_that_died_fails_though_the_average_is_fine() {
        let class = |class, samples, before, after| ClassChange {
            class,
            samples,
            before,
            after,
        };
        let judged = |classes| Judgement {
            classes,
            ..judgement(Some((Metric::Accuracy, 0.98, 0.975)), vec![])
        };
        let died = judged(vec![class(0, 400, 0.99, 0.99), class(3, 5, 0.8, 0.2)]);
        let words = said(&one_percent(), &died).unwrap();
        assert!(
            words.starts_with("class 3 fell by 60.00 points (80.0% -> 20.0% on 5 samples), the default maxClassAccuracyDrop allows 50.00"),
            "{words}"
        );
        // Of too few samples nothing is said but by a limit that is stated.
        let few = judged(vec![class(3, 4, 0.8, 0.2)]);
        assert_eq!(said(&one_percent(), &few), None);
        let stated = Budget {
            max_class_accuracy_drop: Some("10%".parse().unwrap()),
            ..one_percent()
        };
        assert!(said(&stated, &few).unwrap().contains(", maxClassAccuracyDrop allows 10.00"));
    }

    #[test]
    fn all_that_is_exceeded_is_named() {
        let budget = Budget {
            max_size: Some("1Ki".parse().unwrap()),
            min_fidelity: Some("0.9".parse().unwrap()),
            ..Budget::default()
        };
        let said = said(&budget, &judgement(None, vec![output("y", 0.5)])).unwrap();
        assert!(
            said.contains("minFidelity asks for 0.9;")
                && said.contains("the model has 2Ki (2048 bytes), maxSize allows 1Ki; compress more"),
            "{said}"
        );
    }

    #[test]
    fn a_limit_on_latency_rules_out_what_is_slower_than_the_original() {
        let check = |limit: &str, p10: f64| {
            let budget = Budget {
                max_latency: Some(limit.parse().unwrap()),
                ..Budget::default()
            };
            let spread = Spread {
                median: p10 + 0.1,
                p10,
                p90: p10 + 0.2,
            };
            let standing = Standing {
                engine: Engine::OnnxRuntime,
                latency: LatencyChange {
                    before_us: 80.0,
                    after_us: 90.0,
                },
                ratio: spread,
            };
            let summary = summary(1);
            let gate = check(Some(&budget), &summary, &judgement(None, vec![]), Some(&standing)).unwrap();
            exceeded(&gate, &summary).map(|failed| failed.message)
        };
        assert_eq!(check("90us", 0.95), None);
        assert!(
            check("80us", 0.95)
                .unwrap()
                .starts_with("an inference takes 90 us (median), maxLatency allows 80 us")
        );
        assert!(
            check("1ms", 1.01)
                .unwrap()
                .starts_with("the model is slower than the original where that is fastest, on OnnxRuntime (80 us -> 90 us, 1.11 times")
        );
    }
}
