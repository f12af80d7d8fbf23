//! Semi-structured pruning: of every M consecutive weights of a row, N stay.

use std::str::FromStr;

use plimsoll_runtime::onnx::{ModelProto, OnnxError, mapping, weights};
use rayon::prelude::*;

use super::{NotFinite, magnitude::to_raw, not_finite, nothing_to_prune};
use crate::compress::{Change, Setting, Technique, skipped};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::serialize::spilled;
use crate::graph::weight::{self, Rows};

/// N:M, such as 2:4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    /// How many stay, 1 or more and less than `of`.
    pub keep: usize,
    /// Of how many, at most 99.
    pub of: usize,
}

/// Most weights of a group: two digits.
const GROUP_MAX: usize = 99;

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text
            .split_once(':')
            .and_then(|(keep, of)| Some((keep.parse().ok()?, of.parse().ok()?)));
        match numbers {
            Some((keep, of)) if 0 < keep && keep < of && of <= GROUP_MAX => Ok(Self { keep, of }),
            _ => Err(format!(
                "pattern `{text}` is not N:M with N less than M, each 1 to {GROUP_MAX}; 2:4 keeps two of four weights"
            )),
        }
    }
}

impl Pattern {
    /// Calls `drop` with the index of each of the `scores` (as many as a group has) that goes; of equal ones the earlier stay.
    pub(super) fn drop_least(self, scores: &[f32], mut drop: impl FnMut(usize)) {
        let mut order = [0_u8; GROUP_MAX];
        let order = &mut order[..scores.len()];
        // Insertion sort, for groups are small: largest first, and the earlier before its equals.
        for index in 0..scores.len() {
            let mut place = index;
            while place > 0 && scores[order[place - 1] as usize] < scores[index] {
                order[place] = order[place - 1];
                place -= 1;
            }
            order[place] = index as u8;
        }
        order[self.keep..].iter().for_each(|&index| drop(index as usize));
    }
}

/// Semi-structured pruning by magnitude.
#[derive(Debug, Clone)]
pub struct SemiStructured {
    /// How many stay of how many.
    pub pattern: Pattern,
}

impl Technique for SemiStructured {
    fn apply(&self, model: &mut ModelProto, _: &Setting) -> Result<Change, Failure> {
        let mut change = Change::default();
        let found = model.graph.as_mut().map(weight::of_products).unwrap_or_default();
        if found.is_empty() {
            return Err(nothing_to_prune());
        }
        for found in found {
            let name = found.tensor.name().to_owned();
            to_raw(found.tensor)?;
            let unreadable = |error: OnnxError| failure(FailureReason::UnreadableModel, error.to_string());
            let shape = weights::shape(found.tensor).map_err(unreadable)?;
            let rows = found.operators[0].rows(&shape);
            if found.operators.iter().any(|operator| operator.rows(&shape) != rows) {
                change
                    .skipped
                    .push(skipped(&name, "its uses disagree about which axis is summed over"));
                continue;
            }
            if rows.length < self.pattern.of {
                let why = format!(
                    "its rows have {} weights, fewer than the pattern's {}",
                    rows.length, self.pattern.of
                );
                change.skipped.push(skipped(&name, why));
                continue;
            }
            let mut values = weights::floats(found.tensor).map_err(unreadable)?;
            mapping::release(found.tensor.raw_data());
            prune_pattern(&mut values, rows, self.pattern).map_err(|NotFinite| not_finite(&name))?;
            let bytes = values.par_iter().flat_map_iter(|value| value.to_le_bytes()).collect();
            found.tensor.raw_data = Some(spilled(bytes));
            change.changed.push(name);
        }
        Ok(change)
    }
}

