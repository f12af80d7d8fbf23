//! The model that is served: read, verified, loaded, and proven by its probe.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use plimsoll_package::manifest::{MODEL_FILE, Manifest, PackageError, Probe, TensorSpec};

use super::Config;
use super::companions::{CompanionError, Companions};
use super::drift::Drift;
use super::preprocessing::Preprocessing;
use super::scheduler::{Batching, Scheduler};
use crate::engine::{self, Device, Engine, EngineError, EngineKind, LoadOptions, Tensor, independence, probe};

/// Why no engine serves the model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The package is not what its manifest says, or cannot be read.
    #[error("{}", chain(.0))]
    Package(#[from] PackageError),
    /// A file beside the model cannot be read.
    #[error(transparent)]
    Companion(#[from] CompanionError),
    /// Every engine that may serve it failed.
    #[error("no engine serves {path}: {reasons}", path = path.display())]
    NoEngine {
        /// The model's file.
        path: PathBuf,
        /// Why, engine by engine.
        reasons: String,
    },
}

/// A model that answered its probe.
pub(super) struct Model {
    pub(super) scheduler: Scheduler,
    /// Names of classes, by their index; none where the package has none.
    pub(super) labels: Vec<String>,
    /// What it takes besides its own inputs.
    pub(super) preprocessing: Preprocessing,
    /// Whether another engine than the preferred one serves.
    pub(super) fell_back: bool,
    pub(super) manifest: Option<Manifest>,
    /// Compares what goes through with what the package records, or says why not.
    pub(super) drift: Result<Drift, String>,
    kind: EngineKind,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
}

impl Model {
    /// Reads, verifies, loads and proves the model, and starts the threads that run it.
    pub(super) fn load(config: &Config) -> Result<Self, ModelError> {
        let package = config.path.is_dir();
        let manifest = if package { Some(Manifest::read(&config.path)?) } else { None };
        let recorded = if package { Some(Probe::read(&config.path)?) } else { None };
        let file = if package {
            config.path.join(MODEL_FILE)
        } else {
            config.path.clone()
        };
        // Hashing and loading read the same pages, so they go side by side; nothing is served before both are done.
        let companions = Companions::read(&file, manifest.as_ref())?;
        let (verified, loaded) = thread::scope(|scope| {
            let verifying = scope.spawn(|| manifest.as_ref().map_or(Ok(()), |manifest| manifest.verify(&config.path)));
            let loaded = load_any(config, manifest.as_ref(), recorded.as_ref(), &file);
            (verifying.join(), loaded)
        });
        verified.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let (engines, fell_back) = loaded?;
        let first = &engines[0];
        let (kind, inputs, outputs) = (first.kind(), first.inputs().to_vec(), first.outputs().to_vec());
        let preprocessing = Preprocessing::read(&companions, &inputs, &outputs);
        let labels = companions.labels().unwrap_or_else(|reason| {
            tracing::warn!(reason, "classes have no names");
            vec![]
        });
        let drift = Drift::read(&config.path, manifest.as_ref(), config.drift_window, &inputs, &outputs);
        let batching = batching(config, &**first, recorded.as_ref());
        Ok(Self {
            scheduler: Scheduler::start(engines, batching),
            labels,
            preprocessing,
            fell_back,
            manifest,
            drift,
            kind,
            inputs,
            outputs,
        })
    }

    /// A model of one engine that proved itself elsewhere.
    #[cfg(test)]
    pub(super) fn of(engine: Arc<dyn Engine>, batching: Batching) -> Self {
        Self {
            labels: vec![],
            preprocessing: Preprocessing::read(&Companions::default(), engine.inputs(), engine.outputs()),
            fell_back: false,
            manifest: None,
            drift: Err(String::new()),
            kind: engine.kind(),
            inputs: engine.inputs().to_vec(),
            outputs: engine.outputs().to_vec(),
            scheduler: Scheduler::start(vec![engine], batching),
        }
    }

    pub(super) fn kind(&self) -> EngineKind {
        self.kind
    }

    pub(super) fn inputs(&self) -> &[TensorSpec] {
        &self.inputs
    }

    pub(super) fn outputs(&self) -> &[TensorSpec] {
        &self.outputs
    }

    /// Its inputs, and what may be given instead of them.
    pub(super) fn described_inputs(&self) -> Vec<TensorSpec> {
        self.inputs.iter().cloned().chain(self.preprocessing.inputs()).collect()
    }

    /// Its outputs, and what they can be made into.
    pub(super) fn described_outputs(&self) -> Vec<TensorSpec> {
        self.outputs.iter().chain(self.preprocessing.pooled()).cloned().collect()
    }
}

/// The bounds of batches as they are configured, or none of more than a row where the rows of the model depend on each other.
fn batching(config: &Config, engine: &dyn Engine, recorded: Option<&Probe>) -> Batching {
    let mut batching = config.batching.clone();
    if batching.rows_max > 1 {
        let inputs: Option<Vec<Tensor>> = match recorded {
            Some(recorded) => probe::inputs(engine, recorded).ok(),
            None => probe::ramp(engine).ok(),
        };
        let tolerance = recorded.map_or(independence::TOLERANCE, |recorded| recorded.tolerance.max(independence::TOLERANCE));
        if let Err(reason) = independence::check(engine, &inputs.unwrap_or_default(), tolerance) {
            tracing::info!(%reason, "requests are run one by one");
            batching.rows_max = 1;
        }
    }
    batching
}

type Engines = Vec<Arc<dyn Engine>>;

fn load_any(config: &Config, manifest: Option<&Manifest>, probe: Option<&Probe>, file: &Path) -> Result<(Engines, bool), ModelError> {
    let preferred = manifest.map_or(EngineKind::OnnxRuntime, |manifest| manifest.engine);
    let other = if preferred == EngineKind::Tract {
        EngineKind::OnnxRuntime
    } else {
        EngineKind::Tract
    };
    let candidates = match config.engine {
        Some(only) => vec![only],
        // Whoever asks for a device is not served by an engine that does not know it.
        None if config.device != Device::Cpu => vec![EngineKind::OnnxRuntime],
        None => vec![preferred, other],
    };
    let fold_dequantize = manifest.is_none_or(|manifest| manifest.fold_dequantize);
    let options = LoadOptions {
        threads: config.threads,
        fold_dequantize,
        library: None,
        device: config.device,
        device_bytes_max: config.limits.device_bytes_max,
    };
    let mut reasons: Vec<String> = vec![];
    for (index, kind) in candidates.into_iter().enumerate() {
        let engines: Result<Engines, String> = (0..config.instances).map(|_| prove(kind, file, &options, probe)).collect();
        match engines {
            Ok(engines) => {
                if let Some(reason) = reasons.last() {
                    tracing::warn!(engine = %kind, reason, "another engine than the preferred one serves");
                }
                return Ok((engines, index > 0));
            }
            Err(reason) => reasons.push(format!("{kind}: {reason}")),
        }
    }
    Err(ModelError::NoEngine {
        path: file.to_owned(),
        reasons: reasons.join("; "),
    })
}

fn prove(kind: EngineKind, file: &Path, options: &LoadOptions, recorded: Option<&Probe>) -> Result<Arc<dyn Engine>, String> {
    let engine = engine::load(kind, file, options).map_err(|error| chain(&error))?;
    match recorded {
        Some(recorded) => probe::check(&*engine, recorded).map_err(|error| chain(&error))?,
        // Nothing is recorded for a bare file; that it runs is all that can be shown.
        None => probe::check_zeros(&*engine).map_err(|error: EngineError| chain(&error))?,
    }
    Ok(Arc::from(engine))
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
