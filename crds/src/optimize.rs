//! `spec.optimize`: the recipe, the data, the budget, and the Job that does it.

use plimsoll_package::recipe::Optimization;
use plimsoll_package::units::Duration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Resources;

/// How the model is made smaller and faster, and what that may cost. When left out, the model is checked and packaged as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!(has(self.recipe) && has(self.search))",
     "message": "set either recipe (techniques in a fixed order) or search (techniques to try), not both"},
    {"rule": "!has(self.budget) || !has(self.budget.maxAccuracyDrop) || has(self.evaluation)",
     "message": "budget.maxAccuracyDrop needs evaluation.dataset to measure the accuracy on; without labels use budget.minFidelity"},
]))]
#[serde(rename_all = "camelCase")]
pub struct Optimize {
    /// Recipe, data and budget.
    #[serde(flatten)]
    pub optimization: Optimization,

    /// The Job that fetches, converts, compresses, evaluates and publishes. When left out, the defaults of its fields hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobSettings>,
}

/// What the optimisation Job may use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobSettings {
    /// Requests and limits of the compressing step, which needs most. Default: requests of 250m CPU and 256Mi memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,

    /// Longest time that one Job runs before it fails. Default: `"1h"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Duration>,

    /// How often a Job's pod is tried again after a failure that may pass, 0 to 20. Default: 3. After that the operator waits, longer
    /// each time and at most 5 minutes, and starts a new Job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 20))]
    pub backoff_limit: Option<i32>,
}