/// Zeroes all but the `pattern.keep` weights of largest magnitude in each `pattern.of` consecutive weights of every row; of equal ones
/// the earlier stay. What a row has beyond whole groups stays.
///
/// # Errors
/// [`NotFinite`] where a weight is NaN or infinite; the weights are then untouched.
///
/// Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3.
pub fn prune_pattern(weights: &mut [f32], rows: Rows, pattern: Pattern) -> Result<(), NotFinite> {
    if !weights.par_iter().all(|weight| weight.is_finite()) {
        return Err(NotFinite);
    }
    let (block, group) = (rows.length * rows.inner, pattern.of * rows.inner);
    if block == 0 {
        return Ok(());
    }
    weights.par_chunks_exact_mut(block).for_each(|block| {
        block
            .par_chunks_exact_mut(group)
            .with_min_len((1 << 14) / group + 1)
            .for_each(|group| {
                let mut scores = [0.0; GROUP_MAX];
                for row in 0..rows.inner {
                    for (index, score) in scores[..pattern.of].iter_mut().enumerate() {
                        *score = group[index * rows.inner + row].abs();
                    }
                    pattern.drop_least(&scores[..pattern.of], |index| group[index * rows.inner + row] = 0.0);
                }
            });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::weight::Operator;
    use proptest::prelude::*;

    const TWO_OF_FOUR: Pattern = Pattern { keep: 2, of: 4 };

    #[test]
    fn a_pattern_that_keeps_nothing_or_everything_is_refused() {
        assert_eq!("2:4".parse(), Ok(TWO_OF_FOUR));
        for wrong in ["4:4", "0:4", "4:2", "2", "2:100", "a:b", "2:4:8"] {
            assert!(wrong.parse::<Pattern>().unwrap_err().contains("N less than M"), "{wrong}");
        }
    }

    #[test]
    fn groups_lie_along_the_dimension_that_is_summed_over() {
        // Four rows of the inner dimension, two columns.
        let weights = [1.0, 8.0, -2.0, 7.0, 3.0, 6.0, 4.0, -5.0];
        let mut product = weights;
        prune_pattern(&mut product, Operator::MatMul.rows(&[4, 2]), TWO_OF_FOUR).unwrap();
        assert_eq!(product, [0.0, 8.0, 0.0, 7.0, 3.0, 0.0, 4.0, 0.0]);
        let mut transposed = weights;
        prune_pattern(&mut transposed, Operator::Gemm { transposed: true }.rows(&[2, 4]), TWO_OF_FOUR).unwrap();
        assert_eq!(transposed, [0.0, 8.0, 0.0, 7.0, 0.0, 6.0, 0.0, -5.0]);
        let mut convolution = weights;
        prune_pattern(&mut convolution, Operator::Conv.rows(&[2, 2, 1, 2]), TWO_OF_FOUR).unwrap();
        assert_eq!(convolution, transposed, "input channels and kernel are one dimension");
    }

    #[test]
    fn of_equals_the_earlier_stay_and_a_rest_stays_whole() {
        let mut weights = [1.0, -1.0, 1.0, 1.0, 0.1, 0.2];
        prune_pattern(
            &mut weights,
            Rows {
                outer: 1,
                length: 6,
                inner: 1,
            },
            TWO_OF_FOUR,
        )
        .unwrap();
        assert_eq!(weights, [1.0, -1.0, 0.0, 0.0, 0.1, 0.2]);
        assert_eq!(
            prune_pattern(
                &mut [f32::NAN; 4],
                Rows {
                    outer: 1,
                    length: 4,
                    inner: 1
                },
                TWO_OF_FOUR
            ),
            Err(NotFinite)
        );
    }

    proptest! {
        #[test]
        fn every_group_keeps_its_largest(weights in proptest::collection::vec(0.5_f32..10.0, 48), inner in 1_usize..4, keep in 1_usize..4) {
            let rows = Rows { outer: 48 / (8 * inner), length: 8, inner };
            let weights = &weights[..rows.outer * rows.length * inner];
            let mut pruned = weights.to_vec();
            prune_pattern(&mut pruned, rows, Pattern { keep, of: 4 }).unwrap();
            for group in 0..rows.outer * 2 {
                for row in 0..inner {
                    let at = |values: &[f32], index: usize| values[(group * 4 + index) * inner + row];
                    let mut magnitudes: Vec<f32> = (0..4).map(|index| at(weights, index)).collect();
                    let mut kept: Vec<f32> = (0..4).map(|index| at(&pruned, index)).filter(|weight| *weight != 0.0).collect();
                    magnitudes.sort_by(|a, b| b.total_cmp(a));
                    kept.sort_by(|a, b| b.total_cmp(a));
                    prop_assert_eq!(&kept[..], &magnitudes[..keep]);
                }
            }
        }
    }
}
