//! Latency: the median time of an inference of one sample, before and after.

use std::time::{Duration, Instant};

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_package::report::{LatencyChange, Spread};
use plimsoll_runtime::engine::{Engine, EngineError, Tensor};

/// Fewest pairs of inferences, so that their spread says something.
const PAIRS_MIN: usize = 10;
/// Most pairs of inferences.
const PAIRS_MAX: usize = 200;
/// Time within which more than the fewest pairs are measured.
const BUDGET: Duration = Duration::from_millis(80);
/// Time after which no pair is begun but the first: of a model that takes seconds the spread is of those that there are.
const LIMIT: Duration = Duration::from_secs(20);
/// Inferences before the clock counts.
const WARM_UP: usize = 2;

/// How a compressed model stands against the original where that is fastest, which may be on another engine.
pub struct Standing {
    /// The engine of the original.
    pub engine: EngineKind,
    /// The latency of either, in microseconds.
    pub latency: LatencyChange,
    /// The spread of after / before, by turns.
    pub ratio: Spread,
}

/// Measures both models on the same input, by turns, so that whatever else the machine does falls on both; returns the medians, and the
/// spread of after / before over the pairs of neighbouring inferences, of which there are ten at least unless they take over 20 seconds.
///
/// # Errors
/// Whatever an engine fails with.
pub fn measure(before: &dyn Engine, after: &dyn Engine, input: &[Tensor]) -> Result<(LatencyChange, Spread), EngineError> {
    let begun = Instant::now();
    for _ in 0..WARM_UP {
        time(before, input)?;
        time(after, input)?;
        if begun.elapsed() > BUDGET {
            break;
        }
    }
    let (mut times_before, mut times_after) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    while wants_more(times_before.len(), begun.elapsed()) {
        // Each goes first in every second pair.
        if times_before.len().is_multiple_of(2) {
            times_before.push(time(before, input)?);
            times_after.push(time(after, input)?);
        } else {
            times_after.push(time(after, input)?);
            times_before.push(time(before, input)?);
        }
    }
    let ratios = times_before
        .iter()
        .zip(&times_after)
        .map(|(before, after)| after / before)
        .collect();
    let latency = LatencyChange {
        before_us: spread(times_before).median,
        after_us: spread(times_after).median,
    };
    Ok((latency, spread(ratios)))
}

fn wants_more(pairs: usize, elapsed: Duration) -> bool {
    let time = if pairs < PAIRS_MIN { LIMIT } else { BUDGET };
    pairs == 0 || pairs < PAIRS_MAX && elapsed < time
}

/// The median time of an inference of each of `engines` on the same input, in microseconds, by turns for about `time`; ten of each, unless that takes
/// ten times as long.
///
/// # Errors
/// Whatever an engine fails with.
pub fn by_turns(engines: &[Box<dyn Engine>], input: &[Tensor], time: Duration) -> Result<Vec<f64>, EngineError> {
    for engine in engines {
        engine.run(input)?;
    }
    let mut times = vec![Vec::new(); engines.len()];
    let begun = Instant::now();
    for round in 0.. {
        // A slow one is given ten times as long to be measured ten times.
        let limit = if round < PAIRS_MIN { time * 10 } else { time };
        if round > 0 && begun.elapsed() >= limit {
            break;
        }
        for (engine, times) in engines.iter().zip(&mut times) {
            times.push(self::time(&**engine, input)?);
        }
    }
    Ok(times.into_iter().map(|times| spread(times).median).collect())
}

/// The median time of an inference of a model by itself, in microseconds, of about ten; `None` where the engine fails or one takes longer than
/// `limit`.
pub fn alone(engine: &dyn Engine, input: &[Tensor], limit: Duration) -> Option<f64> {
    let mut times = Vec::new();
    engine.run_within(input, limit).ok()?;
    let begun = Instant::now();
    while times.is_empty() || times.len() < PAIRS_MIN && begun.elapsed() < LIMIT {
        times.push(time(engine, input).ok()?);
    }
    Some(spread(times).median)
}

fn time(engine: &dyn Engine, input: &[Tensor]) -> Result<f64, EngineError> {
    let begun = Instant::now();
    engine.run(input)?;
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}

/// Median, 10th and 90th percentile of at least one value, linear between neighbours.
pub(super) fn spread(mut values: Vec<f64>) -> Spread {
    values.sort_by(f64::total_cmp);
    let quantile = |share: f64| {
        let place = share * (values.len() - 1) as f64;
        let (low, high) = (values[place.floor() as usize], values[place.ceil() as usize]);
        low + (high - low) * place.fract()
    };
    Spread {
        median: quantile(0.5),
        p10: quantile(0.1),
        p90: quantile(0.9),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use plimsoll_package::manifest::TensorSpec;

    use super::*;

    #[test]
    fn the_spread_is_linear_between_neighbours() {
        let one = spread(vec![3.0]);
        assert_eq!((one.median, one.p10, one.p90), (3.0, 3.0, 3.0));
        let four = spread(vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!(four.median, 2.5);
        assert!((four.p10 - 1.3).abs() < 1e-12 && (four.p90 - 3.7).abs() < 1e-12);
    }

    /// A model of which every inference takes a time, and is noted by a letter.
    pub(in crate::evaluate) struct Slow {
        pub(in crate::evaluate) kind: EngineKind,
        pub(in crate::evaluate) takes: Duration,
        pub(in crate::evaluate) noted: (char, Arc<Mutex<String>>),
    }

    impl Slow {
        pub(in crate::evaluate) fn new(kind: EngineKind, takes_ms: u64) -> Self {
            Self {
                kind,
                takes: Duration::from_millis(takes_ms),
                noted: Default::default(),
            }
        }
    }

    impl Engine for Slow {
        fn kind(&self) -> EngineKind {
            self.kind
        }

        fn inputs(&self) -> &[TensorSpec] {
            &[]
        }

        fn outputs(&self) -> &[TensorSpec] {
            &[]
        }

        fn infer(&self, _: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
            std::thread::sleep(self.takes);
            self.noted.1.lock().unwrap().push(self.noted.0);
            Ok(vec![])
        }
    }

    #[test]
    fn ten_pairs_are_measured_by_turns_though_each_takes_long() {
        let order = Arc::new(Mutex::new(String::new()));
        let (mut before, mut after) = (Slow::new(EngineKind::Tract, 20), Slow::new(EngineKind::Tract, 10));
        before.noted = ('b', order.clone());
        after.noted = ('a', order.clone());
        let (latency, ratio) = measure(&before, &after, &[]).unwrap();
        let order = order.lock().unwrap();
        assert_eq!(&order[order.len() - 20..], "baabbaabbaabbaabbaab");
        assert!(latency.before_us >= 20e3 && latency.after_us >= 10e3, "{latency:?}");
        assert!(ratio.p10 <= ratio.median && ratio.median < 1.0, "{ratio:?}");
    }

    #[test]
    fn what_takes_seconds_ends_in_bounded_time() {
        assert!(wants_more(9, LIMIT - Duration::from_secs(1)));
        assert!(!wants_more(9, LIMIT));
        assert!(wants_more(0, LIMIT), "one there must be");
        assert!(!wants_more(10, BUDGET) && !wants_more(PAIRS_MAX, Duration::ZERO));
    }
}
