//! What a search tried: the [`Front`] of size against accuracy against latency.

use serde::{Deserialize, Serialize};

use super::{LatencyChange, MetricChange, Spread};
use crate::recipe::Technique;

/// What a search tried, in the order in which it did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Front {
    /// The seed of every choice that is not forced.
    pub seed: u64,
    /// Time that it took, in milliseconds.
    pub took_ms: f64,
    /// Whether it tried all that it meant to; `false` where its time ran out.
    pub complete: bool,
    /// Every recipe that was tried.
    pub candidates: Vec<Candidate>,
    /// How much each layer loses when it alone is quantised, the most sensitive first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sensitivity: Vec<Sensitivity>,
}

/// A recipe that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    /// The recipe; none is the original.
    pub recipe: Vec<Technique>,
    /// Size of the model in bytes; absent where a technique failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Size of the model as the layer that would be pulled, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_layer: Option<u64>,
    /// The metric, with its value before and after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<MetricChange>,
    /// Least cosine similarity of any output to the original model's, `-1.0..=1.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<f64>,
    /// Latency on the engine that measured fastest, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencyChange>,
    /// How that latency relates to the source model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ratio: Option<Spread>,
    /// What came of it.
    pub outcome: Outcome,
    /// Why it lost, in a sentence; absent of the one that was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What came of a recipe that was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Outcome {
    /// It is the smallest within the budget.
    Chosen,
    /// It is within the budget, and no other is better in size, accuracy and latency at once.
    OnFront,
    /// It is within the budget, and another is no worse in any respect and better in one.
    Dominated,
    /// It is outside of the budget.
    BudgetExceeded,
    /// A technique does not work on the model, or no engine runs the result.
    Failed,
}

/// How much layers lose when each is quantised alone by the scheme of the recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Sweep {
    /// Those that were measured, the most sensitive first.
    pub layers: Vec<Sensitivity>,
    /// How many were not; the smallest ones.
    pub left: u64,
    /// Why some or all of them were not, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// How much a layer loses when it alone is quantised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Sensitivity {
    /// The node.
    pub node: String,
    /// Its operator.
    pub operator: String,
    /// Least fidelity of any output of the model to the original's, `-1.0..=1.0`.
    pub fidelity: f64,
    /// Signal to quantisation noise ratio of the output that lost most, in decibels; absent where nothing differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sqnr_db: Option<f64>,
    /// Bytes that quantising it saves.
    pub saved: u64,
}
