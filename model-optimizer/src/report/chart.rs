//! Charts as SVG of the page's own colours: bars, distributions, and a scatter of points.

use std::fmt::Write as _;

use plimsoll_package::report::layer::Distribution;

use super::html::{Attribute, Html, element, labelled, text};

/// Width of a distribution.
const DISTRIBUTION_WIDTH: f64 = 224.0;
/// Height of a distribution.
const DISTRIBUTION_HEIGHT: f64 = 96.0;
/// Where the axes of a scatter end, within 760 times 380.
const LEFT: f64 = 76.0;
const TOP: f64 = 14.0;
const RIGHT: f64 = 736.0;
const BOTTOM: f64 = 326.0;

/// A bar of that `share` of its place, `0.0..=1.0`, of one of the classes `before`, `after`, `good` and `bad`.
pub(super) fn bar(share: f64, class: &'static str) -> Html {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) * 100.0 } else { 0.0 };
    let style = format!("width:{share:.1}%");
    element(
        "span",
        &[("class", &"bar")],
        [element("i", &[("class", &class), ("style", &style)], [])],
    )
}

/// Two bars, one below the other.
pub(super) fn bars(before: f64, after: f64) -> Html {
    element("span", &[("class", &"bars")], [bar(before, "before"), bar(after, "after")])
}

/// A distribution as an area, and the one that came of it as a line. Counts are logarithmic, so that tails are seen beside the peak.
pub(super) fn distribution(before: &Distribution, after: Option<&Distribution>) -> Html {
    let counts = |distribution: &Distribution| distribution.counts.clone();
    let largest = [Some(before), after]
        .into_iter()
        .flatten()
        .flat_map(counts)
        .max()
        .unwrap_or(1)
        .max(1);
    let height = |count: u64| DISTRIBUTION_HEIGHT * (1.0 - (1.0 + count as f64).ln() / (1.0 + largest as f64).ln());
    let steps = |distribution: &Distribution| {
        let width = DISTRIBUTION_WIDTH / distribution.counts.len().max(1) as f64;
        let mut path = format!("M0 {DISTRIBUTION_HEIGHT}");
        for (bin, count) in distribution.counts.iter().enumerate() {
            // A string takes all that is written to it.
            let _ = write!(path, "V{:.1}H{:.1}", height(*count), width * (bin + 1) as f64);
        }
        let _ = write!(path, "V{DISTRIBUTION_HEIGHT}");
        path
    };
    let area = element("path", &[("class", &"area"), ("d", &steps(before))], []);
    let line = after.map(|after| element("path", &[("class", &"line"), ("d", &steps(after))], []));
    let foot = DISTRIBUTION_HEIGHT + 13.0;
    let edge = |x: f64, anchor: &'static str, value: f64| {
        element(
            "text",
            &[("x", &x), ("y", &foot), ("text-anchor", &anchor)],
            [text(significant(value))],
        )
    };
    let (low, high) = (before.low, before.high);
    let zero = (low < 0.0 && high > 0.0).then(|| DISTRIBUTION_WIDTH * -low / (high - low));
    let tick = zero.map(|x| {
        element(
            "path",
            &[("class", &"tick"), ("d", &format!("M{x:.1} 0V{DISTRIBUTION_HEIGHT}"))],
            [],
        )
    });
    // Where it does not run into the edges' labels.
    let middle = zero.filter(|x| (60.0..DISTRIBUTION_WIDTH - 60.0).contains(x));
    let content = tick.into_iter().chain([area]).chain(line).chain([edge(0.0, "start", low)]);
    let content = content
        .chain(middle.map(|x| edge(x, "middle", 0.0)))
        .chain([edge(DISTRIBUTION_WIDTH, "end", high)]);
    let view = format!("0 -2 {DISTRIBUTION_WIDTH} {}", DISTRIBUTION_HEIGHT + 18.0);
    let attributes: [Attribute; 4] = [
        ("class", &"distribution"),
        ("viewBox", &view),
        ("role", &"img"),
        ("aria-label", &"distribution"),
    ];
    element("svg", &attributes, content)
}

