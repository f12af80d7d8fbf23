//! Latency: the median time of an inference of one sample, before and after.

use std::time::{Duration, Instant};

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_package::report::{LatencyChange, Spread};
use plimsoll_runtime::engine::{Engine, EngineError, Tensor};

/// Fewest pairs of inferences, so that their spread says something.
const PAIRS_MIN: usize = 10;
/// Fewest pairs where each of them says that one model is faster by [`FAR`].
const PAIRS_CERTAIN: usize = 5;
/// The ratio of two times that is far beyond the machine's unrest.
const FAR: f64 = 1.25;
/// Most pairs of inferences.
const PAIRS_MAX: usize = 200;
/// Time within which more than the fewest pairs are measured.
const BUDGET: Duration = Duration::from_millis(80);
/// Time after which no pair is begun but the first: of a model that takes seconds the spread is of those that there are.
const LIMIT: Duration = Duration::from_secs(20);

/// What reads the time: [`Instant::now`], but in tests, in which it passes as they say.
pub type Clock = fn() -> Instant;

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
/// spread of after / before over the pairs of neighbouring inferences. Of these there are ten at least, or five where each shows the same model to
/// be faster by far, unless they take over 20 seconds.
///
/// # Errors
/// Whatever an engine fails with.
pub fn measure(before: &dyn Engine, after: &dyn Engine, input: &[Tensor], now: Clock) -> Result<(LatencyChange, Spread), EngineError> {
    // What an engine prepares in its first inferences is no part of the later ones.
    before.run(input)?;
    after.run(input)?;
    let (mut times_before, mut times_after, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let begun = now();
    while wants_more(&ratios, now() - begun) {
        // Each goes first in every second pair.
        let (of_before, of_after);
        if ratios.len().is_multiple_of(2) {
            of_before = time(before, input, now)?;
            of_after = time(after, input, now)?;
        } else {
            of_after = time(after, input, now)?;
            of_before = time(before, input, now)?;
        }
        times_before.push(of_before);
        times_after.push(of_after);
        ratios.push(of_after / of_before);
    }
    let latency = LatencyChange {
        before_us: spread(times_before).median,
        after_us: spread(times_after).median,
    };
    Ok((latency, spread(ratios)))
}

/// Whether another pair is measured after those with these `ratios`.
fn wants_more(ratios: &[f64], elapsed: Duration) -> bool {
    let pairs = ratios.len();
    let is_certain = pairs >= PAIRS_CERTAIN && (ratios.iter().all(|ratio| *ratio > FAR) || ratios.iter().all(|ratio| *ratio < 1.0 / FAR));
    let is_enough = pairs >= PAIRS_MIN || is_certain;
    let time = if is_enough { BUDGET } else { LIMIT };
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
            times.push(self::time(&**engine, input, Instant::now)?);
        }
    }
    Ok(times.into_iter().map(|times| spread(times).median).collect())
}

/// The median time of an inference of a model by itself, in microseconds, of about ten; `None` where the engine fails or takes longer than
/// `limit`.
pub fn alone(engine: &dyn Engine, input: &[Tensor], limit: Duration, now: Clock) -> Option<f64> {
    let mut times = Vec::new();
    within(engine, input, limit).ok()?;
    let begun = now();
    while times.is_empty() || times.len() < PAIRS_MIN && now() - begun < LIMIT {
        times.push(time(engine, input, now).ok()?);
    }
    Some(spread(times).median)
}

/// Runs an inference that is given up where it takes longer than `limit` twice: once may be the machine's other work.
///
/// # Errors
/// Whatever the engine fails with, [`EngineError::Late`] where it is too slow.
pub fn within(engine: &dyn Engine, input: &[Tensor], limit: Duration) -> Result<Vec<Tensor>, EngineError> {
    match engine.run_within(input, limit) {
        Err(EngineError::Late { .. }) => engine.run_within(input, limit),
        done => done,
    }
}

