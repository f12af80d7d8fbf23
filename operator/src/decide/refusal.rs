//! Fields of the API whose machinery is not there yet: refused in words, never ignored.

use plimsoll_crds::{Accelerator, Fallback, ModelDeploymentSpec, Rollout, Source, Strategy};
use plimsoll_package::recipe::ModelFormat;

/// What the spec asks for that this version does not do: a sentence for each such field, with the way out.
#[must_use]
pub fn refuse(spec: &ModelDeploymentSpec) -> Option<String> {
    // Destructured without `..`, here and below, so that a new field cannot be forgotten.
    let ModelDeploymentSpec {
        source: from,
        optimize: _,
        runtime: _,
        accelerator: devices,
        replicas: _,
        autoscaling,
        rollout: strategy,
        route,
        revision_history_limit: _,
        paused: _,
    } = spec;
    let mut refused = source(from);
    refused.extend(devices.iter().flat_map(accelerator));
    refused.extend(asked(
        autoscaling.is_some(),
        "spec.autoscaling",
        "set spec.replicas, or point a HorizontalPodAutoscaler at this object's scale subresource",
    ));
    refused.extend(strategy.iter().flat_map(rollout));
    refused.extend(asked(
        route.is_some(),
        "spec.route",
        "write an HTTPRoute to the Service that carries the model's name",
    ));
    let sentences: Vec<String> = refused
        .iter()
        .map(|(field, way_out)| format!("{field} is not supported by this version; {way_out}"))
        .collect();
    (!sentences.is_empty()).then(|| sentences.join(". "))
}

/// A field that is not supported, and what to do instead.
type Refused = (&'static str, &'static str);

fn asked(asked: bool, field: &'static str, way_out: &'static str) -> Option<Refused> {
    asked.then_some((field, way_out))
}

