//! Prints the CustomResourceDefinitions, one YAML document each; `cargo xtask crds` writes them to `crds/yaml/`.

fn main() {
    let documents: Vec<serde_json::Value> = plimsoll_crds::custom_resource_definitions()
        .into_iter()
        .map(|(file, yaml)| serde_json::json!({ "file": file, "yaml": yaml }))
        .collect();
    println!("{}", serde_json::Value::from(documents));
}
