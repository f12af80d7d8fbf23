//! What is asked of each object that the chart renders.

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::de::DeserializeOwned;
use serde::{Deserialize as _, Serialize};
use serde_json::Value;

/// Reads a stream of YAML documents; empty ones are left out.
///
/// # Errors
/// Where one is not YAML.
pub(crate) fn parse(text: &str) -> Result<Vec<Value>> {
    let documents = serde_yaml_ng::Deserializer::from_str(text)
        .map(Value::deserialize)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// `Kind namespace/name`, without the namespace where there is none.
pub(crate) fn name(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    let namespace = metadata["namespace"]
        .as_str()
        .map(|namespace| format!("{namespace}/"))
        .unwrap_or_default();
    format!("{} {namespace}{}", text(&object["kind"]), text(&metadata["name"]))
}

/// Whether an object of this [`name`] belongs to no namespace.
pub(crate) fn is_cluster_wide(name: &str) -> bool {
    name.starts_with("Cluster") || name.starts_with("CustomResourceDefinition")
}

/// Every field is one that Kubernetes knows for the kind, with the right type.
///
/// # Errors
/// Names the first field that is not, or a kind that is not known here.
pub(crate) fn known_fields(object: &Value) -> Result<()> {
    match object["kind"].as_str().context("an object without a kind")? {
        "ClusterRole" => typed::<ClusterRole>(object),
        "ClusterRoleBinding" => typed::<ClusterRoleBinding>(object),
        "ConfigMap" => typed::<ConfigMap>(object),
        "CustomResourceDefinition" => {
            ensure!(
                object["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep",
                "it would vanish on uninstall, with every model"
            );
            typed::<CustomResourceDefinition>(object)
        }
        "Deployment" => typed::<Deployment>(object),
        "NetworkPolicy" => typed::<NetworkPolicy>(object),
        "PersistentVolumeClaim" => typed::<PersistentVolumeClaim>(object),
        "PodDisruptionBudget" => typed::<PodDisruptionBudget>(object),
        // The Prometheus operator's; Kubernetes' own types do not cover it.
        "PodMonitor" => Ok(()),
        "Role" => typed::<Role>(object),
        "RoleBinding" => typed::<RoleBinding>(object),
        "Service" => typed::<Service>(object),
        "ServiceAccount" => typed::<ServiceAccount>(object),
        other => bail!("no check for the kind {other}"),
    }
}

/// A field that the type does not have is lost on the way through it.
fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> Result<()> {
    let parsed: T = serde_json::from_value(object.clone())?;
    contained(object, &serde_json::to_value(parsed)?, "")
}

fn contained(given: &Value, kept: &Value, path: &str) -> Result<()> {
    match (given, kept) {
        (Value::Null, _) => Ok(()),
        (Value::Object(given), Value::Object(kept)) => given.iter().try_for_each(|(key, value)| match kept.get(key) {
            Some(kept) => contained(value, kept, &format!("{path}.{key}")),
            None if value.is_null() => Ok(()),
            None => bail!("{path}.{key} is no field of Kubernetes"),
        }),
        (Value::Array(given), Value::Array(kept)) if given.len() == kept.len() => given
            .iter()
            .zip(kept)
            .enumerate()
            .try_for_each(|(index, (given, kept))| contained(given, kept, &format!("{path}[{index}]"))),
        _ => {
            ensure!(given == kept, "{path} is {given}, which Kubernetes reads as {kept}");
            Ok(())
        }
    }
}

/// The pods of a Deployment fit the restricted Pod Security Standard, have a read-only root, and state what they need.
///
/// # Errors
/// Names what is missing.
pub(crate) fn restricted(object: &Value) -> Result<()> {
    if object["kind"] != "Deployment" {
        return Ok(());
    }
    let pod = &object["spec"]["template"]["spec"];
    let context = &pod["securityContext"];
    ensure!(context["runAsNonRoot"] == true, "runAsNonRoot is not set");
    ensure!(context["seccompProfile"]["type"] == "RuntimeDefault", "no seccomp profile");
    for container in pod["containers"].as_array().context("no containers")? {
        let context = &container["securityContext"];
        ensure!(context["allowPrivilegeEscalation"] == false, "privileges may escalate");
        ensure!(
            context["capabilities"]["drop"] == serde_json::json!(["ALL"]),
            "capabilities are not dropped"
        );
        ensure!(context["readOnlyRootFilesystem"] == true, "the root file system can be written to");
        ensure!(
            !container["resources"]["requests"]["memory"].is_null() && !container["resources"]["limits"]["memory"].is_null(),
            "no memory request or limit"
        );
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            ensure!(container[probe].is_object(), "no {probe}");
        }
    }
    Ok(())
}

/// No role grants anything on Secrets, by name or by wildcard.
///
/// # Errors
/// Names the rule.
pub(crate) fn no_secrets(object: &Value) -> Result<()> {
    let empty = Vec::new();
    for rule in object["rules"].as_array().unwrap_or(&empty) {
        for list in ["apiGroups", "resources", "verbs"] {
            for entry in rule[list].as_array().context("a rule names groups, resources and verbs")? {
                ensure!(entry != "*" && entry != "secrets", "a rule grants too much: {rule}");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_misspelt_field_is_named_with_its_path() {
        let service =
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 80, "nodeport": 1}]}});
        assert_eq!(
            known_fields(&service).unwrap_err().to_string(),
            ".spec.ports[0].nodeport is no field of Kubernetes"
        );
    }

    #[test]
    fn a_wrong_type_is_refused() {
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": "80"}]}});
        assert!(known_fields(&service).is_err());
    }

    #[test]
    fn secrets_and_wildcards_are_refused_in_roles() {
        let role =
            |resource: &str, verb: &str| json!({"kind": "Role", "rules": [{"apiGroups": [""], "resources": [resource], "verbs": [verb]}]});
        assert!(no_secrets(&role("services", "get")).is_ok());
        assert!(no_secrets(&role("secrets", "get")).is_err());
        assert!(no_secrets(&role("*", "get")).is_err());
        assert!(no_secrets(&role("services", "*")).is_err());
    }

    #[test]
    fn a_pod_that_may_run_as_root_is_refused() {
        let deployment = json!({"kind": "Deployment", "spec": {"template": {"spec": {"containers": []}}}});
        assert_eq!(restricted(&deployment).unwrap_err().to_string(), "runAsNonRoot is not set");
    }
}
