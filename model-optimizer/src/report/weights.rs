//! The weights: bytes and zeros of each, how their values are distributed, and what was left alone.

use std::collections::BTreeMap;

use plimsoll_package::report::Skipped;
use plimsoll_package::report::layer::{LayerChange, LayerState};
use plimsoll_package::units::{display_percent, display_size};

use super::chart::{bars, distribution, swatch};
use super::html::{Html, element, labelled, name, names, numbers, section, table, text, words};

/// Most weights that are shown unfolded.
const WEIGHTS_SHOWN: usize = 32;
/// Weights whose distributions are shown.
const DISTRIBUTIONS_SHOWN: usize = 12;
/// Names that are shown for a reason.
const SKIPPED_SHOWN: usize = 24;

/// Bytes and zeros of each weight.
pub(super) fn layers(layers: &[LayerChange]) -> Option<Html> {
    let largest = layers.iter().map(|layer| layer.before.bytes).max()?.max(1) as f64;
    let row = |layer: &LayerChange| {
        let (before, after) = (&layer.before, layer.after.as_ref());
        let bytes = after.map_or(0, |after| after.bytes);
        let sparsity = after.map_or(0.0, |after| after.sparsity);
        let gone = || "gone".to_owned();
        vec![
            name(&layer.weight),
            text(&layer.operator),
            text(form(layer)),
            text(display_size(before.bytes)),
            text(after.map_or_else(gone, |after| display_size(after.bytes))),
            bars(before.bytes as f64 / largest, bytes as f64 / largest),
            text(display_percent(before.sparsity)),
            text(after.map_or_else(gone, |after| display_percent(after.sparsity))),
            bars(before.sparsity, sparsity),
        ]
    };
    let columns = [
        names("weight"),
        words("operator"),
        words("form"),
        numbers("bytes"),
        numbers("after"),
        words(""),
        numbers("zeros"),
        numbers("after"),
        words(""),
    ];
    let says = "Every weight of two or more axes, the largest first; bytes are with scales and zero points.";
    let rows = layers.iter().map(row).collect();
    Some(section("Weights", says, [legend(), table(&columns, rows, WEIGHTS_SHOWN)]))
}

fn legend() -> Html {
    element(
        "p",
        &[("class", &"legends")],
        [swatch("before", "before"), swatch("after", "after")],
    )
}

/// The type and shape of a weight, and what became of them.
fn form(layer: &LayerChange) -> String {
    let shape = |state: &LayerState| state.shape.iter().map(u64::to_string).collect::<Vec<_>>().join("×");
    let changed = |before: String, after: Option<String>| match after {
        Some(after) if after != before => format!("{before} → {after}"),
        _ => before,
    };
    let (before, after) = (&layer.before, layer.after.as_ref());
    let kinds = changed(before.element_type.clone(), after.map(|after| after.element_type.clone()));
    format!("{kinds} {}", changed(shape(before), after.map(shape)))
}

/// How the values of the largest weights are distributed before and after.
pub(super) fn distributions(layers: &[LayerChange]) -> Option<Html> {
    let figure = |layer: &LayerChange| {
        let before = layer.before.distribution.as_ref()?;
        let after = layer.after.as_ref().and_then(|after| after.distribution.as_ref());
        let caption = element(
            "figcaption",
            &[],
            [element("b", &[], [name(&layer.weight)]), labelled("span", "faint", form(layer))],
        );
        Some(element("figure", &[], [caption, distribution(before, after)]))
    };
    let figures: Vec<Html> = layers.iter().filter_map(figure).take(DISTRIBUTIONS_SHOWN).collect();
    if figures.is_empty() {
        return None;
    }
    let says =
        "How many values of the largest weights lie where, on a logarithmic scale; of quantised ones, the values that they stand for.";
    let figures = element("div", &[("class", &"figures")], figures);
    Some(section("Distributions of weights", says, [legend(), figures]))
}

/// What was left alone, by the reason.
pub(super) fn skipped(skipped: &[Skipped]) -> Option<Html> {
    if skipped.is_empty() {
        return None;
    }
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for Skipped { name, reason } in skipped {
        reasons.entry(reason).or_default().push(name);
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.sort_by_key(|(_, names)| std::cmp::Reverse(names.len()));
    let row = |(reason, names): (&str, Vec<&str>)| {
        let more = names.len().saturating_sub(SKIPPED_SHOWN);
        let mut shown = names[..names.len() - more].join(", ");
        if more > 0 {
            shown.push_str(&format!(" and {more} more"));
        }
        vec![text(reason), text(names.len()), text(shown)]
    };
    let columns = [words("why"), numbers("how many"), names("which")];
    let says = "Weights and nodes that a technique would have changed and did not.";
    let rows = reasons.into_iter().map(row).collect();
    Some(section("What was left alone", says, [table(&columns, rows, WEIGHTS_SHOWN)]))
}
