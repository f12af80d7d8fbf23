//! `fetch`: brings the model and the datasets, checks their digests, and looks whether their artifact exists already.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use plimsoll_package::digest::Digest;
use plimsoll_package::key::{ArtifactKey, Contents};
use plimsoll_package::recipe::{Dataset, Inputs, Optimization, SourceLocation};
use plimsoll_package::registry::{Access, Credentials, Registry, RegistryError};
use plimsoll_package::report::Summary;
use plimsoll_package::units::display_size;
use plimsoll_runtime::onnx::{self, OnnxError};
use serde::{Deserialize, Serialize};

use super::Context;
use crate::failure::{Failure, FailureReason, disk, failure, internal, of_source};
use crate::source::{self, Content, Limits};
use crate::support;

/// The record of this step.
pub const RECORD: &str = "fetched.json";
/// Attempts at a source that does not answer: about half a minute.
const RETRIES: usize = 6;

/// What was fetched.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fetched {
    /// The model.
    pub source: Content,
    /// The calibration data.
    pub calibration: Option<Content>,
    /// The evaluation data.
    pub evaluation: Option<Content>,
    /// The training data of each distillation that has its own, in the order of the recipe.
    #[serde(default)]
    pub distillation: Vec<Content>,
    /// The model that distillations train towards, where it is another one.
    #[serde(default)]
    pub teacher: Option<Content>,
    /// The tag of the artifact.
    pub key: String,
}

impl Fetched {
    /// The contents, as an artifact's key covers them.
    #[must_use]
    pub fn contents(&self) -> Contents {
        let digest = |content: &Content| content.digest.clone();
        Contents {
            source: digest(&self.source),
            calibration: self.calibration.as_ref().map(digest),
            evaluation: self.evaluation.as_ref().map(digest),
            distillation: self.distillation.iter().chain(&self.teacher).map(digest).collect(),
        }
    }
}

/// Whether the model is there before it is fetched, and nothing else is needed to compress it: it lies on this file system, is all in one file,
/// and the recipe looks at no data.
#[must_use]
pub fn is_ahead(context: &Context) -> bool {
    let inputs = &context.inputs;
    let Optimization {
        recipe,
        search: None,
        calibration: None,
        evaluation: _,
        budget: _,
    } = &inputs.optimize
    else {
        return false;
    };
    let alone = inputs.teacher.is_none() && recipe.iter().all(|technique| technique.distill.is_none());
    let destination = context.source("model");
    let linked = || super::make_folder_of(&destination).is_ok() && source::link(&inputs.source.uri, &destination);
    alone && support::check(inputs).is_ok() && linked() && {
        let external = onnx::read_alone(&destination).and_then(|mut model| onnx::external::locations(&mut model));
        external.is_ok_and(|names| names.is_empty())
    }
}

/// Whether one dataset is given for calibration and for evaluation.
///
/// # Errors
/// Where the record of this step cannot be read.
pub fn calibrates_on_evaluation(context: &Context) -> Result<bool, Failure> {
    let fetched: Fetched = context.read(RECORD)?;
    let digest = |content: Option<Content>| content.map(|content| content.digest);
    let (calibration, evaluation) = (digest(fetched.calibration), digest(fetched.evaluation));
    Ok(calibration.is_some() && calibration == evaluation)
}

/// The file of the teacher.
pub const TEACHER: &str = "teacher";

/// The file of the training data of the recipe's entry `index`.
#[must_use]
pub fn distillation_file(index: usize) -> String {
    format!("distillation-{index}")
}

