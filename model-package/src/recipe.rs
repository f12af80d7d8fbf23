//! What shall be done to a model and how far it may go: the fields of `spec.optimize`, which `--recipe FILE` reads on a laptop.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::manifest::Engine;
use crate::units::{Duration, Percentage, Ratio, Size};

#[cfg(feature = "schema")]
use schemars::JsonSchema;

mod metric;
mod technique;

pub use metric::{Metric, MetricError};
pub use technique::{
    ActivationRange, BlockSize, Distill, DistillDevice, DistillLoss, Granularity, HiddenState, HiddenStates, Prune, PruneCriterion,
    PruneScope, PruneStructure, Quantize, QuantizeScheme, Rounding, Technique,
};

/// How the model is made smaller and faster, and what that may cost.
///
/// Without a recipe and without a search the model is checked and packaged as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Optimization {
    /// The techniques to apply, in this order. At most 16. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 16)))]
    pub recipe: Vec<Technique>,

    /// Lets the optimiser find the recipe: the smallest model within the budget. When left out, `recipe` is followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<Search>,

    /// Unlabelled inputs that techniques may look at (static quantisation, fidelity). When left out, evaluation's inputs serve
    /// for fidelity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Dataset>,

    /// Held-out data on which the model is judged before and after. When left out, fidelity alone is judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Evaluation>,

    /// How much may be lost, and how big and slow the result may be. A result outside of it is never served. Default: `minFidelity` of 0.99.
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

    /// The content that is expected, `sha256:...`. Pins the dataset; a different content is refused. Default: whatever is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,

    /// Name of a Secret of this namespace with the credentials to read it. Default: none, it is read without credentials.
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

/// What compression may cost.
///
/// What a model gives is always bounded: each output by `minFidelity` (0.99 where it is left out), unless `maxAccuracyDrop` or
/// `maxClassAccuracyDrop` is set and the metric judges that output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Budget {
    /// Most that the metric may fall, in percentage points: `"1%"` allows 98.1% -> 97.1%. Of a metric for which lower is better
    /// (MeanAbsoluteError, RootMeanSquaredError, Perplexity) the share by which it may rise: `"1%"` allows 20.0 -> 20.2. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_accuracy_drop: Option<Percentage>,

    /// Most that the accuracy of any one class may fall, in percentage points, for the metrics Accuracy, TopKAccuracy and F1. Default: 50%
    /// of any class with 5 samples or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_class_accuracy_drop: Option<Percentage>,

    /// Least fidelity of each output to the original model's: its cosine similarity, from `"0"` to `"1"`. A slice of an output (a class's
    /// scores, a coordinate of a detector's boxes) may lose ten times as much: with `"0.99"` its fidelity is at least 0.9.
    /// Default: `"0.99"` of each output that no bounded metric judges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_fidelity: Option<Ratio>,

    /// Most that the model may weigh on disk: `"10Mi"`. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<Size>,

    /// Most that one inference of one sample may take, median, on the engine that serves: `"5ms"`. Where it is set, a model that is slower
    /// than the original is refused, too. Default: no limit.
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
    /// The format. Default: what the content shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ModelFormat>,
}

/// The format of a source model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[cfg_attr(feature = "schema", derive(JsonSchema))]
#[cfg_attr(feature = "schema", schemars(description = ""))]
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
    fn an_unknown_technique_is_refused() {
        assert!(serde_yaml_ng::from_str::<Optimization>("recipe: [{prun: {amount: \"5%\"}}]").is_err());
    }
}
