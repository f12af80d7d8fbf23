//! Names, labels and owners of the objects.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt as _};
use plimsoll_crds::{MODEL_LABEL, ModelRevision, REVISION_LABEL, REVISION_NAME_LABEL};

/// What an object does for its model; the value of `app.kubernetes.io/component`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Component {
    /// It optimises.
    Optimizer,
    /// It serves.
    Runtime,
}

/// The labels of the objects of a model.
#[must_use]
pub fn labels(model: &str, component: Component) -> BTreeMap<String, String> {
    let component: &str = component.into();
    [
        ("app.kubernetes.io/name", "plimsoll"),
        ("app.kubernetes.io/managed-by", "plimsoll"),
        ("app.kubernetes.io/component", component),
        ("app.kubernetes.io/instance", model),
        (MODEL_LABEL, model),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// The labels of the objects of a revision.
///
/// Without the revision's number, which an undo changes: a pod template must not change with it.
#[must_use]
pub fn revision_labels(revision: &ModelRevision, component: Component) -> BTreeMap<String, String> {
    let mut labels = labels(&model_name(revision), component);
    labels.insert(REVISION_NAME_LABEL.to_owned(), revision.name_any());
    labels.remove(REVISION_LABEL);
    labels
}

/// The name of the model that a revision belongs to.
#[must_use]
pub fn model_name(revision: &ModelRevision) -> String {
    revision.labels().get(MODEL_LABEL).cloned().unwrap_or_default()
}

/// Name, namespace, labels and owner of an object.
#[must_use]
pub fn metadata<K: Resource<DynamicType = ()>>(name: String, owner: &K, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: owner.meta().namespace.clone(),
        labels: Some(labels),
        owner_references: owner.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}
