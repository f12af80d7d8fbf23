//! Accuracy.

use std::collections::BTreeMap;

use plimsoll_package::report::ClassChange;

use super::dataset::Outputs;

/// Most classes whose accuracy is reported.
const CLASSES_MAX: usize = 1000;

/// The class that a model gives each sample: the index of the largest value of the first output or, where that is one whole number,
/// the number itself.
///
/// # Errors
/// In words, where the first output is neither.
pub fn predictions(outputs: &Outputs) -> Result<Vec<i64>, String> {
    let values = outputs
        .values
        .first()
        .filter(|values| !values.is_empty())
        .ok_or("the model's first output holds no numbers")?;
    let width = values.len() / outputs.samples.max(1);
    if width * outputs.samples != values.len() || width == 0 {
        return Err("the model's first output does not hold the same number of values for each sample".into());
    }
    if width == 1 {
        if !outputs.integers[0] {
            return Err("the model's first output is one number for each sample, which names no class; use the metric Fidelity".into());
        }
        return Ok(values.iter().map(|value| *value as i64).collect());
    }
    Ok(values.chunks_exact(width).map(|scores| largest(scores) as i64).collect())
}

/// The index of the first largest value; NaN is never the largest.
fn largest(scores: &[f64]) -> usize {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] || scores[best].is_nan() {
            best = index;
        }
    }
    best
}

/// The share of `predictions` that equal their label, `0.0..=1.0`.
#[must_use]
pub fn accuracy(predictions: &[i64], labels: &[i64]) -> f64 {
    let right = predictions
        .iter()
        .zip(labels)
        .filter(|(prediction, label)| prediction == label)
        .count();
    right as f64 / predictions.len().max(1) as f64
}

/// The accuracy of each class before and after, of at most 1000 classes.
#[must_use]
pub fn by_class(before: &[i64], after: &[i64], labels: &[i64]) -> Vec<ClassChange> {
    let mut classes: BTreeMap<i64, (u64, u64, u64)> = BTreeMap::new();
    for ((label, before), after) in labels.iter().zip(before).zip(after) {
        let (samples, right_before, right_after) = classes.entry(*label).or_default();
        *samples += 1;
        *right_before += u64::from(before == label);
        *right_after += u64::from(after == label);
    }
    let share = |right: u64, samples: u64| right as f64 / samples as f64;
    let changes = classes.into_iter().map(|(class, (samples, before, after))| ClassChange {
        class,
        samples,
        before: share(before, samples),
        after: share(after, samples),
    });
    changes.take(CLASSES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outputs(values: Vec<f64>, samples: usize, integers: bool) -> Outputs {
        Outputs {
            values: vec![values],
            integers: vec![integers],
            samples,
        }
    }

    #[test]
    fn the_largest_score_or_the_number_itself_is_the_class() {
        assert_eq!(predictions(&outputs(vec![0.1, 0.9, f64::NAN, -1.0], 2, false)).unwrap(), [1, 1]);
        assert_eq!(predictions(&outputs(vec![3.0, 7.0], 2, true)).unwrap(), [3, 7]);
        assert!(predictions(&outputs(vec![0.3, 0.7], 2, false)).unwrap_err().contains("Fidelity"));
    }

    #[test]
    fn each_class_is_counted_by_itself() {
        let changes = by_class(&[0, 0, 1], &[0, 1, 0], &[0, 0, 1]);
        assert_eq!((changes[0].samples, changes[0].before, changes[0].after), (2, 1.0, 0.5));
        assert_eq!((changes[1].class, changes[1].before, changes[1].after), (1, 1.0, 0.0));
        assert_eq!(accuracy(&[0, 1, 0], &[0, 0, 1]), 1.0 / 3.0);
    }
}
