//! SparseGPT: weights go one column after another, and those that come later make up for the error.

use rayon::prelude::*;

use super::Share;
use crate::compress::hessian::Hessian;

/// Columns whose errors are passed on to the later ones together, and among which weights are ranked.
const COLUMNS: usize = 128;

/// Prunes `rows`, each of as many weights as the Hessian has features: a weight costs `w^2 / [H^-1]_jj` in squared error once the
/// weights before it are settled, and the weights after it make up for it as well as they can.
///
/// An `amount` is the share of weights that goes in each block of 128 columns, over all rows together. Weights of inputs that were zero
/// in every sample go first.
///
/// # Errors
/// In words, where the Hessian cannot be inverted; the rows are then untouched.
///
/// Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", algorithm 1, with a damping of
/// 1 percent of the mean diagonal.
pub fn prune(rows: &mut [f32], hessian: &Hessian, share: Share) -> Result<(), &'static str> {
    let length = hessian.features();
    let factor = hessian
        .inverse_factor()
        .ok_or("its inputs on the calibration data are too large or too alike for criterion SparseGpt; use Wanda")?;
    let dead: Vec<usize> = (0..length).filter(|feature| hessian.is_dead(*feature)).collect();
    rows.par_chunks_exact_mut(length)
        .for_each(|row| dead.iter().for_each(|feature| row[*feature] = 0.0));
    let columns = match share {
        Share::Amount(_) => COLUMNS,
        // Groups are not torn apart.
        Share::Pattern(pattern) => COLUMNS / pattern.of * pattern.of,
    };
    let cost = |weight: f32, column: usize| (weight / factor[column * length + column]).powi(2);
    let mut gone = 0;
    for begin in (0..length).step_by(columns) {
        let end = (begin + columns).min(length);
        // A weight whose cost is below the first, or equal to it and whose place is before the second, goes.
        let limit = match share {
            Share::Amount(amount) => {
                let total = (amount * (rows.len() / length * end) as f64).round_ties_even() as usize;
                let count = total - gone;
                gone = total;
                limit(rows, length, begin..end, count, cost)
            }
            Share::Pattern(_) => None,
        };
        rows.par_chunks_exact_mut(length).enumerate().for_each(|(index, row)| {
            let mut errors = [0.0_f32; COLUMNS];
            let mut goes = [false; COLUMNS];
            if let Some((limit, place)) = limit {
                for column in begin..end {
                    let (cost, own) = (cost(row[column], column), index * (end - begin) + column - begin);
                    goes[column - begin] = cost < limit || (cost == limit && own < place);
                }
            }
            for column in begin..end {
                if let Share::Pattern(pattern) = share
                    && (column - begin).is_multiple_of(pattern.of)
                    && column + pattern.of <= length
                {
                    let costs: Vec<f32> = (column..column + pattern.of).map(|column| cost(row[column], column)).collect();
                    pattern.drop_least(&costs, |index| goes[column - begin + index] = true);
                }
                if goes[column - begin] {
                    let error = row[column] / factor[column * length + column];
                    errors[column - begin] = error;
                    row[column] = 0.0;
                    let from = &factor[column * length..][column + 1..end];
                    row[column + 1..end]
                        .iter_mut()
                        .zip(from)
                        .for_each(|(weight, factor)| *weight -= error * factor);
                }
            }
            for (offset, error) in errors[..end - begin].iter().enumerate().filter(|(_, error)| **error != 0.0) {
                let from = &factor[(begin + offset) * length..][end..length];
                row[end..]
                    .iter_mut()
                    .zip(from)
                    .for_each(|(weight, factor)| *weight -= error * factor);
            }
        });
    }
    Ok(())
}

