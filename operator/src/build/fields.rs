//! No field is ignored: each field of a revision's template shows in what is built. (The fields of scaling and rollout are decisions, which
//! their own tests hold; those that this version refuses are `decide::refusal`'s.)

use std::collections::BTreeSet;

use kube::ResourceExt as _;
use plimsoll_crds::ModelDeployment;
use serde::Deserialize as _;
use serde_json::Value;

use super::{deployment, job};
use crate::decide::{JobPlan, revision};
use crate::observe::Observed;
use crate::settings::Settings;

/// The manifests that set what this version acts on.
const SUPPORTED: [&str; 3] = [
    include_str!("../../../tests/fixtures/valid/minimal.yaml"),
    include_str!("../../../tests/fixtures/valid/full.yaml"),
    include_str!("../../../tests/fixtures/valid/techniques.yaml"),
];

/// Fields whose only supported value is the default.
const DEFAULT_ONLY: [&str; 1] = ["/spec/accelerator/fallback"];

/// The parts of a spec whose change makes a revision.
const TEMPLATE: [&str; 4] = ["source", "optimize", "runtime", "accelerator"];

/// Job and Deployment of `manifest`, under a name that does not tell by its hash that something changed.
fn built(manifest: &Value) -> Option<Value> {
    let model: ModelDeployment = serde_json::from_value(manifest.clone()).ok()?;
    let settings = Settings::fixture();
    let mut revision = revision::desired(&model, &Observed::default(), &settings).0?;
    revision.metadata.name = Some("revision".into());
    revision.metadata.uid = Some("uid".into());
    let deployment = deployment::deployment(&revision, "sha256:77e0", 1, &settings);
    let plan = JobPlan {
        name: revision.name_any(),
        revision,
        attempt: 0,
    };
    Some(serde_json::json!([job::job(&plan, &settings), deployment]))
}

/// JSON pointers to all that is neither an object nor a list.
fn leaves(value: &Value, pointer: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                leaves(field, &format!("{pointer}/{}", name.replace('~', "~0").replace('/', "~1")), found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                leaves(item, &format!("{pointer}/{index}"), found);
            }
        }
        _ => found.push(pointer.to_owned()),
    }
}

/// Job and Deployment of `manifest` without the field at `pointer` or, where it cannot be without, with another value there.
fn built_otherwise(manifest: &Value, pointer: &str) -> Option<Value> {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let mut without = manifest.clone();
    match without.pointer_mut(parent).unwrap() {
        Value::Object(fields) => drop(fields.remove(&key.replace("~1", "/").replace("~0", "~"))),
        Value::Array(items) => drop(items.remove(key.parse().unwrap())),
        _ => unreachable!("a leaf has a parent"),
    }
    let others: Vec<Value> = match manifest.pointer(pointer).unwrap() {
        // The second is for a quantisation's scheme, the only enumeration that must be there.
        Value::String(text) => vec![format!("{text}0").into(), "Float16".into()],
        Value::Number(number) => vec![(number.as_u64().unwrap() + 1).into()],
        Value::Bool(is) => vec![(!is).into()],
        other => panic!("{pointer}: {other}"),
    };
    built(&without).or_else(|| {
        others.into_iter().find_map(|other| {
            let mut changed = manifest.clone();
            *changed.pointer_mut(pointer).unwrap() = other;
            built(&changed)
        })
    })
}

#[test]
fn each_field_of_the_template_shows_in_the_job_or_the_deployment() {
    // A field may hold its default here and another value there, so what counts is the field, wherever it is in a list.
    let (mut set, mut shown) = (BTreeSet::new(), BTreeSet::new());
    for text in SUPPORTED {
        for document in serde_yaml_ng::Deserializer::from_str(text) {
            let mut manifest = Value::deserialize(document).unwrap();
            manifest["metadata"]["uid"] = "uid".into();
            let whole = built(&manifest).unwrap();
            for part in TEMPLATE.iter().filter(|part| manifest["spec"].get(part).is_some()) {
                let mut pointers = vec![];
                leaves(&manifest["spec"][part], &format!("/spec/{part}"), &mut pointers);
                for pointer in pointers {
                    let name: Vec<&str> = pointer.split('/').filter(|key| key.parse::<usize>().is_err()).collect();
                    let name = name.join("/");
                    let other = built_otherwise(&manifest, &pointer).unwrap_or_else(|| panic!("{pointer} has no other value"));
                    if other != whole {
                        shown.insert(name.clone());
                    }
                    set.insert(name);
                }
            }
        }
    }
    let ignored: Vec<&String> = set.difference(&shown).collect();
    assert_eq!(ignored, DEFAULT_ONLY, "these are ignored");
    assert!(set.len() > 60, "only {} fields", set.len());
}
