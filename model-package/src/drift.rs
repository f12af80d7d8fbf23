//! `drift.json`: how the values of a model's inputs and outputs were distributed on the data that it was optimised with, and how far those
//! that a runtime sees are from that.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::manifest::PackageError;

/// Name of the reference's file in a package.
pub const DRIFT_FILE: &str = "drift.json";

/// Bins of equal shares that a distribution is recorded in, at most: deciles are what PSI and its thresholds are used with.
pub const BINS_MAX: usize = 10;
/// Most classes whose frequencies are recorded.
pub const CLASSES_MAX: usize = 256;
/// Most inputs, and most outputs, that are recorded.
pub const TENSORS_MAX: usize = 16;
/// Most bytes of the file.
const BYTES_MAX: u64 = 1 << 20;
/// The least share of a bin, so that an empty one leaves PSI finite.
const SHARE_MIN: f64 = 1e-4;

/// What the model's inputs and outputs looked like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reference {
    /// Version of this structure: 1.
    pub schema_version: u32,
    /// The data that it was seen on.
    pub from: Source,
    /// How many of their samples were run.
    pub samples: u64,
    /// Of the model's inputs.
    pub inputs: Vec<TensorReference>,
    /// Of the model's outputs.
    pub outputs: Vec<TensorReference>,
}

/// The data that a reference was seen on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// What techniques may look at.
    Calibration,
    /// What the model is judged on.
    Evaluation,
}

/// What one tensor looked like.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TensorReference {
    /// The tensor's name.
    pub name: String,
    /// Its values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Distribution>,
    /// Of a mask of tokens: how many tokens the texts had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lengths: Option<Distribution>,
    /// Of an output of classes: how often each had the largest value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes: Option<Vec<u64>>,
}

/// How often values occur, in bins whose shares are about equal. What lies outside of all bins did not occur.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// The smallest value.
    min: f64,
    /// The upper bound of each bin, which belongs to it, ascending; the last one is the largest value.
    bounds: Vec<f64>,
    /// How many values lie in each bin.
    counts: Vec<u64>,
}

impl Distribution {
    /// The distribution of the finite ones of `values`, in at most [`BINS_MAX`] bins between their quantiles; `None` where there is none.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_unstable_by(f64::total_cmp);
        let min = *values.first()?;
        let quantile = |bin: usize| values[(values.len() * bin).div_ceil(BINS_MAX) - 1];
        let mut bounds: Vec<f64> = (1..=BINS_MAX).map(quantile).collect();
        bounds.dedup();
        let upto = |bound: &f64| values.partition_point(|value| value <= bound) as u64;
        let cumulated: Vec<u64> = bounds.iter().map(upto).collect();
        let before = std::iter::once(0).chain(cumulated.iter().copied());
        let counts = cumulated.iter().zip(before).map(|(upto, before)| upto - before).collect();
        Some(Self { min, bounds, counts })
    }

    /// How many bins there are, with the two for what lies below and above all others.
    #[must_use]
    pub fn bins(&self) -> usize {
        self.bounds.len() + 2
    }

    /// The bin of a value: 0 is below all others, where NaN is, too; the last one is above.
    #[must_use]
    pub fn bin(&self, value: f64) -> usize {
        if value >= self.min {
            1 + self.bounds.partition_point(|bound| *bound < value)
        } else {
            0
        }
    }

    /// How many values lie in each of the [`bins`](Self::bins).
    #[must_use]
    pub fn counts(&self) -> Vec<u64> {
        let outside = std::iter::once(0);
        outside.clone().chain(self.counts.iter().copied()).chain(outside).collect()
    }

    fn is_valid(&self) -> bool {
        let ascends = self.bounds.windows(2).all(|pair| pair[0] < pair[1]);
        let finite = self.min.is_finite() && self.bounds.iter().all(|bound| bound.is_finite());
        let sizes = (1..=BINS_MAX).contains(&self.bounds.len()) && self.counts.len() == self.bounds.len();
        sizes && finite && ascends && self.min <= self.bounds[0] && is_countable(&self.counts)
    }
}

/// Whether there is something, and no sum of it overflows.
fn is_countable(counts: &[u64]) -> bool {
    let total = counts.iter().try_fold(0_u64, |total, &count| total.checked_add(count));
    total.is_some_and(|total| total > 0)
}

