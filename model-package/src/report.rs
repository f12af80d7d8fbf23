//! What an optimisation measured: [`Report`] in the package, and [`Termination`], the short form that fits into a container's
//! termination message and into an annotation of the published image.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::manifest::Engine;
use crate::recipe::{Inputs, Metric};
use front::Front;
use layer::LayerChange;

pub mod front;
pub mod layer;
#[cfg(feature = "schema")]
pub mod schema;

/// Most bytes of a container's termination message (Kubernetes, `terminationMessagePath`).
pub const TERMINATION_MESSAGE_BYTES_MAX: usize = 4096;

/// The image annotation that carries the [`Summary`] as JSON.
pub const SUMMARY_ANNOTATION: &str = "dev.plimsoll.summary";

/// Exit codes of the optimiser and of each of its steps. 2 to 4 are final: the Job fails at once and is not tried again.
pub mod exit_code {
    /// Done.
    pub const DONE: u8 = 0;
    /// Something that may pass: a network, a registry. The Job tries again.
    pub const TRANSIENT: u8 = 1;
    /// The command line or the inputs are wrong.
    pub const USAGE: u8 = 2;
    /// The result is outside of the budget.
    pub const BUDGET_EXCEEDED: u8 = 3;
    /// The source, the dataset or the model cannot be used.
    pub const UNUSABLE: u8 = 4;
    /// A step did not start because an earlier one failed, and says nothing of its own.
    pub const EARLIER_STEP_FAILED: u8 = 10;
}

/// The last word of a Job's step, as JSON in its termination message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "result")]
pub enum Termination {
    /// The artifact is published (by this run or, where `reused`, by an earlier one).
    Succeeded(Box<Summary>),
    /// The step failed.
    Failed(Failure),
}

impl Termination {
    /// The JSON of the message, of at most [`TERMINATION_MESSAGE_BYTES_MAX`] bytes: a failure's text is cut to fit.
    #[must_use]
    pub fn to_message(&self) -> String {
        let mut shortened = self.clone();
        loop {
            let json = serde_json::to_string(&shortened).expect("a tree of strings and numbers serialises");
            let Termination::Failed(failure) = &mut shortened else {
                return json;
            };
            let Some(excess) = json.len().checked_sub(TERMINATION_MESSAGE_BYTES_MAX).filter(|excess| *excess > 0) else {
                return json;
            };
            let mut end = failure.message.len().saturating_sub(excess.div_ceil(6) + '…'.len_utf8());
            // A character takes at most six bytes of JSON, so a sixth of the excess never cuts too much; the loop ends it.
            while !failure.message.is_char_boundary(end) {
                end -= 1;
            }
            failure.message.truncate(end);
            failure.message.push('…');
        }
    }
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase")]
#[error("{message}")]
pub struct Failure {
    /// The kind of failure; the reason of the condition and the Event.
    pub reason: FailureReason,
    /// What was wrong, where, and what to change, in a sentence or two.
    pub message: String,
    /// What was measured, where the failure is of a measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Box<Summary>>,
}

/// The kinds of failure of an optimisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, strum::Display, strum::IntoStaticStr, strum::EnumIter)]
pub enum FailureReason {
    /// The inputs do not parse or contradict each other.
    InvalidInputs,
    /// The source or dataset does not answer, or answers with a server's error.
    SourceUnreachable,
    /// The source or dataset answers that it is not there or not ours to read.
    SourceRefused,
    /// The content is not the one that was pinned.
    DigestMismatch,
    /// The content is larger than the limit.
    SourceTooLarge,
    /// The file is no model of the stated or of any known format.
    UnreadableModel,
    /// The model uses an operator that no engine runs.
    UnsupportedOperator,
    /// A format, technique, metric or option that this version does not have.
    Unsupported,
    /// The dataset does not fit the model.
    InvalidDataset,
    /// The result is outside of the budget.
    BudgetExceeded,
    /// The registry does not take or give the artifact.
    RegistryUnavailable,
    /// A step was ended from outside, such as for its memory.
    Interrupted,
    /// A fault of the optimiser itself.
    Internal,
}

impl FailureReason {
    /// Whether trying again with the same inputs may succeed.
    #[must_use]
    pub fn is_transient(self) -> bool {
        match self {
            Self::SourceUnreachable | Self::RegistryUnavailable | Self::Interrupted | Self::Internal => true,
            Self::InvalidInputs
            | Self::SourceRefused
            | Self::DigestMismatch
            | Self::SourceTooLarge
            | Self::UnreadableModel
            | Self::UnsupportedOperator
            | Self::Unsupported
            | Self::InvalidDataset
            | Self::BudgetExceeded => false,
        }
    }

