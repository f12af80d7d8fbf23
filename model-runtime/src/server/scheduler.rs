//! Which request runs when, on which engine, and together with which others.
//!
//! Requests wait in one [`Line`]. An engine that becomes free takes the first of it, and with it those of the same form that wait already,
//! as far as a row is not dearer in the batch than alone (see [`Cost`]): nothing waits for a batch to fill up unless `delay` says so, and a
//! model that gains nothing by batches gets none.
//!
//! Where a model is so quick that handing it to another thread would take longer than to run it, it runs on the thread that read the
//! request, for at most [`INLINE_MAX`] a run and [`INLINE_RUNS_MAX`] runs in a row. All else runs on a thread of each engine's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::engine::{Engine, EngineError, Tensor};

mod cost;
mod line;

use cost::Cost;
pub(crate) use line::Client;
use line::Line;

/// Longest inference that runs on the thread that read the request: as long as parsing a body of some kilobytes takes.
const INLINE_MAX: Duration = Duration::from_micros(150);

/// Most of them in a row, for others that came meanwhile.
const INLINE_RUNS_MAX: usize = 4;

/// Most forms whose cost is remembered.
const FORMS_MAX: usize = 64;

/// Bounds of a batch.
#[derive(Debug, Clone)]
pub struct Batching {
    /// Most rows of a batch, 1 or more; 1 is no batching. A request with more rows of its own is run as it is.
    pub rows_max: usize,
    /// Most bytes of the inputs of a batch.
    pub bytes_max: usize,
    /// How long a request may wait for others while an engine is free; zero waits for none.
    pub delay: Duration,
}

/// What is to be run, and for whom.
#[derive(Debug)]
pub(super) struct Work {
    /// One tensor for each input of the model, in its order and fitting it.
    pub(super) inputs: Vec<Tensor>,
    pub(super) client: Client,
    /// Lower numbers go first.
    pub(super) priority: u32,
    /// When nobody waits for the answer any more.
    pub(super) deadline: Instant,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Answer {
    /// One tensor for each output of the model, in its order.
    pub(super) outputs: Vec<Tensor>,
    /// How long it waited for an engine.
    pub(super) queued: Duration,
    /// How long the engine took for the batch.
    pub(super) computed: Duration,
    /// Rows of the batch, its own included.
    pub(super) rows: usize,
    /// Whether it stands for its batch where batches are counted.
    pub(super) first: bool,
}

/// Why nothing came of it.
#[derive(Debug)]
pub(super) enum Failure {
    /// The engine failed.
    Engine(EngineError),
    /// Its deadline passed while it waited.
    Late,
}

type Reply = oneshot::Sender<Result<Answer, Failure>>;

/// What requests must have in common to be run together: every dimension but the first, or all where they are run apart.
type Form = Vec<usize>;

struct Job {
    work: Work,
    form: Form,
    /// Rows that it adds to a batch; `None` where it is run apart.
    rows: Option<usize>,
    bytes: usize,
    queued: Instant,
    reply: Reply,
}

/// The engines of a model, and the line before them.
pub(super) struct Scheduler {
    shared: Arc<Shared>,
}

struct Shared {
    engines: Vec<Arc<dyn Engine>>,
    batching: Batching,
    state: Mutex<State>,
    work: Condvar,
    epoch: Instant,
    /// By engine: microseconds from `epoch` to the start of the batch that it runs, plus one; 0 while it runs none.
    running: Vec<AtomicU64>,
}

#[derive(Default)]
struct State {
    line: Line<Job>,
    /// Engines that run nothing.
    free: Vec<usize>,
    costs: HashMap<Form, Cost>,
}

impl Scheduler {
    /// Starts a thread for each engine. `batching.rows_max` above 1 needs a model whose rows are independent (see
    /// [`independence`](crate::engine::independence)).
    pub(super) fn start(engines: Vec<Arc<dyn Engine>>, batching: Batching) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                free: (0..engines.len()).collect(),
                ..State::default()
            }),
            work: Condvar::new(),
            epoch: Instant::now(),
            running: engines.iter().map(|_| AtomicU64::new(0)).collect(),
            engines,
            batching,
        });
        for _ in 0..shared.engines.len() {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.serve());
        }
        Self { shared }
    }

    /// Most rows of a batch; 1 where there is no batching.
    pub(super) fn rows_max(&self) -> usize {
        self.shared.batching.rows_max
    }

    /// Takes on a request; its answer comes through the receiver, at once where it ran on this thread. Dropping the receiver cancels it
    /// while it waits.
    pub(super) fn submit(&self, work: Work) -> oneshot::Receiver<Result<Answer, Failure>> {
        let (reply, answer) = oneshot::channel();
        let job = Job::new(work, self.shared.batching.rows_max > 1, reply);
        self.shared.admit(job);
        answer
    }

    /// For how long the engine has been at work that has been at it longest.
    pub(super) fn busy_for(&self) -> Duration {
        let now = self.shared.epoch.elapsed().as_micros() as u64;
        let began = self.shared.running.iter().map(|began| began.load(Ordering::Relaxed));
        let longest = began.filter(|&began| began > 0).map(|began| now.saturating_sub(began - 1)).max();
        Duration::from_micros(longest.unwrap_or_default())
    }
}

