//! Pruning: the weights of smallest magnitude become zero.

use plimsoll_package::recipe::{Prune, PruneCriterion, PruneScope, PruneStructure};
use plimsoll_runtime::onnx::{ModelProto, TensorProto, weights};

use super::{Change, Setting, Technique};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::{float_tensor, weight};

/// The way of pruning that `prune` asks for.
///
/// # Errors
/// [`FailureReason::InvalidInputs`] where a parameter is wrong, [`FailureReason::Unsupported`] where this version does not have it.
pub fn technique(prune: &Prune) -> Result<Box<dyn Technique>, Failure> {
    let invalid = |message: String| failure(FailureReason::InvalidInputs, format!("optimize.recipe: prune: {message}"));
    let amount = || {
        let amount = prune.amount.as_ref().ok_or_else(|| invalid("amount is missing".into()))?;
        amount.value().map_err(|error| invalid(error.to_string()))
    };
    match (prune.structure, prune.criterion) {
        (PruneStructure::Unstructured, PruneCriterion::Magnitude) => Ok(Box::new(Magnitude {
            amount: amount()?,
            scope: prune.scope,
        })),
        (structure, criterion) => Err(failure(
            FailureReason::Unsupported,
            format!("optimize.recipe: this version does not prune {structure} by {criterion}; leave both out"),
        )),
    }
}

/// Unstructured pruning by magnitude.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// The share of weights that become zero, `0.0..=1.0`.
    pub amount: f64,
    /// What weights are ranked within.
    pub scope: PruneScope,
}

impl Technique for Magnitude {
    fn apply(&self, model: &mut ModelProto, _: &Setting) -> Result<Change, Failure> {
        let Some(graph) = &mut model.graph else {
            return Ok(Change::default());
        };
        let found: Vec<_> = weight::find(graph)
            .into_iter()
            .filter(|weight| weight.uses.iter().any(|used| used.operator != weight::Operator::Gather))
            .collect();
        if found.is_empty() {
            let message = "optimize.recipe: nothing to prune: the model has no convolution or matrix product with constant weights in FP32; prune before quantize";
            return Err(failure(FailureReason::Unsupported, message));
        }
        let read =
            |tensor: &TensorProto| weights::floats(tensor).map_err(|error| failure(FailureReason::UnreadableModel, error.to_string()));
        let mut values = found
            .iter()
            .map(|weight| read(&graph.initializer[weight.initializer]))
            .collect::<Result<Vec<_>, _>>()?;
        let pruned = {
            let mut slices: Vec<&mut [f32]> = values.iter_mut().map(Vec::as_mut_slice).collect();
            match self.scope {
                PruneScope::Global => prune_magnitude(&mut slices, self.amount),
                PruneScope::PerLayer => slices.iter_mut().try_for_each(|slice| prune_magnitude(&mut [slice], self.amount)),
            }
        };
        pruned.map_err(|NotFinite| {
            failure(
                FailureReason::UnreadableModel,
                "a weight of the model is NaN or infinite, so weights cannot be ranked",
            )
        })?;
        let mut change = Change::default();
        for (weight, values) in found.iter().zip(&values) {
            let tensor = &mut graph.initializer[weight.initializer];
            let dims: Vec<usize> = tensor.dims.iter().map(|&size| size as usize).collect();
            *tensor = float_tensor(&weight.name, &dims, values);
            change.changed.push(weight.name.clone());
        }
        Ok(change)
    }
}

/// A weight is NaN or infinite.
#[derive(Debug, PartialEq, Eq)]
pub struct NotFinite;