    /// The exit code of a step that fails so.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::InvalidInputs => exit_code::USAGE,
            Self::BudgetExceeded => exit_code::BUDGET_EXCEEDED,
            reason if reason.is_transient() => exit_code::TRANSIENT,
            _ => exit_code::UNUSABLE,
        }
    }
}

/// The result of an optimisation in brief.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Digest of the published image's manifest; absent before publication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Digest>,
    /// Whether an artifact of an earlier optimisation of the same contents is used.
    #[serde(default)]
    pub reused: bool,
    /// Content digest of the source model.
    pub source_digest: Digest,
    /// Content digest of the evaluation dataset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation_digest: Option<Digest>,
    /// Size of the source model in bytes.
    pub size_before: u64,
    /// Size of the optimised model in bytes.
    pub size_after: u64,
    /// Size of the source model as the layer that would be pulled, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_layer_before: Option<u64>,
    /// Size of the optimised model as the layer that is pulled, in bytes: smaller than the model where many weights are zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_layer_after: Option<u64>,
    /// The share of weights that are zero, `0.0..=1.0`.
    pub sparsity: f64,
    /// The metric, with its value before and after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<MetricChange>,
    /// Least cosine similarity of any output to the original model's, `-1.0..=1.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<f64>,
    /// Median time of an inference of one sample, on the chosen engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencyChange>,
    /// The engine that measured fastest.
    pub engine: Engine,
    /// Version of the optimiser.
    pub toolchain: String,
}

/// A metric before and after.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct MetricChange {
    /// What was measured.
    pub name: Metric,
    /// On the source model.
    pub before: f64,
    /// On the optimised model.
    pub after: f64,
    /// Number of samples.
    pub samples: u64,
}

/// A latency before and after, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LatencyChange {
    /// Median of the source model, in microseconds.
    pub before_us: f64,
    /// Median of the optimised model, in microseconds.
    pub after_us: f64,
}

/// The spread of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The 10th percentile.
    pub p10: f64,
    /// The 90th percentile.
    pub p90: f64,
}

/// Memory before and after, in bytes: what a process holds more once a model is loaded and has run once; medians of a few loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct MemoryChange {
    /// Of the source model, in bytes.
    pub before_bytes: u64,
    /// Of the optimised model, in bytes.
    pub after_bytes: u64,
}

/// The full report of an optimisation, `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Version of this structure: 1.
    pub schema_version: u32,
    /// The result in brief.
    pub summary: Summary,
    /// All that the optimiser was told.
    pub inputs: Inputs,
    /// Whether the result is within the budget, limit by limit.
    #[serde(default)]
    pub gate: Gate,
    /// The samples that it was judged on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<Samples>,
    /// What each technique did, in order.
    pub steps: Vec<TechniqueReport>,
    /// Fidelity of each output.
    pub outputs: Vec<OutputFidelity>,
    /// Accuracy per class before and after, where the metric knows classes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassChange>,
    /// Median latency on each engine that runs the model.
    pub engines: Vec<EngineReport>,
    /// What was left alone, and why.
    pub skipped: Vec<Skipped>,
    /// What became of each weight, the largest first; at most 512.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerChange>,
    /// How much each layer loses when it alone is quantised; absent without the gate, and after a search, which says it in `front`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<front::Sweep>,
    /// What a search tried; absent where the recipe was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub front: Option<Front>,
    /// Wall time of each step, in milliseconds.
    pub step_ms: std::collections::BTreeMap<String, f64>,
}

/// Whether a result is within its budget.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Gate {
    /// What comes of it.
    pub verdict: Verdict,
    /// Every limit that binds, with what was measured; none without the gate.
    pub limits: Vec<LimitCheck>,
}

/// What comes of a result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Verdict {
    /// It is within every limit.
    #[default]
    WithinBudget,
    /// It is outside of a limit, and not handed out.
    BudgetExceeded,
    /// Nobody knows: it is handed out without having been run, for the gate was turned off.
    NotGated,
}

