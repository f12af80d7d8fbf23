//! What came of the recipes that were tried: which one is chosen, which are on the front of size, loss and latency, and why each of the
//! others lost.

use plimsoll_package::manifest::Engine;
use plimsoll_package::recipe::{Distill, Prune, PruneCriterion, PruneScope, PruneStructure, Quantize, Technique};
use plimsoll_package::report::front::{Candidate, Front, Outcome};
use plimsoll_package::report::{EngineReport, Failure, Gate, LimitCheck, Spread};
use plimsoll_package::units::display_size;
use serde::{Deserialize, Serialize};

/// By how much two sizes may differ and still count as the same, so that latency decides.
const TIE: f64 = 0.01;
/// By how much two medians of a latency may differ and still count as the same.
const UNREST: f64 = 0.05;
/// The least distance to which a limit on a loss may be scaled.
const LOSS_MIN: f64 = 1e-3;

/// A recipe that was tried, and what was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// What was measured; of one that is within the budget the outcome is [`Outcome::OnFront`] until all are known.
    pub candidate: Candidate,
    /// Every limit that binds it; none where it could not be measured.
    pub limits: Vec<LimitCheck>,
    /// What each engine measured; none where it could not be measured.
    pub engines: Vec<EngineReport>,
    /// Its latency on the engine that serves it, in proportion to the original's on the engine that serves that.
    pub latency: Option<Spread>,
    /// The time that this took, in milliseconds.
    pub took_ms: f64,
}

/// Where a recipe stands against the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is within every limit.
    Within,
    /// It loses no more than it may, and is too large or too slow.
    TooCostly,
    /// It loses more than it may.
    TooLossy,
    /// It could not be measured.
    Failed,
}

fn is_cost(limit: &LimitCheck) -> bool {
    matches!(limit.limit.as_str(), "maxSize" | "maxLatency")
}

impl Judged {
    /// Where it stands against the budget.
    #[must_use]
    pub fn standing(&self) -> Standing {
        match self.candidate.outcome {
            Outcome::Chosen | Outcome::OnFront | Outcome::Dominated => Standing::Within,
            Outcome::Failed => Standing::Failed,
            // Without a limit that was checked, the metric is not defined on what it gives.
            Outcome::BudgetExceeded if self.limits.iter().any(|limit| !limit.passed && !is_cost(limit)) || self.limits.is_empty() => {
                Standing::TooLossy
            }
            Outcome::BudgetExceeded => Standing::TooCostly,
        }
    }

    /// Whether it loses no more than it may.
    #[must_use]
    pub fn loses_little(&self) -> bool {
        matches!(self.standing(), Standing::Within | Standing::TooCostly)
    }

    /// Size of what is pulled, in bytes; that of one that was not measured is beyond all.
    #[must_use]
    pub fn size(&self) -> f64 {
        self.candidate.size_layer.map_or(f64::INFINITY, |size| size as f64)
    }

    /// How far outside of its limits it is: the sum of each one's excess in proportion to what it allows.
    fn excess(&self) -> f64 {
        if self.limits.is_empty() {
            return f64::INFINITY;
        }
        let excess = |limit: &LimitCheck| match limit.limit.as_str() {
            "minFidelity" => (limit.allowed - limit.measured) / (1.0 - limit.allowed).max(LOSS_MIN),
            "maxSize" | "maxLatency" => limit.measured / limit.allowed - 1.0,
            _ => (limit.measured - limit.allowed) / limit.allowed.max(LOSS_MIN),
        };
        self.limits.iter().filter(|limit| !limit.passed).map(excess).sum()
    }

    /// Whether it is to be preferred to `held`: it is smaller or, of the same size, faster beyond doubt.
    #[must_use]
    pub fn is_better_than(&self, held: &Self) -> bool {
        let (size, of_held) = (self.size(), held.size());
        if (size - of_held).abs() > TIE * of_held {
            return size < of_held;
        }
        matches!((self.latency, held.latency), (Some(latency), Some(of_held)) if latency.p90 < of_held.p10)
    }

    fn median_latency(&self) -> f64 {
        self.latency.map_or(f64::INFINITY, |latency| latency.median)
    }
}

