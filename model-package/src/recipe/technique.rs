//! The techniques: pruning, quantisation and distillation, each with its parameters.

use serde::{Deserialize, Serialize};

use super::{Dataset, is_default};
use crate::units::{Percentage, Ratio};

#[cfg(feature = "schema")]
use schemars::JsonSchema;

/// One technique with its parameters; exactly one key is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = [
    {"rule": "[has(self.prune), has(self.quantize), has(self.distill)].filter(x, x).size() == 1",
     "message": "each entry of recipe has exactly one key: prune, quantize or distill; write one list entry per technique"},
])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Technique {
    /// Sets the least important weights to zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<Prune>,

    /// Stores weights (and, by scheme, computes) in fewer bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantize>,

    /// Trains the compressed model against the original one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<Distill>,
}

impl Technique {
    /// What it buys, in a sentence for people: size of the file, size of what is pulled, speed, or none of them.
    ///
    /// Of what serves here: ONNX Runtime and tract on a CPU, which multiply by a zero as by any other number.
    #[must_use]
    pub fn buys(&self) -> &'static str {
        let narrower = "a smaller file, less to pull, and speed: its layers become narrower";
        match self {
            Self { prune: Some(prune), .. } => match prune.structure {
                PruneStructure::Unstructured => "less to pull, for zeros compress; the file stays as large, and inference as slow",
                PruneStructure::SemiStructured => {
                    "less to pull, for zeros compress; the file stays as large, and inference on a CPU as slow, where no engine skips the pattern's zeros"
                }
                PruneStructure::Channels | PruneStructure::Heads | PruneStructure::FeedForward => narrower,
            },
            Self {
                quantize: Some(quantize), ..
            } => match quantize.scheme {
                QuantizeScheme::Int8 => "a smaller file and less to pull; speed where products in integers measure faster",
                QuantizeScheme::Int8Dynamic => {
                    "a smaller file and less to pull; speed for matrix products where the processor multiplies integers faster"
                }
                QuantizeScheme::Int8Weights => "a smaller file and less to pull; hardly any speed, for products are taken in floats",
                QuantizeScheme::Int8Static => "a smaller file, less to pull, and speed where the engine multiplies integers (ONNX Runtime)",
                QuantizeScheme::Int8Blocks | QuantizeScheme::Int4 => {
                    "a smaller file and less to pull; speed where reading the weights takes longer than multiplying"
                }
                QuantizeScheme::Float16 => "half the file and less to pull; no speed on a CPU, which computes in 32 bits",
            },
            Self {
                distill: Some(Distill { prune_to: Some(_), .. }),
                ..
            } => "accuracy that was lost, and less to pull, for zeros compress; no smaller file and no speed",
            Self { distill: Some(_), .. } => "accuracy that was lost; neither size nor speed",
            _ => "nothing",
        }
    }
}

/// Pruning: which weights go, and how many.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = [
    {"rule": "(has(self.structure) && self.structure == 'SemiStructured') ? (has(self.pattern) && !has(self.amount)) : (has(self.amount) && !has(self.pattern))",
     "message": "prune needs amount, such as 50%; structure SemiStructured needs pattern, such as 2:4, in its place"},
    {"rule": "!has(self.criterion) || self.criterion == 'Magnitude' || !has(self.structure) || self.structure in ['Unstructured', 'SemiStructured']",
     "message": "criterion Wanda and SparseGpt choose single weights: structure Unstructured or SemiStructured"},
])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Prune {
    /// The share that goes, `"0%"` to `"100%"`: of the weights, or, by structure, of the channels, heads or feed-forward units. When left out,
    /// `pattern` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount: Option<Percentage>,

    /// N:M, for structure SemiStructured: of every M consecutive weights along a product's inner dimension, N stay: `"2:4"`.
    /// When left out, `amount` says how many go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = r"^[1-9][0-9]?:[1-9][0-9]?$")))]
    pub pattern: Option<String>,

    /// What the weights are ranked within. Default: Global.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scope: PruneScope,

    /// What is removed together. Default: Unstructured.
    #[serde(default, skip_serializing_if = "is_default")]
    pub structure: PruneStructure,

    /// How weights are ranked. Wanda and SparseGpt look at calibration data and rank within each layer. Default: Magnitude.
    #[serde(default, skip_serializing_if = "is_default")]
    pub criterion: PruneCriterion,
}

