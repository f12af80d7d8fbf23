//! What a release must come to, given its values: storage that stays, registries that are reached, selectors that select, metrics that are found.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::manifest;

/// The objects of a release, and the values that they come from.
pub(super) struct Release {
    pub(super) values: Value,
    pub(super) manifests: Vec<Value>,
}

/// A check of a release, and what it proves.
pub(super) type Check = (&'static str, fn(&Release) -> Result<()>);

/// All checks.
pub(super) const CHECKS: [Check; 8] = [
    ("the CRDs are upgraded with the release and outlive it", Release::crds),
    ("the registry keeps what it was given", Release::persistence),
    ("pushes and pulls go to the registry of the values", Release::registry),
    ("secrets of the values reach who uses them", Release::secrets),
    ("every selector selects pods of the release", Release::selectors),
    ("the PodMonitor finds the metrics", Release::pod_monitor),
    ("pull secrets are given to every pod of the release", Release::pull_secrets),
    ("the image of models on GPUs is that of the values", |release| {
        release.flag("cuda-runtime-image", &release.values["images"]["runtimeCuda"])
    }),
];

/// `over` laid over `defaults`, as Helm does it.
pub(super) fn merged(defaults: &Value, over: &Value) -> Value {
    match (defaults, over) {
        (Value::Object(defaults), Value::Object(over)) => {
            let mut all = defaults.clone();
            for (key, value) in over {
                let below = defaults.get(key).map_or_else(|| value.clone(), |default| merged(default, value));
                all.insert(key.clone(), below);
            }
            Value::Object(all)
        }
        _ => over.clone(),
    }
}

impl Release {
    fn of(&self, kind: &str, component: &str) -> Option<&Value> {
        self.manifests
            .iter()
            .find(|object| object["kind"] == kind && object["metadata"]["labels"]["app.kubernetes.io/component"] == component)
    }

    fn pod(&self, component: &str) -> Result<&Value> {
        let deployment = self
            .of("Deployment", component)
            .with_context(|| format!("no Deployment of the {component}"))?;
        Ok(&deployment["spec"]["template"]["spec"])
    }

    fn arguments(&self) -> Result<Vec<&str>> {
        let arguments = self.pod("operator")?["containers"][0]["args"].as_array().context("no arguments")?;
        Ok(arguments.iter().filter_map(Value::as_str).collect())
    }

    /// The flag `--name=VALUE` for a value that is set, and no such flag for one that is not.
    fn flag(&self, name: &str, value: &Value) -> Result<()> {
        let prefix = format!("--{name}=");
        let given: Vec<&str> = self
            .arguments()?
            .into_iter()
            .filter_map(|argument| argument.strip_prefix(&prefix))
            .collect();
        let wanted: Vec<&str> = match value {
            Value::Array(values) => values.iter().filter_map(Value::as_str).collect(),
            value => value.as_str().into_iter().filter(|text| !text.is_empty()).collect(),
        };
        ensure!(given == wanted, "--{name} is {given:?}, not {wanted:?}");
        Ok(())
    }

    fn crds(&self) -> Result<()> {
        let crds: Vec<&Value> = self
            .manifests
            .iter()
            .filter(|object| object["kind"] == "CustomResourceDefinition")
            .collect();
        if self.values["crds"]["install"] == false {
            ensure!(crds.is_empty(), "they are there, though crds.install is false");
            return Ok(());
        }
        ensure!(
            crds.len() == 2,
            "{} of 2 are among the templates, which alone are upgraded",
            crds.len()
        );
        for crd in crds {
            let policy = &crd["metadata"]["annotations"]["helm.sh/resource-policy"];
            ensure!(
                policy == "keep",
                "{} goes with the release, and every model with it",
                manifest::name(crd)
            );
        }
        Ok(())
    }

    fn persistence(&self) -> Result<()> {
        let internal = &self.values["registry"]["internal"];
        let claim = self.manifests.iter().find(|object| object["kind"] == "PersistentVolumeClaim");
        if internal["enabled"] == false {
            ensure!(claim.is_none(), "a claim without a registry");
            return Ok(());
        }
        let asked = &internal["persistence"];
        let pod = self.pod("registry")?;
        let volume = pod["volumes"]
            .as_array()
            .and_then(|volumes| volumes.iter().find(|volume| volume["name"] == "storage"))
            .context("no volume `storage`")?;
        let mounts = pod["containers"][0]["volumeMounts"].as_array().context("no mounts")?;
        let config = self.of("ConfigMap", "registry").context("no configuration")?;
        let config: Value = serde_yaml_ng::from_str(config["data"]["config.yml"].as_str().unwrap_or_default())?;
        let folder = &config["storage"]["filesystem"]["rootdirectory"];
        ensure!(
            mounts
                .iter()
                .any(|mount| mount["name"] == "storage" && mount["mountPath"] == *folder),
            "the registry writes to {folder}, where the volume is not"
        );
        ensure!(
            self.of("Deployment", "registry")
                .is_some_and(|registry| registry["spec"]["strategy"]["type"] == "Recreate"),
            "two registries would write to one volume during an update"
        );
        if asked["enabled"] == false {
            ensure!(
                volume["emptyDir"].is_object() && claim.is_none(),
                "persistence is off, and there is {volume}"
            );
            return Ok(());
        }
        let name = &volume["persistentVolumeClaim"]["claimName"];
        if asked["existingClaim"] != "" {
            ensure!(
                *name == asked["existingClaim"] && claim.is_none(),
                "the claim of the values is not used, but {name}"
            );
            return Ok(());
        }
        let claim = claim.context("no claim")?;
        ensure!(*name == claim["metadata"]["name"], "the claim {name} is not in the release");
        let mut spec = json!({ "accessModes": asked["accessModes"], "resources": { "requests": { "storage": asked["size"] } } });
        if asked["storageClassName"] != "" {
            spec["storageClassName"] = asked["storageClassName"].clone();
        }
        ensure!(claim["spec"] == spec, "the claim asks for {}, not {spec}", claim["spec"]);
        let kept = claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep";
        ensure!(asked["retain"] == kept, "retain is {}, and the claim says {kept}", asked["retain"]);
        Ok(())
    }

    fn registry(&self) -> Result<()> {
        let (internal, external) = (&self.values["registry"]["internal"], &self.values["registry"]["external"]);
        let plain = self.arguments()?.contains(&"--registry-plain-http");
        if internal["enabled"] == false {
            for name in ["registry-push", "registry-pull"] {
                self.flag(name, &external["repository"])?;
            }
            ensure!(
                plain == external["plainHttp"],
                "plainHttp is {}, the flag {plain}",
                external["plainHttp"]
            );
            let left: Vec<String> = self
                .manifests
                .iter()
                .filter(|object| object["metadata"]["labels"]["app.kubernetes.io/component"] == "registry")
                .map(manifest::name)
                .collect();
            ensure!(left.is_empty(), "the internal registry is off, and there are {left:?}");
            return Ok(());
        }
        let service = self.of("Service", "registry").context("no Service")?;
        let port = &service["spec"]["ports"][0];
        ensure!(
            service["spec"]["type"] == "NodePort" && port["nodePort"] == internal["nodePort"],
            "kubelets do not reach it: {}",
            service["spec"]
        );
        let host = service["metadata"]["name"].as_str().unwrap_or_default();
        let push = format!("{host}.{}.svc.cluster.local:{}/plimsoll/models", super::NAMESPACE, port["port"]);
        self.flag("registry-push", &push.into())?;
        self.flag("registry-pull", &format!("127.0.0.1:{}/plimsoll/models", port["nodePort"]).into())?;
        ensure!(plain, "the internal registry speaks plain HTTP alone");
        Ok(())
    }

    fn secrets(&self) -> Result<()> {
        let external = &self.values["registry"]["external"];
        self.flag("registry-push-secret", &external["pushSecret"])?;
        self.flag("registry-pull-secret", &external["pullSecret"])?;
        self.flag("image-pull-secret", &self.values["models"]["imagePullSecrets"])?;
        let pod = self.pod("operator")?;
        let empty = vec![];
        let volumes = pod["volumes"].as_array().unwrap_or(&empty);
        let secrets: Vec<&Value> = volumes.iter().map(|volume| &volume["secret"]["secretName"]).collect();
        let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap_or(&empty);
        if external["operatorSecret"] == "" {
            ensure!(volumes.is_empty() && mounts.is_empty(), "the operator mounts {volumes:?}");
            return self.flag("registry-credentials", &Value::Null);
        }
        ensure!(secrets == [&external["operatorSecret"]], "the operator mounts {secrets:?}");
        ensure!(mounts.len() == 1 && mounts[0]["readOnly"] == true, "the operator mounts {mounts:?}");
        self.flag("registry-credentials", &mounts[0]["mountPath"])
    }

    fn selectors(&self) -> Result<()> {
        let pods: Vec<&Value> = self
            .manifests
            .iter()
            .filter(|object| object["kind"] == "Deployment")
            .map(|deployment| &deployment["spec"]["template"])
            .collect();
        for object in &self.manifests {
            let selector = match object["kind"].as_str().unwrap_or_default() {
                "Service" => &object["spec"]["selector"],
                "Deployment" | "PodDisruptionBudget" | "PodMonitor" => &object["spec"]["selector"]["matchLabels"],
                "NetworkPolicy" => &object["spec"]["podSelector"]["matchLabels"],
                _ => continue,
            };
            let selector = selector
                .as_object()
                .filter(|labels| !labels.is_empty())
                .context("an empty selector")?;
            let selected = pods.iter().filter(|pod| selects(selector, &pod["metadata"]["labels"])).count();
            ensure!(
                selected == 1,
                "{} selects the pods of {selected} Deployments",
                manifest::name(object)
            );
        }
        Ok(())
    }

    fn pod_monitor(&self) -> Result<()> {
        let asked = &self.values["metrics"]["podMonitor"];
        let Some(monitor) = self.of("PodMonitor", "operator") else {
            ensure!(asked["enabled"] == false, "there is none");
            return Ok(());
        };
        ensure!(asked["enabled"] == true, "there is one, though it is off");
        ensure!(
            monitor["apiVersion"] == "monitoring.coreos.com/v1",
            "its version is {}",
            monitor["apiVersion"]
        );
        ensure!(
            selects(asked["labels"].as_object().context("labels")?, &monitor["metadata"]["labels"]),
            "it lacks labels of the values"
        );
        let endpoint = json!({ "port": "metrics", "path": "/metrics", "interval": asked["interval"] });
        ensure!(
            monitor["spec"]["podMetricsEndpoints"] == json!([endpoint]),
            "it scrapes {}",
            monitor["spec"]["podMetricsEndpoints"]
        );
        let known = ["podMetricsEndpoints", "selector"];
        let fields = monitor["spec"].as_object().context("a spec")?;
        if let Some(other) = fields.keys().find(|field| !known.contains(&field.as_str())) {
            bail!("no check for spec.{other}");
        }
        // The port that it names is the container's, and the one that the operator listens on and the NetworkPolicy opens.
        let ports = self.pod("operator")?["containers"][0]["ports"].as_array().context("no ports")?;
        let port = ports.iter().find(|port| port["name"] == "metrics").context("no port `metrics`")?;
        self.flag("metrics-address", &format!("0.0.0.0:{}", port["containerPort"]).into())?;
        if let Some(policy) = self.of("NetworkPolicy", "operator") {
            let open = policy["spec"]["ingress"][0]["ports"].as_array().context("no ingress")?;
            ensure!(open.iter().any(|open| open["port"] == "metrics"), "the NetworkPolicy keeps it out");
        }
        Ok(())
    }

    fn pull_secrets(&self) -> Result<()> {
        let names = self.values["images"]["pullSecrets"].as_array().context("a list")?;
        let wanted: Vec<Value> = names.iter().map(|name| json!({ "name": name })).collect();
        let wanted = if wanted.is_empty() { Value::Null } else { Value::Array(wanted) };
        for deployment in self.manifests.iter().filter(|object| object["kind"] == "Deployment") {
            let given = &deployment["spec"]["template"]["spec"]["imagePullSecrets"];
            ensure!(*given == wanted, "{} pulls with {given}, not {wanted}", manifest::name(deployment));
        }
        Ok(())
    }
}

fn selects(selector: &Map<String, Value>, labels: &Value) -> bool {
    selector.iter().all(|(key, value)| labels[key] == *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_laid_over_the_defaults_field_by_field_and_lists_as_a_whole() {
        let defaults = json!({ "a": { "b": 1, "c": [1, 2] }, "d": "x" });
        let over = json!({ "a": { "c": [3] }, "e": true });
        assert_eq!(merged(&defaults, &over), json!({ "a": { "b": 1, "c": [3] }, "d": "x", "e": true }));
    }

    #[test]
    fn a_service_that_selects_nothing_is_named() {
        let labels = json!({ "app": "registry" });
        let deployment = json!({ "kind": "Deployment", "metadata": { "name": "d" }, "spec": {
            "selector": { "matchLabels": labels }, "template": { "metadata": { "labels": labels } } } });
        let service = json!({ "kind": "Service", "metadata": { "name": "s" }, "spec": { "selector": { "app": "registri" } } });
        let selectors = |manifests: Vec<Value>| {
            let release = Release {
                values: Value::Null,
                manifests,
            };
            release.selectors().map_err(|error| error.to_string())
        };
        assert_eq!(selectors(vec![deployment.clone()]), Ok(()));
        assert_eq!(
            selectors(vec![deployment, service]),
            Err("Service s selects the pods of 0 Deployments".into())
        );
    }
}
