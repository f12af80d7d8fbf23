//! What was measured: the model before and after, its outputs and its classes.

use plimsoll_package::report::{ClassChange, OutputFidelity, Report, SliceFidelity};
use plimsoll_package::units::{display_percent, display_size};

use super::chart::{bar, bars, significant, swatch};
use super::figure;
use super::html::{Html, element, labelled, name, names, numbers, section, table, text, words};

/// Most outputs, slices and classes that are shown unfolded.
const ROWS_SHOWN: usize = 24;

/// The model before and after: size, metric, fidelity, latency and memory.
pub(super) fn change(report: &Report) -> Html {
    let summary = &report.summary;
    let size = |name: &str, before: u64, after: u64| {
        let change = figure::smaller(before, after);
        row(text(name), display_size(before), display_size(after), text(change))
    };
    let mut rows = vec![size("size of the file", summary.size_before, summary.size_after)];
    if let (Some(before), Some(after)) = (summary.size_layer_before, summary.size_layer_after) {
        rows.push(size("size as the layer that is pulled", before, after));
    }
    if let Some(metric) = summary.metric {
        let name = format!("{}, {} samples", figure::metric_name(metric.name), metric.samples);
        let drop = metric.name.drop(metric.before, metric.after) * 100.0;
        let unit = if metric.name.is_error() { "%" } else { " points" };
        let change = match drop {
            0.0 => "unchanged".to_owned(),
            drop if drop > 0.0 => format!("{drop:.2}{unit} worse"),
            drop => format!("{:.2}{unit} better", -drop),
        };
        let (before, after) = (metric.name.display(metric.before), metric.name.display(metric.after));
        rows.push(row(text(name), before, after, text(change)));
    }
    if let Some(fidelity) = summary.fidelity {
        rows.push(row(
            text("least fidelity of an output"),
            "1".into(),
            figure::fidelity(fidelity),
            text(""),
        ));
    }
    let slices = report.outputs.iter().filter_map(|output| output.worst_slices.first());
    if let Some(worst) = slices.min_by(|a, b| a.cosine.total_cmp(&b.cosine)) {
        rows.push(row(
            text("least fidelity of a slice"),
            "1".into(),
            figure::fidelity(worst.cosine),
            text(""),
        ));
    }
    for measured in &report.engines {
        let chosen = if measured.engine == summary.engine { ", chosen" } else { "" };
        let name = text(format_args!("latency on {}{chosen}", measured.engine));
        rows.push(match (measured.latency, &measured.refused) {
            (Some(latency), _) => {
                let ratio = measured
                    .latency_ratio
                    .map(|ratio| format!("{} times as long", figure::spread(ratio)));
                let (before, after) = (figure::time(latency.before_us), figure::time(latency.after_us));
                row(name, before, after, text(ratio.unwrap_or_default()))
            }
            (None, refused) => row(name, "–".into(), "–".into(), text(refused.as_deref().unwrap_or("not measured"))),
        });
    }
    for measured in &report.engines {
        if let Some(memory) = measured.memory {
            let name = text(format_args!("memory on {}", measured.engine));
            let change = match measured.memory_ratio {
                Some(ratio) => text(format_args!("{} times as much", figure::spread(ratio))),
                None => text(figure::smaller(memory.before_bytes, memory.after_bytes)),
            };
            rows.push(row(
                name,
                display_size(memory.before_bytes),
                display_size(memory.after_bytes),
                change,
            ));
        }
    }
    rows.push(row(
        text("weights that are zero"),
        String::new(),
        display_percent(summary.sparsity),
        text(""),
    ));
    let columns = [words(""), numbers("before"), numbers("after"), words("change")];
    let says = "Latencies are medians of one sample, measured by turns with the original; the spread is of the middle 80 % of neighbouring \
        pairs. Memory is what becomes resident when a model is loaded and run once.";
    section("Before and after", says, [table(&columns, rows, usize::MAX)])
}

fn row(name: Html, before: String, after: String, change: Html) -> Vec<Html> {
    vec![name, text(before), text(after), change]
}