/// The files that were fetched as `content`: itself, and what lies beside it.
pub(super) fn files(content: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (vec![], vec![content.parent().unwrap_or(content).to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

/// Something to fetch.
struct Wanted<'a> {
    /// As the user knows it.
    what: &'static str,
    /// Its file, and the folder of its credentials.
    name: String,
    uri: &'a str,
    digest: Option<&'a Digest>,
}

/// Fetches; returns the summary of the artifact where it exists.
///
/// # Errors
/// Where anything is unsupported, cannot be had, is too large or is not what was pinned.
pub fn run(context: &Context) -> Result<Option<Summary>, Failure> {
    support::check(&context.inputs)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.map_err(|error| internal("cannot start", &error))?.block_on(fetch(context))
}

async fn fetch<'a>(context: &'a Context) -> Result<Option<Summary>, Failure> {
    let inputs: &'a Inputs = &context.inputs;
    let size_max = inputs
        .max_fetch_size
        .value()
        .map_err(|error| failure(FailureReason::InvalidInputs, format!("maxFetchSize: {error}")))?;
    let limits = Limits {
        size_max,
        plain_http_hosts: inputs.plain_http_hosts.clone(),
        extra_ca: context.extra_ca.clone(),
        claims: context.claims.clone(),
        retries: RETRIES,
    };
    let model = |what, name: &str, model: &'a SourceLocation| Wanted {
        what,
        name: name.to_owned(),
        uri: &model.uri,
        digest: model.digest.as_ref(),
    };
    let dataset = |what, name: &str, dataset: &'a Dataset| Wanted {
        what,
        name: name.to_owned(),
        uri: &dataset.uri,
        digest: dataset.digest.as_ref(),
    };
    let optimize = &inputs.optimize;
    let calibration = optimize
        .calibration
        .as_ref()
        .map(|data| dataset("calibration data", "calibration", data));
    let evaluation = optimize.evaluation.as_ref();
    let evaluation = evaluation.map(|evaluation| dataset("evaluation data", "evaluation", &evaluation.dataset));
    let distillation = optimize.recipe.iter().enumerate().filter_map(|(index, technique)| {
        let data = technique.distill.as_ref()?.data.as_ref()?;
        Some(fetch_one(
            context,
            &limits,
            dataset("training data", &distillation_file(index), data),
        ))
    });
    let teacher = inputs.teacher.as_ref().map(|teacher| model("teacher", TEACHER, teacher));
    let optional = async |wanted: Option<Wanted<'_>>| match wanted {
        Some(wanted) => fetch_one(context, &limits, wanted).await.map(Some),
        None => Ok(None),
    };
    let all = futures::future::try_join5(
        fetch_one(context, &limits, model("model", "model", &inputs.source)),
        optional(calibration),
        optional(evaluation),
        futures::future::try_join_all(distillation),
        optional(teacher),
    );
    let (source, calibration, evaluation, distillation, teacher) = all.await?;
    let mut fetched = Fetched {
        source,
        calibration,
        evaluation,
        distillation,
        teacher,
        key: String::new(),
    };
    let key = ArtifactKey::new(inputs, &fetched.contents());
    fetched.key = key.to_string();
    context.write(RECORD, &fetched)?;
    Ok(existing(context, inputs, &key).await)
}

async fn fetch_one(context: &Context, limits: &Limits, wanted: Wanted<'_>) -> Result<Content, Failure> {
    let Wanted { what, name, uri, digest } = wanted;
    let secret = context.secrets.join(if name == "model" { "source" } else { &name });
    let credentials = Credentials::read(&secret).map_err(|error| of_source(what, &error))?;
    let destination = context.source(&name);
    super::make_folder_of(&destination)?;
    let activity = context.console.activity(&format!("fetching the {what}"), "bytes");
    let mut content = if name == "model" {
        source::fetch_model(uri, credentials.clone(), limits, &destination, activity).await?
    } else {
        source::fetch(what, uri, credentials.clone(), limits, &destination, activity).await?
    };
    if name == "model" || name == TEACHER {
        content = with_external_data(context, limits, uri, &credentials, &destination, content).await?;
    }
    let beside = if name == "model" {
        source::companions(&destination)
    } else {
        vec![]
    };
    let with = |beside: &[&str]| {
        if beside.is_empty() {
            String::new()
        } else {
            format!(" with {}", beside.join(", "))
        }
    };
    if let Some(expected) = digest.filter(|expected| **expected != content.digest) {
        let found = &content.digest;
        let advice = "set the digest to the new content's, or put the old content back";
        let files = with(&beside);
        return Err(failure(
            FailureReason::DigestMismatch,
            format!("the {what} {uri}{files} has digest {found}, pinned is {expected}; {advice}"),
        ));
    }
    context.console.info(&format!(
        "fetched the {what} {uri}{}: {}, {}",
        with(&beside),
        display_size(content.size),
        content.digest
    ));
    Ok(content)
}

