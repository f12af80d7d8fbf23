//! An inference, whichever protocol asks for it: admitted, bound to the model's signature, run, and counted.

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use plimsoll_package::manifest::TensorSpec;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::State;
use super::classification::classify;
use super::model::Model;
use super::preprocessing::Postprocessing;
use super::refusal::{Reason, Refusal};
use super::scheduler::{Client, Failure, Work};
use super::shadow::Copy;
use super::statistics::Compute;
use super::text::Pooling;
use super::trace::{Method, Span, Stage};
use crate::engine::{self, Tensor};

/// Most tensors of a request, and most dimensions of a tensor.
pub(super) const LENGTH_MAX: usize = 1024;

/// Priority of a request that names none: the middle, so that others can go before it and after it.
const PRIORITY: u32 = 1 << 16;

/// A request, its tensors in the client's order.
#[derive(Debug, PartialEq, Default)]
pub(super) struct InferRequest {
    pub(super) id: Option<String>,
    pub(super) inputs: Vec<(String, Tensor)>,
    /// The outputs asked for; none is all of them.
    pub(super) outputs: Vec<RequestedOutput>,
    pub(super) options: Options,
}

/// What the request's parameters say of how it is served.
#[derive(Debug, PartialEq, Eq, Clone, Copy, Default)]
pub(super) struct Options {
    /// Lower numbers go first, as in Triton, from 1; absent or 0 is the middle.
    pub(super) priority: Option<u64>,
    /// How long the client waits, in microseconds, as in Triton; the server's own bound holds besides.
    pub(super) timeout: Option<u64>,
    /// How the embeddings of tokens become one of the text; absent is as the model's files say.
    pub(super) pooling: Option<Pooling>,
    /// Whether embeddings are divided by their length; absent is as the model's files say.
    pub(super) normalize: Option<bool>,
    /// Whether texts of more tokens than the model takes are cut off, as they are by default, or refused.
    pub(super) truncate: Option<bool>,
}

/// An output that is asked for.
#[derive(Debug, PartialEq, Eq, Clone, Default)]
pub(super) struct RequestedOutput {
    pub(super) name: String,
    /// Where above 0, so many classes of the largest values are given instead of the tensor (Triton's "Classification Extension").
    pub(super) classes: usize,
    /// Whether its values come as bytes; `None` is as the protocol has it by default.
    pub(super) binary: Option<bool>,
}

/// An output of an answer.
#[derive(Debug, PartialEq)]
pub(super) struct Output {
    pub(super) name: String,
    pub(super) tensor: Tensor,
    pub(super) binary: Option<bool>,
}

/// Leave to take in a request: held from before its body is read until its answer is written.
pub(super) struct Admission {
    state: Arc<State>,
    _slot: OwnedSemaphorePermit,
    memory: Option<OwnedSemaphorePermit>,
    started: Instant,
    /// When it is given up.
    pub(super) deadline: Instant,
}

/// Bodies and answers of more bytes than this are parsed and written off the threads that serve connections.
const INLINE_BYTES_MAX: usize = 64 << 10;

/// Bytes of an answer that are copied as they are: so many of them take no longer than one that is written as digits.
pub(super) const COPIED_AS_ONE: usize = 16;

/// Memory is counted in units of so many bytes.
const MEMORY_UNIT: usize = 1 << 10;

/// Units of memory, of which a semaphore takes 2^29 at most.
pub(super) fn memory_units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(MEMORY_UNIT)).unwrap_or(u32::MAX).min(1 << 28)
}

impl Admission {
    /// Takes on a request.
    ///
    /// # Errors
    /// [`Reason::Unavailable`] while the model loads, [`Reason::Overloaded`] where as many requests are here as may be.
    pub(super) fn new(state: &Arc<State>, started: Instant) -> Result<Self, Refusal> {
        if state.model().is_none() {
            return Err(Refusal::loading());
        }
        let slot = Arc::clone(&state.slots).try_acquire_owned();
        let slot = slot.map_err(|_| Refusal::overloaded("many requests"))?;
        state.metrics.in_flight.inc();
        Ok(Self {
            state: Arc::clone(state),
            _slot: slot,
            memory: None,
            started,
            deadline: started + state.config.limits.request_timeout,
        })
    }