/// The latency on `engine` in proportion to the original's on the engine that serves that, from its `ratio` to the original's on the same
/// engine; `original` is what each engine measured of the original alone.
#[must_use]
pub fn latency(engine: Engine, ratio: Spread, original: &[EngineReport]) -> Spread {
    let of_original = || {
        original
            .iter()
            .filter_map(|measured| Some((measured.engine, measured.latency?.before_us)))
    };
    let fastest = of_original().map(|(_, latency)| latency).reduce(f64::min);
    let same = of_original().find(|(measured, _)| *measured == engine);
    let factor = match (same, fastest) {
        (Some((_, same)), Some(fastest)) => same / fastest,
        _ => 1.0,
    };
    Spread {
        median: ratio.median * factor,
        p10: ratio.p10 * factor,
        p90: ratio.p90 * factor,
    }
}

/// The index of the recipe that is chosen: the smallest within the budget, of several of one size the fastest.
#[must_use]
pub fn chosen(judged: &[Judged]) -> Option<usize> {
    let mut within = (0..judged.len()).filter(|&index| judged[index].standing() == Standing::Within);
    let first = within.next()?;
    Some(within.fold(
        first,
        |held, index| {
            if judged[index].is_better_than(&judged[held]) { index } else { held }
        },
    ))
}

/// The index of the recipe that is chosen or, where none is within the budget, of the one nearest to it.
#[must_use]
pub fn kept(judged: &[Judged]) -> Option<usize> {
    chosen(judged).or_else(|| {
        let measured = (0..judged.len()).filter(|&index| judged[index].candidate.size.is_some());
        measured.min_by(|&one, &other| judged[one].excess().total_cmp(&judged[other].excess()))
    })
}

/// What the model lost, by the metric where there is one, or by its fidelity.
fn loss(candidate: &Candidate) -> f64 {
    match (candidate.metric, candidate.fidelity) {
        (Some(metric), _) => metric.name.drop(metric.before, metric.after),
        (None, fidelity) => 1.0 - fidelity.unwrap_or(0.0),
    }
}

/// Whether `one` is no larger, loses no more and is no slower than `other`, and is better in one of these; latencies differ where they do by
/// more than the machine's unrest.
fn dominates(one: &Judged, other: &Judged) -> bool {
    let (size, of_other) = (one.size(), other.size());
    let (lost, lost_by_other) = (loss(&one.candidate), loss(&other.candidate));
    let (latency, latency_of_other) = (one.median_latency(), other.median_latency());
    let no_worse = size <= of_other && lost <= lost_by_other && latency <= latency_of_other * (1.0 + UNREST);
    no_worse && (size < of_other || lost < lost_by_other || is_faster(one, other))
}

fn is_faster(one: &Judged, other: &Judged) -> bool {
    one.median_latency() * (1.0 + UNREST) < other.median_latency()
}

/// The candidates with what came of each, and why it lost.
#[must_use]
pub fn candidates(judged: &[Judged]) -> Vec<Candidate> {
    let kept = kept(judged);
    let chosen = chosen(judged).map(|index| &judged[index]);
    let within = || judged.iter().filter(|judged| judged.standing() == Standing::Within);
    let settle = |(index, judged): (usize, &Judged)| {
        let mut candidate = judged.candidate.clone();
        match (judged.standing(), chosen) {
            (Standing::Within, Some(_)) if kept == Some(index) => {
                candidate.outcome = Outcome::Chosen;
                candidate.why = None;
            }
            (Standing::Within, Some(chosen)) => {
                let better = within().find(|other| dominates(other, judged));
                candidate.outcome = if better.is_some() { Outcome::Dominated } else { Outcome::OnFront };
                candidate.why = Some(match better {
                    Some(better) => format!("{} is no larger, no slower and loses no more", words(&better.candidate.recipe)),
                    None => beside_chosen(judged, chosen),
                });
            }
            _ if kept == Some(index) => {
                let why = candidate.why.take().unwrap_or_default();
                candidate.why = Some(format!("the nearest to the budget: {why}"));
            }
            _ => {}
        }
        candidate
    };
    judged.iter().enumerate().map(settle).collect()
}

