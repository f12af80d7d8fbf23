//! Latency: the median time of an inference of one sample, before and after.

use std::time::{Duration, Instant};

use plimsoll_package::report::LatencyChange;
use plimsoll_runtime::engine::{Engine, EngineError, Tensor};

/// Time spent on one engine, but for models of which a single inference takes longer.
const BUDGET: Duration = Duration::from_millis(80);
/// Most inferences of each model.
const RUNS_MAX: usize = 200;
/// Inferences before the clock counts.
const WARM_UP: usize = 2;

/// Measures both models on the same input, by turns, so that whatever else the machine does falls on both.
///
/// # Errors
/// Whatever an engine fails with.
pub fn measure(before: &dyn Engine, after: &dyn Engine, input: &[Tensor]) -> Result<LatencyChange, EngineError> {
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
        times_before.push(time(before, input)?);
        times_after.push(time(after, input)?);
    }
    Ok(LatencyChange {
        before_us: median(times_before),
        after_us: median(times_after),
    })
}

fn time(engine: &dyn Engine, input: &[Tensor]) -> Result<f64, EngineError> {
    let begun = Instant::now();
    engine.run(input)?;
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    if times.len().is_multiple_of(2) {
        f64::midpoint(times[middle - 1], times[middle])
    } else {
        times[middle]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
