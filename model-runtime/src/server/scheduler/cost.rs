//! What batches cost: learnt from those that ran, so that requests are joined only where that serves them sooner.

use std::time::Duration;

/// Sizes are kept by powers of two: 1, 2, 3-4, 5-8, ... up to 2^15 and beyond.
const CLASSES: usize = 17;

/// Measurements that are kept of each class.
const RECENT: usize = 8;

/// Measurements without which nothing is concluded from a class.
const TRIALS: usize = 3;

/// How much more a row may cost in a batch than alone before the batch counts as slower: measurements are noisy.
const SLACK: f64 = 1.05;

/// After so many decisions one is made against what was learnt, by turns alone and in the largest batch: the machine may have been busy
/// when either was measured.
const RETRIAL: u32 = 256;

/// The cost of batches of one form, by their number of rows.
#[derive(Debug, Clone, Default)]
pub(super) struct Cost {
    classes: [Recent; CLASSES],
    decisions: u32,
}

/// The latest measurements of a class, in seconds, scaled to its full size.
#[derive(Debug, Clone, Copy, Default)]
struct Recent {
    seconds: [f64; RECENT],
    count: usize,
}

impl Recent {
    fn push(&mut self, seconds: f64) {
        self.seconds[self.count % RECENT] = seconds;
        self.count += 1;
    }

    fn known(&self) -> &[f64] {
        &self.seconds[..self.count.min(RECENT)]
    }

    /// What others do on the machine makes a batch slower and never quicker: the least is what the batch itself takes.
    fn least(&self) -> f64 {
        self.known().iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn median(&self) -> Option<f64> {
        let mut sorted = self.seconds;
        let sorted = &mut sorted[..self.count.min(RECENT)];
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }
}

fn class(rows: usize) -> usize {
    (rows.max(1).next_power_of_two().trailing_zeros() as usize).min(CLASSES - 1)
}

/// Rows of a full class.
fn full(class: usize) -> f64 {
    (1_u32 << class) as f64
}

impl Cost {
    /// Takes in what a batch of so many rows took.
    pub(super) fn learn(&mut self, rows: usize, took: Duration) {
        // Scaled, so that the members of a class are comparable.
        let scale = full(class(rows)) / rows.max(1) as f64;
        self.classes[class(rows)].push(took.as_secs_f64() * scale);
    }

    /// What a batch of so many rows will take, where one of its class ran before.
    pub(super) fn predict(&self, rows: usize) -> Option<Duration> {
        let seconds = self.classes[class(rows)].median()?;
        Some(Duration::from_secs_f64(seconds * rows.max(1) as f64 / full(class(rows))))
    }

    /// The most rows worth joining, of at most `available` and `max`, where the request at the head of the line has `first`: the largest
    /// size at which a row costs no more than at `first`. What was not measured often enough is tried.
    pub(super) fn rows_worth(&mut self, first: usize, available: usize, max: usize) -> usize {
        self.decisions = self.decisions.wrapping_add(1);
        let most = available.min(max).max(first);
        let trials = |rows: usize| self.classes[class(rows)].count;
        if trials(first) < TRIALS {
            return if trials(most) <= trials(first) { most } else { first };
        }
        if self.decisions.is_multiple_of(RETRIAL) {
            return if self.decisions.is_multiple_of(2 * RETRIAL) { most } else { first };
        }
        let alone = self.row(first) * SLACK;
        let mut rows = most;
        while rows > first {
            if trials(rows) < TRIALS || self.row(rows) <= alone {
                return rows;
            }
            rows = (1 << class(rows)) / 2;
        }
        first
    }

    /// What a row costs in a batch of so many.
    fn row(&self, rows: usize) -> f64 {
        self.classes[class(rows)].least() / full(class(rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    fn learn(cost: &mut Cost, rows: usize, micros: u32) {
        (0..TRIALS).for_each(|_| cost.learn(rows, micros * MICROSECOND));
    }

    #[test]
    fn what_was_not_measured_is_tried_by_turns_with_what_it_is_compared_with() {
        let mut cost = Cost::default();
        let tried: Vec<usize> = (0..6)
            .map(|_| {
                let rows = cost.rows_worth(1, 16, 32);
                cost.learn(rows, MICROSECOND);
                rows
            })
            .collect();
        assert_eq!(tried, [16, 1, 16, 1, 16, 1]);
    }

    #[test]
    fn the_largest_size_that_serves_sooner_is_taken() {
        let mut cost = Cost::default();
        learn(&mut cost, 1, 100);
        // Sixteen together take as long as twenty alone; so do eight; four are worth it.
        learn(&mut cost, 16, 2000);
        learn(&mut cost, 8, 1000);
        learn(&mut cost, 4, 300);
        assert_eq!(cost.rows_worth(1, 16, 32), 4);
        assert_eq!(cost.rows_worth(1, 3, 32), 3);
        assert_eq!(cost.rows_worth(1, 1, 32), 1);
    }

    #[test]
    fn a_batch_is_never_larger_than_allowed_nor_smaller_than_its_first() {
        let mut cost = Cost::default();
        assert_eq!(cost.rows_worth(1, 100, 8), 8);
        assert_eq!(cost.rows_worth(50, 100, 8), 50);
        learn(&mut cost, 50, 50);
        learn(&mut cost, 100, 5000);
        // Up to 64 are of the class of 50.
        assert_eq!(cost.rows_worth(50, 100, 200), 64);
    }

    #[test]
    fn on_a_busy_machine_the_choice_is_the_same() {
        // By cost: a row is dearer the more there are, and cheaper.
        for (micros, best) in [((|rows| rows * rows * 100) as fn(u32) -> u32, 1), (|rows| 100 + rows, 16)] {
            let mut cost = Cost::default();
            let mut seed = 7_u32;
            let mut chosen = 0;
            for _ in 0..1000 {
                let rows = cost.rows_worth(1, 16, 32);
                chosen += usize::from(rows == best);
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Every third run is held up by others, up to fifty times as long.
                let held_up = if seed.is_multiple_of(3) { (seed >> 16) % 50 + 1 } else { 1 };
                cost.learn(rows, micros(rows as u32) * held_up * MICROSECOND);
            }
            assert!(chosen > 950, "{chosen} of 1000 for {best}");
        }
    }

    #[test]
    fn a_size_that_was_slower_gets_another_chance() {
        let mut cost = Cost::default();
        learn(&mut cost, 1, 10);
        learn(&mut cost, 2, 1000);
        let worth: Vec<usize> = (0..2 * RETRIAL).map(|_| cost.rows_worth(1, 2, 32)).collect();
        assert_eq!(worth.iter().filter(|&&rows| rows == 2).count(), 1);
    }

    #[test]
    fn predictions_follow_what_was_measured_lately() {
        let mut cost = Cost::default();
        assert_eq!(cost.predict(3), None);
        cost.learn(4, 400 * MICROSECOND);
        assert_eq!(cost.predict(3), Some(300 * MICROSECOND));
        (0..RECENT).for_each(|_| cost.learn(4, 800 * MICROSECOND));
        assert_eq!(cost.predict(4), Some(800 * MICROSECOND));
    }
}
