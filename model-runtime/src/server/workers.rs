//! The threads that run the model: inference never runs on a thread of the async runtime.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::engine::{Engine, EngineError, Tensor};

/// One thread for each engine, fed by one bounded queue.
pub(super) struct Workers {
    queue: SyncSender<Job>,
}

struct Job {
    inputs: Vec<Tensor>,
    queued: Instant,
    reply: oneshot::Sender<Answer>,
}

/// What became of an inference.
pub(super) struct Answer {
    pub(super) outputs: Result<Vec<Tensor>, EngineError>,
    /// How long it waited for a thread.
    pub(super) waited: Duration,
    /// How long the engine ran.
    pub(super) ran: Duration,
}

/// Why an inference was not taken on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The queue is full.
    Full,
    /// No thread is left.
    Stopped,
}

impl Workers {
    pub(super) fn start(engines: Vec<Arc<dyn Engine>>, queue_length_max: usize) -> Self {
        let (queue, jobs) = sync_channel(queue_length_max);
        let jobs = Arc::new(Mutex::new(jobs));
        for engine in engines {
            let jobs = Arc::clone(&jobs);
            thread::spawn(move || run(&*engine, &jobs));
        }
        Self { queue }
    }

    /// Queues an inference; the answer comes through the receiver. Dropping the receiver cancels it while it still waits.
    pub(super) fn submit(&self, inputs: Vec<Tensor>) -> Result<oneshot::Receiver<Answer>, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.queue
            .try_send(Job {
                inputs,
                queued: Instant::now(),
                reply,
            })
            .map_err(|error| match error {
                TrySendError::Full(_) => Refusal::Full,
                TrySendError::Disconnected(_) => Refusal::Stopped,
            })?;
        Ok(answer)
    }
}

fn run(engine: &dyn Engine, jobs: &Mutex<Receiver<Job>>) {
    loop {
        // The lock is given back before the job runs, so that the next thread can wait for the next job.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        if job.reply.is_closed() {
            continue;
        }
        let waited = job.queued.elapsed();
        let started = Instant::now();
        let outputs = engine.run(&job.inputs);
        // Where the client has gone meanwhile, nobody takes the answer.
        let _ = job.reply.send(Answer {
            outputs,
            waited,
            ran: started.elapsed(),
        });
    }
}
