//! Pruning: the least important weights become zero, or whole channels, heads and units go.

use plimsoll_package::recipe::{Prune, PruneCriterion, PruneScope, PruneStructure};

use super::Technique;
use crate::failure::{Failure, FailureReason, failure};

mod magnitude;
mod pattern;
mod selection;
mod structured;

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
    match (prune.structure, prune.criterion) {
        (PruneStructure::Unstructured, PruneCriterion::Magnitude) => Ok(Box::new(Magnitude {
            amount: amount()?,
            scope: prune.scope,
        })),
        (PruneStructure::SemiStructured, PruneCriterion::Magnitude) => Ok(Box::new(SemiStructured { pattern: pattern()? })),
        (structure @ (PruneStructure::Channels | PruneStructure::Heads | PruneStructure::FeedForward), PruneCriterion::Magnitude) => {
            Ok(Box::new(Structured {
                structure,
                amount: amount()?,
                scope: prune.scope,
            }))
        }
        (structure, criterion) => Err(failure(
            FailureReason::Unsupported,
            format!("optimize.recipe: this version does not prune {structure} by {criterion}; leave both out"),
        )),
    }
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
