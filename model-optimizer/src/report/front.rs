//! What a search tried: the front of size against accuracy, every candidate, and how sensitive each layer is.

use plimsoll_package::recipe::Metric;
use plimsoll_package::report::Report;
use plimsoll_package::report::front::{Candidate, Front, Outcome, Sensitivity};
use plimsoll_package::units::display_size;

use super::chart::{Axis, Mark, Point, bar, scatter};
use super::figure;
use super::html::{Html, element, labelled, name, names, numbers, section, table, text, words};

/// Most candidates that are shown unfolded.
const CANDIDATES_SHOWN: usize = 40;
/// Most layers that are shown unfolded.
const LAYERS_SHOWN: usize = 32;

/// The candidates as points, and in a table.
pub(super) fn candidates(report: &Report, front: &Front) -> Html {
    let complete = if front.complete {
        ""
    } else {
        ", which was not enough for all that it meant to try"
    };
    let says = format!(
        "The search tried {} recipes in {}{complete}; the seed of its choices is {}. The numbers are those of the table below.",
        front.candidates.len(),
        figure::time(front.took_ms * 1e3),
        front.seed
    );
    let row = |(index, candidate): (usize, &Candidate)| {
        let (class, word) = outcome(candidate.outcome);
        let absent = || "–".to_owned();
        let size = |size: Option<u64>| text(size.map_or_else(absent, display_size));
        vec![
            text(index + 1),
            labelled("span", class, word),
            text(figure::recipe(&candidate.recipe)),
            size(candidate.size),
            size(candidate.size_layer),
            text(candidate.metric.map_or_else(absent, |metric| metric.name.display(metric.after))),
            text(candidate.fidelity.map_or_else(absent, figure::fidelity)),
            text(candidate.latency.map_or_else(absent, |latency| figure::time(latency.after_us))),
            text(candidate.latency_ratio.map_or_else(absent, figure::spread)),
            text(candidate.why.as_deref().unwrap_or_default()),
        ]
    };
    let columns = [
        numbers("#"),
        words("outcome"),
        names("recipe"),
        numbers("size"),
        numbers("as pulled"),
        numbers("metric"),
        numbers("fidelity"),
        numbers("latency"),
        numbers("of the original's"),
        words("why"),
    ];
    let rows = front.candidates.iter().enumerate().map(row).collect();
    section("Front", says, [chart(report, front), table(&columns, rows, CANDIDATES_SHOWN)])
}

fn outcome(outcome: Outcome) -> (&'static str, &'static str) {
    match outcome {
        Outcome::Chosen => ("good", "chosen"),
        Outcome::OnFront => ("plain", "on the front"),
        Outcome::Dominated => ("faint", "dominated"),
        Outcome::BudgetExceeded => ("bad", "over budget"),
        Outcome::Failed => ("bad", "failed"),
    }
}

fn mark(outcome: Outcome) -> Mark {
    match outcome {
        Outcome::Chosen => Mark::Diamond,
        Outcome::OnFront => Mark::Disc,
        Outcome::Dominated => Mark::Ring,
        Outcome::BudgetExceeded | Outcome::Failed => Mark::Cross,
    }
}

