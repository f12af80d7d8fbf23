//! A share of the requests, evenly spread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Takes a share of what comes by.
#[derive(Debug)]
pub(super) struct Share {
    share: f64,
    seen: AtomicU64,
}

impl Share {
    /// Of 0 to 1.
    pub(super) fn new(share: f64) -> Self {
        Self {
            share,
            seen: AtomicU64::new(0),
        }
    }

    /// Whether this one is taken: evenly spread, so that the share is exact.
    pub(super) fn takes(&self) -> bool {
        let seen = self.seen.fetch_add(1, Ordering::Relaxed) as f64;
        ((seen + 1.0) * self.share).floor() > (seen * self.share).floor()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_exact_and_spread_evenly() {
        for (share, expected) in [(0.05, 50), (1.0, 1000), (0.0, 0), (0.333, 333)] {
            let taken = Share::new(share);
            let taken: Vec<bool> = (0..1000).map(|_| taken.takes()).collect();
            assert_eq!(taken.iter().filter(|&&taken| taken).count(), expected, "{share}");
            if share == 0.05 {
                assert!(taken.chunks(20).all(|part| part.iter().filter(|&&taken| taken).count() == 1));
            }
        }
    }
}
