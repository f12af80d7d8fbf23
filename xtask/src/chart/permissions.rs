//! Who may do what: the roles grant the rules of the chart's `files/rules`, which the operator's tests hold against its requests, where the values
//! want them and nowhere else.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::manifest;

/// The operator's roles and bindings are those that `values` ask for.
///
/// # Errors
/// Names a role that is missing, too many, or grants something else, and a binding that binds anybody but the operator.
pub(super) fn check(chart: &Path, values: &Value, manifests: &[Value]) -> Result<()> {
    let of_operator = |object: &&Value| object["metadata"]["labels"]["app.kubernetes.io/component"] == "operator";
    let kind = |object: &Value, kinds: [&str; 2]| kinds.iter().any(|kind| object["kind"] == *kind);
    let operator: Vec<&Value> = manifests.iter().filter(of_operator).collect();

    let account = operator
        .iter()
        .find(|object| object["kind"] == "ServiceAccount")
        .context("no ServiceAccount")?;
    let name = |suffix: &str| -> Result<String> {
        let deployment = operator
            .iter()
            .find(|object| object["kind"] == "Deployment")
            .context("no Deployment")?;
        let full = deployment["metadata"]["name"].as_str().unwrap_or_default();
        Ok(format!("{}-{suffix}", full.trim_end_matches("-operator")))
    };
    let mut expected = BTreeMap::new();
    let leader = format!("{}/{}", super::NAMESPACE, name("leader")?);
    expected.insert(format!("Role {leader}"), rules(chart, "leader.yaml")?);
    let namespaces = values["watchNamespaces"].as_array().context("watchNamespaces is a list")?;
    let models = rules(chart, "models.yaml")?;
    if namespaces.is_empty() {
        expected.insert(format!("ClusterRole {}", name("operator")?), models);
    } else {
        for namespace in namespaces {
            let namespace = namespace.as_str().unwrap_or_default();
            expected.insert(format!("Role {namespace}/{}", name("operator")?), models.clone());
        }
    }

    let roles = operator.iter().filter(|object| kind(object, ["Role", "ClusterRole"]));
    let granted: BTreeMap<String, Value> = roles.map(|role| (manifest::name(role), role["rules"].clone())).collect();
    for (role, rules) in &granted {
        ensure!(
            expected.get(role) == Some(rules),
            "{role} does not grant what files/rules says for it, but {rules}"
        );
    }
    ensure!(
        granted.len() == expected.len(),
        "there are {:?}, not {:?}",
        granted.keys(),
        expected.keys()
    );

    let bindings: Vec<&&Value> = operator
        .iter()
        .filter(|object| kind(object, ["RoleBinding", "ClusterRoleBinding"]))
        .collect();
    for binding in &bindings {
        let subject = json!([{ "kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": super::NAMESPACE }]);
        ensure!(
            binding["subjects"] == subject,
            "{} binds {}",
            manifest::name(binding),
            binding["subjects"]
        );
        let role = manifest::name(binding).replacen("Binding", "", 1);
        ensure!(granted.contains_key(&role), "{} is bound to no role", manifest::name(binding));
        ensure!(
            binding["roleRef"]["name"] == binding["metadata"]["name"],
            "{role} is not what is bound"
        );
    }
    ensure!(bindings.len() == granted.len(), "a role is not bound");
    Ok(())
}

fn rules(chart: &Path, file: &str) -> Result<Value> {
    let path = chart.join("files/rules").join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(serde_yaml_ng::from_str(&text)?)
}
