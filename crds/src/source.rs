//! `spec.source`: where the original model lies.

use plimsoll_package::digest::Digest;
use plimsoll_package::recipe::{ModelFormat, SourceLocation};
use plimsoll_package::units::Duration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the original model lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "self.uri.matches('^(https?|oci|pvc)://[^ ]+$')",
     "message": "uri must start with https://, oci:// or pvc://CLAIM/ (http:// for hosts that the operator allows); s3, gs, az, hf, mlflow and dvc are not supported yet"},
    {"rule": "!self.uri.matches('^[a-z]+://[^/]*@')",
     "message": "uri must not carry a user name or password; put them into a Secret and name it in credentialsSecret"},
    {"rule": "!has(self.digest) || !has(self.pollInterval)",
     "message": "digest pins the content and pollInterval follows a moving one; set one of them"},
]))]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// The model's address: `https://host/model.onnx`, `oci://registry/repository:tag` (or `@sha256:...`), `pvc://claim/path/model.onnx`.
    #[schemars(length(min = 1, max = 2048))]
    pub uri: String,

    /// The content that is expected, `sha256:...` of the model file. Pins the model; a different content is refused, and a content that was
    /// optimised in the same way before is served without a Job. Default: whatever is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,

    /// The file's format. Default: what the content shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ModelFormat>,

    /// Name of a Secret of this namespace with the credentials to read the source: keys `.dockerconfigjson`, or `username` and `password`, or
    /// `token`. It is mounted into the fetching container only. Default: none, the source is read without credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials_secret: Option<String>,

    /// The signature that the source must carry. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<Verify>,

    /// How often a moving reference is looked at again, at least `"10s"`. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_interval: Option<Duration>,
}

impl Source {
    /// The part of it that the optimiser is told.
    #[must_use]
    pub fn location(&self) -> SourceLocation {
        SourceLocation {
            uri: self.uri.clone(),
            digest: self.digest.clone(),
            format: self.format,
        }
    }
}

/// A signature policy, in cosign's format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Verify {
    /// Name of a Secret of this namespace whose keys are cosign public keys in PEM; a signature by any of them passes.
    #[schemars(length(min = 1, max = 253))]
    pub public_keys_secret: String,
}