    /// Takes the memory of a body of so many bytes, or of as much more as it turned out to be.
    ///
    /// # Errors
    /// [`Reason::Overloaded`] where the bodies that are here already leave no room.
    pub(super) fn hold(&mut self, bytes: usize) -> Result<(), Refusal> {
        let held = self.memory.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = (memory_units(bytes) as usize).saturating_sub(held);
        if more == 0 {
            return Ok(());
        }
        let permit = Arc::clone(&self.state.memory).try_acquire_many_owned(more as u32);
        let permit = permit.map_err(|_| Refusal::overloaded("many bytes of requests"))?;
        match &mut self.memory {
            Some(held) => held.merge(permit),
            none => *none = Some(permit),
        }
        Ok(())
    }

    /// What a client is told whose body was not here by the deadline.
    pub(super) fn late_body(&self) -> Refusal {
        let seconds = (self.deadline - self.started).as_secs_f64();
        Refusal::new(Reason::BodyTimeout, format!("the body did not arrive within {seconds} s"))
    }

    /// Runs the request and counts it.
    ///
    /// # Errors
    /// [`Refusal`] in words for the client.
    pub(super) async fn infer(&self, request: InferRequest, client: Client, span: &Span) -> Result<Vec<Output>, Refusal> {
        let model = self.state.model().ok_or_else(Refusal::loading)?;
        let preprocesses = model.preprocessing.makes(&request.inputs);
        let prepare = self.state.prepare(request.inputs, request.options);
        let prepared = match preprocesses {
            true => span.within(Stage::Preprocess, prepare).await?,
            false => prepare.await?,
        };
        let after = model.preprocessing.postprocessing(&prepared, request.options)?;
        if let Some(mask) = &prepared.mask {
            self.state.metrics.tokens.inc_by(mask.tokens() as u64);
        }
        let inputs = bind(model, prepared.inputs)?;
        let outputs = select(model, after.as_ref(), request.outputs)?;
        let timeout = request.options.timeout.filter(|&micros| micros > 0).map(Duration::from_micros);
        let deadline = timeout.map_or(self.deadline, |timeout| self.deadline.min(self.started + timeout));
        let shadowing = self.state.shadowing.as_ref().filter(|shadowing| shadowing.wants());
        let copied = shadowing.map(|_| inputs.clone());
        let sampler = self.state.sampler.as_ref();
        let sample = sampler.and_then(|sampler| sampler.take(model.inputs(), &inputs, request.id.as_deref()));
        let drift = model.drift.as_ref().ok();
        let look = drift.and_then(|drift| drift.look(&inputs));
        let priority = request.options.priority.filter(|&priority| priority > 0);
        let work = Work {
            inputs,
            client,
            priority: priority.map_or(PRIORITY, |priority| u32::try_from(priority).unwrap_or(u32::MAX)),
            deadline: deadline.into_std(),
        };
        let bound = self.started.elapsed();
        let submitted = std::time::Instant::now();
        let too_late = || {
            let seconds = (deadline - self.started).as_secs_f64();
            Refusal::new(Reason::DeadlineExceeded, format!("there was no answer within {seconds} s"))
        };
        let answer = tokio::time::timeout_at(deadline, model.scheduler.submit(work)).await;
        let answer = answer.map_err(|_| too_late())?;
        let answer = answer.map_err(|_| Refusal::new(Reason::Internal, "the inference thread died"))?;
        let mut answer = answer.map_err(|failure| match failure {
            Failure::Engine(error) => error.into(),
            Failure::Late => too_late(),
        })?;
        span.note(Stage::Queue, submitted, answer.queued, 0);
        span.note(Stage::Compute, submitted + answer.queued, answer.computed, answer.rows);
        if let (Some(drift), Some(look)) = (drift, look) {
            drift.outputs(&look, &answer.outputs);
        }
        if let (Some(sampler), Some(sample)) = (sampler, sample) {
            sampler.send(sample, model.outputs(), &answer.outputs);
        }
        if let (Some(shadowing), Some(inputs)) = (shadowing, copied) {
            let named = |specs: &[TensorSpec], tensors: Vec<Tensor>| specs.iter().map(|spec| spec.name.clone()).zip(tensors).collect();
            let copy = Copy {
                inputs: named(model.inputs(), inputs),
                outputs: named(model.outputs(), answer.outputs.clone()),
                context: span.context.clone(),
            };
            shadowing.send(copy, &self.state.metrics);
        }
        let computed = self.started.elapsed();
        let mut tensors = std::mem::take(&mut answer.outputs);
        if let Some(after) = after {
            after.apply(&mut tensors)?;
        }
        let given = give(&model.labels, tensors, outputs)?;
        self.state.metrics.computed(&answer);
        self.state.statistics.computed(&Compute {
            rows: answer.rows,
            first: answer.first,
            input: bound,
            queue: answer.queued,
            infer: answer.computed,
            output: self.started.elapsed().saturating_sub(computed),
        });
        Ok(given)
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.state.metrics.in_flight.dec();
    }
}

