//! The statistics extension (Triton, "Statistics Extension"): how many requests there were and where their time went, since the start.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Where the time of a request went that succeeded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Compute {
    /// Rows of the batch that it ran in.
    pub(super) rows: usize,
    /// Whether it stands for the batch.
    pub(super) first: bool,
    /// From its headers to its tensors.
    pub(super) input: Duration,
    /// In line.
    pub(super) queue: Duration,
    /// In the engine.
    pub(super) infer: Duration,
    /// From the engine to the outputs that were asked for.
    pub(super) output: Duration,
}

/// A count, and the sum of its durations in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Total {
    pub(super) count: u64,
    pub(super) ns: u64,
}

impl Total {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.ns = self.ns.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// Totals of requests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Totals {
    pub(super) success: Total,
    pub(super) fail: Total,
    pub(super) queue: Total,
    pub(super) compute_input: Total,
    pub(super) compute_infer: Total,
    pub(super) compute_output: Total,
}

/// Totals of batches of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct BatchTotals {
    pub(super) batch_size: usize,
    pub(super) compute_input: Total,
    pub(super) compute_infer: Total,
    pub(super) compute_output: Total,
}

/// What is told about a model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Snapshot {
    /// Milliseconds since 1970 to the last request; 0 before the first.
    pub(super) last_inference: u64,
    /// Rows that were computed.
    pub(super) inference_count: u64,
    /// Batches that were computed.
    pub(super) execution_count: u64,
    pub(super) inference_stats: Totals,
    pub(super) batch_stats: Vec<BatchTotals>,
}

/// The totals since the start.
#[derive(Debug, Default)]
pub(super) struct Statistics(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    snapshot: Snapshot,
    batches: BTreeMap<usize, BatchTotals>,
}

/// Most sizes of batches that are told apart; requests of any number of rows may come, and all beyond count with the largest.
const SIZES_MAX: usize = 128;

impl Statistics {
    pub(super) fn computed(&self, compute: &Compute) {
        let mut state = self.lock();
        let totals = &mut state.snapshot.inference_stats;
        totals.queue.add(compute.queue);
        totals.compute_input.add(compute.input);
        totals.compute_infer.add(compute.infer);
        totals.compute_output.add(compute.output);
        if compute.first {
            state.snapshot.execution_count += 1;
            state.snapshot.inference_count += compute.rows as u64;
            let known = state.batches.len() < SIZES_MAX || state.batches.contains_key(&compute.rows);
            let size = if known {
                Some(compute.rows)
            } else {
                state.batches.keys().next_back().copied()
            };
            let batch = state.batches.entry(size.unwrap_or(compute.rows)).or_default();
            batch.compute_input.add(compute.input);
            batch.compute_infer.add(compute.infer);
            batch.compute_output.add(compute.output);
        }
    }

    /// Counts a request as a whole.
    pub(super) fn answered(&self, succeeded: bool, took: Duration) {
        let mut state = self.lock();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        state.snapshot.last_inference = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let totals = &mut state.snapshot.inference_stats;
        let total = if succeeded { &mut totals.success } else { &mut totals.fail };
        total.add(took);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let batches = state.batches.iter().map(|(&batch_size, totals)| BatchTotals {
            batch_size,
            ..totals.clone()
        });
        Snapshot {
            batch_stats: batches.collect(),
            ..state.snapshot.clone()
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_counts_once_and_its_requests_each() {
        let statistics = Statistics::default();
        let compute = Compute {
            rows: 3,
            first: true,
            input: Duration::from_nanos(1),
            queue: Duration::from_nanos(10),
            infer: Duration::from_nanos(100),
            output: Duration::from_nanos(1000),
        };
        statistics.computed(&compute);
        statistics.computed(&Compute { first: false, ..compute });
        statistics.answered(true, Duration::from_nanos(7));
        statistics.answered(true, Duration::from_nanos(7));
        statistics.answered(false, Duration::from_nanos(9));
        let snapshot = statistics.snapshot();
        assert!(snapshot.last_inference > 0);
        assert_eq!((snapshot.inference_count, snapshot.execution_count), (3, 1));
        let total = |count, ns| Total { count, ns };
        assert_eq!(
            snapshot.inference_stats,
            Totals {
                success: total(2, 14),
                fail: total(1, 9),
                queue: total(2, 20),
                compute_input: total(2, 2),
                compute_infer: total(2, 200),
                compute_output: total(2, 2000),
            }
        );
        assert_eq!((snapshot.batch_stats.len(), snapshot.batch_stats[0].batch_size), (1, 3));
        assert_eq!(snapshot.batch_stats[0].compute_infer, total(1, 100));
    }

    #[test]
    fn sizes_are_bounded() {
        let statistics = Statistics::default();
        for rows in 1..=2 * SIZES_MAX {
            statistics.computed(&Compute {
                rows,
                first: true,
                input: Duration::ZERO,
                queue: Duration::ZERO,
                infer: Duration::ZERO,
                output: Duration::ZERO,
            });
        }
        assert_eq!(statistics.snapshot().batch_stats.len(), SIZES_MAX);
    }
}
