//! What batches cost: learnt from those that ran, so that requests are joined only where that serves them sooner.

use std::time::Duration;

/// Sizes are kept by powers of two: 1, 2, 3-4, 5-8, ... up to 2^15 and beyond.
const CLASSES: usize = 17;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;

/// How much more a row may cost in a batch than alone before the batch counts as slower: measurements are noisy.
const SLACK: f64 = 1.05;

/// After so many decisions one is made against what was learnt, by turns alone and in the largest batch: the machine may have been busy
/// when either was measured.
const RETRIAL: u32 = 256;

/// The cost of batches of one form, by their number of rows.
#[derive(Debug, Clone, Default)]
pub(super) struct Cost {
    /// Seconds of a batch, by class of size.
    seconds: [Option<f64>; CLASSES],
    decisions: u32,
}

fn class(rows: usize) -> usize {
    (rows.max(1).next_power_of_two().trailing_zeros() as usize).min(CLASSES - 1)
}

impl Cost {
    /// Takes in what a batch of so many rows took.
    pub(super) fn learn(&mut self, rows: usize, took: Duration) {
        // Scaled to the class's full size, so that its members are comparable.
        let full = 1_usize << class(rows);
        let scale = full as f64 / rows.max(1) as f64;
        let seconds = took.as_secs_f64() * scale;
        let known = &mut self.seconds[class(rows)];
        *known = Some(known.map_or(seconds, |old| old + NEWEST * (seconds - old)));
    }

    /// What a batch of so many rows will take, where one of its class ran before.
    pub(super) fn predict(&self, rows: usize) -> Option<Duration> {
        let full = 1_usize << class(rows);
        self.seconds[class(rows)].map(|seconds| Duration::from_secs_f64(seconds * rows.max(1) as f64 / full as f64))
    }

    /// The most rows worth joining, of at most `available` and `max`, where the request at the head of the line has `first`: the largest
    /// size at which a row costs no more than at `first`. A size that never ran is tried,
    /// and then what it is compared with.
    pub(super) fn rows_worth(&mut self, first: usize, available: usize, max: usize) -> usize {
        self.decisions = self.decisions.wrapping_add(1);
        let most = available.min(max).max(first);
        let Some(alone) = self.row(first) else {
            return if self.row(most).is_none() { most } else { first };
        };
        if self.decisions.is_multiple_of(RETRIAL) {
            return if self.decisions.is_multiple_of(2 * RETRIAL) { most } else { first };
        }
        let mut rows = most;
        while rows > first {
            match self.row(rows) {
                Some(cost) if cost > alone * SLACK => rows = (1_usize << class(rows)) / 2,
                _ => return rows,
            }
        }
        first
    }

    fn row(&self, rows: usize) -> Option<f64> {
        self.seconds[class(rows)].map(|seconds| seconds / (1_usize << class(rows)) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    #[test]
    fn what_never_ran_is_tried_and_what_was_slower_is_not() {
        let mut cost = Cost::default();
        assert_eq!(cost.rows_worth(1, 16, 32), 16);
        cost.learn(16, 2000 * MICROSECOND);
        assert_eq!(cost.rows_worth(1, 16, 32), 1);
        let mut cost = Cost::default();
        cost.learn(1, 100 * MICROSECOND);
        assert_eq!(cost.rows_worth(1, 16, 32), 16);
        // Sixteen together take as long as twenty alone; so do eight; four are worth it.
        cost.learn(16, 2000 * MICROSECOND);
        cost.learn(8, 1000 * MICROSECOND);
        cost.learn(4, 300 * MICROSECOND);
        assert_eq!(cost.rows_worth(1, 16, 32), 4);
        assert_eq!(cost.rows_worth(1, 3, 32), 3);
        assert_eq!(cost.rows_worth(1, 1, 32), 1);
    }

    #[test]
    fn a_batch_is_never_larger_than_allowed_nor_smaller_than_its_first() {
        let mut cost = Cost::default();
        assert_eq!(cost.rows_worth(1, 100, 8), 8);
        assert_eq!(cost.rows_worth(50, 100, 8), 50);
        cost.learn(50, 50 * MICROSECOND);
        cost.learn(100, 5000 * MICROSECOND);
        // Up to 64 are of the class of 50.
        assert_eq!(cost.rows_worth(50, 100, 200), 64);
    }

    #[test]
    fn a_size_that_was_slower_once_gets_another_chance() {
        let mut cost = Cost::default();
        cost.learn(1, 10 * MICROSECOND);
        cost.learn(2, 1000 * MICROSECOND);
        let worth: Vec<usize> = (0..2 * RETRIAL).map(|_| cost.rows_worth(1, 2, 32)).collect();
        assert_eq!(worth.iter().filter(|&&rows| rows == 2).count(), 1);
    }

    #[test]
    fn predictions_follow_what_was_measured() {
        let mut cost = Cost::default();
        assert_eq!(cost.predict(3), None);
        cost.learn(4, 400 * MICROSECOND);
        assert_eq!(cost.predict(3), Some(300 * MICROSECOND));
        for _ in 0..100 {
            cost.learn(4, 800 * MICROSECOND);
        }
        let predicted = cost.predict(4).unwrap();
        assert!(predicted > 790 * MICROSECOND, "{predicted:?}");
    }
}
