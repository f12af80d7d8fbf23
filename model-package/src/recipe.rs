//! What shall be done to a model and how far it may go: the fields of `spec.optimize`, which `--recipe FILE` reads on a laptop.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use strum::IntoEnumIterator as _;

use crate::digest::Digest;
use crate::manifest::Engine;
use crate::units::{Duration, Percentage, Ratio, Size, display_percent};

#[cfg(feature = "schema")]
use schemars::JsonSchema;

/// How the model is made smaller and faster, and what that may cost.
///
/// Without a recipe and without a search the model is checked and packaged as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Optimization {
    /// The techniques to apply, in this order. At most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 16)))]
    pub recipe: Vec<Technique>,

    /// Lets the optimiser find the recipe: the smallest model within the budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<Search>,

    /// Unlabelled inputs that techniques may look at (static quantisation, fidelity). When left out, evaluation's inputs serve
    /// for fidelity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Dataset>,

    /// Held-out data on which the model is judged before and after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Evaluation>,

    /// How much may be lost, and how big and slow the result may be. A result outside of it is never served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
}

impl Optimization {
    /// Every dataset, under the name of its content and of its credentials in a Job: `calibration`, `evaluation`, and `distillation-N` of the
    /// recipe's entry N.
    pub fn datasets(&self) -> impl Iterator<Item = (String, &Dataset)> {
        let distillation = self.recipe.iter().enumerate().filter_map(|(index, technique)| {
            let data = technique.distill.as_ref()?.data.as_ref()?;
            Some((format!("distillation-{index}"), data))
        });
        let calibration = self.calibration.iter().map(|data| ("calibration".to_owned(), data));
        let evaluation = self.evaluation.iter().map(|data| ("evaluation".to_owned(), &data.dataset));
        calibration.chain(evaluation).chain(distillation)
    }

    /// The same datasets, to change them.
    pub fn datasets_mut(&mut self) -> impl Iterator<Item = &mut Dataset> {
        let distilled = self.recipe.iter_mut().filter_map(|technique| technique.distill.as_mut());
        self.calibration
            .iter_mut()
            .chain(self.evaluation.iter_mut().map(|data| &mut data.dataset))
            .chain(distilled.filter_map(|distill| distill.data.as_mut()))
    }
}

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
    /// The share that goes, `"0%"` to `"100%"`: of the weights, or, by structure, of the channels, heads or feed-forward units.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount: Option<Percentage>,

    /// N:M, for structure SemiStructured: of every M consecutive weights along a product's inner dimension, N stay: `"2:4"`.
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

    /// Names of nodes that stay as they are. At most 256.
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
pub enum Granularity {
    /// Each output channel of a weight.
    PerChannel,
    /// The whole weight.
    PerTensor,
}

/// How the range of an activation is taken from the calibration data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
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
pub enum DistillLoss {
    /// The relative entropy of the softened class scores (Hinton et al. 2015).
    SoftTargets,
    /// The mean squared difference of the outputs.
    MeanSquaredError,
}

/// Which techniques a search may try, and for how long.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Search {
    /// The techniques that may be tried. Default: all. At most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 8)))]
    pub techniques: Vec<SearchTechnique>,

    /// Longest time that the search takes. Default: half of the Job's deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_duration: Option<Duration>,
}

/// A family of techniques that a search may try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
pub enum SearchTechnique {
    /// Every way of pruning.
    Prune,
    /// Every scheme of quantisation.
    Quantize,
    /// Training after compression.
    Distill,
}