impl Reference {
    /// Reads the reference of the package in `dir`.
    ///
    /// # Errors
    /// Where the file cannot be read, does not parse, is newer than this program, or holds what no distribution is.
    pub fn read(dir: &Path) -> Result<Self, PackageError> {
        let path = dir.join(DRIFT_FILE);
        let mut bytes = vec![];
        let read = File::open(&path).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes));
        read.map_err(|source| PackageError::Read {
            path: path.clone(),
            source,
        })?;
        let invalid = |why: &str| PackageError::Parse {
            path: path.clone(),
            source: serde::de::Error::custom(why),
        };
        if bytes.len() as u64 > BYTES_MAX {
            return Err(invalid(&format!("it has more than {BYTES_MAX} bytes")));
        }
        let reference: Self = serde_json::from_slice(&bytes).map_err(|source| PackageError::Parse {
            path: path.clone(),
            source,
        })?;
        if reference.schema_version != 1 {
            return Err(PackageError::SchemaVersion {
                found: reference.schema_version,
            });
        }
        for tensors in [&reference.inputs, &reference.outputs] {
            if tensors.len() > TENSORS_MAX {
                return Err(invalid(&format!("it has more than {TENSORS_MAX} inputs or outputs")));
            }
            let names: BTreeSet<&str> = tensors.iter().map(|tensor| &*tensor.name).collect();
            if names.len() < tensors.len() {
                return Err(invalid("two of its tensors have one name"));
            }
            if let Some(tensor) = tensors.iter().find(|tensor| !tensor.is_valid()) {
                return Err(invalid(&format!("what it has of `{}` is no distribution", tensor.name)));
            }
        }
        Ok(reference)
    }
}

impl TensorReference {
    fn is_valid(&self) -> bool {
        let classes = |counts: &Vec<u64>| (2..=CLASSES_MAX).contains(&counts.len()) && is_countable(counts);
        self.values.iter().chain(&self.lengths).all(Distribution::is_valid) && self.classes.as_ref().is_none_or(classes)
    }
}

/// The population stability index of two histograms over the same bins: the sum over all bins of (a - e) ln(a / e), where a and e are the
/// shares of the values that lie in the bin, each taken for 0.0001 where it is less. 0 where the shares are equal, and never negative.
/// `None` where either has no value.
///
/// Lewis 1994, "An Introduction to Credit Scoring"; Siddiqi 2006, "Credit Risk Scorecards": below 0.1 nothing has changed that matters, from
/// 0.25 on it has. It is the divergence of Jeffreys 1946 over bins.
///
/// # Panics
/// Where they have not as many bins.
#[must_use]
pub fn psi(expected: &[u64], actual: &[u64]) -> Option<f64> {
    let (expected, actual) = (shares(expected)?, shares(actual)?);
    assert_eq!(expected.len(), actual.len(), "bins of the same kind");
    let of_bin = |(expected, actual): (&f64, &f64)| {
        let (expected, actual) = (expected.max(SHARE_MIN), actual.max(SHARE_MIN));
        (actual - expected) * (actual / expected).ln()
    };
    Some(expected.iter().zip(&actual).map(of_bin).sum())
}

/// The two-sample Kolmogorov-Smirnov statistic of two histograms over the same ordered bins: the largest difference of the shares that lie up
/// to a bin's bound, `0.0..=1.0`. It is that of the values themselves where it is taken at a bound, and at most that elsewhere. `None`
/// where either has no value.
///
/// Smirnov 1939, "On the estimation of the discrepancy between empirical curves of distribution for two independent samples".
///
/// # Panics
/// Where they have not as many bins.
#[must_use]
pub fn kolmogorov_smirnov(expected: &[u64], actual: &[u64]) -> Option<f64> {
    let total = |counts: &[u64]| Some(counts.iter().sum::<u64>()).filter(|total| *total > 0);
    let (of_expected, of_actual) = (total(expected)?, total(actual)?);
    assert_eq!(expected.len(), actual.len(), "bins of the same kind");
    let (mut upto_expected, mut upto_actual) = (0, 0);
    let differences = expected.iter().zip(actual).map(|(expected, actual)| {
        upto_expected += expected;
        upto_actual += actual;
        (upto_expected as f64 / of_expected as f64 - upto_actual as f64 / of_actual as f64).abs()
    });
    Some(differences.fold(0.0, f64::max))
}

/// The population stability index that chance alone is expected to give, where `actual` and `expected` are drawn from one distribution: the
/// mean of (1/n + 1/m) times a chi-squared variable of one degree of freedom less than there are bins in use.
///
/// Yurdakul and Naranjo 2020, "Statistical properties of the population stability index".
#[must_use]
pub fn psi_by_chance(expected: &[u64], actual: &[u64]) -> f64 {
    let total = |counts: &[u64]| counts.iter().sum::<u64>() as f64;
    let used = expected.iter().filter(|count| **count > 0).count();
    used.saturating_sub(1) as f64 * (1.0 / total(expected) + 1.0 / total(actual))
}

