//! Connections stay on their thread.
//!
//! hyper wakes a connection's task from within the task itself, whenever a body is taken. tokio puts a task that is woken while it runs at the
//! end of its queue and wakes another thread to steal it from there: with one request at a time, every one of them would move the connection
//! to another processor.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::task::AtomicWaker;

/// Polls in a row; woken in the last of them, it takes its turn among other tasks.
const POLLS_MAX: u32 = 2;

const IDLE: u8 = 0;
const POLLED: u8 = 1;
const WOKEN: u8 = 2;

/// Passes on what wakes a future, but while it is polled.
#[derive(Default)]
struct Relay {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for Relay {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let set = |state| (state != IDLE).then_some(WOKEN);
        if self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, set).is_err() {
            self.task.wake();
        }
    }
}

/// A future that is polled again at once where it was woken while it was polled.
pub(super) struct Relayed<F> {
    future: Pin<Box<F>>,
    relay: Arc<Relay>,
    waker: Waker,
}

impl<F> Relayed<F> {
    pub(super) fn new(future: F) -> Self {
        let relay = Arc::new(Relay::default());
        Self {
            future: Box::pin(future),
            waker: Arc::clone(&relay).into(),
            relay,
        }
    }
}

impl<F: Future> Future for Relayed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<F::Output> {
        let Self { future, relay, waker } = &mut *self;
        relay.task.register(task.waker());
        for _ in 0..POLLS_MAX {
            relay.state.store(POLLED, Ordering::Release);
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(waker)) {
                return Poll::Ready(output);
            }
            let asleep = relay.state.compare_exchange(POLLED, IDLE, Ordering::AcqRel, Ordering::Acquire);
            if asleep.is_ok() {
                return Poll::Pending;
            }
        }
        relay.state.store(IDLE, Ordering::Release);
        task.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often a future was polled, and its task woken, when it woke itself in the first so many polls.
    fn run(wakes: usize) -> (usize, usize) {
        let (mut polls, count) = (0, Arc::new(Count::default()));
        let waker = Waker::from(Arc::clone(&count));
        let future = poll_fn(|context| {
            polls += 1;
            if polls <= wakes {
                context.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        });
        assert!(pin!(Relayed::new(future)).poll(&mut Context::from_waker(&waker)).is_pending());
        (polls, count.0.load(Ordering::Relaxed))
    }

    #[test]
    fn a_future_that_wakes_itself_is_polled_again_and_then_waits_its_turn() {
        assert_eq!([0, 1, 2, 9].map(run), [(1, 0), (2, 0), (2, 1), (2, 1)]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_from_elsewhere_is_lost() {
        for round in 0..20_000_u32 {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let waiting = tokio::spawn(Relayed::new(async move { receiver.await.unwrap_or_default() }));
            let sending = tokio::spawn(async move { sender.send(round) });
            assert_eq!(sending.await.unwrap(), Ok(()));
            assert_eq!(waiting.await.unwrap(), round);
        }
    }
}
