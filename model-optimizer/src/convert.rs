//! From whatever format a model comes in to ONNX that an engine runs.

use std::path::Path;

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_runtime::engine::{self, EngineError, LoadOptions};
use plimsoll_runtime::onnx::{self, ModelProto, OnnxError};

use crate::failure::{Failure, FailureReason, chain, disk, failure};
use crate::graph::{self, operators};

mod content;

/// How a converted model is tried.
pub struct Trial {
    /// Threads that an inference may use.
    pub threads: usize,
    /// The engine that will serve, where that is settled.
    pub engine: Option<EngineKind>,
}

/// Reads the model at `path`, simplifies it, writes it to `destination`, and sees that one of the engines that `trial` names runs it. `uri` is what a
/// user knows it as.
///
/// # Errors
/// [`FailureReason::UnreadableModel`] where it is no model, [`FailureReason::Unsupported`] where it is one of another format, and
/// [`FailureReason::UnsupportedOperator`] where no engine runs one of its operators.
pub fn to_onnx(uri: &str, path: &Path, destination: &Path, trial: Option<&Trial>) -> Result<(), Failure> {
    content::check_is_onnx(uri, path)?;
    let mut model = read(uri, path)?;
    graph::simplify::simplify(&mut model).map_err(|why| {
        let message = format!("{uri} is a broken ONNX model: {why}");
        failure(FailureReason::UnreadableModel, message)
    })?;
    if let Some(graph) = &mut model.graph {
        graph::weight::name_users(graph);
    }
    onnx::signature(&model).map_err(|error| failure(FailureReason::Unsupported, format!("{uri} cannot be served: {error}")))?;
    crate::step::make_folder_of(destination)?;
    graph::serialize::write_referring(&model, destination).map_err(disk("write", destination))?;
    trial.map_or(Ok(()), |trial| check_runs(uri, &model, destination, trial))
}

/// Reads an ONNX model.
///
/// # Errors
/// [`FailureReason::UnreadableModel`].
pub fn read(uri: &str, path: &Path) -> Result<ModelProto, Failure> {
    onnx::read(path).map_err(|error| match error {
        OnnxError::NotOnnx { reason, .. } => {
            let message = format!("{uri} is no ONNX model, or a broken one: {reason}; check that the whole file was uploaded");
            failure(FailureReason::UnreadableModel, message)
        }
        error => failure(FailureReason::UnreadableModel, format!("{uri}: {}", chain(&error))),
    })
}

/// Writes an ONNX model, the weights of a large one as external data beside it.
///
/// # Errors
/// Where the disk does not take it.
pub fn write(model: &ModelProto, destination: &Path) -> Result<(), Failure> {
    crate::step::make_folder_of(destination)?;
    graph::serialize::write(model, destination).map_err(disk("write", destination))
}

/// The engines that may serve: the one that is `asked` for, or all.
#[must_use]
pub fn engines_of(asked: Option<EngineKind>) -> Vec<EngineKind> {
    asked.map_or_else(engines, |kind| vec![kind])
}

/// Every engine, ONNX Runtime only where its library is.
#[must_use]
pub fn engines() -> Vec<EngineKind> {
    let mut engines = vec![EngineKind::Tract];
    if engine::default_library().is_some() {
        engines.push(EngineKind::OnnxRuntime);
    }
    engines
}

fn check_runs(uri: &str, model: &ModelProto, path: &Path, trial: &Trial) -> Result<(), Failure> {
    let options = LoadOptions {
        threads: trial.threads,
        ..LoadOptions::default()
    };
    let (mut refusals, mut loaded) = (Vec::new(), false);
    // ONNX Runtime first: it runs nearly every model, and is quick to say so.
    for kind in engines_of(trial.engine).into_iter().rev() {
        let ran = engine::load(kind, path, &options).and_then(|engine| {
            loaded = true;
            // tract finds out what it cannot run when it knows the shapes.
            engine::probe::check_zeros(&*engine)
        });
        match ran {
            Ok(()) => return Ok(()),
            Err(error) => refusals.push((kind, error)),
        }
    }
    let words = refusals
        .iter()
        .map(|(kind, error)| format!("{kind}: {}", reason(error)))
        .collect::<Vec<_>>()
        .join("; ");
    if let Some(node) = operators::unknown(model) {
        let message = format!(
            "{uri} uses the operator {} of the domain `{}` (node `{}`), which no engine runs; replace it by standard operators and export again",
            node.op_type(),
            node.domain(),
            node.name()
        );
        return Err(failure(FailureReason::UnsupportedOperator, message));
    }
    // An engine that lacks a standard operator names it.
    if let Some(node) = operators::lacking(model, &words) {
        let message = format!(
            "{uri} uses the operator {} (node `{}`), which no engine runs as it is used there: {words}",
            node.op_type(),
            node.name()
        );
        return Err(failure(FailureReason::UnsupportedOperator, message));
    }
    if loaded {
        // Zeros of the smallest shape need not be an input that the model takes; the evaluation has better ones.
        return Ok(());
    }
    Err(failure(FailureReason::UnreadableModel, format!("no engine loads {uri}: {words}")))
}

fn reason(error: &EngineError) -> String {
    match error {
        EngineError::Load { reason, .. } => reason.clone(),
        error => chain(error),
    }
}