/// A dataset: where it lies and, where it is pinned, what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("x-kubernetes-validations" = [
    {"rule": "self.uri.matches('^(https?|oci|pvc)://[^ ]+$')",
     "message": "uri of a dataset must start with https://, oci:// or pvc://CLAIM/ (http:// for hosts that the operator allows)"},
    {"rule": "!self.uri.matches('^[a-z]+://[^/]*@')",
     "message": "uri of a dataset must not carry a user name or password; put them into a Secret and name it in credentialsSecret"},
])))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Dataset {
    /// Where the dataset lies, by the schemes of `spec.source.uri`. Its form is told by its content: `.npz` with one array per model input,
    /// named as the input, whose first axis counts samples (an array of one value holds for all of them); CSV with a header; Parquet; JSON
    /// lines; a `.zip` or `.tar` of pictures with `labels.csv` (`file,label`). Labels are the field `y`, `label` or `labels`.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 2048)))]
    pub uri: String,

    /// The content that is expected, `sha256:...`. Pins the dataset; a different content is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,

    /// Name of a Secret of this namespace with the credentials to read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 253)))]
    pub credentials_secret: Option<String>,
}

/// The data and the measure by which the model is judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Evaluation {
    /// The held-out data.
    pub dataset: Dataset,

    /// What is measured: Accuracy, Top5Accuracy (or another number), F1, Auroc, MeanAbsoluteError, RootMeanSquaredError, R2, Perplexity or
    /// Fidelity. Default: Accuracy where the dataset has labels, Fidelity where not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,

    /// The array, column or field of the dataset that holds the labels. Default: `y`, `label` or `labels`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 256)))]
    pub labels: Option<String>,
}

/// What is measured on the evaluation data, by the definitions of scikit-learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display, strum::EnumIter)]
#[serde(try_from = "String", into = "String")]
pub enum Metric {
    /// The share of samples whose largest output is the label's class.
    Accuracy,
    /// `TopKAccuracy`, such as `Top5Accuracy`: the share of samples whose label is among the K largest outputs; K is 1 to 9999.
    #[strum(to_string = "Top{0}Accuracy")]
    TopAccuracy(u16),
    /// F1 score, averaged over the classes.
    F1,
    /// Area under the receiver operating characteristic; of more than two classes the mean of each against the rest.
    Auroc,
    /// Mean absolute error; lower is better.
    MeanAbsoluteError,
    /// Root of the mean squared error; lower is better.
    RootMeanSquaredError,
    /// Coefficient of determination.
    R2,
    /// Perplexity of a language model on the next tokens of its own input; needs no labels; lower is better.
    Perplexity,
    /// Agreement with the original model; needs no labels.
    Fidelity,
}

/// A text that names no metric.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no metric; write Accuracy, Top5Accuracy (or another number), F1, Auroc, MeanAbsoluteError, RootMeanSquaredError, R2, Perplexity or Fidelity"
)]
pub struct MetricError(String);

impl FromStr for Metric {
    type Err = MetricError;

    fn from_str(text: &str) -> Result<Self, MetricError> {
        let counted = text.strip_prefix("Top").and_then(|rest| rest.strip_suffix("Accuracy"));
        let metric = match counted {
            Some(count) if count.len() <= 4 && count.starts_with(|digit| matches!(digit, '1'..='9')) => {
                count.parse().ok().map(Self::TopAccuracy)
            }
            Some(_) => None,
            None => Self::iter().find(|metric| metric.to_string() == text),
        };
        metric.ok_or_else(|| MetricError(text.to_owned()))
    }
}

impl TryFrom<String> for Metric {
    type Error = MetricError;

    fn try_from(text: String) -> Result<Self, MetricError> {
        text.parse()
    }
}

impl From<Metric> for String {
    fn from(metric: Metric) -> Self {
        metric.to_string()
    }
}

#[cfg(feature = "schema")]
impl JsonSchema for Metric {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Metric".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "What is measured on the evaluation data, by the definitions of scikit-learn: Accuracy, Top5Accuracy (or another number than 5), \
                F1, Auroc, MeanAbsoluteError, RootMeanSquaredError or R2, against labels; Perplexity of a language model on the next tokens \
                of its own input, or Fidelity to the original model, without labels.",
            "pattern": "^(Accuracy|Top[1-9][0-9]{0,3}Accuracy|F1|Auroc|MeanAbsoluteError|RootMeanSquaredError|R2|Perplexity|Fidelity)$",
            "maxLength": 32,
        })
    }
}