/// Fetches the files in which the model keeps its weights, where it does. The content is then that of the model's file, followed by those of the
/// others in the order of their names, and then by its companions in the order of theirs, as `cat model.onnx model.onnx.data config.json` gives it:
/// what is pinned is all that is served. The size is that of the model and its weights.
async fn with_external_data(
    context: &Context,
    limits: &Limits,
    uri: &str,
    credentials: &Credentials,
    path: &Path,
    model: Content,
) -> Result<Content, Failure> {
    let unreadable = |error: OnnxError| failure(FailureReason::UnreadableModel, format!("{uri}: {error}"));
    let names = match onnx::read_alone(path) {
        Ok(mut proto) => onnx::external::locations(&mut proto).map_err(unreadable)?,
        // What is no ONNX model keeps nothing elsewhere; the next step says what it is.
        Err(_) => Default::default(),
    };
    let mut content = model;
    for name in &names {
        let destination = path.with_file_name(name);
        if destination == path {
            let message =
                format!("{uri} keeps its weights in a file called `{name}`, a name that is taken here; give that file another name");
            return Err(failure(FailureReason::UnreadableModel, message));
        }
        super::make_folder_of(&destination)?;
        let limits = Limits {
            size_max: limits.size_max.saturating_sub(content.size),
            ..limits.clone()
        };
        let activity = context.console.activity(&format!("fetching {name}"), "bytes");
        content.size += source::fetch_beside(uri, name, credentials.clone(), &limits, &destination, activity)
            .await?
            .size;
    }
    let beside = source::companions(path);
    if !names.is_empty() || !beside.is_empty() {
        let mut all: Box<dyn Read> = Box::new(io::empty());
        let names = names.iter().map(String::as_str).chain(beside);
        for file in std::iter::once(path.to_owned()).chain(names.map(|name| path.with_file_name(name))) {
            all = Box::new(all.chain(fs::File::open(&file).map_err(disk("read", &file))?));
        }
        content.digest = Digest::of_reader(all).map_err(disk("read", path))?;
    }
    Ok(content)
}

/// The artifact of these contents, where the registry has it. A registry that does not answer is no reason to stop: what is made
/// meanwhile may be published when it does, and if not, `publish` says so.
async fn existing(context: &Context, inputs: &Inputs, key: &ArtifactKey) -> Option<Summary> {
    if inputs.repository.is_empty() {
        return None;
    }
    let reference = format!("{}:{key}", inputs.repository);
    let credentials = Credentials::read(&context.secrets.join("registry"));
    let found = match credentials.and_then(|credentials| registry(context, credentials)) {
        Ok(registry) => look_up(&registry, inputs, &reference).await,
        Err(error) => Err(error),
    };
    match found {
        Ok(found) => {
            let summary = found?;
            context.console.info(&format!("{reference} exists, nothing is left to do"));
            Some(Summary { reused: true, ..summary })
        }
        Err(error) => {
            context.console.warn(&format!("cannot look for an existing artifact: {error}"));
            None
        }
    }
}

async fn look_up(registry: &Registry, inputs: &Inputs, reference: &str) -> Result<Option<Summary>, RegistryError> {
    let Some(found) = registry.lookup(reference).await? else {
        return Ok(None);
    };
    if let (Some(tag), Some(_)) = (&inputs.run_tag, &found.summary) {
        registry.tag(&inputs.repository, &found.digest, tag).await?;
    }
    Ok(found.summary)
}

pub(super) fn registry(context: &Context, credentials: Credentials) -> Result<Registry, RegistryError> {
    Registry::new(Access {
        credentials,
        plain_http_hosts: context.inputs.plain_http_hosts.clone(),
        extra_ca: context.extra_ca.clone(),
    })
}
