use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Connection, get, post};
use crate::process::{Server, model};

const SLOW: &str = "/v2/models/slow/infer";

fn body() -> Value {
    json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]})
}

fn in_flight(address: SocketAddr) -> bool {
    get(address, "/metrics").text.contains("plimsoll_runtime_requests_in_flight 1\n")
}

fn wait_for_a_request(address: SocketAddr) {
    while !in_flight(address) {
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_request_beyond_the_bound_is_told_to_come_back_and_probes_still_answer() {
    let server = Server::ready(&model("slow"), &["--max-concurrency", "1"]);
    let address = server.http;
    let first = thread::spawn(move || post(address, SLOW, &body()));
    wait_for_a_request(address);
    let second = post(address, SLOW, &body());
    assert_eq!((second.status, second.header("retry-after")), (429, Some("1")), "{}", second.text);
    assert_eq!(get(address, "/v2/models/slow/ready").status, 200);
    let first = first.join().unwrap();
    assert_eq!(first.status, 200, "{}", first.text);
    assert_eq!(post(address, SLOW, &body()).status, 200);
}

#[test]
fn an_answer_that_takes_too_long_is_given_up() {
    let server = Server::ready(&model("slow"), &["--request-timeout", "20ms"]);
    let answer = post(server.http, SLOW, &body());
    assert_eq!((answer.status, answer.error().as_str()), (504, "there was no answer within 0.02 s"));
}

#[test]
fn a_body_that_does_not_come_is_given_up() {
    let server = Server::ready(&model("mlp"), &["--request-timeout", "100ms"]);
    let mut connection = Connection::open(server.http).unwrap();
    connection
        .write(b"POST /v2/models/mlp/infer HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{")
        .unwrap();
    let answer = connection.answer().unwrap();
    assert_eq!(
        (answer.status, answer.error().as_str()),
        (408, "the body did not arrive within 0.1 s")
    );
}

#[test]
fn headers_that_do_not_come_close_the_connection() {
    let server = Server::ready(&model("mlp"), &["--header-timeout", "100ms"]);
    let mut connection = Connection::open(server.http).unwrap();
    connection.write(b"POST /v2/models/mlp/infer HTTP/1.1\r\nhost:").unwrap();
    let started = Instant::now();
    assert!(connection.answer().is_err() || connection.is_closed());
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_body_beyond_the_bound_is_refused_with_and_without_its_length() {
    let server = Server::ready(&model("mlp"), &["--max-body", "1Ki"]);
    let text = "the body is larger than the 1024 bytes that this server takes";
    let mut connection = Connection::open(server.http).unwrap();
    connection
        .write(b"POST /v2/models/mlp/infer HTTP/1.1\r\nhost: test\r\ncontent-length: 5000000000\r\n\r\n")
        .unwrap();
    let answer = connection.answer().unwrap();
    assert_eq!((answer.status, answer.error().as_str()), (413, text));
    let mut connection = Connection::open(server.http).unwrap();
    connection
        .write(b"POST /v2/models/mlp/infer HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n800\r\n")
        .unwrap();
    connection.write(&[b' '; 0x800]).unwrap();
    let answer = connection.answer().unwrap();
    assert_eq!((answer.status, answer.error().as_str()), (413, text));
}

#[test]
fn a_shape_of_many_zeros_takes_no_memory() {
    let server = Server::ready(&model("mlp"), &["--engine", "tract"]);
    let before = server.resident();
    let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1_000_000_000_000_u64, 4], "data": [0]}]});
    let answer = post(server.http, "/v2/models/mlp/infer", &body);
    assert_eq!(answer.status, 400);
    assert!(
        answer.error().contains("takes 4000000000000 values, 1 were given"),
        "{}",
        answer.text
    );
    assert!(server.resident() < before + (16 << 20));
}
