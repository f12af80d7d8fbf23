//! The model whose outputs are the targets, on an engine.

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_runtime::engine::{self, Engine, LoadOptions, Tensor};
use plimsoll_runtime::onnx::ModelProto;

use crate::convert;
use crate::failure::{Failure, FailureReason, chain, failure, internal};
use crate::graph::elements::element_types;
use crate::graph::value_info;

/// Runs the teacher.
pub(super) struct Teacher(Box<dyn Engine>);

impl Teacher {
    /// Loads `model`, into ONNX Runtime where that runs it; its `hidden` values are outputs, too, and where among them is given.
    ///
    /// # Errors
    /// [`FailureReason::UnsupportedOperator`] where no engine loads it.
    pub(super) fn load(model: &ModelProto, hidden: &[&str], threads: usize) -> Result<(Self, Vec<usize>), Failure> {
        let mut model = model.clone();
        let places = show(&mut model, hidden);
        let folder = tempfile::tempdir().map_err(|error| internal("cannot make a folder for the teacher", &error))?;
        let path = folder.path().join("teacher.onnx");
        convert::write(&model, &path)?;
        let options = LoadOptions {
            threads,
            ..LoadOptions::default()
        };
        let mut kinds = convert::engines();
        kinds.sort_by_key(|kind| *kind != EngineKind::OnnxRuntime);
        let mut refusals = Vec::new();
        for kind in kinds {
            match engine::load(kind, &path, &options) {
                Ok(engine) => return Ok((Self(engine), places)),
                Err(error) => refusals.push(format!("{kind}: {}", chain(&error))),
            }
        }
        let message = format!("no engine loads the teacher: {}", refusals.join("; "));
        Err(failure(FailureReason::UnsupportedOperator, message))
    }

    /// The names of its inputs.
    pub(super) fn inputs(&self) -> impl Iterator<Item = &str> {
        self.0.inputs().iter().map(|spec| spec.name.as_str())
    }

    /// How many samples it takes at once, where that is fixed.
    pub(super) fn fixed_batch(&self) -> Option<usize> {
        let sizes = self.0.inputs().iter().filter_map(|spec| spec.shape.first());
        sizes.filter_map(|&size| usize::try_from(size).ok()).next()
    }

    /// Its outputs.
    ///
    /// # Errors
    /// [`FailureReason::InvalidDataset`] where it does not run on the samples.
    pub(super) fn run(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Failure> {
        self.0.run(inputs).map_err(|error| {
            let message = format!("the teacher does not run on the training data: {}", chain(&error));
            failure(FailureReason::InvalidDataset, message)
        })
    }
}

/// Makes outputs of values inside of the model, and says where among the outputs each is.
fn show(model: &mut ModelProto, hidden: &[&str]) -> Vec<usize> {
    let graph = model.graph.get_or_insert_default();
    let types = element_types(graph);
    let place = |name: &&str| {
        if let Some(known) = graph.output.iter().position(|output| output.name() == *name) {
            return known;
        }
        let kind = types.get(*name).copied().unwrap_or_default();
        graph.output.push(value_info(name, kind, None));
        graph.output.len() - 1
    };
    hidden.iter().map(place).collect()
}