fn time(engine: &dyn Engine, input: &[Tensor], now: Clock) -> Result<f64, EngineError> {
    let begun = now();
    engine.run(input)?;
    Ok((now() - begun).as_secs_f64() * 1e6)
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
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, LazyLock, Mutex};

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

    thread_local! {
        static PASSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// A clock that stands still but for the inferences of [`Slow`] on this thread.
    pub(in crate::evaluate) fn stepped() -> Instant {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        *START + PASSED.get()
    }

    /// A model of which every inference takes a time on the clock [`stepped`], and is noted by a letter.
    pub(in crate::evaluate) struct Slow {
        pub(in crate::evaluate) kind: EngineKind,
        pub(in crate::evaluate) takes: Duration,
        pub(in crate::evaluate) noted: (char, Arc<Mutex<String>>),
        /// How many inferences with a limit are too late, whatever the limit.
        pub(in crate::evaluate) late: AtomicUsize,
    }

    impl Slow {
        pub(in crate::evaluate) fn new(kind: EngineKind, takes_ms: u64) -> Self {
            Self {
                kind,
                takes: Duration::from_millis(takes_ms),
                noted: Default::default(),
                late: AtomicUsize::new(0),
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
            PASSED.set(PASSED.get() + self.takes);
            self.noted.1.lock().unwrap().push(self.noted.0);
            Ok(vec![])
        }

        fn infer_within(&self, inputs: &[Tensor], limit: Duration) -> Result<Vec<Tensor>, EngineError> {
            let engine = self.kind;
            match self
                .late
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |late| late.checked_sub(1))
            {
                Ok(_) => Err(EngineError::Late { engine, limit }),
                Err(_) => self.infer(inputs),
            }
        }
    }

    #[test]
    fn ten_pairs_are_measured_by_turns_though_each_takes_long_and_five_where_one_is_faster_by_far() {
        for (after_ms, pairs) in [(36, "baabbaabbaabbaabbaab"), (20, "baabbaabba"), (60, "baabbaabba")] {
            let order = Arc::new(Mutex::new(String::new()));
            let (mut before, mut after) = (Slow::new(EngineKind::Tract, 40), Slow::new(EngineKind::Tract, after_ms));
            before.noted = ('b', order.clone());
            after.noted = ('a', order.clone());
            let (latency, ratio) = measure(&before, &after, &[], stepped).unwrap();
            let order = order.lock().unwrap();
            let warm_up = order.len() - pairs.len();
            assert_eq!((&order[..warm_up], &order[warm_up..]), (&"baba"[..warm_up], pairs));
            let after_us = after_ms as f64 * 1e3;
            assert_eq!(
                (latency.before_us.round(), latency.after_us.round()),
                (40e3, after_us),
                "{latency:?}"
            );
            assert!((ratio.median - after_us / 40e3).abs() < 1e-9 && ratio.p10 <= ratio.p90, "{ratio:?}");
        }
    }

    #[test]
    fn an_engine_is_given_up_that_is_late_twice() {
        let late = |times: usize| {
            let engine = Slow {
                late: AtomicUsize::new(times),
                ..Slow::new(EngineKind::Tract, 1)
            };
            within(&engine, &[], Duration::from_millis(100)).is_err()
        };
        assert_eq!([0, 1, 2].map(late), [false, false, true]);
    }

    #[test]
    fn what_takes_seconds_ends_in_bounded_time() {
        assert!(wants_more(&[1.0; 9], LIMIT - Duration::from_secs(1)));
        assert!(!wants_more(&[1.0; 9], LIMIT));
        assert!(wants_more(&[], LIMIT), "one there must be");
        assert!(!wants_more(&[1.0; 10], BUDGET) && !wants_more(&[1.0; PAIRS_MAX], Duration::ZERO));
        assert!(!wants_more(&[0.5; 5], BUDGET) && wants_more(&[0.5; 4], BUDGET) && wants_more(&[0.5, 0.5, 0.5, 0.5, 1.1], BUDGET));
    }
}
