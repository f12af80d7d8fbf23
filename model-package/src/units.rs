//! Amounts as people write them: percentages, ratios, sizes and durations, each a string with a schema pattern.
//!
//! Kubernetes advises against floats in an API (a float does not survive a round trip through every client), so each of these is
//! a string that is validated by its pattern in the CRD and parsed here. The written form is kept: what a user reads back is what
//! they wrote.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A written amount that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{written}` is not {expected}")]
pub struct UnitError {
    /// What was written.
    pub written: String,
    /// What would have been understood, with an example.
    pub expected: &'static str,
}

macro_rules! written_unit {
    ($(#[$doc:meta])* $name:ident, $value:ty, $pattern:literal, $example:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(transparent)]
        pub struct $name(
            #[cfg_attr(feature = "schema", schemars(regex(pattern = $pattern), length(max = 32)))] String,
        );

        impl $name {
            /// The amount as it was written.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = UnitError;

            fn from_str(written: &str) -> Result<Self, UnitError> {
                let amount = Self(written.to_owned());
                amount.value().map(|_| amount.clone())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl $name {
            /// The parsed amount.
            ///
            /// # Errors
            /// [`UnitError`] where the text does not follow the pattern.
            pub fn value(&self) -> Result<$value, UnitError> {
                Self::parse(&self.0).ok_or_else(|| UnitError { written: self.0.clone(), expected: $example })
            }
        }
    };
}

written_unit!(
    /// A percentage from `0%` to `100%`, as a string: `"1%"`, `"0.5%"`. Its value is a ratio, `0.0..=1.0`.
    Percentage, f64, r"^(100(\.0{1,4})?|[0-9]{1,2}(\.[0-9]{1,4})?)%$", "a percentage from 0% to 100%, such as \"1%\""
);

impl Percentage {
    fn parse(text: &str) -> Option<f64> {
        let percent: f64 = text.strip_suffix('%')?.parse().ok()?;
        (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
    }
}

written_unit!(
    /// A ratio from 0 to 1, as a string: `"0.99"`.
    Ratio, f64, r"^(0(\.[0-9]{1,6})?|1(\.0{1,6})?)$", "a ratio from 0 to 1, such as \"0.99\""
);

impl Ratio {
    fn parse(text: &str) -> Option<f64> {
        let ratio: f64 = text.parse().ok()?;
        (0.0..=1.0).contains(&ratio).then_some(ratio)
    }
}

written_unit!(
    /// A size in bytes as a Kubernetes quantity: `"310Ki"`, `"1.5Gi"`, `"20M"`, `"4096"`.
    Size, u64, r"^[0-9]{1,15}(\.[0-9]{1,3})?(Ki|Mi|Gi|Ti|k|M|G|T)?$", "a size such as \"10Mi\" or \"2Gi\""
);

impl Size {
    fn parse(text: &str) -> Option<u64> {
        let digits = text.trim_end_matches(char::is_alphabetic);
        let factor: f64 = match &text[digits.len()..] {
            "" => 1.0,
            "k" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            "Ki" => 1024.0,
            "Mi" => 1024.0_f64.powi(2),
            "Gi" => 1024.0_f64.powi(3),
            "Ti" => 1024.0_f64.powi(4),
            _ => return None,
        };
        let amount: f64 = digits.parse().ok()?;
        (amount.is_finite() && amount >= 0.0).then_some((amount * factor).round() as u64)
    }
}

written_unit!(
    /// A duration above zero: a number and its unit, `us`, `ms`, `s`, `m` or `h`: `"5ms"`, `"10m"`.
    Duration, std::time::Duration, r"^([1-9][0-9]{0,5}(\.[0-9]{1,3})?|0\.[0-9]{0,2}[1-9][0-9]{0,2})(us|ms|s|m|h)$",
    "a duration above zero such as \"5ms\" or \"10m\""
);

impl Duration {
    fn parse(text: &str) -> Option<std::time::Duration> {
        let digits = text.trim_end_matches(char::is_alphabetic);
        let seconds: f64 = match &text[digits.len()..] {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let duration = std::time::Duration::try_from_secs_f64(digits.parse::<f64>().ok()? * seconds).ok()?;
        (!duration.is_zero()).then_some(duration)
    }
}

/// A size in bytes for people, in the binary units of a Kubernetes quantity and three digits: `310Ki`, `1.24Mi`.
#[must_use]
pub fn display_size(bytes: u64) -> String {
    let mut amount = bytes as f64;
    let mut units = ["", "Ki", "Mi", "Gi", "Ti"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for next in units {
        // 999.5 would print as 1000 with three digits.
        if amount < 999.5 {
            break;
        }
        amount /= 1024.0;
        unit = next;
    }
    let decimals = if unit.is_empty() || amount >= 99.95 {
        0
    } else if amount >= 9.995 {
        1
    } else {
        2
    };
    let text = format!("{amount:.decimals$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text}{unit}")
}

/// A ratio as a percentage with one decimal, as people compare accuracies: `98.1%`.
#[must_use]
pub fn display_percent(ratio: f64) -> String {
    format!("{:.1}%", ratio * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_written() {
        assert_eq!("1%".parse::<Percentage>().unwrap().value(), Ok(0.01));
        assert_eq!("1Mi".parse::<Size>().unwrap().value(), Ok(1 << 20));
        assert_eq!("1.5k".parse::<Size>().unwrap().value(), Ok(1500));
        assert_eq!("0.99".parse::<Ratio>().unwrap().value(), Ok(0.99));
        assert_eq!("5ms".parse::<Duration>().unwrap().value(), Ok(std::time::Duration::from_millis(5)));
    }

    #[test]
    fn what_is_not_an_amount_is_refused_with_an_example() {
        assert_eq!(
            "101%".parse::<Percentage>().unwrap_err().to_string(),
            "`101%` is not a percentage from 0% to 100%, such as \"1%\""
        );
        assert!("1".parse::<Percentage>().is_err());
        assert!("1Xi".parse::<Size>().is_err());
        assert!("1.2".parse::<Ratio>().is_err());
        assert!("5".parse::<Duration>().is_err());
    }

    #[test]
    fn sizes_print_with_three_digits() {
        assert_eq!(display_size(0), "0");
        assert_eq!(display_size(999), "999");
        assert_eq!(display_size(317_440), "310Ki");
        assert_eq!(display_size(1_300_000), "1.24Mi");
        assert_eq!(display_size(1 << 20), "1Mi");
        assert_eq!(display_size(1024 * 1024 - 1), "1Mi");
    }
}