impl State {
    /// A request that begins.
    pub(super) fn begin(&self, method: Method, headers: &HeaderMap, started: Instant) -> Span {
        Span::begin(self.tracing.as_ref(), method, headers, started.into_std())
    }

    /// Counts, logs and traces a request that is answered.
    pub(super) fn answered(&self, span: Span, refusal: Option<&Refusal>) {
        let took = span.started.elapsed();
        self.metrics.answered(took, refusal.map(|refusal| refusal.reason));
        self.statistics.answered(refusal.is_none(), took);
        let milliseconds = took.as_secs_f64() * 1e3;
        let trace = || span.context.as_ref().map(|context| format!("{:032x}", context.trace));
        match refusal {
            None if self.access.takes() => {
                tracing::info!(method = span.method.name(), milliseconds, trace = trace(), "inference");
            }
            None => tracing::debug!(method = span.method.name(), milliseconds, trace = trace(), "inference"),
            Some(Refusal { reason, text }) => {
                let (method, code) = (span.method.name(), span.method.status(Some(*reason)));
                let fault = reason.is_the_servers();
                let reason: &str = reason.into();
                if fault {
                    tracing::warn!(method, code, reason, milliseconds, trace = trace(), error = %text, "inference failed");
                } else {
                    tracing::info!(method, code, reason, milliseconds, trace = trace(), error = %text, "inference refused");
                }
            }
        }
        span.end(self.tracing.as_ref(), refusal);
    }
}

/// Runs `work` on `bytes` bytes, off the threads that serve connections where they are many.
pub(super) async fn off_thread<T: Send + 'static>(bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    if bytes <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    let failed = |_| Refusal::new(Reason::Internal, "the request could not be processed");
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

/// Refuses extensions that change the meaning of a request and are not there: tensors in shared memory, and requests that belong together.
///
/// # Errors
/// In words for the client.
pub(super) fn check_extensions(shared_memory: bool, sequence: bool) -> Result<(), String> {
    let (extension, instead) = match (shared_memory, sequence) {
        (true, _) => ("shared memory", "send the tensors in the request"),
        (false, true) => ("sequences", "the model keeps no state between requests"),
        (false, false) => return Ok(()),
    };
    Err(format!("the extension for {extension} is not supported; {instead}"))
}