impl Metric {
    /// Whether a smaller value is the better one.
    #[must_use]
    pub fn is_error(self) -> bool {
        matches!(self, Self::MeanAbsoluteError | Self::RootMeanSquaredError | Self::Perplexity)
    }

    /// Whether it is measured against labels.
    #[must_use]
    pub fn needs_labels(self) -> bool {
        !matches!(self, Self::Perplexity | Self::Fidelity)
    }

    /// What compression cost, as `maxAccuracyDrop` bounds it: how far the metric fell, or of an error by which share it rose. Negative where
    /// the result is better; infinite where an error of 0 rose.
    #[must_use]
    pub fn drop(self, before: f64, after: f64) -> f64 {
        if !self.is_error() {
            before - after
        } else if after == before {
            0.0
        } else {
            (after - before) / before
        }
    }

    /// A value for people: `98.1%`, or of an error four digits.
    #[must_use]
    pub fn display(self, value: f64) -> String {
        if self.is_error() || self == Self::R2 {
            let decimals = (3 - value.abs().max(1e-9).log10().floor() as i32).clamp(0, 9) as usize;
            format!("{value:.decimals$}")
        } else {
            display_percent(value)
        }
    }
}

/// What compression may cost.
///
/// What a model gives is always bounded: each output by `minFidelity` (0.99 where it is left out), unless `maxAccuracyDrop` or
/// `maxClassAccuracyDrop` is set and the metric judges that output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Budget {
    /// Most that the metric may fall, in percentage points: `"1%"` allows 98.1% -> 97.1%. Of a metric for which lower is better
    /// (MeanAbsoluteError, RootMeanSquaredError, Perplexity) the share by which it may rise: `"1%"` allows 20.0 -> 20.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_accuracy_drop: Option<Percentage>,

    /// Most that the accuracy of any one class may fall, in percentage points, for the metrics Accuracy, TopKAccuracy and F1. Default: 50%
    /// of any class with 5 samples or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_class_accuracy_drop: Option<Percentage>,

    /// Least fidelity of each output to the original model's: its cosine similarity, from `"0"` to `"1"`. A slice of an output (a class's
    /// scores, a coordinate of a detector's boxes) may lose ten times as much: with `"0.99"` its fidelity is at least 0.9.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_fidelity: Option<Ratio>,

    /// Most that the model may weigh on disk: `"10Mi"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<Size>,

    /// Most that one inference of one sample may take, median, on the engine that serves: `"5ms"`. Where it is set, a model that is slower
    /// than the original is refused, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_latency: Option<Duration>,
}

/// Where the original model lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct SourceLocation {
    /// `https://`, `http://` (to allowed hosts), `oci://`, `pvc://CLAIM/PATH`, or a path on a laptop.
    pub uri: String,
    /// The content that is expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// The format; detected from the content when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ModelFormat>,
}

/// The format of a source model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
pub enum ModelFormat {
    /// ONNX.
    Onnx,
    /// PyTorch TorchScript.
    TorchScript,
    /// Keras 3 (`.keras`) or HDF5.
    Keras,
    /// TensorFlow SavedModel.
    SavedModel,
    /// TensorFlow Lite.
    TfLite,
    /// scikit-learn, as skops or pickle.
    ScikitLearn,
    /// An MLflow model folder.
    MlFlow,
    /// Safetensors with a Hugging Face configuration.
    Safetensors,
}