impl Job {
    fn new(work: Work, batching: bool, reply: Reply) -> Self {
        let first = work.inputs.first().and_then(Tensor::rows);
        let together = batching && first.is_some_and(|rows| rows > 0) && work.inputs.iter().all(|input| input.rows() == first);
        let skipped = usize::from(together);
        // Ranks are the model's, so that the dimensions in a row tell shapes apart.
        let form = work.inputs.iter().flat_map(|input| &input.shape()[skipped..]).copied().collect();
        Self {
            bytes: work.inputs.iter().map(|input| input.data().byte_count()).sum(),
            rows: first.filter(|_| together),
            form,
            queued: Instant::now(),
            reply,
            work,
        }
    }

    /// Rows as batches are counted.
    fn count(&self) -> usize {
        self.rows.unwrap_or(1)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that runs under it panics halfway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, job: Job) {
        let mut state = self.lock();
        let quick = state.line.is_empty() && self.batching.delay.is_zero() && state.is_quick(&job.form, job.count());
        if quick && let Some(engine) = state.free.pop() {
            drop(state);
            self.run(engine, vec![job], INLINE_RUNS_MAX);
            return;
        }
        state.line.push(job.work.priority, job.work.client, job);
        if !state.free.is_empty() {
            drop(state);
            self.work.notify_one();
        }
    }

    /// The life of an engine's thread.
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if state.free.is_empty() || state.line.is_empty() {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if let Some(left) = state.wait_for_more(&self.batching) {
                state = self.work.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let batch = state.next_batch(&self.batching);
            // Nobody may be left who waits; then the engine stays free.
            if !batch.is_empty()
                && let Some(engine) = state.free.pop()
            {
                drop(state);
                self.run(engine, batch, 0);
                state = self.lock();
            }
        }
    }

    /// Runs a batch, and up to `more` of what came meanwhile where it is as quick; then the engine is free again.
    fn run(&self, engine: usize, mut batch: Vec<Job>, mut more: usize) {
        loop {
            let (form, rows) = (batch[0].form.clone(), batch.iter().map(Job::count).sum());
            let done = self.execute(engine, batch);
            let mut state = self.lock();
            if let Some(took) = done.took {
                state.learn(form, rows, took);
            }
            batch = if more > 0 { state.next_quick(&self.batching) } else { vec![] };
            if batch.is_empty() {
                state.free.push(engine);
            }
            let waiting = batch.is_empty() && !state.line.is_empty();
            drop(state);
            // Whoever hears of it and asks again finds the engine as it is now.
            done.replies.into_iter().for_each(|(reply, answer)| drop(reply.send(answer)));
            if waiting {
                self.work.notify_one();
            }
            if batch.is_empty() {
                return;
            }
            more -= 1;
        }
    }

    fn execute(&self, engine: usize, batch: Vec<Job>) -> Done {
        let begun = Instant::now();
        self.running[engine].store((begun - self.epoch).as_micros() as u64 + 1, Ordering::Relaxed);
        let model = &*self.engines[engine];
        let done = match <[Job; 1]>::try_from(batch) {
            Ok([job]) => run_alone(model, job),
            Err(batch) => match run_together(model, &batch) {
                Ok(outputs) => {
                    let computed = begun.elapsed();
                    let rows = batch.iter().map(Job::count).sum();
                    let jobs = batch.into_iter().zip(outputs).enumerate();
                    let replies = jobs.map(|(index, (job, outputs))| job.answer(Ok(outputs), begun, computed, rows, index == 0));
                    Done {
                        took: Some(computed),
                        replies: replies.collect(),
                    }
                }
                // One of them may be what fails: it alone is told so.
                Err(_) => Done {
                    took: None,
                    replies: batch.into_iter().flat_map(|job| run_alone(model, job).replies).collect(),
                },
            },
        };
        self.running[engine].store(0, Ordering::Relaxed);
        done
    }
}

/// What came of a batch.
struct Done {
    /// What the engine took, where it succeeded.
    took: Option<Duration>,
    replies: Vec<(Reply, Result<Answer, Failure>)>,
}

fn run_alone(model: &dyn Engine, job: Job) -> Done {
    let begun = Instant::now();
    let outputs = model.run(&job.work.inputs);
    let (computed, rows) = (begun.elapsed(), job.count());
    Done {
        took: outputs.is_ok().then_some(computed),
        replies: vec![job.answer(outputs, begun, computed, rows, true)],
    }
}