/// An axis: its title, its ends, and the places with a label.
pub(super) struct Axis {
    pub(super) title: String,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From `low` to `high` or somewhat beyond, with a label at round values.
    pub(super) fn linear(title: String, low: f64, high: f64, label: impl Fn(f64) -> String) -> Self {
        // Values that are all the same lie in the middle.
        let pad = if low < high { 0.0 } else { 0.05 * high.abs().max(0.1) };
        let (low, high) = (low - pad, high + pad);
        let step = round_step((high - low) / 5.0);
        let (first, last) = ((low / step).floor(), (high / step).ceil());
        let ticks = (0..=(last - first) as u32).map(|index| (first + f64::from(index)) * step);
        Self {
            title,
            low: first * step,
            high: last * step,
            ticks: ticks.map(|value| (value, label(value))).collect(),
        }
    }

    fn share(&self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// The least of 1, 2 and 5 times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|factor| factor * power >= step * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

/// A point of a scatter.
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) label: String,
    /// What it says when pointed at.
    pub(super) title: String,
    pub(super) mark: Mark,
}

/// How a point is drawn: told apart by form as well as by colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Ring,
    Disc,
    Diamond,
    Cross,
    Square,
}

impl Mark {
    /// The path around a centre, and the class that colours it.
    fn path(self) -> (&'static str, &'static str) {
        match self {
            Self::Ring => ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "mark dominated"),
            Self::Disc => ("m-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0", "mark front"),
            Self::Diamond => ("m0-9l8 9l-8 9l-8-9z", "mark chosen"),
            Self::Cross => ("m-4.5-4.5l9 9m0-9l-9 9", "mark exceeded"),
            Self::Square => ("m-5-5h10v10h-10z", "mark original"),
        }
    }

    /// The mark with what it means, for a legend.
    pub(super) fn legend(self, meaning: &'static str) -> Html {
        let (path, class) = self.path();
        let mark = element("path", &[("class", &class), ("d", &format!("M10 10{path}"))], []);
        let mark = element("svg", &[("class", &"legend"), ("viewBox", &"0 0 20 20")], [mark]);
        element("span", &[], [mark, text(meaning)])
    }
}

/// Points over two axes.
pub(super) fn scatter(x_axis: &Axis, y_axis: &Axis, points: &[Point]) -> Html {
    let x_of = |value: f64| LEFT + (RIGHT - LEFT) * x_axis.share(value);
    let y_of = |value: f64| BOTTOM - (BOTTOM - TOP) * y_axis.share(value);
    let line = |path: String| element("path", &[("class", &"tick"), ("d", &path)], []);
    let word = |x: f64, y: f64, anchor: &'static str, word: &str| {
        let (x, y) = (format!("{x:.1}"), format!("{y:.1}"));
        element("text", &[("x", &x), ("y", &y), ("text-anchor", &anchor)], [text(word)])
    };
    let mut content = Vec::new();
    for (value, label) in &x_axis.ticks {
        let x = x_of(*value);
        content.extend([line(format!("M{x:.1} {TOP}V{BOTTOM}")), word(x, BOTTOM + 18.0, "middle", label)]);
    }
    for (value, label) in &y_axis.ticks {
        let y = y_of(*value);
        content.extend([line(format!("M{LEFT} {y:.1}H{RIGHT}")), word(LEFT - 8.0, y + 4.0, "end", label)]);
    }
    content.push(word((LEFT + RIGHT) / 2.0, BOTTOM + 42.0, "middle", &x_axis.title));
    let turned = format!("translate(16 {}) rotate(-90)", (TOP + BOTTOM) / 2.0);
    content.push(element("g", &[("transform", &turned)], [word(0.0, 0.0, "middle", &y_axis.title)]));
    let centres: Vec<(f64, f64)> = points.iter().map(|point| (x_of(point.x), y_of(point.y))).collect();
    let mut taken = centres.clone();
    for (point, (x, y)) in points.iter().zip(&centres) {
        let (path, class) = point.mark.path();
        let title = element("title", &[], [text(&point.title)]);
        content.push(element(
            "path",
            &[("class", &class), ("d", &format!("M{x:.1} {y:.1}{path}"))],
            [title],
        ));
        // Where no other label or point is, if there is such a place.
        let places =
            [(13.0, -9.0), (13.0, 9.0), (-13.0, -9.0), (-13.0, 9.0), (0.0, -16.0), (0.0, 16.0)].map(|(right, down)| (x + right, y + down));
        let is_free = |place: &&(f64, f64)| {
            taken
                .iter()
                .all(|other| (place.0 - other.0).abs() > 12.0 || (place.1 - other.1).abs() > 10.0)
        };
        let place = places.iter().find(is_free).copied().unwrap_or(places[0]);
        taken.push(place);
        content.push(word(place.0, place.1 + 4.0, "middle", &point.label));
    }
    let says = format!("{} against {}", y_axis.title, x_axis.title);
    let attributes: [Attribute; 4] = [
        ("class", &"scatter"),
        ("viewBox", &"0 0 760 380"),
        ("role", &"img"),
        ("aria-label", &says),
    ];
    element("svg", &attributes, content)
}

