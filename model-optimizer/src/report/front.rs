//! What a search tried: the front of size against accuracy, every candidate, and how sensitive each layer is.

use plimsoll_package::recipe::Metric;
use plimsoll_package::report::Report;
use plimsoll_package::report::front::{Candidate, Front, Outcome, Sensitivity, Sweep};
use plimsoll_package::units::display_size;

use super::chart::{Axis, Mark, Point, bar, scatter};
use super::figure;
use super::html::{Html, element, labelled, name, names, numbers, section, table, text, words};

/// Most candidates that are shown unfolded.
const CANDIDATES_SHOWN: usize = 40;
/// The heading of what each layer loses alone.
const SENSITIVITY: &str = "Sensitivity of each layer";
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
        "The search tried {} recipes in {}{complete}; the seed of its choices is {}. The numbers are those of the table below, whose ratio \
         is the latency's to the original's; what is far outside of the budget is drawn on the edge.",
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
        numbers("ratio"),
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

/// What the marks mean.
const LEGEND: [(Mark, &str); 5] = [
    (Mark::Diamond, "chosen"),
    (Mark::Disc, "on the front"),
    (Mark::Ring, "dominated"),
    (Mark::Cross, "over budget"),
    (Mark::Square, "original"),
];

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
    let y_axis = match metric {
        Some(metric) => of_metric(metric.name, &points),
        None => of_fidelity(&points),
    };
    let is_shown = |mark: Mark| points.iter().any(|point| point.mark == mark);
    let legend = LEGEND.into_iter().filter(|(mark, _)| is_shown(*mark));
    let legend = element("p", &[("class", &"legends")], legend.map(|(mark, meaning)| mark.legend(meaning)));
    [legend, scatter(&of_size(&points), &y_axis, &points)].into_iter().collect()
}

/// From 0 to the largest size, with labels at round values in its unit.
fn of_size(points: &[Point]) -> Axis {
    let largest = points.iter().map(|point| point.x).fold(1.0, f64::max);
    let unit = [1024_f64.powi(3), 1024_f64.powi(2), 1024.0]
        .into_iter()
        .find(|unit| largest >= *unit)
        .unwrap_or(1.0);
    let mut axis = Axis::linear("size of the file".into(), 0.0, largest / unit, |size| {
        display_size((size * unit) as u64)
    });
    axis.high *= unit;
    axis.ticks.iter_mut().for_each(|(size, _)| *size *= unit);
    axis
}

/// Wide enough for all that is within the budget; what is far outside of it lies on the edge, so that the others are told apart.
fn of_metric(name: Metric, points: &[Point]) -> Axis {
    let ends = |points: &mut dyn Iterator<Item = &Point>| {
        points.fold(None, |ends: Option<(f64, f64)>, point| {
            let (low, high) = ends.unwrap_or((point.y, point.y));
            Some((low.min(point.y), high.max(point.y)))
        })
    };
    let (lowest, highest) = ends(&mut points.iter()).unwrap_or_default();
    let within = ends(&mut points.iter().filter(|point| point.mark != Mark::Cross));
    let (low, high) = within.unwrap_or((lowest, highest));
    let room = (high - low).max(0.02 * high.abs());
    let better = if name.is_error() { "lower" } else { "higher" };
    let title = format!("{} ({better} is better)", figure::metric_name(name));
    let is_ratio = !name.is_error() && name != Metric::R2;
    Axis::linear(title, lowest.max(low - room), highest.min(high + room), |value| match is_ratio {
        true => format!("{}%", (value * 1e4).round() / 1e2),
        false => name.display(value),
    })
}

/// By the number of nines, so that 0.99 and 0.999 are as far apart as 0.9 and 0.99.
fn of_fidelity(points: &[Point]) -> Axis {
    let low = points.iter().map(|point| point.y).fold(figure::NINES_MAX, f64::min).floor() as u32;
    let high = points.iter().map(|point| point.y).fold(0.0, f64::max).ceil() as u32;
    Axis {
        title: "fidelity".into(),
        low: low.into(),
        high: high.max(low + 1).into(),
        ticks: (low..=high).map(|nines| (nines.into(), of_nines(nines))).collect(),
    }
}

/// The fidelity of that many nines.
fn of_nines(nines: u32) -> String {
    match nines {
        0 => "0".to_owned(),
        nines if f64::from(nines) >= figure::NINES_MAX => "1".to_owned(),
        nines => format!("0.{}", "9".repeat(nines as usize)),
    }
}

/// What was measured of the layers without a search, or why nothing was.
pub(super) fn sweep(sweep: &Sweep) -> Option<Html> {
    let why = sweep.why.as_deref().unwrap_or_default();
    if sweep.layers.is_empty() {
        return (!why.is_empty()).then(|| section(SENSITIVITY, format!("Not measured: {why}."), []));
    }
    let left = (sweep.left > 0).then(|| format!(" {} smaller layers were not measured: {why}.", sweep.left));
    sensitivity(&sweep.layers, left.as_deref())
}

/// How much each layer loses when it alone is quantised, and what is to be said besides.
pub(super) fn sensitivity(layers: &[Sensitivity], besides: Option<&str>) -> Option<Html> {
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
    let says = format!("{says}{}", besides.unwrap_or_default());
    let rows = layers.iter().map(row).collect();
    Some(section(SENSITIVITY, says, [table(&columns, rows, LAYERS_SHOWN)]))
}