/// Size against the metric or, where there is none, against fidelity; nothing where no candidate has both.
fn chart(report: &Report, front: &Front) -> Html {
    let metric = report
        .summary
        .metric
        .filter(|_| front.candidates.iter().any(|candidate| candidate.metric.is_some()));
    let height = |candidate: &Candidate| match metric {
        Some(_) => candidate.metric.map(|metric| metric.after),
        None => candidate.fidelity.map(figure::nines),
    };
    let point = |(index, candidate): (usize, &Candidate)| {
        Some(Point {
            x: candidate.size? as f64,
            y: height(candidate)?,
            label: (index + 1).to_string(),
            title: figure::recipe(&candidate.recipe),
            mark: mark(candidate.outcome),
        })
    };
    let mut points: Vec<Point> = front.candidates.iter().enumerate().filter_map(point).collect();
    if points.is_empty() {
        return Html::default();
    }
    if front.candidates.iter().all(|candidate| !candidate.recipe.is_empty()) {
        points.push(Point {
            x: report.summary.size_before as f64,
            y: metric.map_or(figure::NINES_MAX, |metric| metric.before),
            label: "original".into(),
            title: "the original".into(),
            mark: Mark::Square,
        });
    }
    let of = |value: fn(&Point) -> f64, least: f64, larger: fn(f64, f64) -> f64| points.iter().map(value).fold(least, larger);
    let (low, high) = (of(|point| point.y, f64::MAX, f64::min), of(|point| point.y, f64::MIN, f64::max));
    let y_axis = match metric {
        Some(metric) => {
            let better = if metric.name.is_error() { "lower" } else { "higher" };
            let title = format!("{} ({better} is better)", figure::metric_name(metric.name));
            let is_ratio = !metric.name.is_error() && metric.name != Metric::R2;
            Axis::linear(title, low, high, |value| match is_ratio {
                true => format!("{}%", ((value * 1e4).round() / 1e2)),
                false => metric.name.display(value),
            })
        }
        None => {
            let ticks = low.floor() as u32..=high.ceil() as u32;
            Axis {
                title: "fidelity".into(),
                low: low.floor(),
                high: high.ceil().max(low.floor() + 1.0),
                ticks: ticks.map(|nines| (f64::from(nines), of_nines(nines))).collect(),
            }
        }
    };
    let largest = of(|point| point.x, 0.0, f64::max);
    // Round values in the unit that the largest size has.
    let unit = [1024_f64.powi(3), 1024_f64.powi(2), 1024.0, 1.0]
        .into_iter()
        .find(|unit| largest >= *unit)
        .unwrap_or(1.0);
    let mut x_axis = Axis::linear("size of the file".into(), 0.0, largest / unit, |size| {
        display_size((size * unit) as u64)
    });
    x_axis.high *= unit;
    x_axis.ticks.iter_mut().for_each(|(size, _)| *size *= unit);
    let legend = [
        Mark::Diamond.legend("chosen"),
        Mark::Disc.legend("on the front"),
        Mark::Ring.legend("dominated"),
        Mark::Cross.legend("over budget"),
        Mark::Square.legend("original"),
    ];
    [element("p", &[("class", &"legends")], legend), scatter(&x_axis, &y_axis, &points)]
        .into_iter()
        .collect()
}

/// The fidelity of that many nines.
fn of_nines(nines: u32) -> String {
    match nines {
        0 => "0".to_owned(),
        nines if f64::from(nines) >= figure::NINES_MAX => "1".to_owned(),
        nines => format!("0.{}", "9".repeat(nines as usize)),
    }
}

/// How much each layer loses when it alone is quantised.
pub(super) fn sensitivity(layers: &[Sensitivity]) -> Option<Html> {
    if layers.is_empty() {
        return None;
    }
    let row = |layer: &Sensitivity| {
        vec![
            name(&layer.node),
            text(&layer.operator),
            bar(figure::loss(layer.fidelity), "bad"),
            text(figure::fidelity(layer.fidelity)),
            text(figure::decibels(layer.sqnr_db)),
            text(display_size(layer.saved)),
        ]
    };
    let columns = [
        names("node"),
        words("operator"),
        words("loses"),
        numbers("fidelity"),
        numbers("SQNR"),
        numbers("saves"),
    ];
    let says = "What the model loses when that layer alone is quantised, the most sensitive first. The bars are logarithmic: full where nothing \
        of the output is left, empty where its fidelity is 0.999999 or more.";
    let rows = layers.iter().map(row).collect();
    Some(section("Sensitivity of each layer", says, [table(&columns, rows, LAYERS_SHOWN)]))
}
