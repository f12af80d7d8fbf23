//! Distillation: the compressed model is trained to give what its original gives.
//!
//! The model is trained as it is served: pruned weights stay zero, and quantised weights are rounded in every forward pass while the
//! floats behind them are trained. So what compression broke is mended within the same size.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use plimsoll_package::recipe::{Distill, DistillDevice, DistillLoss, HiddenStates};
use plimsoll_runtime::onnx::{GraphProto, ModelProto};

use self::adamw::AdamW;
use self::forward::{Forward, Place};
use self::hidden::Hidden;
use self::loss::{Measure, Target};
use self::parameters::Parameters;
use self::schedule::Pruning;
use self::teacher::Teacher;
use super::{Change, Setting, Technique, quantize};
use crate::evaluate::dataset::Dataset;
use crate::failure::{Failure, FailureReason, failure, internal};
use crate::graph::opset;

mod adamw;
mod device;
mod forward;
mod hidden;
mod loss;
mod operators;
mod parameters;
mod quantization;
mod samples;
mod schedule;
mod teacher;
mod window;

/// Softening of the scores where the recipe names none.
const TEMPERATURE: u32 = 2;
/// Samples a step where the recipe names none.
const BATCH: u32 = 32;
/// Step size where the recipe names none.
const RATE: f64 = 1e-4;
/// Autograd recurses as deep as the graph is.
const STACK_BYTES: usize = 256 << 20;

/// The distillation that `distill` asks for.
///
/// # Errors
/// [`FailureReason::InvalidInputs`] where a parameter is out of its range.
pub fn technique(distill: &Distill) -> Result<Box<dyn Technique>, Failure> {
    Ok(Box::new(Distillation::new(distill)?))
}

/// Training against the original, with parameters that are in their ranges.
#[derive(Debug, Clone, PartialEq)]
struct Distillation {
    epochs: usize,
    loss: Option<DistillLoss>,
    temperature: f64,
    batch: usize,
    rate: f64,
    prune_to: Option<f64>,
    hidden_states: Option<HiddenStates>,
    /// What hidden states count together beside the outputs.
    hidden_weight: f64,
    device: DistillDevice,
}

impl Distillation {
    fn new(distill: &Distill) -> Result<Self, Failure> {
        let invalid = |message: String| failure(FailureReason::InvalidInputs, format!("optimize.recipe: distill: {message}"));
        let within = |name: &str, value: u32, most: u32| {
            if (1..=most).contains(&value) {
                Ok(value)
            } else {
                Err(invalid(format!("{name} is {value}; write a number from 1 to {most}")))
            }
        };
        let rate = match &distill.learning_rate {
            Some(rate) => rate.value().map_err(|error| invalid(format!("learningRate: {error}")))?,
            None => RATE,
        };
        if rate <= 0.0 {
            return Err(invalid(
                "learningRate is 0, by which nothing is learnt; write a ratio such as \"0.0001\"".into(),
            ));
        }
        let prune_to = distill
            .prune_to
            .as_ref()
            .map(|share| share.value().map_err(|error| invalid(format!("pruneTo: {error}"))));
        let hidden_weight = match distill.hidden_states.as_ref().and_then(|hidden| hidden.weight.as_ref()) {
            Some(weight) => weight.value().map_err(|error| invalid(format!("hiddenStates.weight: {error}")))?,
            None => 1.0,
        };
        let device = distill.device.unwrap_or_default();
        if !cfg!(feature = "cuda") {
            // What is not built in is said at once; what is not there where it trains.
            device::find(device)?;
        }
        Ok(Self {
            epochs: within("epochs", distill.epochs, 1000)? as usize,
            loss: distill.loss,
            temperature: f64::from(within("temperature", distill.temperature.unwrap_or(TEMPERATURE), 100)?),
            batch: within("batchSize", distill.batch_size.unwrap_or(BATCH), 65536)? as usize,
            rate,
            prune_to: prune_to.transpose()?,
            hidden_states: distill.hidden_states.clone(),
            hidden_weight,
            device,
        })
    }

    fn train(&self, model: &mut ModelProto, samples: &Dataset, setting: &Setting) -> Result<Change, Failure> {
        let place = Place {
            device: device::find(self.device)?,
            dtype: DType::F32,
        };
        let mut training = self.training(model, samples, setting, place)?;
        training.run(setting)?;
        let Training { parameters, .. } = training;
        let Some(graph) = &mut model.graph else {
            return Ok(Change::default());
        };
        let changed = parameters
            .write(graph)
            .map_err(|error| internal("cannot write what was trained", &error))?;
        quantize::product::limit_pairs(graph);
        Ok(Change {
            changed,
            skipped: parameters.frozen,
            fold_dequantize: false,
        })
    }