/// Zeroes the `amount` share of weights of smallest magnitude, ranked over all `tensors` together.
///
/// `amount` is a ratio, `0.0..=1.0`; as in `torch.nn.utils.prune.global_unstructured` with `L1Unstructured`, the number of zeros is
/// `amount` times the number of weights, rounded half to even. Where magnitudes are equal the earlier weight is kept; torch leaves
/// that choice open, and without ties the mask is torch's.
///
/// # Errors
/// [`NotFinite`] where a weight is NaN or infinite; the tensors are then untouched.
///
/// Han et al. 2015, "Learning both Weights and Connections", section 3.
pub fn prune_magnitude(tensors: &mut [&mut [f32]], amount: f64) -> Result<(), NotFinite> {
    let mut magnitudes: Vec<f32> = tensors.iter().flat_map(|tensor| tensor.iter().map(|value| value.abs())).collect();
    if magnitudes.iter().any(|magnitude| !magnitude.is_finite()) {
        return Err(NotFinite);
    }
    let count = ((amount * magnitudes.len() as f64).round_ties_even() as usize).min(magnitudes.len());
    if count == 0 {
        return Ok(());
    }
    let (below, &mut threshold, _) = magnitudes.select_nth_unstable_by(count - 1, f32::total_cmp);
    let mut ties = count - below.iter().filter(|magnitude| **magnitude < threshold).count();
    // From the end, so that of equal weights the later ones go.
    for value in tensors.iter_mut().rev().flat_map(|tensor| tensor.iter_mut().rev()) {
        if value.abs() < threshold {
            *value = 0.0;
        } else if value.abs() == threshold && ties > 0 {
            *value = 0.0;
            ties -= 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_smallest_go_whichever_tensor_they_are_in() {
        let (mut a, mut b) = ([3.0, -0.5, 2.0], [-4.0, 0.1]);
        prune_magnitude(&mut [&mut a, &mut b], 0.4).unwrap();
        assert_eq!((a, b), ([3.0, 0.0, 2.0], [-4.0, 0.0]));
    }

    #[test]
    fn of_equal_weights_the_earlier_stay() {
        let (mut a, mut b) = ([1.0, -1.0], [1.0, -1.0]);
        prune_magnitude(&mut [&mut a, &mut b], 0.5).unwrap();
        assert_eq!((a, b), ([1.0, -1.0], [0.0, 0.0]));
    }

    #[test]
    fn the_number_is_rounded_half_to_even_as_python_does() {
        for (amount, zeros) in [(0.1, 0), (0.3, 2), (0.5, 2), (1.0, 5)] {
            let mut weights = [1.0, 2.0, 3.0, 4.0, 5.0];
            prune_magnitude(&mut [&mut weights], amount).unwrap();
            assert_eq!(weights.iter().filter(|weight| **weight == 0.0).count(), zeros, "{amount}");
        }
    }

    #[test]
    fn a_weight_that_is_not_finite_leaves_all_untouched() {
        let mut weights = [1.0, f32::NAN, 0.5];
        assert_eq!(prune_magnitude(&mut [&mut weights], 0.9), Err(NotFinite));
        assert_eq!((weights[0], weights[2]), (1.0, 0.5));
    }

    proptest! {
        #[test]
        fn exactly_the_share_goes_and_no_kept_weight_is_smaller_than_a_pruned_one(
            weights in proptest::collection::vec(prop_oneof![-10.0_f32..10.0, Just(1.0), Just(-1.0)], 1..300),
            amount in 0.0_f64..=1.0,
            split in 0_usize..300,
        ) {
            let mut pruned = weights.clone();
            let (first, second) = pruned.split_at_mut(split.min(weights.len()));
            prune_magnitude(&mut [first, second], amount).unwrap();
            let count = (amount * weights.len() as f64).round_ties_even() as usize;
            let gone: Vec<f32> = weights.iter().zip(&pruned).filter(|(_, after)| **after == 0.0).map(|(before, _)| before.abs()).collect();
            let kept: Vec<f32> = pruned.iter().filter(|weight| **weight != 0.0).map(|weight| weight.abs()).collect();
            prop_assert!(gone.len() >= count && gone.len() <= count.max(weights.iter().filter(|weight| **weight == 0.0).count()));
            let largest_gone = gone.iter().copied().fold(0.0, f32::max);
            prop_assert!(kept.iter().all(|kept| *kept >= largest_gone));
            prop_assert!(weights.iter().zip(&pruned).all(|(before, after)| *after == 0.0 || before == after));
        }
    }
}
