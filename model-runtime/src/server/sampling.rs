//! Request sampling: a share of the requests and of what was answered is written to an object store, as JSON lines that the optimiser reads
//! as evaluation data. The caller waits for none of it: what the buffer does not hold is dropped and counted.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use plimsoll_package::manifest::TensorSpec;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::inference::memory_units;
use super::metrics::SampleMetrics;
use super::share::Share;
use crate::engine::Tensor;

mod line;
mod store;

use store::Store;

/// Most samples that wait to be written.
const WAITING_MAX: usize = 256;
/// Most bytes of tensors that wait to be written.
const WAITING_BYTES_MAX: usize = 32 << 20;
/// Lines of so many bytes are written as one object.
const OBJECT_BYTES: usize = 4 << 20;
/// The longest that a line waits for its object to fill.
const OBJECT_AGE: Duration = Duration::from_secs(60);
/// The longest that the end of the server waits for the last object.
const END_WAIT: Duration = Duration::from_secs(10);
/// What stands for a request's id among the names that are redacted.
const ID: &str = "id";

/// Where samples go.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`, or `file:///DIR`.
    pub to: String,
    /// Share of the requests, 0 to 1.
    pub share: f64,
    /// Inputs and outputs whose values are left out, and `id` for the request's.
    pub redact: Vec<String>,
}

/// What became of a sample: a label of the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
pub(super) enum Sampled {
    Written,
    /// Too many waited.
    Dropped,
    /// JSON cannot hold it: a string that is not UTF-8, an input that is NaN or infinite, or an empty one.
    Unwritable,
    /// The object store did not take it.
    Failed,
}

/// A request that is written, with what was answered.
#[derive(Debug)]
pub(super) struct Sample {
    id: Option<String>,
    time: SystemTime,
    /// The samples that the request holds, where all inputs have them in their first axis.
    rows: Option<usize>,
    inputs: Vec<(String, Tensor)>,
    outputs: Vec<(String, Tensor)>,
    /// The memory that the tensors take.
    held: OwnedSemaphorePermit,
}

enum Message {
    Sample(Box<Sample>),
    /// Everything before it is to be written now.
    End(oneshot::Sender<()>),
}

/// Takes samples and writes them in the background.
pub(super) struct Sampler {
    sender: mpsc::Sender<Message>,
    memory: Arc<Semaphore>,
    share: Share,
    redact: Vec<String>,
    metrics: SampleMetrics,
}

impl Sampling {
    /// Whether each name that is redacted is one of the model's: one that is not would let through what it was to keep back.
    ///
    /// # Errors
    /// In words, with the names that there are.
    pub(super) fn check(&self, inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Result<(), String> {
        let names = || inputs.iter().chain(outputs).map(|spec| spec.name.as_str()).chain([ID]);
        match self.redact.iter().find(|name| names().all(|known| known != *name)) {
            None => Ok(()),
            Some(name) => {
                let known = names().collect::<Vec<_>>().join(", ");
                Err(format!("--sample-redact {name} is none of what is written, which is {known}"))
            }
        }
    }
}

impl Sampler {
    /// Starts the task that writes samples of the model; needs the async runtime.
    ///
    /// # Errors
    /// In words, where the place to write to is none.
    pub(super) fn start(sampling: &Sampling, model: &str, version: &str, metrics: &SampleMetrics) -> Result<Self, String> {
        Self::start_with(sampling, model, version, metrics, OBJECT_AGE)
    }

    fn start_with(sampling: &Sampling, model: &str, version: &str, metrics: &SampleMetrics, age: Duration) -> Result<Self, String> {
        let store = Store::open(&sampling.to)?;
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let writer = Writer {
            store,
            model: model.to_owned(),
            version: version.to_owned(),
            redacted: sampling.redact.clone(),
            metrics: metrics.clone(),
            age,
            lines: vec![],
            samples: 0,
            objects: 0,
        };
        tokio::spawn(writer.run(receiver));
        Ok(Self {
            sender,
            memory: Arc::new(Semaphore::new(memory_units(WAITING_BYTES_MAX) as usize)),
            share: Share::new(sampling.share),
            redact: sampling.redact.clone(),
            metrics: metrics.clone(),
        })
    }

    /// Copies the inputs of a request, where it is one of the share and there is room.
    pub(super) fn take(&self, specs: &[TensorSpec], inputs: &[Tensor], id: Option<&str>) -> Option<Sample> {
        if !self.share.takes() {
            return None;
        }
        let kept = self.kept(specs, inputs);
        let Some(held) = self.hold(&kept) else {
            self.metrics.count(Sampled::Dropped, 1);
            return None;
        };
        let rows = inputs.first().and_then(Tensor::rows);
        Some(Sample {
            id: id.filter(|_| !self.is_redacted(ID)).map(str::to_owned),
            time: SystemTime::now(),
            rows: rows.filter(|_| inputs.iter().all(|input| input.rows() == rows)),
            inputs: copy(&kept),
            outputs: vec![],
            held,
        })
    }