fn source(source: &Source) -> Vec<Refused> {
    let Source {
        uri: _,
        digest: _,
        format,
        credentials_secret: _,
        verify,
        poll_interval,
    } = source;
    [
        asked(
            format.is_some_and(|format| format != ModelFormat::Onnx),
            "spec.source.format other than Onnx",
            "export the model to ONNX and name that file",
        ),
        asked(
            verify.is_some(),
            "spec.source.verify",
            "remove it and pin the content with spec.source.digest",
        ),
        asked(
            poll_interval.is_some(),
            "spec.source.pollInterval",
            "remove it and change spec.source.uri for each version",
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn accelerator(accelerator: &Accelerator) -> Vec<Refused> {
    let Accelerator {
        resource: _,
        count: _,
        node_labels: _,
        device_class,
        fallback,
    } = accelerator;
    [
        asked(
            device_class.is_some(),
            "spec.accelerator.deviceClass",
            "name the extended resource in spec.accelerator.resource",
        ),
        asked(
            *fallback == Some(Fallback::Cpu),
            "spec.accelerator.fallback: CPU",
            "remove spec.accelerator to serve on CPUs",
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn rollout(rollout: &Rollout) -> Vec<Refused> {
    let Rollout {
        strategy,
        max_surge: _,
        max_unavailable: _,
        deadline: _,
        automatic_rollback,
        steps,
        analysis,
    } = rollout;
    [
        asked(
            strategy.is_some_and(|strategy| strategy != Strategy::Rolling),
            "spec.rollout.strategy other than Rolling",
            "use Rolling",
        ),
        asked(!steps.is_empty(), "spec.rollout.steps", "remove them"),
        asked(analysis.is_some(), "spec.rollout.analysis", "remove it"),
        asked(
            *automatic_rollback == Some(true),
            "spec.rollout.automaticRollback",
            "remove it; apply the older manifest to go back",
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use jiff::Timestamp;
    use plimsoll_crds::ModelDeployment;
    use serde::Deserialize as _;
    use serde_json::{Value, json};

    use super::*;
    use crate::decide::decide;
    use crate::observe::Observed;
    use crate::settings::Settings;

    /// The manifests that set what this version acts on.
    const SUPPORTED: [&str; 3] = [
        include_str!("../../../tests/fixtures/valid/minimal.yaml"),
        include_str!("../../../tests/fixtures/valid/full.yaml"),
        include_str!("../../../tests/fixtures/valid/techniques.yaml"),
    ];

    /// The manifest that sets what it does not.
    const LATER: &str = include_str!("../../../tests/fixtures/valid/later.yaml");

    /// Each field, or value of a field, that this version does not act on, set alone.
    fn unsupported() -> Vec<(&'static str, Value)> {
        let source = |field: &str, value: Value| json!({ "source": { "uri": "oci://r.example/m:v1", field: value } });
        let mut rows = vec![
            ("spec.source.verify", source("verify", json!({ "publicKeysSecret": "signers" }))),
            ("spec.source.pollInterval", source("pollInterval", json!("10m"))),
            (
                "spec.accelerator.deviceClass",
                json!({ "accelerator": { "deviceClass": "gpu.nvidia.com" } }),
            ),
            (
                "spec.accelerator.fallback",
                json!({ "accelerator": { "resource": "nvidia.com/gpu", "fallback": "CPU" } }),
            ),
            ("spec.autoscaling", json!({ "autoscaling": { "maxReplicas": 3 } })),
            (
                "spec.autoscaling",
                json!({ "autoscaling": { "maxReplicas": 3, "behavior": { "scaleDown": { "selectPolicy": "Disabled" } } } }),
            ),
            ("spec.rollout.steps", json!({ "rollout": { "steps": [{ "weight": "10%" }] } })),
            (
                "spec.rollout.analysis",
                json!({ "rollout": { "analysis": { "maxErrorRate": "1%" } } }),
            ),
            (
                "spec.rollout.automaticRollback",
                json!({ "rollout": { "automaticRollback": true } }),
            ),
            ("spec.route", json!({ "route": { "parents": [{ "name": "public" }] } })),
        ];
        let formats = [
            "TorchScript",
            "Keras",
            "SavedModel",
            "TfLite",
            "ScikitLearn",
            "MlFlow",
            "Safetensors",
        ];
        rows.extend(formats.map(|format| ("spec.source.format", source("format", json!(format)))));
        let strategies = ["Canary", "BlueGreen", "Shadow", "Recreate"];
        rows.extend(strategies.map(|strategy| ("spec.rollout.strategy", json!({ "rollout": { "strategy": strategy } }))));
        rows
    }

    fn model(spec: &Value) -> ModelDeployment {
        let mut full = json!({ "source": { "uri": "oci://r.example/m:v1" } });
        full.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "apiVersion": "plimsoll.dev/v1alpha1", "kind": "ModelDeployment",
            "metadata": { "name": "m", "namespace": "n", "uid": "u", "generation": 1 }, "spec": full,
        }))
        .unwrap()
    }

    #[test]
    fn each_field_whose_machinery_is_not_there_stalls_the_model_and_starts_nothing() {
        for (field, spec) in unsupported() {
            let plan = decide(&model(&spec), &Observed::default(), &Settings::fixture(), Timestamp::UNIX_EPOCH);
            let stalled = plan
                .status
                .conditions
                .iter()
                .find(|condition| condition.type_ == "Stalled")
                .unwrap();
            assert_eq!(
                (stalled.status.as_str(), stalled.reason.as_str()),
                ("True", "Unsupported"),
                "{spec}"
            );
            let message = &stalled.message;
            assert!(
                message.starts_with(field) && message.contains("is not supported by this version; "),
                "{spec}: {message}"
            );
            assert_eq!((plan.revision, plan.job, plan.lookup), (None, None, None), "{spec}");
        }
    }

    #[test]
    fn all_that_is_not_supported_is_said_at_once() {
        let message = refuse(&model(&json!({ "autoscaling": { "maxReplicas": 3 }, "rollout": { "strategy": "Canary" } })).spec).unwrap();
        assert!(
            message.contains("spec.autoscaling is") && message.contains("spec.rollout.strategy other than Rolling is"),
            "{message}"
        );
    }

    fn manifests(text: &str) -> Vec<Value> {
        serde_yaml_ng::Deserializer::from_str(text)
            .map(|document| Value::deserialize(document).unwrap())
            .collect()
    }

    fn leaves(value: &Value, path: &str, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => fields
                .iter()
                .for_each(|(name, field)| leaves(field, &format!("{path}.{name}"), found)),
            Value::Array(items) => items.iter().for_each(|item| leaves(item, &format!("{path}[]"), found)),
            _ => {
                found.insert(path.to_owned());
            }
        }
    }

    /// The fixtures set every field of the API together, which `plimsoll-crds` sees to: what is not among the supported ones is refused.
    #[test]
    fn every_field_of_the_api_is_either_supported_or_refused() {
        let mut supported = BTreeSet::new();
        for manifest in SUPPORTED.into_iter().flat_map(manifests) {
            assert_eq!(refuse(&model(&manifest["spec"]).spec), None);
            leaves(&manifest["spec"], "spec", &mut supported);
        }
        let mut later = BTreeSet::new();
        leaves(&manifests(LATER)[0]["spec"], "spec", &mut later);
        let refused = |path: &str| {
            let mut rows = unsupported().into_iter();
            rows.any(|(field, _)| {
                path.strip_prefix(field)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
            })
        };
        let ignored: Vec<&String> = later.difference(&supported).filter(|path| !refused(path)).collect();
        assert!(ignored.is_empty(), "no row refuses {ignored:?}");
        let message = refuse(&model(&manifests(LATER)[0]["spec"]).spec).unwrap();
        for (field, _) in unsupported().iter().filter(|(field, _)| *field != "spec.source.format") {
            assert!(message.contains(field), "later.yaml does not set {field}");
        }
    }
}
