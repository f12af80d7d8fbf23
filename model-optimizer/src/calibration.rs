//! Calibration: what values inside of a model are on real samples.

use std::path::Path;

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_runtime::engine::{self, Data, Engine, LoadOptions, Tensor};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, ModelProto, ValueInfoProto};
use rayon::prelude::*;

use crate::convert;
use crate::evaluate::dataset::Dataset;
use crate::failure::{Failure, FailureReason, chain, disk, failure, internal};
use crate::graph::{serialize, value_info};
use histogram::Histogram;

pub mod histogram;

/// Most bytes of observed values that are held at once, but for a sample that alone has more.
const OBSERVED_BYTES_MAX: usize = 32 << 20;

/// Samples that models can be run on, batch after batch.
pub struct Calibration {
    samples: Dataset,
    threads: usize,
}

/// A value to be observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// Its name.
    pub name: String,
    /// The axis of its channels, where they are to be looked at one by one; negative axes count from the last.
    pub channel_axis: Option<i64>,
}

/// What a value was on all samples.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// Its distribution.
    pub histogram: Histogram,
    /// Each channel by itself, where that was asked for.
    pub channels: Channels,
}

/// Each channel of a value by itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Channels {
    /// The largest magnitude in each channel.
    pub largest: Vec<f32>,
    /// The sum of the values in each channel.
    sums: Vec<f64>,
    /// Values in each channel.
    count: usize,
}

impl Channels {
    fn add(&mut self, shape: &[usize], axis: i64, values: &[f32]) {
        let axis = if axis < 0 { axis + shape.len() as i64 } else { axis };
        let Some(axis) = usize::try_from(axis).ok().filter(|axis| *axis < shape.len()) else {
            return;
        };
        let channels = shape[axis];
        let inner: usize = shape[axis + 1..].iter().product();
        if values.is_empty() {
            return;
        }
        self.largest.resize(channels, 0.0);
        self.sums.resize(channels, 0.0);
        for block in values.chunks_exact(channels * inner) {
            for (channel, run) in block.chunks_exact(inner).enumerate() {
                self.largest[channel] = run.iter().fold(self.largest[channel], |largest, value| largest.max(value.abs()));
                self.sums[channel] += f64::from(run.iter().sum::<f32>());
            }
        }
        self.count += values.len() / channels;
    }

    /// The mean of the values in each channel.
    #[must_use]
    pub fn means(&self) -> Vec<f64> {
        self.sums.iter().map(|sum| sum / self.count as f64).collect()
    }
}

impl Calibration {
    /// Of `samples`, run with that many threads.
    #[must_use]
    pub fn new(samples: Dataset, threads: usize) -> Self {
        Self { samples, threads }
    }

    /// The samples.
    #[must_use]
    pub fn samples(&self) -> &Dataset {
        &self.samples
    }

    /// Runs `model` on every sample and gathers what each of the values `observed` was, in one pass. The memory that it takes depends on
    /// the model alone, however many samples there are.
    ///
    /// # Errors
    /// As [`observe`](Self::observe).
    pub fn statistics(&self, model: &ModelProto, observed: &[Observed]) -> Result<Vec<Statistics>, Failure> {
        let mut statistics = vec![Statistics::default(); observed.len()];
        let names: Vec<String> = observed.iter().map(|observed| observed.name.clone()).collect();
        self.observe(model, &names, |tensors| {
            let values = statistics.par_iter_mut().zip(observed).zip(tensors);
            values.for_each(|((statistics, observed), tensor)| {
                let values = tensor.as_f32().unwrap_or_default();
                statistics.histogram.add(values);
                if let Some(axis) = observed.channel_axis {
                    statistics.channels.add(tensor.shape(), axis, values);
                }
            });
            Ok(())
        })?;
        Ok(statistics)
    }