    /// Hands the sample with its outputs over, where there is room.
    pub(super) fn send(&self, mut sample: Sample, specs: &[TensorSpec], outputs: &[Tensor]) {
        let kept = self.kept(specs, outputs);
        let sent = self.hold(&kept).is_some_and(|held| {
            sample.held.merge(held);
            sample.outputs = copy(&kept);
            self.sender.try_send(Message::Sample(Box::new(sample))).is_ok()
        });
        if !sent {
            self.metrics.count(Sampled::Dropped, 1);
        }
    }

    /// Writes what waits; the longest that this takes is stated.
    pub(super) async fn end(&self) {
        let (done, ended) = oneshot::channel();
        let ending = async {
            if self.sender.send(Message::End(done)).await.is_ok() {
                let _ = ended.await;
            }
        };
        if timeout(END_WAIT, ending).await.is_err() {
            tracing::warn!(seconds = END_WAIT.as_secs(), "the last samples were not written in time");
        }
    }

    fn is_redacted(&self, name: &str) -> bool {
        self.redact.iter().any(|redacted| redacted == name)
    }

    fn kept<'a>(&self, specs: &'a [TensorSpec], tensors: &'a [Tensor]) -> Vec<(&'a str, &'a Tensor)> {
        let named = specs.iter().map(|spec| spec.name.as_str()).zip(tensors);
        named.filter(|(name, _)| !self.is_redacted(name)).collect()
    }

    /// Takes the memory of the tensors' copies.
    fn hold(&self, tensors: &[(&str, &Tensor)]) -> Option<OwnedSemaphorePermit> {
        let bytes: usize = tensors.iter().map(|(_, tensor)| tensor.data().byte_count()).sum();
        Arc::clone(&self.memory).try_acquire_many_owned(memory_units(bytes)).ok()
    }
}

fn copy(tensors: &[(&str, &Tensor)]) -> Vec<(String, Tensor)> {
    tensors.iter().map(|&(name, tensor)| (name.to_owned(), tensor.clone())).collect()
}

/// Collects lines into objects.
struct Writer {
    store: Store,
    model: String,
    version: String,
    redacted: Vec<String>,
    metrics: SampleMetrics,
    /// The longest that a line waits.
    age: Duration,
    lines: Vec<u8>,
    /// How many samples the lines are of.
    samples: u64,
    objects: u64,
}

impl Writer {
    async fn run(mut self, mut receiver: mpsc::Receiver<Message>) {
        let mut due: Option<Instant> = None;
        loop {
            let message = match due {
                Some(due) => timeout_at(due, receiver.recv()).await,
                None => Ok(receiver.recv().await),
            };
            match message {
                Ok(Some(Message::Sample(sample))) => {
                    self = self.add(*sample).await;
                    if !self.lines.is_empty() {
                        due = due.or_else(|| Some(Instant::now() + self.age));
                    }
                    if self.lines.len() < OBJECT_BYTES {
                        continue;
                    }
                    self.flush().await;
                }
                Ok(Some(Message::End(done))) => {
                    self.flush().await;
                    let _ = done.send(());
                }
                Ok(None) => return self.flush().await,
                Err(_) => self.flush().await,
            }
            due = None;
        }
    }

    /// Writes the sample's lines down, off the threads that serve connections.
    async fn add(mut self, sample: Sample) -> Self {
        let metrics = self.metrics.clone();
        let write = move || {
            let length = self.lines.len();
            match line::write(&mut self.lines, &sample, &self.model, &self.version, &self.redacted) {
                Ok(()) => self.samples += 1,
                Err(reason) => {
                    self.lines.truncate(length);
                    tracing::debug!(%reason, "a sample cannot be written");
                    metrics.count(Sampled::Unwritable, 1);
                }
            }
            self
        };
        match tokio::task::spawn_blocking(write).await {
            Ok(writer) => writer,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Writes the lines as an object.
    async fn flush(&mut self) {
        if self.lines.is_empty() {
            return;
        }
        let lines = std::mem::take(&mut self.lines);
        let samples = std::mem::take(&mut self.samples);
        self.objects += 1;
        let name = store::name(&self.model, &self.version, SystemTime::now(), self.objects);
        let became = match self.store.put(&name, lines).await {
            Ok(()) => Sampled::Written,
            Err(reason) => {
                tracing::warn!(reason, samples, "samples are lost");
                Sampled::Failed
            }
        };
        self.metrics.count(became, samples);
    }
}

#[cfg(test)]
mod tests;
