//! The steps of a Job, each a process of its own on a shared folder, or all in one process on a laptop.
//!
//! The folder holds:
//!
//! ```text
//! source/{model,calibration,evaluation,distillation-N,teacher}/content    what was fetched, a model's external data beside it
//! fetched.json     digests and sizes                      [`fetch::Fetched`]
//! converted/model.onnx
//! search/          what a search judged so far            [`crate::search`]
//! compressed/model.onnx, compressed.json                  [`compress::Compressed`]
//! package/         the package to publish
//! .steps/          locks and marks                        [`chain`]
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use plimsoll_package::manifest::MODEL_FILE;
use plimsoll_package::recipe::Inputs;
use plimsoll_package::report::Termination;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::{Failure, disk, internal};
use crate::progress::Console;

pub mod chain;
pub mod compress;
pub mod convert;
pub mod evaluate;
pub mod fetch;
pub mod publish;

/// The name of every file that was fetched.
const CONTENT: &str = "content";

/// A step, in the order of the Job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, strum::Display, strum::IntoStaticStr, strum::EnumIter, clap::ValueEnum)]
#[strum(serialize_all = "lowercase")]
pub enum Step {
    /// Brings the model and the datasets.
    Fetch,
    /// Makes ONNX of the model and checks that an engine runs it.
    Convert,
    /// Applies the recipe.
    Compress,
    /// Measures, holds the result against the budget, and lays out the package.
    Evaluate,
    /// Pushes the package.
    Publish,
}

impl Step {
    /// The step before.
    #[must_use]
    pub fn predecessor(self) -> Option<Self> {
        match self {
            Self::Fetch => None,
            Self::Convert => Some(Self::Fetch),
            Self::Compress => Some(Self::Convert),
            Self::Evaluate => Some(Self::Compress),
            Self::Publish => Some(Self::Evaluate),
        }
    }
}

/// What every step is told.
pub struct Context {
    /// What to do.
    pub inputs: Inputs,
    /// The folder that the steps share.
    pub work: PathBuf,
    /// The folder of mounted credentials.
    pub secrets: PathBuf,
    /// The folder of mounted volume claims.
    pub claims: PathBuf,
    /// A PEM file with roots to trust beside the system's.
    pub extra_ca: Option<PathBuf>,
    /// Threads that an inference may use.
    pub threads: usize,
    /// Where messages go.
    pub console: Console,
}

impl Context {
    /// What was fetched: `model`, `calibration`, `evaluation`, `distillation-N` (of the recipe's entry N) or `teacher`.
    #[must_use]
    pub fn source(&self, name: &str) -> PathBuf {
        self.work.join("source").join(name).join(CONTENT)
    }

    /// The model after conversion.
    #[must_use]
    pub fn converted(&self) -> PathBuf {
        self.work.join("converted").join(MODEL_FILE)
    }

    /// The model after compression.
    #[must_use]
    pub fn compressed(&self) -> PathBuf {
        self.work.join("compressed").join(MODEL_FILE)
    }

    /// The folder of the package.
    #[must_use]
    pub fn package(&self) -> PathBuf {
        self.work.join("package")
    }

    /// Writes a record for a later step.
    ///
    /// # Errors
    /// Where the disk does not take it.
    pub fn write<T: Serialize>(&self, name: &str, record: &T) -> Result<(), Failure> {
        write_json(&self.work.join(name), record)
    }

    /// Reads an earlier step's record.
    ///
    /// # Errors
    /// Where it is missing or does not parse.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Result<T, Failure> {
        let path = self.work.join(name);
        let json = fs::read(&path).map_err(disk("read", &path))?;
        serde_json::from_slice(&json).map_err(|error| internal(&format!("{} does not parse", path.display()), &error))
    }
}

pub(crate) fn write_json<T: Serialize>(path: &Path, record: &T) -> Result<(), Failure> {
    let json = serde_json::to_vec(record).map_err(|error| internal("a record does not serialise", &error))?;
    make_folder_of(path)?;
    fs::write(path, json).map_err(disk("write", path))
}

pub(crate) fn make_folder_of(path: &Path) -> Result<(), Failure> {
    path.parent()
        .map_or(Ok(()), |folder| fs::create_dir_all(folder).map_err(disk("make", folder)))
}

/// Does a step's work, when its predecessors have done theirs. The result is there when the Job has its last word: after `publish`,
/// or after `fetch` where the artifact exists already.
///
/// # Errors
/// Whatever the step fails with.
pub fn run(step: Step, context: &Context) -> Result<Option<Termination>, Failure> {
    context.console.enter(step.into());
    let succeeded = |summary| Termination::Succeeded(Box::new(summary));
    match step {
        Step::Fetch => fetch::run(context).map(|reused| reused.map(succeeded)),
        Step::Convert => convert::run(context).map(|()| None),
        Step::Compress => compress::run(context).map(|()| None),
        Step::Evaluate => evaluate::run(context).map(|()| None),
        Step::Publish => publish::run(context).map(succeeded).map(Some),
    }
}
