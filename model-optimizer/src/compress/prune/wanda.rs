//! Wanda: a weight is as important as its magnitude times the norm of the activations that it meets.

use rayon::prelude::*;

use super::Share;

/// Zeroes, in each of `rows` (of as many weights as there are `norms`), the share of weights whose magnitude times the norm of their
/// input is smallest; of equal ones the earlier stay. `norms` are the L2 norms of the inputs over the calibration data.
///
/// Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", equation 1; every output is a group of its own.
pub fn prune(rows: &mut [f32], norms: &[f32], share: Share) {
    let length = norms.len();
    rows.par_chunks_exact_mut(length).for_each(|row| {
        let scores: Vec<f32> = row.iter().zip(norms).map(|(weight, norm)| weight.abs() * norm).collect();
        match share {
            Share::Amount(amount) => {
                let count = ((amount * length as f64).round_ties_even() as usize).min(length);
                if count > 0 {
                    let mut order: Vec<usize> = (0..length).collect();
                    let (least, _, _) = order.select_nth_unstable_by(count - 1, |a, b| scores[*a].total_cmp(&scores[*b]).then(b.cmp(a)));
                    least.iter().for_each(|index| row[*index] = 0.0);
                    row[order[count - 1]] = 0.0;
                }
            }
            Share::Pattern(pattern) => {
                for (weights, scores) in row.chunks_exact_mut(pattern.of).zip(scores.chunks_exact(pattern.of)) {
                    pattern.drop_least(scores, |index| weights[index] = 0.0);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::prune::Pattern;

    #[test]
    fn a_small_weight_of_a_strong_input_stays() {
        let mut rows = [1.0, -0.5, 3.0, 0.1, 1.0, 1.0, 1.0, 1.0];
        prune(&mut rows, &[1.0, 10.0, 0.1, 1.0], Share::Amount(0.5));
        assert_eq!(rows, [1.0, -0.5, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
        let mut rows = [1.0, -0.5, 3.0, 0.1];
        prune(&mut rows, &[1.0, 10.0, 0.1, 1.0], Share::Pattern(Pattern { keep: 1, of: 2 }));
        assert_eq!(rows, [0.0, -0.5, 3.0, 0.0]);
    }
}
