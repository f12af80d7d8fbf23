//! Clients of the model: those that ask it without a pause while its versions change and count what fails, and the one that asks until it is
//! answered for the first time.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::digit::{HeldOut, Prediction};
use super::gateway::Client;

/// Clients at one time.
const CLIENTS: usize = 4;
/// What a client waits between an answer and its next request: the demo shows that none is lost, not how many fit.
const PAUSE: Duration = Duration::from_millis(5);
/// What the one that waits for the first answer waits between two attempts.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(50);

/// Running clients.
pub(super) struct Traffic {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stopped: AtomicBool,
    total: AtomicU64,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
}

/// What the clients saw.
#[derive(Default)]
pub(super) struct Counted {
    pub(super) total: u64,
    pub(super) failed: u64,
    pub(super) first_failure: Option<String>,
}

impl Traffic {
    /// Starts the clients.
    pub(super) fn start(client: &Client, path: &str, held_out: &HeldOut) -> Self {
        let shared = Arc::new(Shared::default());
        let clients = (0..CLIENTS)
            .map(|number| {
                let (client, path, held_out, shared) = (client.clone(), path.to_owned(), held_out.clone(), Arc::clone(&shared));
                std::thread::spawn(move || {
                    for index in (number..).step_by(CLIENTS).map(|index| index % held_out.count()) {
                        if shared.stopped.load(Ordering::Relaxed) {
                            break;
                        }
                        shared.count(held_out.ask(&client, &path, index).map(drop));
                        std::thread::sleep(PAUSE);
                    }
                })
            })
            .collect();
        Self { shared, clients }
    }

    /// Stops the clients after the requests that they have under way.
    pub(super) fn stop(self) -> Counted {
        self.shared.stopped.store(true, Ordering::Relaxed);
        for client in self.clients {
            if client.join().is_err() {
                self.shared.count(Err(anyhow::anyhow!("a client died")));
            }
        }
        Counted {
            total: self.shared.total.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
            first_failure: self.shared.first_failure.lock().ok().and_then(|mut first| first.take()),
        }
    }
}

impl Shared {
    fn count(&self, result: anyhow::Result<()>) {
        self.total.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = result {
            self.failed.fetch_add(1, Ordering::Relaxed);
            if let Ok(mut first) = self.first_failure.lock() {
                first.get_or_insert_with(|| format!("{error:#}"));
            }
        }
    }
}

/// A client that asks from now on until the model answers for the first time.
pub(super) struct FirstAnswer {
    ready: Arc<AtomicBool>,
    client: JoinHandle<Result<(Instant, Prediction)>>,
}

impl FirstAnswer {
    /// Starts the client.
    pub(super) fn wait(client: &Client, path: &str, held_out: &HeldOut) -> Self {
        let ready = Arc::new(AtomicBool::new(false));
        let (client, path, held_out, told) = (client.clone(), path.to_owned(), held_out.clone(), Arc::clone(&ready));
        let client = std::thread::spawn(move || {
            loop {
                // Looked at first: an attempt that began before the model was ready may fail.
                let last = told.load(Ordering::Relaxed);
                match held_out.ask(&client, &path, held_out.any()) {
                    Ok(prediction) => return Ok((Instant::now(), prediction)),
                    Err(error) if last => return Err(error),
                    Err(_) => std::thread::sleep(ATTEMPT_PAUSE),
                }
            }
        });
        Self { ready, client }
    }

    /// When the first answer came, and what it was. To be called when the model is ready: it is asked once more at most.
    ///
    /// # Errors
    /// Where that last attempt is not answered.
    pub(super) fn take(self) -> Result<(Instant, Prediction)> {
        self.ready.store(true, Ordering::Relaxed);
        self.client.join().map_err(|_| anyhow!("the client died"))?
    }
}