    /// All that training `model` takes.
    fn training<'a>(&'a self, model: &ModelProto, samples: &'a Dataset, setting: &Setting, place: Place) -> Result<Training<'a>, Failure> {
        let opset = opset::version(model);
        let empty = GraphProto::default();
        let graph = model.graph.as_ref().unwrap_or(&empty);
        let invalid = |why: String| failure(FailureReason::InvalidInputs, format!("cannot distil: {why}"));
        let teacher_graph = setting.original.graph.as_ref().unwrap_or(&empty);
        let targets = loss::targets(graph, teacher_graph, opset, self.loss).map_err(invalid)?;
        let mut wanted: Vec<String> = targets.iter().map(|target| target.value.clone()).collect();
        let hidden = match &self.hidden_states {
            Some(asked) => hidden::find(&asked.pairs, model, setting.original, &wanted).map_err(invalid)?,
            None => vec![],
        };
        wanted.extend(hidden.iter().map(|hidden| hidden.value.clone()));
        let parameters = Parameters::find(graph, &wanted, &place)?;
        let forward = Forward::new(graph, opset, &wanted, &parameters.names(), place)?;
        if parameters.len() == 0 {
            let message = "cannot distil: the model has no weight that can be trained";
            return Err(failure(FailureReason::Unsupported, message));
        }
        let names: Vec<&str> = hidden.iter().map(|hidden| hidden.teacher.as_str()).collect();
        let (teacher, places) = Teacher::load(setting.original, &names, setting.threads)?;
        let inputs: Vec<String> = graph.input.iter().map(|input| input.name().to_owned()).collect();
        if let Some(missing) = teacher.inputs().find(|input| !inputs.iter().any(|given| given == input)) {
            return Err(invalid(format!(
                "the teacher takes an input `{missing}`, which the model does not have"
            )));
        }
        let share = self.hidden_weight / hidden.len().max(1) as f64;
        let followed = hidden.iter().zip(places).map(|(hidden, output)| Target {
            value: hidden.value.clone(),
            output,
            measure: Measure::Square,
        });
        Ok(Training {
            inputs: teacher.inputs().map(str::to_owned).collect(),
            weights: targets.iter().map(|_| 1.0).chain(hidden.iter().map(|_| share)).collect(),
            distillation: self,
            parameters,
            forward,
            wanted,
            targets: targets.into_iter().chain(followed).collect(),
            hidden,
            teacher,
            samples,
        })
    }
}

impl Technique for Distillation {
    fn apply(&self, model: &mut ModelProto, setting: &Setting) -> Result<Change, Failure> {
        let samples = setting.calibration("distill")?.samples();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(setting.threads)
            .stack_size(STACK_BYTES)
            .build();
        let pool = pool.map_err(|error| internal("cannot start threads", &error))?;
        pool.install(|| self.train(model, samples, setting))
    }
}

/// A training in progress.
struct Training<'a> {
    distillation: &'a Distillation,
    parameters: Parameters,
    forward: Forward,
    /// The values of the graph that are compared.
    wanted: Vec<String>,
    /// The outputs, and after them what is hidden.
    targets: Vec<Target>,
    /// The values inside of the model that are compared.
    hidden: Vec<Hidden>,
    /// What the loss of each target is multiplied by.
    weights: Vec<f64>,
    teacher: Teacher,
    /// The inputs in the order of the samples.
    inputs: Vec<String>,
    samples: &'a Dataset,
}

