//! The manifests of `tests/fixtures` keep up with the API: each CEL rule has one that breaks it, each field one that sets it. That the API
//! server answers with the messages is shown by the end-to-end tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use plimsoll_crds::{ModelDeployment, custom_resource_definitions};
use serde::Deserialize as _;
use serde_json::Value;

/// Types of Kubernetes' own, whose fields are not ours to cover.
const FOREIGN: [&str; 3] = [
    "spec.runtime.pod.affinity",
    "spec.runtime.pod.tolerations[]",
    "spec.runtime.pod.topologySpreadConstraints[]",
];

fn manifests(folder: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(folder);
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                fs::read_to_string(path).unwrap(),
            )
        })
        .collect()
}

fn schema(file: &str) -> Value {
    let definitions = custom_resource_definitions();
    let (_, yaml) = definitions.iter().find(|(name, _)| *name == file).unwrap();
    let definition: Value = serde_yaml_ng::from_str(yaml).unwrap();
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

fn rule_messages(schema: &Value, found: &mut BTreeSet<String>) {
    match schema {
        Value::Object(fields) => {
            for (name, value) in fields {
                if name == "x-kubernetes-validations" {
                    found.extend(
                        value
                            .as_array()
                            .unwrap()
                            .iter()
                            .map(|rule| rule["message"].as_str().expect("a rule has a message").to_owned()),
                    );
                } else {
                    rule_messages(value, found);
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| rule_messages(item, found)),
        _ => {}
    }
}

fn schema_fields(schema: &Value, path: &str, found: &mut BTreeSet<String>) {
    if FOREIGN.contains(&path) {
        return;
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        found.insert(path.clone());
        schema_fields(field, &path, found);
    }
    if schema["items"].is_object() {
        schema_fields(&schema["items"], &format!("{path}[]"), found);
    }
}

fn set_fields(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                found.insert(path.clone());
                set_fields(field, &path, found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| set_fields(item, &format!("{path}[]"), found)),
        _ => {}
    }
}

#[test]
fn each_cel_rule_has_a_manifest_that_breaks_it() {
    let mut messages = BTreeSet::new();
    for (file, _) in custom_resource_definitions() {
        rule_messages(&schema(file), &mut messages);
    }
    let expected: BTreeSet<String> = ["invalid", "update"]
        .into_iter()
        .flat_map(manifests)
        .map(|(name, text)| {
            let first = text.lines().next().unwrap_or_default();
            first
                .strip_prefix("# expect: ")
                .unwrap_or_else(|| panic!("{name} begins with `# expect: MESSAGE`"))
                .to_owned()
        })
        .collect();
    let missing: Vec<_> = messages.difference(&expected).collect();
    assert!(missing.is_empty(), "no manifest in tests/fixtures expects: {missing:#?}");
}

#[test]
fn the_valid_manifests_are_read_and_set_every_field_together() {
    let mut set = BTreeSet::new();
    for (name, text) in manifests("valid") {
        for document in serde_yaml_ng::Deserializer::from_str(&text) {
            let manifest = Value::deserialize(document).unwrap();
            serde_json::from_value::<ModelDeployment>(manifest.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
            set_fields(&manifest["spec"], "spec", &mut set);
        }
    }
    let mut fields = BTreeSet::new();
    schema_fields(&schema("modeldeployments.yaml")["properties"]["spec"], "spec", &mut fields);
    let unset: Vec<_> = fields.difference(&set).collect();
    assert!(unset.is_empty(), "no manifest of tests/fixtures/valid sets {unset:#?}");
}

/// Of an entry of a recipe exactly one key is set.
const ONE_OF: [&str; 3] = [
    "spec.optimize.recipe[].prune",
    "spec.optimize.recipe[].quantize",
    "spec.optimize.recipe[].distill",
];

/// Fields whose documentation lacks a bound that the schema has, or does not say what holds where they are left out.
fn undocumented(schema: &Value, path: &str, found: &mut Vec<String>) {
    if FOREIGN.contains(&path) {
        return;
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let text = field["description"].as_str().unwrap_or_default();
        let is_required = schema["required"]
            .as_array()
            .is_some_and(|required| required.iter().any(|other| other == name));
        let tells_default = is_required || ONE_OF.contains(&path.as_str()) || text.contains("Default: ") || text.contains("hen left out");
        // The bounds of an integer's type are none of the field's: 0 of what is unsigned, all where the values are listed.
        let is_listed = field["enum"].is_array();
        let tells = |bound: &str| {
            let value = field[bound].as_f64();
            value.is_none_or(|value| is_listed || value == 0.0 || text.contains(&value.to_string()))
        };
        if text.is_empty() || !tells_default || !["minimum", "maximum", "maxItems", "maxProperties"].iter().all(|bound| tells(bound)) {
            found.push(format!("{path}: {text}"));
        }
        undocumented(field, &path, found);
        undocumented(&field["items"], &format!("{path}[]"), found);
    }
}

#[test]
fn every_field_documents_its_range_and_its_default() {
    let mut found = vec![];
    undocumented(&schema("modeldeployments.yaml")["properties"]["spec"], "spec", &mut found);
    assert!(found.is_empty(), "{found:#?}");
}