/// The cost up to which `count` weights of the columns go, and how many places into the block those of exactly that cost do.
fn limit(
    rows: &[f32],
    length: usize,
    columns: std::ops::Range<usize>,
    count: usize,
    cost: impl Fn(f32, usize) -> f32 + Sync,
) -> Option<(f32, usize)> {
    let cost = &cost;
    let costs: Vec<f32> = rows
        .par_chunks_exact(length)
        .flat_map_iter(|row| columns.clone().map(move |column| cost(row[column], column)))
        .collect();
    if count == 0 {
        return None;
    }
    if count >= costs.len() {
        return Some((f32::INFINITY, costs.len()));
    }
    let mut order = costs.clone();
    let (least, limit, _) = order.select_nth_unstable_by(count - 1, f32::total_cmp);
    let limit = *limit;
    let tied = count - least.iter().filter(|cost| **cost < limit).count();
    let place = costs.iter().enumerate().filter(|(_, cost)| **cost == limit).nth(tied - 1);
    place.map(|(place, _)| (limit, place + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::prune::Pattern;
    use faer::linalg::solvers::Solve as _;
    use faer::{Mat, Side};

    fn activations(count: usize, features: usize) -> Vec<f32> {
        let mut state = 7_u32;
        let mut rows: Vec<f32> = (0..count * features)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.4
            })
            .collect();
        // Inputs that are alike can make up for each other.
        for row in rows.chunks_exact_mut(features) {
            for index in 1..features {
                row[index] += 0.7 * row[index - 1];
            }
        }
        rows
    }

    fn damped(hessian: &[f32], count: usize, features: usize) -> Mat<f64> {
        let mut damped = Mat::from_fn(features, features, |a, b| {
            let products = hessian.chunks_exact(features).map(|row| f64::from(row[a]) * f64::from(row[b]));
            2.0 / count as f64 * products.sum::<f64>()
        });
        let mean = (0..features).map(|index| damped[(index, index)]).sum::<f64>() / features as f64;
        (0..features).for_each(|index| damped[(index, index)] += 0.01 * mean);
        damped
    }

    /// The weights that stay, where those not in `stays` go: the least squares problem solved exactly, one removal after another in the order
    /// of the columns, with the columns before each settled.
    fn exact(weights: &[f32], hessian: &Mat<f64>, goes: &[usize]) -> Vec<f64> {
        let mut weights: Vec<f64> = weights.iter().map(|weight| f64::from(*weight)).collect();
        for &column in goes {
            // Optimal Brain Surgeon on the columns that are not settled: w -= w_q [H^-1]_{:,q} / [H^-1]_qq.
            let rest: Vec<usize> = (column..weights.len()).collect();
            let part = Mat::from_fn(rest.len(), rest.len(), |a, b| hessian[(rest[a], rest[b])]);
            let unit = Mat::from_fn(rest.len(), 1, |row, _| if row == 0 { 1.0 } else { 0.0 });
            let inverse = part.llt(Side::Lower).unwrap().solve(&unit);
            let scale = weights[column] / inverse[(0, 0)];
            for (index, place) in rest.iter().enumerate() {
                weights[*place] -= scale * inverse[(index, 0)];
            }
            weights[column] = 0.0;
        }
        weights
    }

    #[test]
    fn the_weights_that_stay_are_those_of_the_surgeons_formula_solved_exactly() {
        for features in [6, 150] {
            let count = 400;
            let rows = activations(count, features);
            let mut hessian = Hessian::new(features);
            rows.chunks(features * 100).for_each(|chunk| hessian.add(chunk));
            let weights: Vec<f32> = activations(1, features).iter().map(|weight| weight + 0.3).collect();
            for share in [Share::Amount(0.5), Share::Pattern(Pattern { keep: 1, of: 3 })] {
                let mut pruned = weights.clone();
                prune(&mut pruned, &hessian, share).unwrap();
                let goes: Vec<usize> = (0..features).filter(|index| pruned[*index] == 0.0).collect();
                assert_eq!(
                    goes.len(),
                    if matches!(share, Share::Amount(_)) {
                        features / 2
                    } else {
                        features / 3 * 2
                    }
                );
                let expected = exact(&weights, &damped(&rows, count, features), &goes);
                for (weight, expected) in pruned.iter().zip(&expected) {
                    assert!((f64::from(*weight) - expected).abs() < 1e-3, "{weight} is not {expected}");
                }
            }
        }
    }

    #[test]
    fn the_error_is_smaller_than_that_of_magnitude_alone() {
        let (count, features) = (300, 64);
        let samples = activations(count, features);
        let mut hessian = Hessian::new(features);
        hessian.add(&samples);
        let weights = activations(8, features);
        let error = |pruned: &[f32]| {
            let mut sum = 0.0;
            for sample in samples.chunks_exact(features) {
                for (row, original) in pruned.chunks_exact(features).zip(weights.chunks_exact(features)) {
                    let difference: f32 = row.iter().zip(original).zip(sample).map(|((a, b), x)| (a - b) * x).sum();
                    sum += f64::from(difference).powi(2);
                }
            }
            sum
        };
        let mut second_order = weights.clone();
        prune(&mut second_order, &hessian, Share::Amount(0.5)).unwrap();
        let mut magnitude = weights.clone();
        crate::compress::prune::prune_magnitude(&mut [&mut magnitude], 0.5).unwrap();
        assert!(
            error(&second_order) < 0.3 * error(&magnitude),
            "{} {}",
            error(&second_order),
            error(&magnitude)
        );
    }
}