/// All that an optimisation Job is told; each of its steps gets it as JSON in the environment variable `PLIMSOLL_INPUTS`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Inputs {
    /// The model to start from.
    pub source: SourceLocation,
    /// What to do to it.
    #[serde(default)]
    pub optimize: Optimization,
    /// The model whose outputs distillation trains towards; by default the one to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<SourceLocation>,
    /// The engine that will serve, where that is settled: the model is measured and judged on it alone. By default on every engine that runs it,
    /// and the fastest one is recommended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Engine>,
    /// Version of the optimiser that the revision was made for; part of the artifact's key.
    pub toolchain: String,
    /// The repository that artifacts are pushed to, `HOST[:PORT]/PATH`, without a tag.
    pub repository: String,
    /// Largest source or dataset that is fetched.
    pub max_fetch_size: Size,
    /// Hosts (`HOST[:PORT]`) that are spoken to in plain HTTP; all others in TLS.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plain_http_hosts: Vec<String>,
    /// Annotations of the published image, such as the ModelDeployment that first made it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Whether the result is handed out without being run and measured (`--no-gate` on a laptop); the report says so.
    #[serde(default, skip_serializing_if = "is_default")]
    pub no_gate: bool,
    /// A second tag of the published image, which names this very run: it is found by it though the Job's pod is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_tag: Option<String>,
}

/// The environment variable that carries [`Inputs`].
pub const INPUTS_ENV: &str = "PLIMSOLL_INPUTS";

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_yaml_of_spec_optimize_is_read_as_a_user_writes_it() {
        let optimization: Optimization = serde_yaml_ng::from_str(
            "recipe:\n- prune: {amount: \"50%\"}\n- quantize: {scheme: Int8Dynamic}\nevaluation:\n  dataset: {uri: d.npz}\n  metric: Accuracy\nbudget: {maxAccuracyDrop: \"1%\", maxSize: 1Mi}\n",
        )
        .unwrap();
        assert_eq!(optimization.recipe.len(), 2);
        assert_eq!(
            optimization.recipe[0].prune.as_ref().unwrap().amount.as_ref().unwrap().value(),
            Ok(0.5)
        );
        assert_eq!(optimization.budget.unwrap().max_size.unwrap().value(), Ok(1 << 20));
    }

    #[test]
    fn what_a_metric_lost_is_points_or_of_an_error_its_rise() {
        assert!((Metric::Accuracy.drop(0.98, 0.97) - 0.01).abs() < 1e-12);
        assert!((Metric::Perplexity.drop(20.0, 20.2) - 0.01).abs() < 1e-12);
        assert!(Metric::MeanAbsoluteError.drop(0.5, 0.4) < 0.0);
        assert_eq!(Metric::MeanAbsoluteError.drop(0.0, 0.0), 0.0);
        assert_eq!(Metric::MeanAbsoluteError.drop(0.0, 0.1), f64::INFINITY);
    }

    #[test]
    fn a_metric_is_shown_as_people_write_it() {
        assert_eq!(Metric::Accuracy.display(0.981), "98.1%");
        assert_eq!(Metric::Perplexity.display(20.2), "20.20");
        assert_eq!(Metric::RootMeanSquaredError.display(0.0125), "0.01250");
        assert_eq!(Metric::MeanAbsoluteError.display(12_345.6), "12346");
        assert_eq!(Metric::R2.display(-0.5), "-0.5000");
    }

    #[test]
    fn a_metric_is_written_and_read_by_its_name() {
        for name in [
            "Accuracy",
            "Top5Accuracy",
            "Top1Accuracy",
            "Top9999Accuracy",
            "F1",
            "R2",
            "Fidelity",
        ] {
            let metric: Metric = serde_json::from_value(name.into()).unwrap();
            assert_eq!(serde_json::to_value(metric).unwrap(), name);
        }
        assert_eq!("Top5Accuracy".parse(), Ok(Metric::TopAccuracy(5)));
        for name in [
            "accuracy",
            "Top0Accuracy",
            "Top05Accuracy",
            "Top+5Accuracy",
            "TopAccuracy",
            "Top10000Accuracy",
            "",
        ] {
            let refused = serde_json::from_value::<Metric>(name.into()).unwrap_err().to_string();
            assert!(
                refused.contains(&format!("`{name}` is no metric; write Accuracy, Top5Accuracy")),
                "{refused}"
            );
        }
    }

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

    #[test]
    fn an_unknown_technique_is_refused() {
        assert!(serde_yaml_ng::from_str::<Optimization>("recipe: [{prun: {amount: \"5%\"}}]").is_err());
    }
}