fn shares(counts: &[u64]) -> Option<Vec<f64>> {
    let total: u64 = counts.iter().sum();
    (total > 0).then(|| counts.iter().map(|count| *count as f64 / total as f64).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(count: u32) -> Vec<f64> {
        (0..count).map(f64::from).collect()
    }

    #[test]
    fn bins_are_bounded_by_quantiles() {
        // numpy.quantile(numpy.arange(100), [.1, .2, ..., 1], method="inverted_cdf")
        let distribution = Distribution::of(ramp(100)).unwrap();
        assert_eq!(distribution.min, 0.0);
        assert_eq!(distribution.bounds, [9.0, 19.0, 29.0, 39.0, 49.0, 59.0, 69.0, 79.0, 89.0, 99.0]);
        assert_eq!(distribution.counts(), [0, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 0]);
        let bins = [-0.5, 0.0, 9.0, 9.5, 99.0, 99.5, f64::NAN, f64::INFINITY].map(|value| distribution.bin(value));
        assert_eq!(bins, [0, 1, 1, 2, 10, 11, 0, 11]);
    }

    #[test]
    fn a_value_that_is_frequent_has_a_bin_of_its_own() {
        let values = [vec![0.0; 60], ramp(40)].concat();
        let distribution = Distribution::of(values).unwrap();
        assert_eq!(distribution.bounds, [0.0, 9.0, 19.0, 29.0, 39.0]);
        assert_eq!(distribution.counts, [61, 9, 10, 10, 10]);
        let constant = Distribution::of(vec![2.5; 7]).unwrap();
        assert_eq!((constant.bounds.as_slice(), constant.counts.as_slice()), (&[2.5][..], &[7][..]));
        let one = Distribution::of(vec![f64::NAN, 1.0, f64::INFINITY]).unwrap();
        assert_eq!(one.counts(), [0, 1, 0]);
        assert_eq!(Distribution::of(vec![f64::NAN]), None);
    }

    #[test]
    fn psi_is_what_numpy_computes() {
        // e, a = numpy.array([10, 20, 30, 40]) / 100, numpy.array([40, 30, 20, 10]) / 100; ((a - e) * numpy.log(a / e)).sum()
        let psi = |expected: &[u64], actual: &[u64]| super::psi(expected, actual).unwrap();
        assert!((psi(&[10, 20, 30, 40], &[40, 30, 20, 10]) - 0.912_869_638_293_567_3).abs() < 1e-12);
        // The share of the first bin is taken for 0.0001: (0.5 - 0.0001) ln(5000) + (0.5 - 1) ln(0.5)
        assert!((psi(&[0, 8], &[4, 4]) - 4.604_318_466_668_95).abs() < 1e-9);
        assert_eq!(super::psi(&[0, 0], &[1, 2]), None);
    }

    #[test]
    fn the_statistic_of_kolmogorov_and_smirnov_is_what_scipy_computes() {
        // scipy.stats.ks_2samp(numpy.arange(100), numpy.arange(100) + 30).statistic
        let expected = Distribution::of(ramp(100)).unwrap();
        let mut actual = vec![0; expected.bins()];
        ramp(100).iter().for_each(|value| actual[expected.bin(value + 30.0)] += 1);
        let statistic = kolmogorov_smirnov(&expected.counts(), &actual).unwrap();
        assert!((statistic - 0.3).abs() < 1e-12, "{statistic}");
        assert_eq!(kolmogorov_smirnov(&[5, 0], &[0, 5]), Some(1.0));
        assert_eq!(kolmogorov_smirnov(&[5, 0], &[0, 0]), None);
    }

    #[test]
    fn chance_gives_less_the_more_there_is() {
        assert!((psi_by_chance(&[0, 50, 50, 0], &[0, 25, 25, 0]) - 0.03).abs() < 1e-12);
        assert!(psi_by_chance(&[50, 50], &[0, 0]).is_infinite());
    }

    #[test]
    fn what_is_no_distribution_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let reference = Reference {
            schema_version: 1,
            from: Source::Calibration,
            samples: 100,
            inputs: vec![TensorReference {
                name: "x".into(),
                values: Distribution::of(ramp(100)),
                ..TensorReference::default()
            }],
            outputs: vec![TensorReference {
                name: "y".into(),
                classes: Some(vec![1, 2, 3]),
                ..TensorReference::default()
            }],
        };
        let json = serde_json::to_string(&reference).unwrap();
        let read = |json: &str| {
            std::fs::write(dir.path().join(DRIFT_FILE), json).unwrap();
            Reference::read(dir.path())
        };
        assert_eq!(read(&json).unwrap(), reference);
        for (from, to) in [
            ("[9.0,19.0", "[19.0,9.0"),
            ("\"min\":0.0", "\"min\":10.0"),
            ("\"counts\":[10,10", "\"counts\":[10"),
            ("\"classes\":[1,2,3]", "\"classes\":[0,0]"),
            ("\"classes\":[1,2,3]", "\"classes\":[1,18446744073709551615]"),
            ("\"classes\":[1,2,3]", "\"classes\":[1]"),
            ("\"schemaVersion\":1", "\"schemaVersion\":2"),
            ("\"from\":\"Calibration\"", "\"from\":\"Hearsay\""),
        ] {
            let broken = json.replacen(from, to, 1);
            assert_ne!(broken, json, "{from}");
            assert!(read(&broken).is_err(), "{to}");
        }
        assert!(read(&" ".repeat((1 << 20) + 1)).unwrap_err().to_string().contains("drift.json"));
    }
}
