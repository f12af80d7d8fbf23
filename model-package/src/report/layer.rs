//! What became of each weight: its size, its sparsity and its distribution.

use serde::{Deserialize, Serialize};

/// A weight before and after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LayerChange {
    /// The weight's name in the source model.
    pub weight: String,
    /// The operator that uses it.
    pub operator: String,
    /// Before compression.
    pub before: LayerState,
    /// After it; absent where the weight is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<LayerState>,
}

/// A weight as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LayerState {
    /// The ONNX name of its element type, such as `FLOAT` or `INT8`.
    pub element_type: String,
    /// Its dimensions.
    pub shape: Vec<u64>,
    /// Its size in bytes, with its scales and zero points.
    pub bytes: u64,
    /// The share of its elements that are zero, `0.0..=1.0`.
    pub sparsity: f64,
    /// How its values are distributed, as they are computed with (quantised ones dequantised).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distribution: Option<Distribution>,
}

/// A histogram of bins of equal width.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Distribution {
    /// The lower edge of the first bin.
    pub low: f64,
    /// The upper edge of the last bin.
    pub high: f64,
    /// How many values fall into each bin; the same bins before and after.
    pub counts: Vec<u64>,
}
