//! The threads that serve connections, each with an event loop of its own. A connection stays on the one that it was given to: nothing of a
//! request moves between processors, and nobody is woken to look for work.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use super::busy::Lookout;

/// Shorter than the timeouts of requests, as a rule.
const TICK: Duration = Duration::from_millis(500);

/// The threads; they end when this is dropped.
pub(in crate::server) struct Threads(Vec<Thread>);

struct Thread {
    events: Handle,
    /// Held by each connection there.
    token: Arc<()>,
    _alive: oneshot::Sender<()>,
}

impl Threads {
    /// Starts so many.
    ///
    /// # Errors
    /// Where the system has no more of them, or no event queue.
    pub(in crate::server) fn start(count: usize) -> io::Result<Self> {
        (0..count).map(|_| Thread::start()).collect::<io::Result<_>>().map(Self)
    }

    /// Serves a connection on the thread that has the fewest.
    pub(super) fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let Some(thread) = self.0.iter().min_by_key(|thread| thread.open()) else {
            return;
        };
        let token = Arc::clone(&thread.token);
        thread.events.spawn(async move {
            connection.await;
            drop(token);
        });
    }
}

impl Thread {
    fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let events = runtime.handle().clone();
        let (alive, mut gone) = oneshot::channel::<()>();
        thread::Builder::new().name("connections".to_owned()).spawn(move || {
            runtime.block_on(async {
                // A timer that is due before those of requests: where a request's own is the first that is due, setting it wakes the event
                // loop, by system calls that take as long as a small inference.
                while tokio::time::timeout(TICK, &mut gone).await.is_err() {}
            });
            // A thread that is still reading a body must not hold up the exit.
            runtime.shutdown_background();
        })?;
        Ok(Self {
            events,
            token: Arc::default(),
            _alive: alive,
        })
    }

    /// How many connections it has.
    fn open(&self) -> usize {
        Arc::strong_count(&self.token) - 1
    }
}

/// A connection's future, whose thread does not sleep as long as its lookout looks.
pub(super) struct Watched<F> {
    connection: Pin<Box<F>>,
    lookout: Arc<Lookout>,
}

impl<F> Watched<F> {
    pub(super) fn new(connection: F, lookout: Arc<Lookout>) -> Self {
        let connection = Box::pin(connection);
        Self { connection, lookout }
    }
}

impl<F: Future> Future for Watched<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<F::Output> {
        let polled = self.connection.as_mut().poll(task);
        if polled.is_pending() && self.lookout.looks(Instant::now) {
            // Wakes this task when the thread has looked for events, which it does without waiting for one then.
            let _ = pin!(tokio::task::yield_now()).poll(task);
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::super::busy::BusyPoll;
    use super::*;

    #[tokio::test]
    async fn connections_go_where_the_fewest_are_and_stay_there() {
        let threads = Threads::start(2).unwrap();
        let (told, mut tells) = tokio::sync::mpsc::unbounded_channel();
        let mut end = vec![];
        let mut connect = || {
            let (ends, ended) = oneshot::channel::<()>();
            end.push(ends);
            let told = told.clone();
            threads.spawn(async move {
                let _ = told.send(thread::current().id());
                tokio::time::sleep(Duration::from_millis(1)).await;
                let _ = told.send(thread::current().id());
                let _ = ended.await;
                let _ = told.send(thread::current().id());
            });
        };
        connect();
        let [first, again] = [tells.recv().await.unwrap(), tells.recv().await.unwrap()];
        assert_eq!(first, again);
        connect();
        let [second, again] = [tells.recv().await.unwrap(), tells.recv().await.unwrap()];
        assert_eq!(second, again);
        assert_ne!(first, second);
        drop(end.remove(0));
        assert_eq!(tells.recv().await, Some(first));
        // The count goes down just after it has told.
        while threads.0.iter().map(Thread::open).sum::<usize>() > 1 {
            tokio::task::yield_now().await;
        }
        let connect = || threads.spawn(std::future::pending());
        connect();
        assert!(threads.0.iter().all(|thread| thread.open() == 1));
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_connection_wakes_itself_as_long_as_its_lookout_looks() {
        let polling = BusyPoll::new(Duration::from_secs(3600));
        let lookout = Arc::new(polling.lookout());
        let mut connection = pin!(Watched::new(std::future::pending::<()>(), Arc::clone(&lookout)));
        let wakes = Arc::new(Wakes::default());
        let waker = Arc::clone(&wakes).into();
        let mut woken = || {
            assert!(connection.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            wakes.0.swap(0, Ordering::Relaxed)
        };
        assert_eq!(woken(), 0);
        lookout.answered(Instant::now());
        assert_eq!([woken(), woken()], [1, 1]);
        lookout.asked();
        assert_eq!(woken(), 0);
    }
}
