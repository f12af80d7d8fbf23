//! The manifest of the example, and what the demo changes in it.

use std::fs;

use anyhow::{Context as _, Result};
use plimsoll_package::report::Summary;
use serde_yaml_ng::Value;

use super::NAMESPACE;
use crate::workspace;

/// The manifest's path in the checkout.
pub(super) const PATH: &str = "docs/examples/digits.yaml";
/// The accelerator that it asks for.
pub(super) const GPU: &str = "nvidia.com/gpu";

/// The example's manifest for the model of `version` (`v1`, `v2`), in the demo's namespace; without its accelerator where no node has one.
///
/// # Errors
/// Where the example is not there or not as it is expected.
pub(super) fn manifest(version: &str, accelerated: bool) -> Result<String> {
    let mut manifest = example()?;
    manifest["metadata"]["namespace"] = NAMESPACE.into();
    let uri = manifest["spec"]["source"]["uri"]
        .as_str()
        .context("the example has no spec.source.uri")?;
    let (repository, _) = uri.rsplit_once(':').context("the example's source has no tag")?;
    manifest["spec"]["source"]["uri"] = format!("{repository}:{version}").into();
    if !accelerated {
        manifest["spec"]
            .as_mapping_mut()
            .context("the example has no spec")?
            .remove("accelerator");
    }
    Ok(serde_yaml_ng::to_string(&manifest)?)
}

/// The manifest with its contents pinned: an artifact that was made of them is found without a Job.
///
/// # Errors
/// As [`manifest`].
pub(super) fn pinned(version: &str, accelerated: bool, summary: &Summary) -> Result<String> {
    let mut manifest: Value = serde_yaml_ng::from_str(&manifest(version, accelerated)?)?;
    manifest["spec"]["source"]["digest"] = summary.source_digest.to_string().into();
    let evaluation = summary.evaluation_digest.as_ref().context("the example is judged on data")?;
    manifest["spec"]["optimize"]["evaluation"]["dataset"]["digest"] = evaluation.to_string().into();
    Ok(serde_yaml_ng::to_string(&manifest)?)
}

/// `spec.optimize` of the example with its dataset at `dataset`.
///
/// # Errors
/// Where the example is not there or not as it is expected.
pub(super) fn recipe(dataset: &str) -> Result<String> {
    let mut optimize = example()?["spec"]["optimize"].clone();
    let location = optimize.get_mut("evaluation").and_then(|evaluation| evaluation.get_mut("dataset"));
    location.context("the example has no evaluation")?["uri"] = dataset.into();
    Ok(serde_yaml_ng::to_string(&optimize)?)
}

fn example() -> Result<Value> {
    let path = workspace::root().join(PATH);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_yaml_ng::from_str(&text).with_context(|| format!("{} is no YAML", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_version_differs_in_its_source_alone() {
        let (first, second) = (manifest("v1", true).unwrap(), manifest("v2", true).unwrap());
        assert_eq!(first.replace("models/digits:v1", "models/digits:v2"), second);
        assert_ne!(first, second);
    }

    #[test]
    fn without_accelerators_the_rest_is_the_same() {
        let manifest: Value = serde_yaml_ng::from_str(&manifest("v1", false).unwrap()).unwrap();
        assert!(manifest["spec"].get("accelerator").is_none());
        assert_eq!(manifest["spec"]["replicas"], Value::from(2));
    }

    #[test]
    fn the_recipe_judges_on_the_local_data() {
        let recipe: Value = serde_yaml_ng::from_str(&recipe("/data.npz").unwrap()).unwrap();
        assert_eq!(recipe["evaluation"]["dataset"]["uri"], Value::from("/data.npz"));
        assert_eq!(recipe["recipe"].as_sequence().unwrap().len(), 2);
    }
}
