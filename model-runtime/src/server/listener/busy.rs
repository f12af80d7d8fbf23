//! Busy polling, as Linux' `net.core.busy_poll` does it for sockets: the thread that answered looks for the next request for a while before
//! it sleeps. A processor that has halted, in a virtual machine above all, takes longer to wake up than a small inference.
//!
//! Clients that are far away or seldom ask cost nothing by it: every look in vain halves how often is looked, down to one answer of
//! [`PAUSE_MAX`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Most answers after which is not looked, between two looks.
const PAUSE_MAX: u32 = 64;

/// How long is looked for a request, and which answer was the latest of all connections.
#[derive(Debug)]
pub(super) struct BusyPoll {
    window: Duration,
    epoch: Instant,
    /// When the answer was given after which is looked, in nanoseconds since the epoch; 0 where nobody looks, as once another request came:
    /// whoever serves that does not sleep.
    latest: AtomicU64,
    /// Answers until the next look.
    pause: AtomicU32,
    /// How many there were before the latest one, plus one.
    pace: AtomicU32,
}

/// A connection's view of it.
#[derive(Debug)]
pub(super) struct Lookout {
    shared: Arc<BusyPoll>,
    /// When its own latest answer was given.
    answered: AtomicU64,
}

impl BusyPoll {
    /// Without a window nothing is looked for.
    pub(super) fn new(window: Duration) -> Arc<Self> {
        Arc::new(Self {
            window,
            epoch: Instant::now(),
            latest: AtomicU64::new(0),
            pause: AtomicU32::new(0),
            pace: AtomicU32::new(1),
        })
    }

    /// Of a new connection.
    pub(super) fn lookout(self: &Arc<Self>) -> Lookout {
        Lookout {
            shared: Arc::clone(self),
            answered: AtomicU64::new(0),
        }
    }

    /// Whether the latest answer is one to look after.
    fn is_due(&self) -> bool {
        let fewer = |pause: u32| pause.checked_sub(1);
        self.pause.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_err()
    }

    /// Nothing came while that answer was the latest.
    fn in_vain(&self, answered: u64) {
        let ended = self.latest.compare_exchange(answered, 0, Ordering::Relaxed, Ordering::Relaxed);
        if ended.is_ok() {
            let pace = (2 * self.pace.load(Ordering::Relaxed)).min(PAUSE_MAX);
            self.pace.store(pace, Ordering::Relaxed);
            self.pause.store(pace - 1, Ordering::Relaxed);
        }
    }
}

impl Lookout {
    /// A request came.
    pub(super) fn asked(&self) {
        let shared = &*self.shared;
        if !shared.window.is_zero() && shared.latest.swap(0, Ordering::Relaxed) != 0 {
            shared.pace.store(1, Ordering::Relaxed);
        }
    }

    /// It is answered at `now`.
    pub(super) fn answered(&self, now: Instant) {
        if !self.shared.window.is_zero() && self.shared.is_due() {
            let at = self.since_epoch(now);
            self.answered.store(at, Ordering::Relaxed);
            self.shared.latest.store(at, Ordering::Relaxed);
        }
    }

    /// Whether this connection's thread is to look further at `now`: where its answer was the latest, and just given.
    pub(super) fn looks(&self, now: impl FnOnce() -> Instant) -> bool {
        let answered = self.answered.load(Ordering::Relaxed);
        if answered == 0 || answered != self.shared.latest.load(Ordering::Relaxed) {
            return false;
        }
        let looks = u128::from(self.since_epoch(now()) - answered) < self.shared.window.as_nanos();
        if !looks {
            self.shared.in_vain(answered);
        }
        looks
    }

    fn since_epoch(&self, now: Instant) -> u64 {
        let nanos = now.saturating_duration_since(self.shared.epoch).as_nanos();
        u64::try_from(nanos).unwrap_or(u64::MAX).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_latest_answer_is_followed_by_a_look_and_only_for_a_while() {
        let polling = BusyPoll::new(Duration::from_micros(100));
        let (one, two) = (polling.lookout(), polling.lookout());
        let at = |micros| polling.epoch + Duration::from_micros(micros);
        assert!(!one.looks(|| at(10)), "it has answered nothing");
        one.asked();
        one.answered(at(20));
        assert!(one.looks(|| at(119)) && !two.looks(|| at(30)));
        assert!(!one.looks(|| at(120)), "the time is over");
    }

    #[test]
    fn one_thread_looks_at_a_time_and_none_while_one_is_at_work() {
        let polling = BusyPoll::new(Duration::from_micros(100));
        let (one, two) = (polling.lookout(), polling.lookout());
        let at = |micros| polling.epoch + Duration::from_micros(micros);
        one.answered(at(20));
        two.answered(at(30));
        assert!(two.looks(|| at(40)) && !one.looks(|| at(40)));
        one.asked();
        assert!(!two.looks(|| at(40)));
    }

    #[test]
    fn looks_in_vain_become_rare_and_a_request_in_time_brings_them_back() {
        let polling = BusyPoll::new(Duration::from_micros(100));
        let lookout = polling.lookout();
        let at = |micros| polling.epoch + Duration::from_micros(micros);
        let mut looked = vec![];
        for answer in 1..=300_u64 {
            lookout.asked();
            lookout.answered(at(1000 * answer));
            if lookout.looks(|| at(1000 * answer + 50)) {
                looked.push(answer);
                assert!(!lookout.looks(|| at(1000 * answer + 100)));
            }
        }
        assert_eq!(looked, [1, 3, 7, 15, 31, 63, 127, 191, 255]);
        // Until a client asks again soon.
        let due = (301..).find(|&answer| {
            lookout.answered(at(1000 * answer));
            lookout.looks(|| at(1000 * answer + 50))
        });
        assert_eq!(due, Some(319));
        lookout.asked();
        lookout.answered(at(319_080));
        assert!(lookout.looks(|| at(319_090)));
    }

    #[test]
    fn without_a_window_nothing_is_looked_for() {
        let polling = BusyPoll::new(Duration::ZERO);
        let lookout = polling.lookout();
        lookout.asked();
        lookout.answered(polling.epoch);
        assert!(!lookout.looks(|| polling.epoch));
    }
}