/// Puts the tensors into the model's order; each refusal names what is wrong.
fn bind(model: &Model, mut given: Vec<(String, Tensor)>) -> Result<Vec<Tensor>, Refusal> {
    let specs = model.inputs();
    let mut inputs = Vec::with_capacity(given.len());
    for spec in specs {
        let Some(index) = given.iter().position(|(name, _)| *name == spec.name) else {
            return Err(Refusal::invalid(format!(
                "input `{}` ({}, shape {:?}) is missing",
                spec.name, spec.datatype, spec.shape
            )));
        };
        let (_, tensor) = given.swap_remove(index);
        engine::check_one(spec, tensor.datatype(), tensor.shape()).map_err(|error| Refusal::invalid(error.to_string()))?;
        inputs.push(tensor);
    }
    if let Some((name, _)) = given.first() {
        let what = if specs.iter().any(|spec| spec.name == *name) {
            "is given twice"
        } else {
            "is not the model's"
        };
        return Err(Refusal::invalid(format!(
            "input `{name}` {what}; it takes {}",
            names(&model.described_inputs())
        )));
    }
    Ok(inputs)
}

/// Which of the model's outputs are given, and how.
fn select(
    model: &Model,
    after: Option<&Postprocessing>,
    requested: Vec<RequestedOutput>,
) -> Result<Vec<(usize, RequestedOutput)>, Refusal> {
    let (specs, pooled) = (model.outputs(), model.preprocessing.pooled());
    let pools = after.and_then(Postprocessing::pools);
    if requested.is_empty() {
        // The pooled output comes behind the model's own, and in place of what it is made of.
        let index = |index| if pools == Some(index) { specs.len() } else { index };
        let name = |index| specs.get(index).or(pooled).map(|spec| spec.name.clone());
        let all = (0..specs.len()).map(index).map(|index| {
            let output = RequestedOutput {
                name: name(index).unwrap_or_default(),
                ..RequestedOutput::default()
            };
            (index, output)
        });
        return Ok(all.collect());
    }
    let find = |output: RequestedOutput| match specs.iter().position(|spec| spec.name == output.name) {
        Some(index) => Ok((index, output)),
        None if pooled.is_some_and(|pooled| pooled.name == output.name) => match pools {
            Some(_) => Ok((specs.len(), output)),
            None => Err(Refusal::invalid(format!(
                "output `{}` is pooled, and neither the request's parameter `pooling` nor the model's files say how",
                output.name
            ))),
        },
        None => {
            let known = names(&model.described_outputs());
            Err(Refusal::invalid(format!(
                "output `{}` is not the model's; it gives {known}",
                output.name
            )))
        }
    };
    requested.into_iter().map(find).collect()
}

fn names(specs: &[TensorSpec]) -> String {
    specs.iter().map(|spec| spec.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The outputs as they were asked for; one that is asked for twice is copied.
fn give(labels: &[String], computed: Vec<Tensor>, selected: Vec<(usize, RequestedOutput)>) -> Result<Vec<Output>, Refusal> {
    let last_use = |index: usize| selected.iter().rposition(|(other, _)| *other == index);
    let last: Vec<bool> = (0..selected.len()).map(|at| last_use(selected[at].0) == Some(at)).collect();
    let mut computed: Vec<Option<Tensor>> = computed.into_iter().map(Some).collect();
    let give = |((index, output), last): ((usize, RequestedOutput), bool)| {
        let tensor = if last { computed[index].take() } else { computed[index].clone() };
        let tensor = tensor.ok_or_else(|| Refusal::new(Reason::Internal, format!("output `{}` was not computed", output.name)))?;
        let tensor = match output.classes {
            0 => tensor,
            count => classify(&tensor, count, labels).map_err(|text| Refusal::invalid(format!("output `{}`: {text}", output.name)))?,
        };
        Ok(Output {
            name: output.name,
            tensor,
            binary: output.binary,
        })
    };
    selected.into_iter().zip(last).map(give).collect()
}
