//! What is measured on labelled or held-out data.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use strum::IntoEnumIterator as _;

use crate::units::display_percent;

#[cfg(feature = "schema")]
use schemars::JsonSchema;

/// What is measured on the evaluation data, by the definitions of scikit-learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display, strum::EnumIter)]
#[serde(try_from = "String", into = "String")]
pub enum Metric {
    /// The share of samples whose largest output is the label's class.
    Accuracy,
    /// `TopKAccuracy`, such as `Top5Accuracy`: the share of samples whose label is among the K largest outputs; K is 1 to 9999.
    #[strum(to_string = "Top{0}Accuracy")]
    TopAccuracy(u16),
    /// F1 score, averaged over the classes.
    F1,
    /// Area under the receiver operating characteristic; of more than two classes the mean of each against the rest.
    Auroc,
    /// Mean absolute error; lower is better.
    MeanAbsoluteError,
    /// Root of the mean squared error; lower is better.
    RootMeanSquaredError,
    /// Coefficient of determination.
    R2,
    /// Perplexity of a language model on the next tokens of its own input; needs no labels; lower is better.
    Perplexity,
    /// Agreement with the original model; needs no labels.
    Fidelity,
}

/// A text that names no metric.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no metric; write Accuracy, Top5Accuracy (or another number), F1, Auroc, MeanAbsoluteError, RootMeanSquaredError, R2, Perplexity or Fidelity"
)]
pub struct MetricError(String);

impl FromStr for Metric {
    type Err = MetricError;

    fn from_str(text: &str) -> Result<Self, MetricError> {
        let counted = text.strip_prefix("Top").and_then(|rest| rest.strip_suffix("Accuracy"));
        let metric = match counted {
            Some(count) if count.len() <= 4 && count.starts_with(|digit| matches!(digit, '1'..='9')) => {
                count.parse().ok().map(Self::TopAccuracy)
            }
            Some(_) => None,
            None => Self::iter().find(|metric| metric.to_string() == text),
        };
        metric.ok_or_else(|| MetricError(text.to_owned()))
    }
}

impl TryFrom<String> for Metric {
    type Error = MetricError;

    fn try_from(text: String) -> Result<Self, MetricError> {
        text.parse()
    }
}

impl From<Metric> for String {
    fn from(metric: Metric) -> Self {
        metric.to_string()
    }
}

#[cfg(feature = "schema")]
impl JsonSchema for Metric {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Metric".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "What is measured on the evaluation data, by the definitions of scikit-learn: Accuracy, Top5Accuracy (or another number than 5), \
                F1, Auroc, MeanAbsoluteError, RootMeanSquaredError or R2, against labels; Perplexity of a language model on the next tokens \
                of its own input, or Fidelity to the original model, without labels.",
            "pattern": "^(Accuracy|Top[1-9][0-9]{0,3}Accuracy|F1|Auroc|MeanAbsoluteError|RootMeanSquaredError|R2|Perplexity|Fidelity)$",
            "maxLength": 32,
        })
    }
}

impl Metric {
    /// Whether a smaller value is the better one.
    #[must_use]
    pub fn is_error(self) -> bool {
        matches!(self, Self::MeanAbsoluteError | Self::RootMeanSquaredError | Self::Perplexity)
    }

    /// Whether it is measured against labels.
    #[must_use]
    pub fn needs_labels(self) -> bool {
        !matches!(self, Self::Perplexity | Self::Fidelity)
    }

    /// What compression cost, as `maxAccuracyDrop` bounds it: how far the metric fell, or of an error by which share it rose. Negative where
    /// the result is better; infinite where an error of 0 rose.
    #[must_use]
    pub fn drop(self, before: f64, after: f64) -> f64 {
        if !self.is_error() {
            before - after
        } else if after == before {
            0.0
        } else {
            (after - before) / before
        }
    }

    /// A value for people: `98.1%`, or of an error four digits.
    #[must_use]
    pub fn display(self, value: f64) -> String {
        if self.is_error() || self == Self::R2 {
            let decimals = (3 - value.abs().max(1e-9).log10().floor() as i32).clamp(0, 9) as usize;
            format!("{value:.decimals$}")
        } else {
            display_percent(value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_metric_lost_is_points_or_of_an_error_its_rise() {
        assert!((Metric::Accuracy.drop(0.98, 0.97) - 0.01).abs() < 1e-12);
        assert!((Metric::Perplexity.drop(20.0, 20.2) - 0.01).abs() < 1e-12);
        assert!(Metric::MeanAbsoluteError.drop(0.5, 0.4) < 0.0);
        assert_eq!(Metric::MeanAbsoluteError.drop(0.0, 0.0), 0.0);
        assert_eq!(Metric::MeanAbsoluteError.drop(0.0, 0.1), f64::INFINITY);
    }

    #[test]
    fn a_metric_is_shown_as_people_write_it() {
        assert_eq!(Metric::Accuracy.display(0.981), "98.1%");
        assert_eq!(Metric::Perplexity.display(20.2), "20.20");
        assert_eq!(Metric::RootMeanSquaredError.display(0.0125), "0.01250");
        assert_eq!(Metric::MeanAbsoluteError.display(12_345.6), "12346");
        assert_eq!(Metric::R2.display(-0.5), "-0.5000");
    }

    #[test]
    fn a_metric_is_written_and_read_by_its_name() {
        for name in [
            "Accuracy",
            "Top5Accuracy",
            "Top1Accuracy",
            "Top9999Accuracy",
            "F1",
            "R2",
            "Fidelity",
        ] {
            let metric: Metric = serde_json::from_value(name.into()).unwrap();
            assert_eq!(serde_json::to_value(metric).unwrap(), name);
        }
        assert_eq!("Top5Accuracy".parse(), Ok(Metric::TopAccuracy(5)));
        for name in [
            "accuracy",
            "Top0Accuracy",
            "Top05Accuracy",
            "Top+5Accuracy",
            "TopAccuracy",
            "Top10000Accuracy",
            "",
        ] {
            let refused = serde_json::from_value::<Metric>(name.into()).unwrap_err().to_string();
            assert!(
                refused.contains(&format!("`{name}` is no metric; write Accuracy, Top5Accuracy")),
                "{refused}"
            );
        }
    }
}
