//! Calibration: what values inside of a model are on real samples.

use std::path::Path;

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_runtime::engine::{self, Engine, LoadOptions, Tensor};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{ModelProto, TypeProto, ValueInfoProto, type_proto};

use crate::convert;
use crate::evaluate::dataset::Dataset;
use crate::failure::{Failure, FailureReason, chain, failure, internal};

/// Samples that models can be run on, batch after batch.
pub struct Calibration {
    samples: Dataset,
    threads: usize,
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

    /// Runs `model` on every sample and gives `visit` the named `values` of each batch, in the order of their names; they are values of
    /// the graph itself in single precision, its inputs excepted. Memory holds one batch.
    ///
    /// # Errors
    /// Where no engine runs the model with these values as its outputs, or `visit` fails.
    pub fn observe(
        &self,
        model: &ModelProto,
        values: &[String],
        mut visit: impl FnMut(&[Tensor]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let engine = self.tapped(model, values)?;
        let size = self.samples.batch_size(&*engine);
        let mut start = 0;
        while start < self.samples.samples {
            let end = (start + size).min(self.samples.samples);
            // A model of a fixed batch takes no incomplete one; its last samples are left out.
            if start > 0 && end - start < size && has_fixed_batch(&*engine) {
                break;
            }
            let mut outputs = engine.run(&self.samples.batch(start..end)).map_err(|error| {
                failure(
                    FailureReason::InvalidDataset,
                    format!("the model does not run on the calibration data: {}", chain(&error)),
                )
            })?;
            outputs.drain(..outputs.len() - values.len());
            visit(&outputs)?;
            start = end;
        }
        Ok(())
    }

    /// An engine that gives `values` after the model's own outputs.
    fn tapped(&self, model: &ModelProto, values: &[String]) -> Result<Box<dyn Engine>, Failure> {
        let mut tapped = model.clone();
        let graph = tapped.graph.get_or_insert_default();
        graph.output.extend(values.iter().map(|name| float_value(name)));
        let folder = tempfile::tempdir().map_err(|error| internal("cannot make a folder for calibration", &error))?;
        let path = folder.path().join("tapped.onnx");
        convert::write(&tapped, &path)?;
        self.load(&path)
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

fn has_fixed_batch(engine: &dyn Engine) -> bool {
    engine.inputs().iter().any(|spec| spec.shape.first().is_some_and(|size| *size >= 0))
}

fn float_value(name: &str) -> ValueInfoProto {
    let kind = type_proto::Tensor {
        elem_type: Some(DataType::Float as i32),
        shape: None,
    };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(kind)),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}
