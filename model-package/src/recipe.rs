//! What shall be done to a model and how far it may go: the fields of `spec.optimize`, which `--recipe FILE` reads on a laptop.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::units::{Duration, Percentage, Ratio, Size};

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

/// Pruning: which weights go, and how many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Prune {
    /// The share of weights set to zero, `"0%"` to `"100%"`. A pruned model compresses better when pulled; it computes no faster
    /// unless whole channels go.
    pub amount: Percentage,

    /// What the weights are ranked within. Default: Global.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scope: PruneScope,

    /// What is removed together. Default: Unstructured.
    #[serde(default, skip_serializing_if = "is_default")]
    pub structure: PruneStructure,
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
    /// Single weights, by magnitude.
    #[default]
    Unstructured,
    /// Two of every four consecutive weights.
    TwoOfFour,
    /// Whole channels, heads and feed-forward units.
    Channels,
}

/// Quantisation: the scheme.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Quantize {
    /// The number format, and what is quantised.
    pub scheme: QuantizeScheme,
}

/// The number format, and what is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
pub enum QuantizeScheme {
    /// 8-bit integers, in the way that suits each operator: dynamic for MatMul and Gemm, weight-only for convolutions.
    Int8,
    /// 8-bit weights per channel and activations quantised on the fly, for MatMul and Gemm; weight-only for convolutions,
    /// which dynamic quantisation makes slower.
    Int8Dynamic,
    /// 8-bit weights per channel, computed in 32-bit floats.
    Int8Weights,
    /// 8-bit weights and activations with ranges taken from the calibration data.
    Int8Static,
    /// 4-bit weights in blocks.
    Int4,
    /// 16-bit floats.
    Float16,
}

/// Distillation: training the compressed model against its original.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Distill {
    /// Passes over the training data, 1 to 1000.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1000)))]
    pub epochs: u32,

    /// Softens the targets of both models, 1 to 100. Default: 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 100)))]
    pub temperature: Option<u32>,

    /// Samples a step, 1 to 65536. Default: 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 65536)))]
    pub batch_size: Option<u32>,

    /// Step size as a ratio, `"0.001"`. Default: 0.0001.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<Ratio>,

    /// The training data. Default: the calibration data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Dataset>,
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
    /// Where the dataset lies, by the schemes of `spec.source.uri`. An `.npz` holds one array per model input, named as the
    /// input, whose first axis counts samples.
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

    /// What is measured. Default: Accuracy where the dataset has labels, Fidelity where not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,

    /// The array of the dataset that holds the labels. Default: `y`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 256)))]
    pub labels: Option<String>,
}

/// What is measured on the evaluation data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
pub enum Metric {
    /// The share of samples whose largest output is the label's class.
    Accuracy,
    /// The share of samples whose label is among the five largest outputs.
    Top5Accuracy,
    /// Macro-averaged F1 score.
    F1,
    /// Area under the receiver operating characteristic.
    Auroc,
    /// Mean absolute error.
    MeanAbsoluteError,
    /// Root of the mean squared error.
    RootMeanSquaredError,
    /// Coefficient of determination.
    R2,
    /// Perplexity of a language model.
    Perplexity,
    /// Agreement with the original model; needs no labels.
    Fidelity,
}

/// What compression may cost. A limit that is left out does not bind; without `budget` the fidelity of every output must be 0.99.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Budget {
    /// Most that accuracy may fall, in percentage points of the metric: `"1%"` allows 98.1% -> 97.1%.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_accuracy_drop: Option<Percentage>,

    /// Least fidelity of each output to the original model's: its cosine similarity, from `"0"` to `"1"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_fidelity: Option<Ratio>,

    /// Most that the model may weigh on disk: `"10Mi"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<Size>,

    /// Most that one inference of one sample may take, median, on the engine that serves: `"5ms"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_latency: Option<Duration>,
}

/// Where the original model lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[serde(rename_all = "camelCase")]
pub struct Inputs {
    /// The model to start from.
    pub source: SourceLocation,
    /// What to do to it.
    #[serde(default)]
    pub optimize: Optimization,
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
        assert_eq!(optimization.recipe[0].prune.as_ref().unwrap().amount.value(), Ok(0.5));
        assert_eq!(optimization.budget.unwrap().max_size.unwrap().value(), Ok(1 << 20));
    }

    #[test]
    fn an_unknown_technique_is_refused() {
        assert!(serde_yaml_ng::from_str::<Optimization>("recipe: [{prun: {amount: \"5%\"}}]").is_err());
    }
}
