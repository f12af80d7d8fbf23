//! An apiserver in memory, for tests: it does what the operator asks of it, as far as the operator can tell, and remembers which permissions
//! that took and what was written. What only a real one shows is for the end-to-end tests.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use kube::Client;
use serde_json::{Value, json};

/// Group, resource with its subresource, verb.
pub(crate) type Permission = (String, String, String);

/// The apiserver; clones are the same one.
#[derive(Clone, Default)]
pub(crate) struct Apiserver(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// By path.
    objects: BTreeMap<String, Value>,
    permissions: BTreeSet<Permission>,
    writes: Vec<String>,
    patch_queries: Vec<String>,
    refused: Option<String>,
    version: u64,
}

/// What a path names.
struct Target {
    group: String,
    resource: String,
    subresource: Option<String>,
    /// The object's path, or its collection's.
    path: String,
    is_object: bool,
}

impl Apiserver {
    pub(crate) fn client(&self) -> Client {
        let server = self.clone();
        let router = Router::new().fallback(move |method: Method, uri: Uri, body: Bytes| {
            let answer = server.state().answer(&method, &uri, &body);
            std::future::ready(answer)
        });
        Client::new(router, "default")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// What the requests so far took.
    pub(crate) fn permissions(&self) -> BTreeSet<Permission> {
        self.state().permissions.clone()
    }

    /// What changed something, as `VERB path`, since the last call of this.
    pub(crate) fn take_writes(&self) -> Vec<String> {
        std::mem::take(&mut self.state().writes)
    }

    /// The queries of all patches.
    pub(crate) fn patch_queries(&self) -> Vec<String> {
        self.state().patch_queries.clone()
    }

    pub(crate) fn put(&self, path: &str, object: Value) {
        self.state().store(path, object);
    }

    pub(crate) fn remove(&self, path: &str) {
        self.state().objects.remove(path);
    }

    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.state().objects.get(path).cloned()
    }

    /// The objects whose path has `/resource/` in it.
    pub(crate) fn all<K: serde::de::DeserializeOwned>(&self, resource: &str) -> Vec<Arc<K>> {
        let state = self.state();
        let objects = state.objects.iter().filter(|(path, _)| path.contains(&format!("/{resource}/")));
        objects
            .map(|(_, object)| Arc::new(serde_json::from_value(object.clone()).unwrap()))
            .collect()
    }

    /// Refuses to write to paths that contain `part`, as a quota does.
    pub(crate) fn refuse(&self, part: &str) {
        self.state().refused = Some(part.into());
    }
}

