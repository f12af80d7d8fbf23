//! The key of an artifact: a digest over every input of its optimisation, which is its tag in the registry.
//!
//! Inputs are contents, never names: two ModelDeployments that optimise the same bytes in the same way share an artifact, and a
//! tag that moved yields another key.

use std::fmt;

use serde::Serialize;

use crate::digest::Digest;
use crate::manifest::Engine;
use crate::recipe::{Budget, Inputs, Metric, ModelFormat, Optimization, Search, Technique};

/// The tag of an artifact in its repository, `opt-<40 hex digits>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ArtifactKey(String);

/// The contents that were fetched for an optimisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// Of the source model.
    pub source: Digest,
    /// Of the calibration dataset, where one is named.
    pub calibration: Option<Digest>,
    /// Of the evaluation dataset, where one is named.
    pub evaluation: Option<Digest>,
    /// Of each `distill.data` of the recipe, in its order, and of the teacher, where one is named.
    pub distillation: Vec<Digest>,
}

impl Contents {
    /// The contents as the spec pins them; `None` where any of them is a moving reference that must be fetched to be known.
    #[must_use]
    pub fn pinned(inputs: &Inputs) -> Option<Self> {
        let optimize = &inputs.optimize;
        let pin = |dataset: Option<&crate::recipe::Dataset>| match dataset {
            None => Some(None),
            Some(dataset) => dataset.digest.clone().map(Some),
        };
        Some(Self {
            source: inputs.source.digest.clone()?,
            calibration: pin(optimize.calibration.as_ref())?,
            evaluation: pin(optimize.evaluation.as_ref().map(|evaluation| &evaluation.dataset))?,
            distillation: distillation_data(optimize)
                .map(|data| data.digest.clone())
                .chain(inputs.teacher.iter().map(|teacher| teacher.digest.clone()))
                .collect::<Option<_>>()?,
        })
    }
}

fn distillation_data(optimize: &Optimization) -> impl Iterator<Item = &crate::recipe::Dataset> {
    optimize
        .recipe
        .iter()
        .filter_map(|technique| technique.distill.as_ref()?.data.as_ref())
}

impl ArtifactKey {
    /// The key of what `inputs` make of `contents`.
    ///
    /// It covers the contents, the format, the recipe with its parameters, the metric, the budget, the engine that is asked for and the toolchain; not where
    /// anything lies, nor who asked.
    #[must_use]
    pub fn new(inputs: &Inputs, contents: &Contents) -> Self {
        // A structure of our own in a fixed field order: an upgrade of a library cannot change it.
        #[derive(Serialize)]
        struct Keyed<'a> {
            schema: u32,
            toolchain: &'a str,
            source: &'a Digest,
            format: Option<ModelFormat>,
            recipe: Vec<Technique>,
            search: Option<&'a Search>,
            calibration: Option<&'a Digest>,
            evaluation: Option<(&'a Digest, Option<Metric>, Option<&'a str>)>,
            distillation: &'a [Digest],
            budget: Option<&'a Budget>,
            #[serde(skip_serializing_if = "std::ops::Not::not")]
            no_gate: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            engine: Option<Engine>,
        }
        let optimize = &inputs.optimize;
        let recipe = optimize
            .recipe
            .iter()
            .cloned()
            .map(|mut technique| {
                if let Some(distill) = &mut technique.distill {
                    distill.data = None;
                }
                technique
            })
            .collect();
        let keyed = Keyed {
            schema: 1,
            toolchain: &inputs.toolchain,
            source: &contents.source,
            format: inputs.source.format,
            recipe,
            search: optimize.search.as_ref(),
            calibration: contents.calibration.as_ref(),
            evaluation: match (&optimize.evaluation, &contents.evaluation) {
                (Some(evaluation), Some(digest)) => Some((digest, evaluation.metric, evaluation.labels.as_deref())),
                _ => None,
            },
            distillation: &contents.distillation,
            budget: optimize.budget.as_ref(),
            no_gate: inputs.no_gate,
            engine: inputs.engine,
        };
        let canonical = serde_json::to_vec(&keyed).expect("a tree of strings and numbers serialises");
        Self(format!("opt-{}", &Digest::of(&canonical).hex()[..40]))
    }

    /// The tag.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ArtifactKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::SourceLocation;

    fn inputs(uri: &str, toolchain: &str) -> Inputs {
        Inputs {
            source: SourceLocation {
                uri: uri.into(),
                digest: Some(Digest::of(b"model")),
                format: None,
            },
            optimize: Optimization::default(),
            teacher: None,
            engine: None,
            toolchain: toolchain.into(),
            repository: "r.example/p".into(),
            max_fetch_size: "1Gi".parse().unwrap(),
            plain_http_hosts: vec![],
            annotations: Default::default(),
            no_gate: false,
            run_tag: None,
        }
    }

    #[test]
    fn the_key_is_of_contents_not_of_names() {
        let here = inputs("https://a.example/m.onnx", "0.1.0");
        let there = inputs("oci://b.example/m:v1", "0.1.0");
        let contents = Contents::pinned(&here).unwrap();
        assert_eq!(ArtifactKey::new(&here, &contents), ArtifactKey::new(&there, &contents));
        let moved = Contents {
            source: Digest::of(b"another"),
            ..contents.clone()
        };
        assert_ne!(ArtifactKey::new(&here, &contents), ArtifactKey::new(&here, &moved));
        assert_ne!(
            ArtifactKey::new(&here, &contents),
            ArtifactKey::new(&inputs("https://a.example/m.onnx", "0.2.0"), &contents)
        );
    }

    #[test]
    fn the_key_of_a_given_input_never_changes() {
        let inputs = inputs("x", "0.1.0");
        let key = ArtifactKey::new(&inputs, &Contents::pinned(&inputs).unwrap());
        assert_eq!(key.as_str(), "opt-82e26e9ed7a4c5e9069e88b9177a8fea1d0239f7");
        let for_tract = Inputs {
            engine: Some(Engine::Tract),
            ..inputs.clone()
        };
        assert_ne!(ArtifactKey::new(&for_tract, &Contents::pinned(&inputs).unwrap()), key);
    }

    #[test]
    fn a_moving_reference_is_not_pinned() {
        let mut moving = inputs("x", "0.1.0");
        moving.source.digest = None;
        assert_eq!(Contents::pinned(&moving), None);
    }
}