/// What the weights are ranked within.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
pub enum PruneScope {
    /// All weights of the model together.
    #[default]
    Global,
    /// Each layer for itself.
    PerLayer,
}

/// What is removed together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
pub enum PruneStructure {
    /// Single weights, set to zero: the compressed layer that is pulled gets smaller, inference no faster.
    #[default]
    Unstructured,
    /// All but N of every M consecutive weights, set to zero, by `pattern`.
    SemiStructured,
    /// Whole channels of convolutions and features of matrix products: the model gets smaller and faster.
    Channels,
    /// Whole attention heads.
    Heads,
    /// Whole units between the two matrix products of a transformer's feed-forward part.
    FeedForward,
}

/// How weights are ranked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
pub enum PruneCriterion {
    /// By their absolute value (Han et al. 2015).
    #[default]
    Magnitude,
    /// By their absolute value times the norm of the activations that they meet (Sun et al. 2023).
    Wanda,
    /// By the error that their removal causes, which the weights that stay make up for (Frantar and Alistarh 2023).
    SparseGpt,
}

/// Quantisation: the scheme and, where it has any, its parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = [
    {"rule": "self.scheme == 'Int8Static' || !(has(self.range) || has(self.smooth) || has(self.biasCorrection) || has(self.operators))",
     "message": "range, smooth, biasCorrection and operators belong to scheme Int8Static"},
    {"rule": "self.scheme in ['Int4', 'Int8Blocks'] || !(has(self.blockSize) || has(self.rounding))",
     "message": "blockSize and rounding belong to the schemes Int4 and Int8Blocks"},
    {"rule": "self.scheme in ['Int8', 'Int8Dynamic', 'Int8Weights', 'Int8Static'] || !has(self.granularity)",
     "message": "granularity belongs to the schemes Int8, Int8Dynamic, Int8Weights and Int8Static"},
])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Quantize {
    /// The number format, and what is quantised.
    pub scheme: QuantizeScheme,

    /// Whether each output channel of a weight has a scale of its own. Default: PerChannel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<Granularity>,

    /// Int8Static: how the range of an activation is taken from the calibration data. Default: Percentile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<ActivationRange>,

    /// Int8Static: how much of the activations' outliers moves into the weights, `"0"` (nothing) to `"1"` (SmoothQuant's alpha).
    /// Default: nothing moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smooth: Option<Ratio>,

    /// Int8Static: corrects each bias by the mean error that quantisation causes on the calibration data. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias_correction: Option<bool>,

    /// Int8Static: the types of operators that are quantised. Default: Conv, MatMul and Gemm, which are computed in integers, and the weights
    /// alone of ConvTranspose and Gather (tables). At most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 32), inner(length(min = 1, max = 64))))]
    pub operators: Vec<String>,

    /// Int4 and Int8Blocks: how many consecutive weights share a scale; 16, 32, 64, 128 or 256. Default: 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,

    /// Int4 and Int8Blocks: how weights are rounded. Default: Nearest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounding: Option<Rounding>,

    /// Names of nodes that stay as they are. At most 256. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 256), inner(length(min = 1, max = 512))))]
    pub exclude: Vec<String>,
}

impl Quantize {
    /// `scheme` with the defaults of all else.
    #[must_use]
    pub fn of(scheme: QuantizeScheme) -> Self {
        Self {
            scheme,
            granularity: None,
            range: None,
            smooth: None,
            bias_correction: None,
            operators: vec![],
            block_size: None,
            rounding: None,
            exclude: vec![],
        }
    }
}

/// The number format, and what is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
pub enum QuantizeScheme {
    /// 8-bit integers, for each operator in the way that measures best: dynamic or weight-only.
    Int8,
    /// 8-bit weights, and activations quantised on the fly, for MatMul and Gemm; weight-only for convolutions, which dynamic quantisation
    /// makes slower, and for recurrences.
    Int8Dynamic,
    /// 8-bit weights, computed in 32-bit floats.
    Int8Weights,
    /// 8-bit weights and activations with ranges taken from the calibration data.
    Int8Static,
    /// 8-bit weights of matrix products in blocks; ONNX Runtime only.
    Int8Blocks,
    /// 4-bit weights of matrix products in blocks; ONNX Runtime only.
    Int4,
    /// 16-bit floats.
    Float16,
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(description = ""))]
pub enum Granularity {
    /// Each output channel of a weight.
    PerChannel,
    /// The whole weight.
    PerTensor,
}