/// The outputs of each of the jobs, computed in one inference.
fn run_together(model: &dyn Engine, jobs: &[Job]) -> Result<Vec<Vec<Tensor>>, EngineError> {
    let inputs: Vec<Tensor> = (0..model.inputs().len())
        .map(|input| Tensor::join(&jobs.iter().map(|job| &job.work.inputs[input]).collect::<Vec<_>>()))
        .collect();
    let rows: Vec<usize> = jobs.iter().map(Job::count).collect();
    let mut parted: Vec<Vec<Tensor>> = jobs.iter().map(|_| Vec::with_capacity(model.outputs().len())).collect();
    for (spec, output) in model.outputs().iter().zip(model.run(&inputs)?) {
        let parts = output.part(&rows).ok_or_else(|| EngineError::Run {
            engine: model.kind(),
            reason: format!("output `{}` of a batch has not as many rows as its inputs", spec.name),
        })?;
        for (of_job, part) in parted.iter_mut().zip(parts) {
            of_job.push(part);
        }
    }
    Ok(parted)
}

impl Job {
    fn answer(
        self,
        outputs: Result<Vec<Tensor>, EngineError>,
        begun: Instant,
        computed: Duration,
        rows: usize,
        first: bool,
    ) -> (Reply, Result<Answer, Failure>) {
        let queued = begun.saturating_duration_since(self.queued);
        let answer = outputs.map_err(Failure::Engine).map(|outputs| Answer {
            outputs,
            queued,
            computed,
            rows,
            first,
        });
        (self.reply, answer)
    }
}

impl State {
    fn is_quick(&self, form: &Form, rows: usize) -> bool {
        let predicted = self.costs.get(form).and_then(|cost| cost.predict(rows));
        predicted.is_some_and(|predicted| predicted <= INLINE_MAX)
    }

    fn learn(&mut self, form: Form, rows: usize, took: Duration) {
        if self.costs.len() >= FORMS_MAX && !self.costs.contains_key(&form) {
            // Clients that send ever new shapes learn nothing lasting.
            self.costs.clear();
        }
        self.costs.entry(form).or_default().learn(rows, took);
    }

    /// How much longer a batch may fill up; `None` where one is to run now.
    fn wait_for_more(&self, batching: &Batching) -> Option<Duration> {
        let oldest = self.line.iter().map(|job| job.queued).min().filter(|_| !batching.delay.is_zero())?;
        let rows: usize = self.line.iter().map(Job::count).sum();
        let left = batching.delay.checked_sub(oldest.elapsed())?;
        (rows < batching.rows_max).then_some(left)
    }

    /// The first in line that somebody still waits for, and with it those that it is worth running with.
    fn next_batch(&mut self, batching: &Batching) -> Vec<Job> {
        let Some(first) = self.next_job(|_| true) else { return vec![] };
        let mut batch = vec![first];
        let form = batch[0].form.clone();
        let Some(mut rows) = batch[0].rows else { return batch };
        let waiting: usize = self.line.iter().filter(|job| job.form == form).filter_map(|job| job.rows).sum();
        if waiting == 0 {
            return batch;
        }
        let worth = self
            .costs
            .entry(form.clone())
            .or_default()
            .rows_worth(rows, rows + waiting, batching.rows_max);
        let mut bytes = batch[0].bytes;
        while rows < worth {
            let (rows_left, bytes_left) = (worth - rows, batching.bytes_max.saturating_sub(bytes));
            let fits = |job: &Job| job.form == form && job.rows.is_some_and(|rows| rows <= rows_left) && job.bytes <= bytes_left;
            let Some(job) = self.next_job(fits) else { break };
            rows += job.count();
            bytes += job.bytes;
            batch.push(job);
        }
        batch
    }

    /// As [`next_batch`](Self::next_batch), where all that waits is so quick that the thread at hand may run it.
    fn next_quick(&mut self, batching: &Batching) -> Vec<Job> {
        let predict = |job: &Job| self.costs.get(&job.form)?.predict(job.count());
        let all: Option<Duration> = self.line.iter().map(predict).sum();
        if all.is_some_and(|all| all <= 2 * INLINE_MAX) {
            self.next_batch(batching)
        } else {
            vec![]
        }
    }

    fn next_job(&mut self, wanted: impl Fn(&Job) -> bool) -> Option<Job> {
        loop {
            let job = self.line.take(&wanted)?;
            if job.reply.is_closed() {
                continue;
            }
            if job.work.deadline <= Instant::now() {
                let _ = job.reply.send(Err(Failure::Late));
                continue;
            }
            return Some(job);
        }
    }
}

#[cfg(test)]
mod tests;
