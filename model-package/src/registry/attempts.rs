//! How often a transfer that breaks off is taken up again, and when.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

/// The attempts at one transfer. Between them lie 0.25 s, 0.5 s, 1 s ... up to 8 s, each up to twice as long by chance, so that many Jobs do
/// not come back at once.
#[derive(Debug)]
pub struct Attempts {
    retries: usize,
    delays: ExponentialBackoff,
    done: u64,
}

impl Attempts {
    /// A first attempt, and `retries` more of which none gets anywhere.
    #[must_use]
    pub fn new(retries: usize) -> Self {
        Self {
            retries,
            delays: delays(retries),
            done: 0,
        }
    }

    /// The wait before the next attempt, after one that broke off when `done` bytes had come altogether; `None` where it was the last. A
    /// connection that gets somewhere each time may break as often as it likes.
    pub fn next_delay(&mut self, done: u64) -> Option<Duration> {
        if done > self.done {
            self.delays = delays(self.retries);
        }
        self.done = done;
        self.delays.next()
    }
}

fn delays(retries: usize) -> ExponentialBackoff {
    let builder = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(250))
        .with_max_delay(Duration::from_secs(8));
    builder.with_factor(2.0).with_max_times(retries).with_jitter().build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_attempts_that_get_nowhere_are_counted() {
        let mut attempts = Attempts::new(2);
        for done in 1..10 {
            assert!(attempts.next_delay(done).is_some());
        }
        assert!(attempts.next_delay(9).is_some());
        assert_eq!(attempts.next_delay(9), None);
    }

    #[test]
    fn waits_grow_up_to_a_limit() {
        let mut attempts = Attempts::new(10);
        let waits: Vec<Duration> = std::iter::from_fn(|| attempts.next_delay(0)).collect();
        assert_eq!(waits.len(), 10);
        assert!(
            waits[0] < Duration::from_millis(501) && waits[9] >= Duration::from_secs(8),
            "{waits:?}"
        );
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(16)), "{waits:?}");
    }
}
