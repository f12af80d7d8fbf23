//! ModelRevision: one version of a model, immutable.
#![allow(clippy::duplicated_attributes, reason = "each printer column repeats the keys of the others")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use plimsoll_package::digest::Digest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Accelerator, Optimize, Runtime, Source};

/// One version of a model: the snapshot of what was asked for and, in status, what came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "plimsoll.dev",
    version = "v1alpha1",
    kind = "ModelRevision",
    plural = "modelrevisions",
    shortname = "mr",
    category = "plimsoll",
    namespaced,
    status = "ModelRevisionStatus",
    derive = "PartialEq",
    doc = "One version of a model: the snapshot of what its ModelDeployment asked for and, in status, what the optimisation measured. Made by the operator; its spec never changes.",
    printcolumn(name = "Model", type_ = "string", json_path = ".metadata.labels.plimsoll\\.dev/model"),
    printcolumn(name = "Revision", type_ = "string", json_path = ".metadata.labels.plimsoll\\.dev/revision"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.size", priority = 1),
    printcolumn(name = "Pulled", type_ = "string", json_path = ".status.pulled", priority = 1),
    printcolumn(name = "Accuracy", type_ = "string", json_path = ".status.accuracy", priority = 1),
    printcolumn(name = "Source", type_ = "string", json_path = ".status.sourceDigest", priority = 1),
    printcolumn(name = "Artifact", type_ = "string", json_path = ".status.artifact"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "self == oldSelf",
     "message": "a ModelRevision's spec never changes; change the ModelDeployment, which makes a new revision"},
]))]
#[serde(rename_all = "camelCase")]
pub struct ModelRevisionSpec {
    /// What the ModelDeployment asked for.
    #[serde(flatten)]
    pub template: RevisionTemplate,

    /// The optimiser's image at the time when the revision was made.
    #[schemars(length(min = 1, max = 512))]
    pub optimizer_image: String,

    /// The runtime's image at the time when the revision was made.
    #[schemars(length(min = 1, max = 512))]
    pub runtime_image: String,

    /// Version of the optimiser, part of the artifact's key.
    #[schemars(length(min = 1, max = 64))]
    pub toolchain: String,
}

/// The part of a ModelDeployment whose change makes a revision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RevisionTemplate {
    /// Where the original model lies.
    pub source: Source,
    /// How the model is made smaller and faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimize: Option<Optimize>,
    /// How the model is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Runtime>,
    /// The devices that each serving pod needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
}

impl RevisionTemplate {
    /// Ten characters that differ where the template differs, by Kubernetes' alphabet for generated names.
    ///
    /// Taken over our own structure with sorted keys, never over a serialised pod template: an upgrade of the operator changes no hash, and so
    /// restarts no pod. A field that is added later is left out of the JSON when unset, which keeps the hash of what exists.
    #[must_use]
    pub fn hash(&self) -> String {
        // serde_json's maps are sorted, so a trip through Value makes the form canonical.
        let canonical = serde_json::to_value(self)
            .expect("a tree of strings and numbers serialises")
            .to_string();
        let digest = Digest::of(canonical.as_bytes());
        const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
        digest.hex().as_bytes()[..20]
            .chunks(2)
            .map(|pair| {
                let byte = u8::from_str_radix(std::str::from_utf8(pair).expect("hex is ASCII"), 16).expect("hex digits");
                char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])
            })
            .collect()
    }
}

/// What came of a revision.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelRevisionStatus {
    /// Where the revision stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<RevisionPhase>,

    /// Digest of the published image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<String>,

    /// Whether the artifact of an earlier optimisation of the same contents is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reused: Option<bool>,

    /// Content digest of the source model, as it was resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_digest: Option<String>,

    /// Content digest of the evaluation dataset, as it was resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation_digest: Option<String>,

    /// Size of the source model, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_before: Option<i64>,

    /// Size of the optimised model, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_after: Option<i64>,

    /// Size before and after, `1.2Mi -> 310Ki`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,

    /// Size of the source model as the compressed layer that a node would pull, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_layer_before: Option<i64>,

    /// Size of the optimised model as the compressed layer that a node pulls, in bytes: smaller than `sizeAfter` where many weights are zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_layer_after: Option<i64>,

    /// What a node pulls, before and after, `1.1Mi -> 180Ki`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulled: Option<String>,

    /// The metric before and after, `98.1% -> 97.9%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<String>,

    /// Name of the metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,

    /// Least cosine similarity of any output to the original model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<String>,

    /// Share of the weights that are zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<String>,

    /// Median latency of one sample before and after, `41 us -> 35 us`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<String>,

    /// The engine that measured fastest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,

    /// Version of the optimiser that made the artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toolchain: Option<String>,

    /// Optimized, Available, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]), length(max = 16))]
    pub conditions: Vec<Condition>,
}

/// Where a revision stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display)]
pub enum RevisionPhase {
    /// Its artifact is being made or looked for.
    Optimizing,
    /// Its artifact cannot be made.
    Failed,
    /// Its artifact exists, its pods are starting.
    Starting,
    /// Its pods serve.
    Serving,
    /// Its artifact exists and nothing serves it; undo brings it back.
    Retired,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(yaml: &str) -> RevisionTemplate {
        serde_yaml_ng::from_str(yaml).unwrap()
    }

    #[test]
    fn the_hash_of_a_given_template_never_changes() {
        let digits =
            template("source: {uri: 'oci://registry.example.org/models/digits:v3'}\noptimize: {recipe: [{prune: {amount: '50%'}}]}");
        assert_eq!(digits.hash(), "k4jpnc6q8f");
    }

    #[test]
    fn the_hash_ignores_the_order_in_which_fields_were_written() {
        let one = template("source: {uri: 'oci://r/m:v1', format: Onnx}\nruntime: {engine: Tract}");
        let other = template("runtime: {engine: Tract}\nsource: {format: Onnx, uri: 'oci://r/m:v1'}");
        assert_eq!(one.hash(), other.hash());
        assert_ne!(
            one.hash(),
            template("source: {uri: 'oci://r/m:v2', format: Onnx}\nruntime: {engine: Tract}").hash()
        );
    }
}
