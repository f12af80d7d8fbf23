//! Figures as people read them.

use plimsoll_package::recipe::{Metric, Technique};
use plimsoll_package::report::Spread;
use serde_yaml_ng::Value;

/// `3.92x smaller`.
pub(super) fn smaller(before: u64, after: u64) -> String {
    let (before, after) = (before.max(1) as f64, after.max(1) as f64);
    if after <= before {
        format!("{:.2}x smaller", before / after)
    } else {
        format!("{:.2}x larger", after / before)
    }
}

/// A time in microseconds, with its unit.
pub(super) fn time(us: f64) -> String {
    match us {
        _ if us < 1e3 => format!("{us:.0} us"),
        _ if us < 1e6 => format!("{:.2} ms", us / 1e3),
        _ => format!("{:.2} s", us / 1e6),
    }
}

/// A fidelity with five digits.
pub(super) fn fidelity(fidelity: f64) -> String {
    let text = format!("{fidelity:.5}");
    text.strip_suffix(".00000").unwrap_or(&text).to_owned()
}

/// Decibels, infinite where nothing differs.
pub(super) fn decibels(sqnr_db: Option<f64>) -> String {
    sqnr_db.map_or_else(|| "∞".to_owned(), |decibels| format!("{decibels:.1} dB"))
}

/// `0.81 (0.78 to 0.85)`: the median, and where the middle 80 percent lie.
pub(super) fn spread(Spread { median, p10, p90 }: Spread) -> String {
    format!("{median:.2} ({p10:.2} to {p90:.2})")
}

/// The nines of the largest fidelity that is told from 1.
pub(super) const NINES_MAX: f64 = 6.0;

/// The number of nines of a fidelity: 2 of 0.99, 0 where it is 0 or less, and at most 6.
pub(super) fn nines(fidelity: f64) -> f64 {
    -(1.0 - fidelity).clamp(10_f64.powf(-NINES_MAX), 1.0).log10()
}

/// What is lost of a fidelity, for a bar: 1 where nothing is left, 0 where it has six nines.
pub(super) fn loss(fidelity: f64) -> f64 {
    1.0 - nines(fidelity) / NINES_MAX
}

/// A metric within a sentence.
pub(super) fn metric_name(metric: Metric) -> String {
    match metric {
        Metric::Accuracy => "accuracy".to_owned(),
        metric => metric.to_string(),
    }
}

/// A recipe in one line, as YAML in its flow form; `nothing` where it is empty.
pub(super) fn recipe(recipe: &[Technique]) -> String {
    let entries = recipe.iter().filter_map(|entry| serde_yaml_ng::to_value(entry).ok());
    let entries: Vec<String> = entries.map(|entry| fields(&entry)).collect();
    if entries.is_empty() {
        "nothing".to_owned()
    } else {
        entries.join(", ")
    }
}

/// The fields of a mapping without its braces; of anything else the whole.
fn fields(value: &Value) -> String {
    let Value::Mapping(mapping) = value else {
        return flow(value);
    };
    let fields = mapping.iter().map(|(key, value)| format!("{}: {}", flow(key), flow(value)));
    fields.collect::<Vec<_>>().join(", ")
}

fn flow(value: &Value) -> String {
    match value {
        Value::Mapping(_) => format!("{{{}}}", fields(value)),
        Value::Sequence(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::Null | Value::Tagged(_) => "null".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use plimsoll_package::recipe::{Prune, Quantize, QuantizeScheme};

    use super::*;

    #[test]
    fn figures_have_their_units() {
        assert_eq!([12.0, 1234.0, 2.5e6].map(time), ["12 us", "1.23 ms", "2.50 s"]);
        assert_eq!([smaller(400, 100), smaller(100, 110)], ["4.00x smaller", "1.10x larger"]);
        assert_eq!([1.0, 0.999_99, 0.5].map(fidelity), ["1", "0.99999", "0.50000"]);
        assert_eq!([1.0, 0.0, -1.0].map(loss), [0.0, 1.0, 1.0]);
        assert!((loss(0.999) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_recipe_is_read_in_one_line() {
        let prune = Technique {
            prune: Some(Prune {
                amount: Some("50%".parse().unwrap()),
                ..Prune::default()
            }),
            ..Technique::default()
        };
        let quantize = Technique {
            quantize: Some(Quantize {
                exclude: vec!["a".into(), "b".into()],
                ..Quantize::of(QuantizeScheme::Int8)
            }),
            ..Technique::default()
        };
        assert_eq!(
            recipe(&[prune, quantize]),
            "prune: {amount: 50%}, quantize: {scheme: Int8, exclude: [a, b]}"
        );
        assert_eq!(recipe(&[]), "nothing");
    }
}
