//! The runtime as clients on a cluster see it: over gRPC, when one of its pods goes, and compared with another revision.

use serde_json::json;

use crate::cluster::{Namespace, apply, digits_spec, eventually, fixture, kubectl, program};
use crate::traffic::{Load, infer};

#[test]
fn an_unmodified_client_of_triton_asks_over_grpc_through_the_service() {
    let namespace = Namespace::new("grpc");
    namespace.apply_model("digits", &digits_spec("v1"));
    namespace.wait_ready("digits");
    let address = namespace.address("digits");
    let logits = infer(&address, "digits").unwrap();

    let output = program("PLIMSOLL_TRITON_CLIENT")
        .arg(fixture("e2e/infer_over_grpc.py"))
        .args([&format!("{}:8081", address.trim_start_matches("http://")), "digits"])
        .output()
        .expect("Python starts");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
    let over_grpc: Vec<f64> = serde_json::from_str(&printed).unwrap();
    assert_eq!(over_grpc.len(), logits.len());
    for (over_grpc, over_http) in over_grpc.iter().zip(&logits) {
        assert!((over_grpc - over_http).abs() < 1e-5, "{over_grpc} over gRPC, {over_http} over HTTP");
    }
}

#[test]
fn a_pod_that_is_deleted_under_load_costs_no_request() {
    let namespace = Namespace::new("pod-deleted");
    let mut spec = digits_spec("v1");
    spec["replicas"] = json!(2);
    namespace.apply_model("digits", &spec);
    namespace.wait_ready("digits");
    let load = Load::start(&namespace.address("digits"), "digits");
    let pods = namespace.items(&["pods", "-l", "app.kubernetes.io/component=runtime"]);
    let victim = pods[0]["metadata"]["name"].as_str().unwrap();
    // As a node's drain does it; kubectl returns when the pod is gone.
    namespace.kubectl(&["delete", "pod", victim, "--timeout=60s"]);
    namespace.wait_until("digits", "two pods serve again", |md| md["status"]["readiness"] == "2/2");
    load.expect_no_failure();
}

#[test]
fn two_revisions_are_compared_in_the_shadow_of_the_one_that_answers() {
    let namespace = Namespace::new("shadow");
    namespace.apply_model("digits", &digits_spec("v2"));
    namespace.wait_ready("digits");
    // The other revision of the same digits, of another training: it agrees on what a picture shows, and not on the numbers.
    namespace.apply_model("candidate", &digits_spec("v1"));
    namespace.wait_ready("candidate");
    let candidate = &namespace.items(&["pods", "-l", "plimsoll.dev/model=candidate,app.kubernetes.io/component=runtime"])[0]["spec"];
    // Pods like the candidate's: one beside the revision in service, one beside its own.
    for (name, other) in [("differs", "digits"), ("agrees", "candidate")] {
        let mut container = candidate["containers"][0].clone();
        let url = format!("http://{other}.{}.svc.cluster.local/v2/models/{other}", namespace.name);
        let more = ["--shadow", &url, "--shadow-share", "100%"].map(|argument| json!(argument));
        container["args"].as_array_mut().expect("arguments").extend(more);
        apply(&json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": namespace.name },
            "spec": {
                "automountServiceAccountToken": false,
                "securityContext": candidate["securityContext"],
                "containers": [container],
                "volumes": candidate["volumes"],
            },
        }));
    }
    namespace.kubectl(&["wait", "--for=condition=Ready", "pod", "differs", "agrees", "--timeout=120s"]);
    for (name, verdict) in [("differs", "Differed"), ("agrees", "Agreed")] {
        let address = namespace.get(&["pod", name])["status"]["podIP"].as_str().unwrap().to_owned();
        let series = format!("plimsoll_runtime_shadow_requests_total{{result=\"{verdict}\"}}");
        let metrics = || {
            kubectl(&[
                "get",
                "--raw",
                &format!("/api/v1/namespaces/{}/pods/{name}:8082/proxy/metrics", namespace.name),
            ])
        };
        let compared = |metrics: &str| -> f64 {
            let line = metrics.lines().find_map(|line| line.strip_prefix(series.as_str()));
            line.map_or(0.0, |value| value.trim().parse().unwrap())
        };
        // Copies are sent in the background, some at a time; what finds no room is dropped and counted.
        eventually(&format!("the pod `{name}` counts some as {verdict}"), || {
            infer(&format!("http://{address}:8080"), "candidate").unwrap();
            compared(&metrics()) >= 5.0
        });
    }
}
