//! Watching instead of asking again and again: what there is, what there ever was, and the moment when something holds.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::Value;

use crate::cluster::{PATIENCE, program, story, text};

/// Where the API serves what is watched.
const KINDS: [(&str, &str); 10] = [
    ("md", "apis/plimsoll.dev/v1alpha1/namespaces/{}/modeldeployments"),
    ("mr", "apis/plimsoll.dev/v1alpha1/namespaces/{}/modelrevisions"),
    ("jobs", "apis/batch/v1/namespaces/{}/jobs"),
    ("deployments", "apis/apps/v1/namespaces/{}/deployments"),
    ("pods", "api/v1/namespaces/{}/pods"),
    ("services", "api/v1/namespaces/{}/services"),
    ("networkpolicies", "apis/networking.k8s.io/v1/namespaces/{}/networkpolicies"),
    ("events", "apis/events.k8s.io/v1/namespaces/{}/events"),
    ("poddisruptionbudgets", "apis/policy/v1/namespaces/{}/poddisruptionbudgets"),
    ("leases", "apis/coordination.k8s.io/v1/namespaces/{}/leases"),
];

/// A watch of objects of one kind in one namespace.
pub(crate) struct Watch {
    namespace: String,
    kubectl: Child,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

#[derive(Default)]
struct Seen {
    /// The objects as they stand, by UID.
    now: BTreeMap<String, Value>,
    /// Every object there ever was, as it was last.
    ever: BTreeMap<String, Value>,
    /// Every state of every object, in the order in which they came.
    states: Vec<Value>,
    /// That all which there was at the start has been listed.
    is_listed: bool,
    /// That kubectl said its last.
    is_over: bool,
}

impl Seen {
    fn take(&mut self, event: &mut Value) {
        let object = event["object"].take();
        if event["type"] == "BOOKMARK" {
            self.is_listed = true;
            return;
        }
        let uid = text(&object["metadata"]["uid"]).to_owned();
        if event["type"] == "DELETED" {
            self.now.remove(&uid);
        } else {
            self.now.insert(uid.clone(), object.clone());
        }
        self.states.push(object.clone());
        self.ever.insert(uid, object);
    }
}

impl Watch {
    /// Watches the objects of `kind` in `namespace`; returns once those that there are were listed.
    pub(crate) fn start(namespace: &str, kind: &str) -> Self {
        let (_, path) = KINDS.iter().find(|(name, _)| *name == kind).expect("a kind of the table");
        let path = path.replace("{}", namespace);
        // The first bookmark tells that the list is complete.
        let query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
        let mut kubectl = program("PLIMSOLL_KUBECTL")
            .args(["get", "--raw", &format!("/{path}?{query}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let events = BufReader::new(kubectl.stdout.take().expect("piped"));
        let seen = Arc::<(Mutex<Seen>, Condvar)>::default();
        let shared = seen.clone();
        std::thread::spawn(move || {
            let (seen, news) = &*shared;
            for event in serde_json::Deserializer::from_reader(events).into_iter::<Value>() {
                let Ok(mut event) = event else { break };
                lock(seen).take(&mut event);
                news.notify_all();
            }
            lock(seen).is_over = true;
            news.notify_all();
        });
        let watch = Self {
            namespace: namespace.to_owned(),
            kubectl,
            seen,
        };
        watch.until(&format!("{kind} are listed"), |_| Some(()));
        watch
    }

    /// Waits until `holds` gives something for the objects as they stand, and returns it.
    pub(crate) fn until<T>(&self, what: &str, holds: impl Fn(&[&Value]) -> Option<T>) -> T {
        let begun = Instant::now();
        let (seen, news) = &*self.seen;
        let mut seen = lock(seen);
        loop {
            if seen.is_listed
                && let Some(held) = holds(&seen.now.values().collect::<Vec<_>>())
            {
                return held;
            }
            let left = PATIENCE.saturating_sub(begun.elapsed());
            assert!(!seen.is_over, "the watch ended while waiting until {what}");
            assert!(!left.is_zero(), "waited in vain until {what}\n{}", story(&self.namespace));
            seen = news.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The objects as they stand.
    pub(crate) fn now(&self) -> Vec<Value> {
        lock(&self.seen.0).now.values().cloned().collect()
    }

    /// Every object that there was since the watch began, those that are gone among them.
    pub(crate) fn ever(&self) -> Vec<Value> {
        lock(&self.seen.0).ever.values().cloned().collect()
    }

    /// Whether `holds` of any state of any object since the watch began.
    pub(crate) fn ever_held(&self, holds: impl Fn(&Value) -> bool) -> bool {
        lock(&self.seen.0).states.iter().any(holds)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