    /// Runs `model` on every sample and gives `visit` the named `values` of each batch, in the order of their names; they are values of
    /// the graph itself in single precision, its inputs and outputs among them. Memory holds one batch, as large as about 32 MiB of
    /// these values allow.
    ///
    /// # Errors
    /// Where no engine runs the model with these values as its outputs, or `visit` fails.
    pub fn observe(
        &self,
        model: &ModelProto,
        values: &[String],
        mut visit: impl FnMut(&[Tensor]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let (engine, places) = self.tapped(model, values)?;
        // The first sample shows how many values there are to each.
        let (mut start, mut samples_max) = (0, 1);
        while let Some(range) = self.samples.batches_from(start, samples_max).next() {
            let inputs = self.samples.batch(range.clone())?;
            let mut outputs = engine.run(&inputs).map_err(|error| {
                failure(
                    FailureReason::InvalidDataset,
                    format!("the model does not run on the calibration data: {}", chain(&error)),
                )
            })?;
            // Each value is moved out of its place; nobody else looks at it.
            let observed: Vec<Tensor> = places
                .iter()
                .map(|place| match *place {
                    Place::Input(index) => inputs[index].clone(),
                    Place::Output(index) => std::mem::replace(&mut outputs[index], empty()),
                })
                .collect();
            visit(&observed)?;
            if start == 0 {
                let bytes: usize = observed.iter().map(|tensor| 4 * tensor.data().len()).sum();
                samples_max = (OBSERVED_BYTES_MAX * range.len() / bytes.max(1)).max(1);
            }
            start = range.end;
        }
        Ok(())
    }

    /// An engine that gives every one of `values`, and where.
    fn tapped(&self, model: &ModelProto, values: &[String]) -> Result<(Box<dyn Engine>, Vec<Place>), Failure> {
        let mut tapped = model.clone();
        let graph = tapped.graph.get_or_insert_default();
        let position = |infos: &[ValueInfoProto], name: &str| infos.iter().position(|info| info.name() == name);
        let given: Vec<ValueInfoProto> = served_inputs(graph);
        let mut places = Vec::with_capacity(values.len());
        for name in values {
            places.push(match position(&given, name) {
                Some(index) => Place::Input(index),
                None => Place::Output(position(&graph.output, name).unwrap_or_else(|| {
                    graph.output.push(value_info(name, DataType::Float, None));
                    graph.output.len() - 1
                })),
            });
        }
        let folder = tempfile::tempdir().map_err(|error| internal("cannot make a folder for calibration", &error))?;
        let path = folder.path().join("tapped.onnx");
        // Its weights stay in the file in which they are.
        serialize::write_referring(&tapped, &path).map_err(disk("write", &path))?;
        Ok((self.load(&path)?, places))
    }

    fn load(&self, path: &Path) -> Result<Box<dyn Engine>, Failure> {
        let options = LoadOptions {
            threads: self.threads,
            ..LoadOptions::default()
        };
        let mut refusals = Vec::new();
        // ONNX Runtime first, where it is: it runs nearly every model, and fast.
        let mut kinds = convert::engines();
        kinds.sort_by_key(|kind| *kind != EngineKind::OnnxRuntime);
        for kind in kinds {
            match engine::load(kind, path, &options) {
                Ok(engine) => return Ok(engine),
                Err(error) => refusals.push(format!("{kind}: {}", chain(&error))),
            }
        }
        let message = format!("no engine shows what values inside of the model are: {}", refusals.join("; "));
        Err(failure(FailureReason::UnsupportedOperator, message))
    }
}

/// Where an engine has a value.
enum Place {
    Input(usize),
    Output(usize),
}

/// The inputs that no initialiser gives, as engines take them.
fn served_inputs(graph: &GraphProto) -> Vec<ValueInfoProto> {
    let given = |input: &&ValueInfoProto| !graph.initializer.iter().any(|tensor| tensor.name() == input.name());
    graph.input.iter().filter(given).cloned().collect()
}

fn empty() -> Tensor {
    Tensor::new(vec![0], Data::Fp32(vec![])).unwrap_or_else(|_| unreachable!("no values fill an empty shape"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{float_tensor, node};
    use plimsoll_runtime::onnx::{OperatorSetIdProto, TensorShapeProto, tensor_shape_proto};

    fn shaped(name: &str, sizes: &[Option<i64>]) -> ValueInfoProto {
        use tensor_shape_proto::{Dimension, dimension::Value};
        let dim = sizes.iter().map(|size| Dimension {
            value: size.map(Value::DimValue),
            ..Dimension::default()
        });
        value_info(name, DataType::Float, Some(TensorShapeProto { dim: dim.collect() }))
    }

    fn doubling(batch: Option<i64>) -> ModelProto {
        let graph = GraphProto {
            input: vec![shaped("x", &[batch, Some(2)])],
            output: vec![shaped("y", &[batch, Some(2)])],
            initializer: vec![float_tensor("two", &[], &[2.0])],
            node: vec![node("Mul", &["x", "two"], "m", vec![]), node("Neg", &["m"], "y", vec![])],
            name: Some("doubling".into()),
            ..GraphProto::default()
        };
        ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto {
                domain: None,
                version: Some(13),
            }],
            graph: Some(graph),
            ..ModelProto::default()
        }
    }

    fn calibration(model: &ModelProto, samples: usize) -> Calibration {
        let values: Vec<f32> = (0..2 * samples).map(|index| index as f32).collect();
        let inputs = vec![Tensor::new(vec![samples, 2], values).unwrap()];
        let (specs, _) = plimsoll_runtime::onnx::signature(model).unwrap();
        Calibration::new(Dataset::of_tensors(inputs, &specs, None).unwrap(), 1)
    }

    #[test]
    fn inputs_values_inside_and_outputs_are_seen_on_every_sample() {
        let names: Vec<String> = ["y", "m", "x"].map(str::to_owned).to_vec();
        let mut seen = vec![Vec::new(); 3];
        let model = doubling(None);
        calibration(&model, 5)
            .observe(&model, &names, |tensors| {
                for (seen, tensor) in seen.iter_mut().zip(tensors) {
                    seen.extend_from_slice(tensor.as_f32().unwrap());
                }
                Ok(())
            })
            .unwrap();
        let expected = |factor: f32| (0..10).map(|index| factor * index as f32).collect::<Vec<_>>();
        assert_eq!(seen, [expected(-2.0), expected(2.0), expected(1.0)]);
    }

    #[test]
    fn of_a_fixed_batch_the_last_samples_are_left_out() {
        let mut batches = Vec::new();
        let model = doubling(Some(2));
        calibration(&model, 5)
            .observe(&model, &["m".to_owned()], |tensors| {
                batches.push(tensors[0].shape().to_vec());
                Ok(())
            })
            .unwrap();
        assert_eq!(batches, [[2, 2], [2, 2]]);
    }

    #[test]
    fn channels_have_their_own_extremes_and_means() {
        let observed = [Observed {
            name: "m".into(),
            channel_axis: Some(-1),
        }];
        let statistics = calibration(&doubling(None), 3).statistics(&doubling(None), &observed).unwrap();
        assert_eq!(statistics[0].channels.largest, [8.0, 10.0]);
        assert_eq!(statistics[0].channels.means(), [4.0, 6.0]);
        assert_eq!(statistics[0].histogram.min_max(), (0.0, 10.0));
    }
}