/// How the range of an activation is taken from the calibration data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(description = ""))]
pub enum ActivationRange {
    /// From the smallest to the largest value.
    MinMax,
    /// Without the outermost 0.001 percent of values.
    Percentile,
    /// The range whose quantised distribution has the least relative entropy to the true one.
    Entropy,
}

/// How many consecutive weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("enum" = [16, 32, 64, 128, 256])))]
#[serde(transparent)]
pub struct BlockSize(pub u16);

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(description = ""))]
pub enum Rounding {
    /// To the nearest.
    Nearest,
    /// One after another, each making up for the errors of those before it on the calibration data (Frantar et al. 2022).
    Gptq,
}

/// Distillation: training the compressed model against its original.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Distill {
    /// Passes over the training data, 1 to 1000.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1000)))]
    pub epochs: u32,

    /// What is made small. Default: SoftTargets for outputs that end in a softmax or hold class scores, MeanSquaredError else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<DistillLoss>,

    /// Softens the targets of both models, 1 to 100. Default: 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 100)))]
    pub temperature: Option<u32>,

    /// Samples a step, 1 to 65536. Default: 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 65536)))]
    pub batch_size: Option<u32>,

    /// Step size of AdamW as a ratio, `"0.001"`. Default: 0.0001.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<Ratio>,

    /// The training data. Default: the calibration data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Dataset>,

    /// Prunes step by step while training, up to this share of the weights, along a cubic curve (Zhu and Gupta 2017). Default: what was
    /// pruned before stays, and no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune_to: Option<Percentage>,

    /// Values inside of the model that are trained towards the teacher's, beside the outputs; `{}` chooses them. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_states: Option<HiddenStates>,

    /// What trains. Default: Auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DistillDevice>,
}

impl Distill {
    /// That many `epochs`, with the defaults of all else.
    #[must_use]
    pub fn of(epochs: u32) -> Self {
        Self {
            epochs,
            loss: None,
            temperature: None,
            batch_size: None,
            learning_rate: None,
            data: None,
            prune_to: None,
            hidden_states: None,
            device: None,
        }
    }
}

/// Values inside of the model that are trained towards the teacher's: the mean squared difference, relative to the mean square of the
/// teacher's (Romero et al. 2015, "FitNets").
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HiddenStates {
    /// Which value follows which. Default: what layers with weights read, where the model and the teacher have it under one name and in one
    /// shape; of more than 16 values 16 that are spread over the depth of the model. At most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 64)))]
    pub pairs: Vec<HiddenState>,

    /// What they count together beside the outputs, `"0"` to `"1"`. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Ratio>,
}

/// A value of the model and the teacher's that it follows, of the same shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HiddenState {
    /// The value's name in the model: an output of one of its nodes.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 512)))]
    pub value: String,

    /// Its name in the teacher. Default: the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 512)))]
    pub teacher: Option<String>,
}

/// What trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(description = ""))]
pub enum DistillDevice {
    /// A CUDA device where the optimiser is built with CUDA and finds one, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The first CUDA device; it fails where there is none, or the optimiser is built without CUDA.
    Cuda,
}

/// What distillation makes small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(description = ""))]
pub enum DistillLoss {
    /// The relative entropy of the softened class scores (Hinton et al. 2015).
    SoftTargets,
    /// The mean squared difference of the outputs.
    MeanSquaredError,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_technique_buys_is_told_plainly() {
        let buys = |yaml: &str| serde_yaml_ng::from_str::<Technique>(yaml).unwrap().buys();
        for yaml in ["prune: {amount: 50%}", "prune: {structure: SemiStructured, pattern: '2:4'}"] {
            assert!(
                buys(yaml).contains("the file stays as large") && buys(yaml).contains("as slow"),
                "{yaml}"
            );
        }
        for structure in ["Channels", "Heads", "FeedForward"] {
            assert!(buys(&format!("prune: {{amount: 50%, structure: {structure}}}")).contains("and speed: its layers become narrower"));
        }
        for scheme in ["Int8", "Int8Dynamic", "Int8Weights", "Int8Static", "Int8Blocks", "Int4"] {
            assert!(buys(&format!("quantize: {{scheme: {scheme}}}")).starts_with("a smaller file"));
        }
        assert_eq!(buys("distill: {epochs: 1}"), "accuracy that was lost; neither size nor speed");
        assert!(buys("distill: {epochs: 1, pruneTo: 50%}").contains("less to pull"));
    }
}
