//! Latency: the median time of an inference of one sample, before and after.

use std::time::{Duration, Instant};

use plimsoll_package::report::{LatencyChange, Spread};
use plimsoll_runtime::engine::{Engine, EngineError, Tensor};

/// Time spent on one engine, but for models of which a single inference takes longer.
const BUDGET: Duration = Duration::from_millis(80);
/// Most inferences of each model.
const RUNS_MAX: usize = 200;
/// Inferences before the clock counts.
const WARM_UP: usize = 2;

/// Measures both models on the same input, by turns, so that whatever else the machine does falls on both; returns the medians, and the
/// spread of after / before over the pairs of neighbouring inferences.
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
    while times_before.is_empty() || begun.elapsed() < BUDGET && times_before.len() < RUNS_MAX {
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

fn time(engine: &dyn Engine, input: &[Tensor]) -> Result<f64, EngineError> {
    let begun = Instant::now();
    engine.run(input)?;
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}

/// Median, 10th and 90th percentile of at least one value, linear between neighbours.
fn spread(mut values: Vec<f64>) -> Spread {
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
mod tests {
    use super::*;

    #[test]
    fn the_spread_is_linear_between_neighbours() {
        let one = spread(vec![3.0]);
        assert_eq!((one.median, one.p10, one.p90), (3.0, 3.0, 3.0));
        let four = spread(vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!(four.median, 2.5);
        assert!((four.p10 - 1.3).abs() < 1e-12 && (four.p90 - 3.7).abs() < 1e-12);
    }
}
