use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use plimsoll_package::manifest::Engine;
use serde_json::json;

use crate::client::{Connection, get, post};
use crate::process::{Server, model, package};

#[test]
fn clients_that_follow_readiness_lose_no_request_when_the_server_is_told_to_stop() {
    let package = package("mlp", Engine::Tract);
    let mut server = Server::ready(package.path(), &["--drain-delay", "500ms"]);
    let address = server.http;
    let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).to_string();
    let (served, failed, gone) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut kept: Option<Connection> = None;
                // As a Service does: new traffic stops soon after readiness fails.
                while !gone.load(Ordering::Relaxed) {
                    let connection = kept.take().map_or_else(|| Connection::open(address), Ok);
                    let answer = connection.and_then(|mut connection| {
                        let answer = connection.send("POST", "/v2/models/model/infer", "", &body)?;
                        Ok((answer, connection))
                    });
                    match answer {
                        Ok((answer, connection)) if answer.status == 200 => {
                            served.fetch_add(1, Ordering::Relaxed);
                            kept = (answer.header("connection") != Some("close")).then_some(connection);
                        }
                        _ => drop(failed.fetch_add(1, Ordering::Relaxed)),
                    }
                }
            });
        }
        while served.load(Ordering::Relaxed) < 50 {
            thread::sleep(Duration::from_millis(1));
        }
        server.terminate();
        server.line("draining");
        let ready = get(address, "/v2/models/model/ready");
        assert_eq!((ready.status, ready.header("connection")), (503, Some("close")));
        assert_eq!(get(address, "/v2/health/live").status, 200);
        let during = served.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(200));
        assert!(served.load(Ordering::Relaxed) > during, "requests are served while endpoints go");
        gone.store(true, Ordering::Relaxed);
    });
    assert_eq!(failed.load(Ordering::Relaxed), 0);
    assert!(server.wait().success());
}

#[test]
fn a_request_in_flight_is_finished_before_the_end() {
    let mut server = Server::ready(&model("slow"), &["--drain-delay", "0"]);
    let address = server.http;
    let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]});
    let request = thread::spawn(move || post(address, "/v2/models/slow/infer", &body));
    while !get(address, "/metrics").text.contains("plimsoll_runtime_requests_in_flight 1\n") {
        thread::sleep(Duration::from_millis(2));
    }
    server.terminate();
    assert_eq!(request.join().unwrap().status, 200);
    assert!(server.wait().success());
}

#[test]
fn the_grace_ends_the_wait_for_a_client_that_sends_nothing_more() {
    let mut server = Server::ready(&model("mlp"), &["--drain-delay", "0", "--grace", "100ms"]);
    let mut connection = Connection::open(server.http).unwrap();
    connection
        .write(b"POST /v2/models/mlp/infer HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{")
        .unwrap();
    while !get(server.http, "/metrics")
        .text
        .contains("plimsoll_runtime_requests_in_flight 1\n")
    {
        thread::sleep(Duration::from_millis(2));
    }
    let started = Instant::now();
    server.terminate();
    server.line("stopped with requests in flight");
    assert!(server.wait().success());
    assert!(started.elapsed() < Duration::from_secs(10));
}