/// A limit and what was measured against it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LimitCheck {
    /// The field of `spec.optimize.budget`.
    pub limit: String,
    /// Whether the limit is the default, for none was stated.
    #[serde(default)]
    pub default: bool,
    /// What it bounds: `model`, an output, a slice of one, a class.
    pub of: String,
    /// What it allows, in the unit of the field: a ratio, bytes, or microseconds.
    pub allowed: f64,
    /// What was measured, in the same unit.
    pub measured: f64,
    /// Whether that is within it.
    pub passed: bool,
    /// The sentence that says what is exceeded; absent where it passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The samples that a result was judged on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Samples {
    /// Where they come from.
    pub from: SampleSource,
    /// How many there are.
    pub count: u64,
    /// The seed of their choice, where one dataset was split, or of their values, where they were drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// Where samples come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum SampleSource {
    /// The evaluation data.
    Evaluation,
    /// The part of the evaluation data that was not calibrated on, for both are one dataset.
    EvaluationPart,
    /// The calibration data.
    Calibration,
    /// The model's signature: they are random numbers.
    Signature,
}

/// What one technique did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TechniqueReport {
    /// The technique with its parameters, as in the recipe.
    pub technique: crate::recipe::Technique,
    /// What it buys of size and speed, in a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub buys: String,
    /// Names of the weights that were changed.
    pub changed: Vec<String>,
    /// Size of the model after it, in bytes.
    pub size_after: u64,
}

/// Fidelity of one output to the original model's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct OutputFidelity {
    /// The output's name.
    pub name: String,
    /// Cosine similarity over all samples together.
    pub cosine: f64,
    /// Signal to quantisation noise ratio, in decibels; absent where nothing differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sqnr_db: Option<f64>,
    /// Largest absolute difference.
    pub max_abs_error: f64,
    /// The share of rows along the last axis whose largest value is at the same place in both, of whole numbers the share of equal ones;
    /// absent where a row has one value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// How many slices carry signal: columns, channels.
    #[serde(default)]
    pub slices: u64,
    /// How many slices are zero or next to it in the original's output, so that nothing can be said of them.
    #[serde(default)]
    pub silent_slices: u64,
    /// The slices of least fidelity, the worst first; at most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub worst_slices: Vec<SliceFidelity>,
}

/// Fidelity of a slice of an output: all values at one index of an axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct SliceFidelity {
    /// The axis, from 0.
    pub axis: u64,
    /// The index along it, from 0.
    pub index: u64,
    /// Cosine similarity over all samples together.
    pub cosine: f64,
    /// Signal to quantisation noise ratio, in decibels; absent where nothing differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sqnr_db: Option<f64>,
}

/// Accuracy of one class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ClassChange {
    /// The label.
    pub class: i64,
    /// Samples of the class.
    pub samples: u64,
    /// Share of them that the source model gets right.
    pub before: f64,
    /// Share of them that the optimised model gets right.
    pub after: f64,
}

/// How the model does on one engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct EngineReport {
    /// The engine.
    pub engine: Engine,
    /// Its latencies; absent where it cannot run the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencyChange>,
    /// How the latency of the optimised model relates to the source model's, pair by pair of neighbouring inferences; below 1 is faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ratio: Option<Spread>,
    /// Its memory; absent where it cannot be measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryChange>,
    /// How the memory of the optimised model relates to the source model's, load by load; below 1 is less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_ratio: Option<Spread>,
    /// Why it cannot run the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// Something that a technique left alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Skipped {
    /// The weight or node.
    pub name: String,
    /// Why.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use strum::IntoEnumIterator as _;

    #[test]
    fn a_long_failure_is_cut_to_the_kubelets_limit() {
        let failure = Failure {
            reason: FailureReason::UnreadableModel,
            message: "é\"".repeat(5000),
            measured: None,
        };
        let message = Termination::Failed(failure).to_message();
        assert!(
            message.len() <= TERMINATION_MESSAGE_BYTES_MAX && message.len() > TERMINATION_MESSAGE_BYTES_MAX - 16,
            "{}",
            message.len()
        );
        assert!(matches!(serde_json::from_str(&message).unwrap(), Termination::Failed(f) if f.message.ends_with('…')));
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for reason in FailureReason::iter() {
            assert_eq!(reason.exit_code() == exit_code::TRANSIENT, reason.is_transient(), "{reason}");
        }
    }
}
