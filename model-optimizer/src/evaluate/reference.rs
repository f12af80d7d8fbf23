//! What the inputs and outputs of the model that is handed out look like, for a runtime to tell drift by.

use plimsoll_package::drift::{Distribution, Reference, Source, TENSORS_MAX, TensorReference};
use plimsoll_package::manifest::{Datatype, TensorSpec};
use plimsoll_runtime::engine::{Engine, Tensor};
use plimsoll_runtime::observation::{self, Mask};

use super::dataset::Dataset;
use crate::failure::{Failure, FailureReason, chain, failure};
use crate::progress::Activity;

/// Most samples that are looked at: more tell next to nothing about shares of a tenth.
pub const SAMPLES_MAX: usize = 512;
/// The seed by which they are chosen.
const SEED: u64 = 0xd21f7;
/// Values of a tensor that are kept of each sample, about.
const VALUES_MAX: usize = 256;

/// Runs the model on at most [`SAMPLES_MAX`] of the samples. Memory holds about [`VALUES_MAX`] values of each of them and of each tensor.
///
/// # Errors
/// [`FailureReason::InvalidDataset`] where the model does not run on a sample.
pub fn record(engine: &dyn Engine, data: Dataset, from: Source, activity: &Activity) -> Result<Reference, Failure> {
    let data = data.subset(SAMPLES_MAX, SEED);
    let mut recorder = Recorder::of(engine);
    for range in data.batches() {
        let given = data.batch(range.clone())?;
        let gave = engine.run(&given).map_err(|error| {
            let words = format!("the model does not run on the samples that drift is told by: {}", chain(&error));
            failure(FailureReason::InvalidDataset, words)
        })?;
        recorder.add(engine.inputs(), &given, &gave, range.len());
        activity.report(range.end as u64, Some(data.samples() as u64));
    }
    Ok(recorder.finish(from))
}

/// What a model was given and gave.
pub struct Recorder {
    inputs: Vec<Seen>,
    outputs: Vec<Seen>,
    batches: usize,
    samples: usize,
}

impl Recorder {
    /// Of the model that is loaded into `engine`.
    #[must_use]
    pub fn of(engine: &dyn Engine) -> Self {
        Self {
            inputs: engine.inputs().iter().take(TENSORS_MAX).map(Seen::input).collect(),
            outputs: engine.outputs().iter().take(TENSORS_MAX).map(Seen::output).collect(),
            batches: 0,
            samples: 0,
        }
    }

    /// Adds a batch of that many `samples`: what was `given` to the inputs of those `specs`, and what the outputs `gave`.
    pub fn add(&mut self, specs: &[TensorSpec], given: &[Tensor], gave: &[Tensor], samples: usize) {
        let mask = Mask::of(specs, given);
        for (seen, tensors) in [(&mut self.inputs, given), (&mut self.outputs, gave)] {
            for (seen, tensor) in seen.iter_mut().zip(tensors) {
                seen.add(tensor, mask.as_ref(), samples, self.batches);
            }
        }
        self.batches += 1;
        self.samples += samples;
    }

    /// The distributions.
    #[must_use]
    pub fn finish(self, from: Source) -> Reference {
        let finished = |seen: Vec<Seen>| seen.into_iter().map(Seen::finish).collect();
        Reference {
            schema_version: 1,
            from,
            samples: self.samples as u64,
            inputs: finished(self.inputs),
            outputs: finished(self.outputs),
        }
    }
}

/// What was seen of a tensor.
struct Seen {
    name: String,
    is_mask: bool,
    is_text: bool,
    values: Vec<f64>,
    lengths: Vec<f64>,
    /// Absent of inputs, and once the tensor told another number of classes apart.
    classes: Option<Vec<u64>>,
}

impl Seen {
    fn output(spec: &TensorSpec) -> Self {
        Self {
            classes: Some(vec![]),
            ..Self::input(spec)
        }
    }

    fn input(spec: &TensorSpec) -> Self {
        Self {
            name: spec.name.clone(),
            is_mask: observation::is_mask(spec),
            is_text: spec.datatype == Datatype::Bytes,
            values: vec![],
            lengths: vec![],
            classes: None,
        }
    }

    fn add(&mut self, tensor: &Tensor, mask: Option<&Mask>, samples: usize, turn: usize) {
        if self.is_text {
            return;
        }
        match mask {
            Some(mask) if self.is_mask => self.lengths.extend(mask.lengths()),
            mask => observation::values(tensor, mask, VALUES_MAX * samples, turn, |value| self.values.push(value)),
        }
        let count = observation::class_count(tensor);
        self.classes = self.classes.take().filter(|seen| seen.is_empty() || Some(seen.len()) == count);
        if let (Some(classes), Some(count)) = (&mut self.classes, count) {
            classes.resize(count, 0);
            observation::classes(tensor, usize::MAX, turn, |class| classes[class] += 1);
        }
    }

    fn finish(self) -> TensorReference {
        TensorReference {
            name: self.name,
            values: Distribution::of(self.values),
            lengths: Distribution::of(self.lengths),
            classes: self.classes.filter(|classes| !classes.is_empty()),
        }
    }
}