/// Why one that is on the front is not the chosen one.
fn beside_chosen(judged: &Judged, chosen: &Judged) -> String {
    let (size, of_chosen) = (judged.size(), chosen.size());
    if size <= of_chosen * (1.0 + TIE) {
        return "of the same size as the chosen one, and not faster beyond doubt".into();
    }
    let better: Vec<&str> = [
        (loss(&judged.candidate) < loss(&chosen.candidate), "loses less"),
        (is_faster(judged, chosen), "is faster"),
    ]
    .into_iter()
    .filter_map(|(is_better, words)| is_better.then_some(words))
    .collect();
    let but = match better.as_slice() {
        [] => String::new(),
        better => format!("; it {}", better.join(" and ")),
    };
    format!(
        "larger than the chosen one ({} against {} as pulled){but}",
        display_size(size as u64),
        display_size(of_chosen as u64)
    )
}

/// The sentence of the limits that are exceeded.
#[must_use]
pub fn exceeded(limits: &[LimitCheck]) -> String {
    let words: Vec<&str> = limits.iter().filter_map(|limit| limit.message.as_deref()).collect();
    words.join("; ")
}

/// `failed`, of the nearest recipe, in the words of a search that found none within the budget.
#[must_use]
pub fn exhausted(front: &Front, failed: Failure, gate: &Gate) -> Failure {
    let nearest = front.candidates.iter().find(|candidate| {
        let why = candidate.why.as_deref().unwrap_or_default();
        candidate.outcome == Outcome::Chosen || why.starts_with("the nearest to the budget")
    });
    let more_time = if front.complete { "" } else { ", or give the search more time" };
    let message = format!(
        "none of the {} recipes that the search tried is within the budget; the nearest is {}: {}; raise the limit in optimize.budget{more_time}",
        front.candidates.len(),
        nearest.map_or_else(|| "the original".to_owned(), |nearest| words(&nearest.recipe)),
        exceeded(&gate.limits),
    );
    Failure { message, ..failed }
}

/// A recipe in short words: `prune 50% + Int8Dynamic`; without a technique `the original`.
#[must_use]
pub fn words(recipe: &[Technique]) -> String {
    if recipe.is_empty() {
        return "the original".into();
    }
    let techniques: Vec<String> = recipe.iter().map(of_technique).collect();
    techniques.join(" + ")
}

fn of_technique(technique: &Technique) -> String {
    match technique {
        Technique { prune: Some(prune), .. } => of_pruning(prune),
        Technique {
            quantize: Some(quantize), ..
        } => of_quantization(quantize),
        Technique {
            distill: Some(Distill { epochs, .. }),
            ..
        } => format!("distil {epochs} epochs"),
        Technique {
            prune: None,
            quantize: None,
            distill: None,
        } => String::new(),
    }
}

fn of_pruning(prune: &Prune) -> String {
    let amount = prune.amount.as_ref().map_or("", |amount| amount.as_str());
    let pattern = prune.pattern.as_deref().unwrap_or_default();
    let mut words = match prune.structure {
        PruneStructure::Unstructured => format!("prune {amount}"),
        PruneStructure::SemiStructured => format!("prune {pattern}"),
        PruneStructure::Channels => format!("prune {amount} of channels"),
        PruneStructure::Heads => format!("prune {amount} of heads"),
        PruneStructure::FeedForward => format!("prune {amount} of feed-forward units"),
    };
    if prune.scope == PruneScope::PerLayer {
        words += " of each layer";
    }
    if prune.criterion != PruneCriterion::Magnitude {
        words += &format!(" by {}", prune.criterion);
    }
    words
}