/// How close each output is to the original's, with its worst slices.
pub(super) fn outputs(outputs: &[OutputFidelity]) -> Option<Html> {
    if outputs.is_empty() {
        return None;
    }
    let row = |output: &OutputFidelity| {
        let slices = match (output.slices, output.silent_slices) {
            (slices, 0) => slices.to_string(),
            (slices, silent) => format!("{slices} and {silent} silent"),
        };
        vec![
            name(&output.name),
            text(figure::fidelity(output.cosine)),
            text(figure::decibels(output.sqnr_db)),
            text(largest_error(output.max_abs_error)),
            text(output.agreement.map_or_else(|| "–".to_owned(), display_percent)),
            text(slices),
        ]
    };
    let columns = [
        names("output"),
        numbers("fidelity"),
        numbers("SQNR"),
        numbers("largest error"),
        numbers("agreement"),
        numbers("slices"),
    ];
    let mut content = vec![table(&columns, outputs.iter().map(row).collect(), ROWS_SHOWN)];
    let mut slices: Vec<(&str, &SliceFidelity)> = outputs
        .iter()
        .flat_map(|output| output.worst_slices.iter().map(|slice| (output.name.as_str(), slice)))
        .collect();
    slices.sort_by(|a, b| a.1.cosine.total_cmp(&b.1.cosine));
    if !slices.is_empty() {
        let row = |(output, slice): (&str, &SliceFidelity)| {
            vec![
                name(output),
                text(slice.axis),
                text(slice.index),
                text(figure::fidelity(slice.cosine)),
                bar(figure::loss(slice.cosine), "bad"),
                text(figure::decibels(slice.sqnr_db)),
            ]
        };
        let columns = [
            names("output"),
            numbers("axis"),
            numbers("index"),
            numbers("fidelity"),
            words("loses"),
            numbers("SQNR"),
        ];
        content.push(labelled("h3", "part", "Worst slices"));
        content.push(table(&columns, slices.into_iter().map(row).collect(), ROWS_SHOWN));
    }
    let says = "Fidelity is the cosine similarity to the original's output over all samples; SQNR the ratio of signal to the noise that \
        compression added; agreement the share of rows whose largest value is at the same place. A slice is all values at one index of an \
        axis; of a silent one, zero in the original's output, nothing can be said. Bars are logarithmic: full where nothing is left of a slice, \
        empty at a fidelity of 0.999999.";
    Some(section("Fidelity of each output", says, content))
}

/// JSON has no infinity; the largest number stands for it.
fn largest_error(error: f64) -> String {
    if error == f64::MAX { "∞".to_owned() } else { significant(error) }
}

/// Accuracy of each class before and after.
pub(super) fn classes(classes: &[ClassChange]) -> Option<Html> {
    if classes.is_empty() {
        return None;
    }
    let row = |class: &ClassChange| {
        let points = (class.after - class.before) * 100.0;
        let change = if points == 0.0 { "±0".to_owned() } else { format!("{points:+.1}") };
        vec![
            text(class.class),
            text(class.samples),
            text(display_percent(class.before)),
            text(display_percent(class.after)),
            bars(class.before, class.after),
            labelled("span", if points < 0.0 { "bad" } else { "plain" }, change),
        ]
    };
    let columns = [
        numbers("class"),
        numbers("samples"),
        numbers("before"),
        numbers("after"),
        words(""),
        numbers("points"),
    ];
    let mut sorted: Vec<&ClassChange> = classes.iter().collect();
    sorted.sort_by(|a, b| (a.after - a.before).total_cmp(&(b.after - b.before)).then(a.class.cmp(&b.class)));
    let legend = element(
        "p",
        &[("class", &"legends")],
        [swatch("before", "before"), swatch("after", "after")],
    );
    let rows = sorted.into_iter().map(row).collect();
    let says = "The share of each class's samples that are right, the class that lost most first.";
    Some(section("Classes", says, [legend, table(&columns, rows, ROWS_SHOWN)]))
}