/// A number with three digits.
pub(super) fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let exponent = value.abs().log10().floor() as i32;
    match exponent {
        -3..=3 => format!("{value:.*}", (2 - exponent).clamp(0, 5) as usize),
        _ => format!("{value:.1e}"),
    }
}

/// A swatch of that class with what it means.
pub(super) fn swatch(class: &'static str, meaning: &'static str) -> Html {
    element("span", &[], [labelled("i", class, ""), text(meaning)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_begin_and_end_at_round_values() {
        let axis = Axis::linear("x".into(), 0.0, 23.0, |value| format!("{value}"));
        assert_eq!((axis.low, axis.high), (0.0, 25.0));
        assert_eq!(
            axis.ticks.iter().map(|tick| tick.1.as_str()).collect::<Vec<_>>(),
            ["0", "5", "10", "15", "20", "25"]
        );
        let flat = Axis::linear("x".into(), 0.5, 0.5, |value| format!("{value}"));
        assert!(flat.low < 0.5 && 0.5 < flat.high && flat.ticks.len() < 10, "{:?}", flat.ticks);
    }

    #[test]
    fn a_distribution_steps_through_its_bins() {
        let of = |counts: &[u64]| Distribution {
            low: -1.0,
            high: 1.0,
            counts: counts.to_vec(),
        };
        let html = distribution(&of(&[0, 7]), Some(&of(&[7, 0])));
        assert!(
            html.as_str().contains("class=\"area\" d=\"M0 96V96.0H112.0V0.0H224.0V96\""),
            "{html:?}"
        );
        assert!(
            html.as_str().contains("class=\"line\" d=\"M0 96V0.0H112.0V96.0H224.0V96\""),
            "{html:?}"
        );
    }

    #[test]
    fn labels_do_not_cover_each_other() {
        let point = |label: &str| Point {
            x: 1.0,
            y: 1.0,
            label: label.into(),
            title: String::new(),
            mark: Mark::Disc,
        };
        let axis = || Axis::linear("a".into(), 0.0, 2.0, |value| format!("{value}"));
        let html = scatter(&axis(), &axis(), &[point("first"), point("second")]);
        let place = |label: &str| {
            let before = html.as_str().split(&format!(">{label}<")).next().unwrap().to_owned();
            before[before.rfind("<text").unwrap()..].to_owned()
        };
        assert_ne!(place("first"), place("second"));
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [0.0, 1.0, -0.1234, 12.34, 1234.5, 1e-9, 5e7].map(significant),
            ["0", "1.00", "-0.123", "12.3", "1234", "1.0e-9", "5.0e7"]
        );
    }
}
