//! Fidelity: how close the outputs of the optimised model are to the original's.

use plimsoll_package::report::OutputFidelity;

/// Compares one output over all samples together.
///
/// Cosine similarity is 1 where both are all zero, and 0 where any value is not finite or the sizes differ. The signal to
/// quantisation noise ratio is `10 log10(sum(before^2) / sum((after - before)^2))` dB.
#[must_use]
pub fn compare(name: &str, before: &[f64], after: &[f64]) -> OutputFidelity {
    let (mut product, mut square_before, mut square_after, mut noise, mut largest) = (0.0, 0.0, 0.0, 0.0, 0.0_f64);
    // An infinity on both sides (a mask in the logits) is agreement and no number to reckon with.
    for (before, after) in before
        .iter()
        .zip(after)
        .filter(|(before, after)| before != after || before.is_finite())
    {
        product += before * after;
        square_before += before * before;
        square_after += after * after;
        noise += (after - before) * (after - before);
        let error = (after - before).abs();
        largest = if error.is_nan() { f64::INFINITY } else { largest.max(error) };
    }
    let lengths = f64::sqrt(square_before) * f64::sqrt(square_after);
    let cosine = if before.len() != after.len() || !noise.is_finite() {
        0.0
    } else if noise == 0.0 {
        1.0
    } else if lengths > 0.0 {
        (product / lengths).clamp(-1.0, 1.0)
    } else {
        0.0
    };
    let sqnr_db = (noise > 0.0 && noise.is_finite() && square_before > 0.0).then(|| 10.0 * f64::log10(square_before / noise));
    // JSON has no infinity.
    OutputFidelity {
        name: name.to_owned(),
        cosine,
        sqnr_db,
        max_abs_error: largest.min(f64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_outputs_are_of_full_fidelity_even_where_all_is_zero() {
        let same = compare("y", &[1.0, f64::NEG_INFINITY], &[1.0, f64::NEG_INFINITY]);
        assert_eq!((same.cosine, same.sqnr_db, same.max_abs_error), (1.0, None, 0.0));
        assert_eq!(compare("y", &[0.0], &[0.0]).cosine, 1.0);
    }

    #[test]
    fn noise_is_measured_in_decibels() {
        let noisy = compare("y", &[3.0, 4.0], &[3.0, 4.5]);
        assert!((noisy.sqnr_db.unwrap() - 20.0).abs() < 1e-9);
        assert!((noisy.cosine - 27.0 / (5.0 * 29.25_f64.sqrt())).abs() < 1e-12);
        assert_eq!(noisy.max_abs_error, 0.5);
    }

    #[test]
    fn what_is_not_finite_has_no_fidelity() {
        assert_eq!(compare("y", &[1.0, 2.0], &[1.0, f64::NAN]).cosine, 0.0);
        assert_eq!(compare("y", &[1.0, 2.0], &[1.0]).cosine, 0.0);
        assert!((compare("y", &[1.0, 2.0], &[-1.0, -2.0]).cosine + 1.0).abs() < 1e-12);
    }
}