impl State {
    fn answer(&mut self, method: &Method, uri: &Uri, body: &Bytes) -> Response {
        let target = Target::of(uri.path());
        let query = uri.query().unwrap_or_default();
        let verb = match (method.as_str(), target.is_object) {
            ("GET", true) => "get",
            ("GET", false) if query.contains("watch=true") => "watch",
            ("GET", false) => "list",
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            ("DELETE", true) => "delete",
            (other, _) => panic!("{other} {uri}"),
        };
        self.permit(&target.group, &target.full_resource(), verb);
        if verb == "patch" {
            self.patch_queries.push(query.into());
        }
        if verb == "watch" {
            return Body::from_stream(futures::stream::pending::<Result<Bytes, Infallible>>()).into_response();
        }
        if method != Method::GET && self.refused.as_ref().is_some_and(|part| target.path.contains(part.as_str())) {
            return status(StatusCode::FORBIDDEN, "exceeded quota");
        }
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        for owner in body["metadata"]["ownerReferences"].as_array().into_iter().flatten() {
            if owner["blockOwnerDeletion"] == true {
                let group = owner["apiVersion"].as_str().unwrap().split('/').next().unwrap();
                let resource = format!("{}s/finalizers", owner["kind"].as_str().unwrap().to_lowercase());
                self.permit(group, &resource, "update");
            }
        }
        match (verb, target.subresource.as_deref()) {
            ("list", None) => {
                let below = format!("{}/", target.path);
                let items: Vec<&Value> = self
                    .objects
                    .iter()
                    .filter(|(path, _)| path.starts_with(&below))
                    .map(|(_, object)| object)
                    .collect();
                ok(&json!({ "apiVersion": "v1", "kind": "List", "metadata": { "resourceVersion": "1" }, "items": items }))
            }
            ("get", None) => self.found(&target.path),
            ("create", None) => {
                let path = format!("{}/{}", target.path, body["metadata"]["name"].as_str().unwrap());
                if self.objects.contains_key(&path) {
                    return status(StatusCode::CONFLICT, "exists");
                }
                self.write(verb, &path, body)
            }
            ("update", None) => self.write(verb, &target.path, body),
            ("patch", subresource) => {
                let live = self.objects.get(&target.path).cloned();
                match (subresource, live) {
                    (None, None) => self.permit(&target.group, &target.resource, "create"),
                    (Some(_), None) => return status(StatusCode::NOT_FOUND, "not found"),
                    _ => {}
                }
                let mut object = self.objects.get(&target.path).cloned().unwrap_or_else(|| json!({}));
                match subresource {
                    Some("scale") => object["spec"]["replicas"] = body["spec"]["replicas"].clone(),
                    Some("status") => object["status"] = body["status"].clone(),
                    _ => merge(&mut object, &body),
                }
                let written = self.write(verb, &target.path, object);
                match subresource {
                    Some("scale") => ok(&body),
                    _ => written,
                }
            }
            ("delete", None) => match self.objects.remove(&target.path) {
                Some(_) => {
                    self.writes.push(format!("delete {}", target.path));
                    ok(&json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" }))
                }
                None => status(StatusCode::NOT_FOUND, "not found"),
            },
            _ => panic!("{method} {uri}"),
        }
    }

    fn permit(&mut self, group: &str, resource: &str, verb: &str) {
        self.permissions.insert((group.into(), resource.into(), verb.into()));
    }

    fn found(&self, path: &str) -> Response {
        match self.objects.get(path) {
            Some(object) => ok(object),
            None => status(StatusCode::NOT_FOUND, "not found"),
        }
    }

    fn write(&mut self, verb: &str, path: &str, object: Value) -> Response {
        if self.objects.get(path) != Some(&object) {
            self.writes.push(format!("{verb} {path}"));
            self.store(path, object);
        }
        self.found(path)
    }

    fn store(&mut self, path: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = format!("uid-{}", self.version).into();
        }
        self.objects.insert(path.into(), object);
    }
}

impl Target {
    /// `/api/v1/namespaces/NS/RESOURCE[/NAME[/SUB]]`, or the same below `/apis/GROUP/VERSION`.
    fn of(path: &str) -> Self {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, rest) = if parts[0] == "api" { ("", 2) } else { (parts[1], 3) };
        assert_eq!(parts[rest], "namespaces", "{path}: the tests watch one namespace");
        let (resource, name) = (parts[rest + 2], parts.get(rest + 3));
        let length = rest + 3 + usize::from(name.is_some());
        Self {
            group: group.into(),
            resource: resource.into(),
            subresource: parts.get(rest + 4).map(|&part| part.into()),
            path: format!("/{}", parts[..length].join("/")),
            is_object: name.is_some(),
        }
    }

    fn full_resource(&self) -> String {
        let subresource = self.subresource.iter().map(|name| format!("/{name}"));
        std::iter::once(self.resource.clone()).chain(subresource).collect()
    }
}

fn ok(body: &Value) -> Response {
    ([(CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

fn status(code: StatusCode, message: &str) -> Response {
    let reason = match code {
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::CONFLICT => "AlreadyExists",
        _ => "Forbidden",
    };
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code.as_u16(),
    });
    (code, ok(&body)).into_response()
}

fn merge(live: &mut Value, applied: &Value) {
    match (live, applied) {
        (Value::Object(live), Value::Object(applied)) => {
            for (key, value) in applied {
                merge(live.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (live, applied) => *live = applied.clone(),
    }
}
