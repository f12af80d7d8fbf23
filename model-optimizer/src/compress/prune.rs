//! Pruning: the least important weights become zero, or whole channels, heads and units go.

use plimsoll_package::recipe::{Prune, PruneCriterion, PruneScope, PruneStructure};

use super::Technique;
use crate::failure::{Failure, FailureReason, failure};

mod activation;
mod calibrated;
mod magnitude;
mod pattern;
mod selection;
pub mod sparsegpt;
mod structured;
pub mod wanda;

pub use calibrated::{Calibrated, Ranking};
pub use magnitude::{Magnitude, TORCH_TIES_MAX, prune_magnitude};
pub use pattern::{Pattern, SemiStructured, prune_pattern};
pub use structured::Structured;

/// The way of pruning that `prune` asks for.
///
/// # Errors
/// [`FailureReason::InvalidInputs`] where a parameter is wrong or belongs to another structure.
pub fn technique(prune: &Prune) -> Result<Box<dyn Technique>, Failure> {
    let invalid = |message: String| failure(FailureReason::InvalidInputs, format!("optimize.recipe: prune: {message}"));
    let amount = || {
        let amount = prune.amount.as_ref().ok_or_else(|| invalid("amount is missing".into()))?;
        amount.value().map_err(|error| invalid(error.to_string()))
    };
    let pattern = || -> Result<Pattern, Failure> {
        let pattern = prune
            .pattern
            .as_deref()
            .ok_or_else(|| invalid("pattern is missing, such as 2:4".into()))?;
        pattern.parse().map_err(invalid)
    };
    let semi_structured = prune.structure == PruneStructure::SemiStructured;
    if semi_structured && prune.amount.is_some() {
        return Err(invalid("pattern says how many weights go; leave amount out".into()));
    }
    if !semi_structured && prune.pattern.is_some() {
        return Err(invalid(
            "pattern belongs to structure SemiStructured; leave it out or set that".into(),
        ));
    }
    if semi_structured && prune.scope == PruneScope::PerLayer {
        return Err(invalid("with a pattern weights are ranked within its M; leave scope out".into()));
    }
    let ranking = match prune.criterion {
        PruneCriterion::Magnitude => None,
        PruneCriterion::Wanda => Some(Ranking::Wanda),
        PruneCriterion::SparseGpt => Some(Ranking::SparseGpt),
    };
    Ok(match (prune.structure, ranking) {
        (PruneStructure::Unstructured, None) => Box::new(Magnitude {
            amount: amount()?,
            scope: prune.scope,
        }),
        (PruneStructure::SemiStructured, None) => Box::new(SemiStructured { pattern: pattern()? }),
        (PruneStructure::Unstructured, Some(ranking)) => Box::new(Calibrated {
            ranking,
            share: Share::Amount(amount()?),
        }),
        (PruneStructure::SemiStructured, Some(ranking)) => Box::new(Calibrated {
            ranking,
            share: Share::Pattern(pattern()?),
        }),
        (structure, None) => Box::new(Structured {
            structure,
            amount: amount()?,
            scope: prune.scope,
        }),
        (structure, Some(_)) => {
            let message = format!(
                "criterion {} chooses single weights, not {structure}; leave it out",
                prune.criterion
            );
            return Err(invalid(message));
        }
    })
}

/// How many weights go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Share {
    /// A share, `0.0..=1.0`.
    Amount(f64),
    /// All but N of every M.
    Pattern(Pattern),
}

/// A weight is NaN or infinite.
#[derive(Debug, PartialEq, Eq)]
pub struct NotFinite;

fn nothing_to_prune() -> Failure {
    let message = "optimize.recipe: nothing to prune: the model has no convolution or matrix product with constant weights in FP32; prune before quantize";
    failure(FailureReason::Unsupported, message)
}

fn not_finite(name: &str) -> Failure {
    let message = format!("the weight `{name}` holds NaN or infinity, so weights cannot be ranked");
    failure(FailureReason::UnreadableModel, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::Setting;
    use crate::graph::generator;
    use crate::progress::Console;
    use proptest::prelude::*;

    fn prune(structure: PruneStructure, criterion: PruneCriterion, share: &str) -> Prune {
        let semi_structured = structure == PruneStructure::SemiStructured;
        Prune {
            amount: (!semi_structured).then(|| serde_json::from_value(share.into()).unwrap()),
            pattern: semi_structured.then(|| share.to_owned()),
            structure,
            criterion,
            ..Prune::default()
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_what_to_write() {
        let refusal = |prune: Prune| technique(&prune).err().map(|failure| failure.message).unwrap_or_default();
        let both = Prune {
            pattern: Some("2:4".into()),
            ..prune(PruneStructure::Unstructured, PruneCriterion::Magnitude, "50%")
        };
        assert!(refusal(both).contains("pattern belongs to structure SemiStructured"));
        assert!(refusal(Prune::default()).contains("amount is missing"));
        assert!(refusal(prune(PruneStructure::Channels, PruneCriterion::Wanda, "50%")).contains("chooses single weights, not Channels"));
        assert!(refusal(prune(PruneStructure::SemiStructured, PruneCriterion::Magnitude, "4:2")).contains("N less than M"));
        let scoped = Prune {
            scope: PruneScope::PerLayer,
            ..prune(PruneStructure::SemiStructured, PruneCriterion::Magnitude, "2:4")
        };
        assert!(refusal(scoped).contains("leave scope out"));
    }

    const WAYS: [(PruneStructure, PruneCriterion, &str); 9] = [
        (PruneStructure::Unstructured, PruneCriterion::Magnitude, "50%"),
        (PruneStructure::Unstructured, PruneCriterion::Wanda, "50%"),
        (PruneStructure::Unstructured, PruneCriterion::SparseGpt, "70%"),
        (PruneStructure::SemiStructured, PruneCriterion::Magnitude, "2:4"),
        (PruneStructure::SemiStructured, PruneCriterion::Wanda, "1:2"),
        (PruneStructure::SemiStructured, PruneCriterion::SparseGpt, "2:3"),
        (PruneStructure::Channels, PruneCriterion::Magnitude, "40%"),
        (PruneStructure::Heads, PruneCriterion::Magnitude, "50%"),
        (PruneStructure::FeedForward, PruneCriterion::Magnitude, "30%"),
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn any_model_survives_any_way_of_pruning(seed in any::<u64>()) {
            let model = generator::model(seed);
            let calibration = generator::agreement::calibration(&model);
            let inputs = generator::agreement::inputs(&model);
            let expected = generator::agreement::run(&model, &inputs);
            let console = Console::silent();
            let setting = Setting { calibration: Some(&calibration), original: &model, threads: 1, engine: None, console: &console };
            for (structure, criterion, share) in WAYS {
                let mut pruned = model.clone();
                let technique = technique(&prune(structure, criterion, share)).unwrap();
                match technique.apply(&mut pruned, &setting) {
                    Ok(_) => {}
                    Err(refusal) => {
                        prop_assert!(refusal.message.contains("nothing to prune"), "{structure} by {criterion}: {refusal}");
                        continue;
                    }
                }
                for ((kind, expected), (_, outputs)) in expected.iter().zip(generator::agreement::run(&pruned, &inputs)) {
                    for (expected, output) in expected.iter().zip(&outputs) {
                        prop_assert_eq!(expected.shape(), output.shape(), "{} by {} on {}", structure, criterion, kind);
                    }
                }
            }
        }
    }
}