impl Training<'_> {
    /// Trains, and leaves the parameters at their best.
    fn run(&mut self, setting: &Setting) -> Result<(), Failure> {
        let Distillation { epochs, batch, .. } = *self.distillation;
        let unit = self.teacher.fixed_batch();
        let (mut order, held_out) = samples::split(self.samples.samples(), unit.unwrap_or(1));
        if order.is_empty() {
            let message = format!(
                "the model takes {} samples at once, and the training data hold {}",
                unit.unwrap_or(1),
                self.samples.samples()
            );
            return Err(failure(FailureReason::InvalidDataset, message));
        }
        let unit = unit.unwrap_or(batch);
        let step_size = batch.div_ceil(unit) * unit;
        let steps = epochs * order.len().div_ceil(step_size);
        let mut pruning = self.pruning(steps)?;
        self.balance(&held_out, unit)?;

        let before = self.mean_loss(&held_out, unit)?;
        setting.console.info(&format!(
            "distilling {} tensors towards {} outputs and {} hidden states on {}, on {} samples, {} held out; loss {before:.3e} before (order \
             of samples by seed {})",
            self.parameters.len(),
            self.targets.len() - self.hidden.len(),
            self.hidden.len(),
            device::name(&self.forward.place().device),
            order.len(),
            held_out.len(),
            samples::SEED,
        ));
        if !before.is_finite() {
            return Err(failure(
                FailureReason::InvalidDataset,
                "cannot distil: the loss is no number before training; check the data and the model's weights for NaN and infinity",
            ));
        }
        let snapshot = |parameters: &Parameters| {
            parameters
                .snapshot()
                .map_err(|error| internal("cannot keep the best epoch", &error))
        };
        // While pruning goes on, what came before is not yet what was asked for.
        let mut best = (before, None);
        if pruning.is_none() {
            best.1 = Some(snapshot(&self.parameters)?);
        }
        let mut optimizer = AdamW::new(self.parameters.len());
        let activity = setting.console.activity("distilling", "samples");
        // A model of a fixed batch takes no incomplete one.
        let usable = self.teacher.fixed_batch().map_or(order.len(), |fixed| order.len() / fixed * fixed);
        let total = (epochs * usable) as u64;
        let (mut step, mut done) = (0, 0);
        for epoch in 1..=epochs {
            samples::shuffle(&mut order, samples::SEED + epoch as u64);
            let mut sum = 0.0;
            for chunk in order[..usable].chunks(step_size) {
                let rate = schedule::rate(self.distillation.rate, step, steps);
                sum += self.step(chunk, unit, rate, &mut optimizer)? * chunk.len() as f64;
                step += 1;
                if let Some(pruning) = pruning.filter(|pruning| pruning.is_due(step)) {
                    self.parameters
                        .prune(pruning.share(step))
                        .map_err(|error| failure(FailureReason::InvalidInputs, format!("cannot distil: {error}; lower learningRate")))?;
                }
                done += chunk.len() as u64;
                activity.report(done, Some(total));
            }
            if pruning.is_some_and(|pruning| step >= pruning.steps) {
                // From here on every epoch is as sparse as was asked for.
                pruning = None;
            }
            let now = self.mean_loss(&held_out, unit)?;
            setting.console.info(&format!(
                "epoch {epoch} of {epochs}: loss {:.3e}, held out {now:.3e}",
                sum / usable as f64
            ));
            if pruning.is_none() && now.is_finite() && (now < best.0 || best.1.is_none()) {
                best = (now, Some(snapshot(&self.parameters)?));
            }
            if !now.is_finite() {
                setting
                    .console
                    .warn(&format!("training left the numbers in epoch {epoch}; lower learningRate"));
                break;
            }
        }
        let (Some(kept), loss) = (&best.1, best.0) else {
            let message = "cannot distil: no epoch came to an end in numbers; lower distill.learningRate";
            return Err(failure(FailureReason::InvalidInputs, message));
        };
        setting
            .console
            .info(&format!("kept the epoch with the least loss, held out: {loss:.3e}"));
        self.parameters
            .restore(kept)
            .map_err(|error| internal("cannot come back to the best epoch", &error))
    }

    /// The gradual pruning that is asked for: over the first two thirds of all steps, so that the last third mends what it broke.
    fn pruning(&self, steps: usize) -> Result<Option<Pruning>, Failure> {
        let from = self.parameters.sparsity().map_err(|error| internal("cannot count zeros", &error))?;
        let asked = self.distillation.prune_to.filter(|to| *to > from);
        Ok(asked.map(|to| Pruning {
            from,
            to,
            steps: (steps * 2).div_ceil(3).max(1),
        }))
    }

    /// Lets squared differences count relative to the mean square of what the teacher gives, so that each output has a say.
    fn balance(&mut self, held_out: &[usize], unit: usize) -> Result<(), Failure> {
        let mut squares = vec![0.0; self.targets.len()];
        let mut counts = vec![0_usize; self.targets.len()];
        for chunk in held_out.chunks(unit) {
            let (_, taught) = self.batch(chunk)?;
            for (index, target) in self.targets.iter().enumerate() {
                let square = taught[target.output]
                    .sqr()
                    .and_then(|square| square.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>());
                squares[index] += square.map_err(unsupported)?;
                counts[index] += taught[target.output].elem_count();
            }
        }
        for (index, target) in self.targets.iter().enumerate() {
            let mean = squares[index] / counts[index].max(1) as f64;
            if target.measure == Measure::Square && mean > 0.0 && mean.is_finite() {
                self.weights[index] /= mean;
            }
        }
        Ok(())
    }

    /// The inputs of a batch, and the teacher's outputs for it.
    fn batch(&self, indices: &[usize]) -> Result<(HashMap<String, Tensor>, Vec<Tensor>), Failure> {
        let place = self.forward.place();
        let batch = samples::batch(self.samples, indices, place)?;
        let taught = self.teacher.run(&batch.given)?;
        let taught = taught.iter().map(|output| {
            let values = output.data().to_f64().unwrap_or_default();
            Tensor::from_vec(values, output.shape(), &Device::Cpu)?
                .to_dtype(place.dtype)?
                .to_device(&place.device)
        });
        let taught = taught.collect::<candle_core::Result<_>>().map_err(unsupported)?;
        Ok((self.inputs.iter().cloned().zip(batch.tensors).collect(), taught))
    }

    /// The loss on a batch.
    fn loss(&self, indices: &[usize]) -> Result<Tensor, Failure> {
        let (mut values, taught) = self.batch(indices)?;
        values.extend(self.parameters.values().map_err(unsupported)?);
        let given = self.forward.run(values, &self.wanted)?;
        let outputs = self.targets.len() - self.hidden.len();
        for ((hidden, target), given) in self.hidden.iter().zip(&self.targets[outputs..]).zip(&given[outputs..]) {
            hidden.check(given.dims(), taught[target.output].dims())?;
        }
        let mut total: Option<Tensor> = None;
        for ((target, given), weight) in self.targets.iter().zip(&given).zip(&self.weights) {
            let part = loss::loss(target.measure, given, &taught[target.output], self.distillation.temperature)
                .and_then(|part| part * *weight)
                .map_err(unsupported)?;
            total = Some(match total {
                Some(total) => (total + part).map_err(unsupported)?,
                None => part,
            });
        }
        total.ok_or_else(|| failure(FailureReason::Internal, "there is nothing to train towards"))
    }

    /// The mean loss of the samples.
    fn mean_loss(&self, indices: &[usize], unit: usize) -> Result<f64, Failure> {
        let mut sum = 0.0;
        for chunk in indices.chunks(unit) {
            sum += number(&self.loss(chunk)?)? * chunk.len() as f64;
        }
        Ok(sum / indices.len() as f64)
    }

    /// Takes one step on the samples of `chunk`, `unit` of them at a time, and returns their mean loss before it.
    fn step(&self, chunk: &[usize], unit: usize, rate: f64, optimizer: &mut AdamW) -> Result<f64, Failure> {
        let mut gradients: Vec<Option<Tensor>> = vec![None; self.parameters.len()];
        let mut sum = 0.0;
        for part in chunk.chunks_exact(unit.min(chunk.len())) {
            let share = part.len() as f64 / chunk.len() as f64;
            let loss = self.loss(part)?;
            sum += number(&loss)? * share;
            let found = (loss * share).and_then(|loss| loss.backward()).map_err(unsupported)?;
            for (total, var) in gradients.iter_mut().zip(self.parameters.vars()) {
                let Some(gradient) = found.get(var.as_tensor()) else { continue };
                *total = Some(match total.take() {
                    Some(total) => (total + gradient).map_err(unsupported)?,
                    None => gradient.clone(),
                });
            }
        }
        optimizer.step(&self.parameters, &gradients, rate).map_err(unsupported)?;
        Ok(sum)
    }
}

fn number(loss: &Tensor) -> Result<f64, Failure> {
    loss.to_dtype(DType::F64).and_then(|loss| loss.to_scalar()).map_err(unsupported)
}

fn unsupported(error: candle_core::Error) -> Failure {
    failure(FailureReason::UnsupportedOperator, format!("cannot distil: {error}"))
}

/// A weight that cannot be read.
fn unreadable(name: &str, error: &candle_core::Error) -> Failure {
    failure(FailureReason::UnreadableModel, format!("cannot train the weight `{name}`: {error}"))
}

#[cfg(test)]
mod tests;