fn of_quantization(quantize: &Quantize) -> String {
    let mut words = vec![quantize.scheme.to_string()];
    words.extend(quantize.block_size.map(|size| format!("in blocks of {}", size.0)));
    words.extend(quantize.granularity.map(|granularity| granularity.to_string()));
    words.extend(quantize.range.map(|range| format!("by {range}")));
    words.extend(quantize.rounding.map(|rounding| format!("by {rounding}")));
    words.extend(quantize.smooth.as_ref().map(|alpha| format!("smoothed by {alpha}")));
    words.extend((quantize.bias_correction == Some(true)).then(|| "with corrected biases".to_owned()));
    words.extend((!quantize.operators.is_empty()).then(|| format!("of {}", quantize.operators.join(", "))));
    words.extend(match quantize.exclude.as_slice() {
        [] => None,
        [node] => Some(format!("but for `{node}`")),
        nodes => Some(format!("but for {} nodes", nodes.len())),
    });
    words.join(" ")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use plimsoll_package::recipe::{BlockSize, Metric, QuantizeScheme, Rounding};
    use plimsoll_package::report::{FailureReason, LatencyChange, MetricChange, Verdict};

    use crate::failure::failure;

    pub(in crate::search) fn limit(name: &str, allowed: f64, measured: f64, passed: bool) -> LimitCheck {
        LimitCheck {
            limit: name.into(),
            default: false,
            of: "model".into(),
            allowed,
            measured,
            passed,
            message: (!passed).then(|| format!("{name} is {measured}, not {allowed}")),
        }
    }

    /// Of a layer size, an accuracy (from 0.98 before) and a latency within 5 percent; its recipe prunes by `name` percent.
    fn judged(name: u32, size: u64, accuracy: f64, latency_us: f64, limits: Vec<LimitCheck>) -> Judged {
        let prune = Prune {
            amount: Some(format!("{name}%").parse().unwrap()),
            ..Prune::default()
        };
        let within = limits.iter().all(|limit| limit.passed);
        let ratio = Spread {
            median: latency_us / 100.0,
            p10: latency_us * 0.0095,
            p90: latency_us * 0.0105,
        };
        Judged {
            candidate: Candidate {
                recipe: vec![Technique {
                    prune: Some(prune),
                    ..Technique::default()
                }],
                size: Some(size),
                size_layer: Some(size),
                metric: Some(MetricChange {
                    name: Metric::Accuracy,
                    before: 0.98,
                    after: accuracy,
                    samples: 100,
                }),
                fidelity: Some(0.999),
                latency: Some(LatencyChange {
                    before_us: 100.0,
                    after_us: latency_us,
                }),
                latency_ratio: Some(ratio),
                outcome: if within { Outcome::OnFront } else { Outcome::BudgetExceeded },
                why: (!within).then(|| exceeded(&limits)),
            },
            limits,
            engines: vec![],
            latency: Some(ratio),
            took_ms: 1.0,
        }
    }

    fn within(name: u32, size: u64, accuracy: f64, latency_us: f64) -> Judged {
        judged(name, size, accuracy, latency_us, vec![])
    }

    #[test]
    fn the_smallest_within_the_budget_is_chosen() {
        let lossy = judged(4, 100, 0.5, 50.0, vec![limit("maxAccuracyDrop", 0.01, 0.48, false)]);
        let all = [
            within(1, 1000, 0.98, 100.0),
            within(2, 300, 0.975, 90.0),
            within(3, 250, 0.972, 95.0),
            lossy,
        ];
        assert_eq!(chosen(&all), Some(2));
        assert_eq!(kept(&all), Some(2));
    }

    #[test]
    fn of_one_size_the_one_that_is_faster_beyond_doubt_is_chosen() {
        let first = within(1, 1000, 0.98, 100.0);
        let faster = within(2, 1005, 0.98, 80.0);
        assert_eq!(chosen(&[first.clone(), faster.clone()]), Some(1));
        assert_eq!(chosen(&[faster, first.clone()]), Some(0));
        let hardly_faster = within(3, 995, 0.98, 95.0);
        assert_eq!(chosen(&[first.clone(), hardly_faster]), Some(0));
        assert_eq!(
            chosen(&[first, within(4, 980, 0.98, 200.0)]),
            Some(1),
            "two percent are another size"
        );
    }

    #[test]
    fn each_that_lost_is_told_why() {
        let lossy = judged(5, 100, 0.5, 50.0, vec![limit("maxAccuracyDrop", 0.01, 0.48, false)]);
        let all = [
            within(1, 2048, 0.98, 100.0),
            within(2, 1024, 0.975, 90.0),
            within(3, 3072, 0.979, 110.0),
            lossy,
        ];
        let front = candidates(&all);
        let outcomes: Vec<Outcome> = front.iter().map(|candidate| candidate.outcome).collect();
        assert_eq!(
            outcomes,
            [Outcome::OnFront, Outcome::Chosen, Outcome::Dominated, Outcome::BudgetExceeded]
        );
        let why = |index: usize| front[index].why.as_deref().unwrap();
        assert_eq!(why(0), "larger than the chosen one (2Ki against 1Ki as pulled); it loses less");
        assert_eq!(front[1].why, None);
        assert_eq!(why(2), "prune 1% is no larger, no slower and loses no more");
        assert_eq!(why(3), "maxAccuracyDrop is 0.48, not 0.01");
    }

    #[test]
    fn a_latency_is_compared_with_the_original_where_that_is_fastest() {
        let measured = |engine, before_us| EngineReport {
            engine,
            latency: Some(LatencyChange {
                before_us,
                after_us: before_us,
            }),
            latency_ratio: None,
            memory: None,
            memory_ratio: None,
            refused: None,
        };
        let original = [measured(Engine::Tract, 300.0), measured(Engine::OnnxRuntime, 100.0)];
        let half = Spread {
            median: 0.5,
            p10: 0.4,
            p90: 0.6,
        };
        assert_eq!(latency(Engine::OnnxRuntime, half, &original), half);
        assert_eq!(latency(Engine::Tract, half, &original).median, 1.5);
    }

    #[test]
    fn where_none_is_within_the_budget_the_nearest_is_kept_and_named() {
        let size = |name, measured: u64| {
            let limits = vec![limit("maxSize", 100.0, measured as f64, false)];
            judged(name, measured, 0.98, 100.0, limits)
        };
        let all = [size(1, 1000), size(2, 250), size(3, 300)];
        assert_eq!((chosen(&all), kept(&all)), (None, Some(1)));
        let front = Front {
            candidates: candidates(&all),
            complete: true,
            ..Front::default()
        };
        assert!(
            front.candidates[1]
                .why
                .as_deref()
                .unwrap()
                .starts_with("the nearest to the budget: maxSize")
        );
        let gate = Gate {
            verdict: Verdict::BudgetExceeded,
            limits: all[1].limits.clone(),
        };
        let failed = exhausted(&front, failure(FailureReason::BudgetExceeded, ""), &gate);
        assert_eq!(
            failed.message,
            "none of the 3 recipes that the search tried is within the budget; the nearest is prune 2%: maxSize is 250, not 100; raise the limit in optimize.budget"
        );
    }

    #[test]
    fn what_loses_little_and_is_too_large_is_too_costly() {
        let large = limit("maxSize", 100.0, 200.0, false);
        let unfaithful = limit("minFidelity", 0.99, 0.9, false);
        assert_eq!(judged(1, 200, 0.98, 1.0, vec![large.clone()]).standing(), Standing::TooCostly);
        let both = judged(1, 200, 0.98, 1.0, vec![large, unfaithful]);
        assert_eq!(both.standing(), Standing::TooLossy);
        assert!((both.excess() - (1.0 + 9.0)).abs() < 1e-9, "{}", both.excess());
    }

    #[test]
    fn a_recipe_is_told_in_short_words() {
        let quantize = |quantize| Technique {
            quantize: Some(quantize),
            ..Technique::default()
        };
        let mut blocks = Quantize::of(QuantizeScheme::Int4);
        blocks.block_size = Some(BlockSize(128));
        blocks.rounding = Some(Rounding::Gptq);
        blocks.exclude = vec!["a".into(), "b".into()];
        let recipe = [
            within(50, 1, 0.0, 1.0).candidate.recipe[0].clone(),
            quantize(blocks),
            quantize(Quantize::of(QuantizeScheme::Int8Weights)),
        ];
        assert_eq!(
            words(&recipe),
            "prune 50% + Int4 in blocks of 128 by Gptq but for 2 nodes + Int8Weights"
        );
        assert_eq!(words(&[]), "the original");
    }
}
