use std::io::Write as _;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::channel::proto::{ModelInferRequest, ModelInferResponse};
use crate::channel::{Channel, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, framed};
use crate::client::{Connection, get, post};
use crate::process::{Server, model};

const MLP: &str = "/v2/models/mlp/infer";
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

/// A server that takes bodies of 4 MiB, and the memory that it had before anything came. What comes may make it grow by some bodies, not by
/// what the bodies claim or unfold to.
struct Bounded {
    server: Server,
    before: u64,
}

impl Bounded {
    const GROWTH_MAX: u64 = 48 << 20;

    fn start() -> Self {
        let server = Server::ready(&model("mlp"), &["--engine", "tract", "--max-body", "4Mi"]);
        let bounded = Self { before: 0, server };
        bounded.answers();
        Self {
            before: bounded.server.resident(),
            ..bounded
        }
    }

    fn answers(&self) {
        let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]});
        assert_eq!(post(self.server.http, MLP, &body).status, 200);
    }

    fn open(&self) -> Connection {
        Connection::open(self.server.http).unwrap()
    }

    /// The status and text that a body is refused with.
    fn refuses(&self, headers: &str, body: &[u8]) -> (u16, String) {
        let answer = self.open().send_bytes(MLP, headers, body.len(), body).unwrap();
        self.holds();
        (answer.status, answer.error())
    }

    fn holds(&self) {
        self.answers();
        let resident = self.server.resident();
        assert!(
            resident < self.before + Self::GROWTH_MAX,
            "{resident} bytes, {} before",
            self.before
        );
    }
}

#[test]
fn json_that_is_nested_deep_is_refused_wherever_it_is() {
    let bounded = Bounded::start();
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(500_000), close.repeat(500_000));
    let lists = deep("[", "]");
    for body in [
        lists.clone(),
        format!(r#"{{"inputs":{lists}}}"#),
        format!(r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1,4],"data":{lists}}}]}}"#),
        format!(r#"{{"inputs":[{{"data":{lists},"name":"x","datatype":"FP32","shape":[1,4]}}]}}"#),
        format!(r#"{{"parameters":{{"sequence_id":{lists}}},"inputs":[]}}"#),
        format!(r#"{{"inputs":{}"#, "[".repeat(1_000_000)),
        format!(r#"{{"parameters":{}1{}}}"#, r#"{"a":"#.repeat(500_000), "}".repeat(500_000)),
    ] {
        let (status, text) = bounded.refuses("", body.as_bytes());
        assert_eq!(status, 400, "{text}");
        assert!(text.len() < 500, "{text}");
    }
}

#[test]
fn headers_that_are_many_or_large_are_refused() {
    let bounded = Bounded::start();
    for headers in ["a: b\r\n".repeat(1000), format!("a: {}\r\n", "b".repeat(1 << 20))] {
        let mut connection = bounded.open();
        // The server may close before all of it is sent.
        let sent = connection.send("GET", "/v2", &headers, "");
        assert!(sent.is_err() || sent.is_ok_and(|answer| answer.status == 431));
        bounded.holds();
    }
    let mut connection = bounded.open();
    let answer = connection.send("GET", &format!("/{}", "a".repeat(1 << 17)), "", "");
    assert!(answer.is_err() || answer.is_ok_and(|answer| matches!(answer.status, 414 | 431)));
    bounded.holds();
}

#[test]
fn a_content_length_that_lies_spoils_no_other_request() {
    let bounded = Bounded::start();
    let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).to_string();
    // Longer than what comes, and then the end.
    let mut connection = bounded.open();
    let head = format!(
        "POST {MLP} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{body}",
        body.len() + 1
    );
    connection.write(head.as_bytes()).unwrap();
    connection.end().unwrap();
    let answer = connection.answer();
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status == 400));
    bounded.holds();
    // Shorter: the body is not JSON, and the rest is no request.
    let mut connection = bounded.open();
    let answer = connection.send_bytes(MLP, "", body.len() - 1, body.as_bytes()).unwrap();
    assert_eq!(answer.status, 400);
    assert!(answer.error().contains("the body is not an inference request"), "{}", answer.text);
    connection.end().unwrap();
    assert!(!connection.answer().is_ok_and(|answer| answer.status == 200));
    // Two that differ, or one beside chunks, are how requests are smuggled.
    for headers in ["content-length: 1\r\n", "transfer-encoding: chunked\r\n"] {
        let mut connection = bounded.open();
        let answer = connection.send_bytes(MLP, headers, body.len(), body.as_bytes());
        assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status == 400), "{headers}");
        bounded.holds();
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn what_unfolds_to_more_than_a_body_may_have_is_refused_over_both_protocols() {
    let bounded = Bounded::start();
    let bomb = gzip(&vec![b' '; 128 << 20]);
    assert!(bomb.len() < 1 << 20);
    let text = "the body is larger than the 4194304 bytes that this server takes";
    assert_eq!(bounded.refuses("content-encoding: gzip\r\n", &bomb), (413, text.to_owned()));
    let mut frame = vec![1];
    frame.extend((bomb.len() as u32).to_be_bytes());
    frame.extend(&bomb);
    let channel = Channel::open(bounded.server.grpc);
    let path = "/inference.GRPCInferenceService/ModelInfer";
    let failed = channel.exchange(path, &[("grpc-encoding", "gzip")], vec![frame]).err().unwrap();
    assert_eq!((failed.code, failed.text.as_str()), (RESOURCE_EXHAUSTED, text));
    // What it claims to hold is refused before it comes.
    let failed = channel.exchange(path, &[], vec![vec![0, 255, 255, 255, 255]]).err().unwrap();
    assert_eq!((failed.code, failed.text.as_str()), (RESOURCE_EXHAUSTED, text));
    let cut = framed(&ModelInferRequest::default()).len() + 100;
    let failed = channel.exchange(path, &[], vec![vec![0, 0, 0, 0, cut as u8, 1]]).err().unwrap();
    assert_eq!(failed.code, INVALID_ARGUMENT);
    bounded.holds();
    assert!(
        channel
            .call::<ModelInferResponse>("ModelInfer", &[], &ModelInferRequest::default())
            .is_err()
    );
}

#[test]
fn binary_tensors_whose_sizes_lie_are_refused_by_what_is_there() {
    let bounded = Bounded::start();
    let refuses = |json_length: &str, size: u64, shape: &Value, datatype: &str, bytes: &[u8]| {
        let input = json!({"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}});
        let json = json!({"inputs": [input]}).to_string();
        let length = if json_length.is_empty() {
            json.len().to_string()
        } else {
            json_length.to_owned()
        };
        let headers = format!("inference-header-content-length: {length}\r\n");
        bounded.refuses(&headers, &[json.as_bytes(), bytes].concat())
    };
    let row = json!([1, 4]);
    for (json_length, size, shape, datatype, bytes, told) in [
        ("", 16, &row, "FP32", &[0; 15][..], "15 bytes are left in the body"),
        ("", u64::MAX, &row, "FP32", &[0; 16], "16 bytes are left in the body"),
        ("", 12, &row, "FP32", &[0; 16], "input `x`"),
        ("", 16, &row, "FP32", &[0; 17], "1 bytes are left behind the last binary tensor"),
        ("", 16, &json!([1_u64 << 40, 4]), "FP32", &[0; 16], "input `x`"),
        ("", 16, &json!([u64::MAX, 4]), "FP32", &[0; 16], "input `x`"),
        ("", 8, &json!([1]), "BYTES", &[255, 255, 255, 255, 1, 2, 3, 4], "input `x`"),
        (
            "99999999",
            16,
            &row,
            "FP32",
            &[0; 16],
            "Inference-Header-Content-Length is 99999999",
        ),
        ("10", 16, &row, "FP32", &[0; 16], "not an inference request"),
        ("99999999999999999999", 16, &row, "FP32", &[0; 16], "no number of bytes"),
        ("-1", 16, &row, "FP32", &[0; 16], "no number of bytes"),
    ] {
        let (status, text) = refuses(json_length, size, shape, datatype, bytes);
        assert_eq!(status, 400, "{text}");
        assert!(text.contains(told), "{text} has no `{told}`");
    }
}

#[test]
fn too_many_inputs_and_outputs_are_refused_before_they_are_all_read() {
    let bounded = Bounded::start();
    let many = |one: &str, count: usize| vec![one; count].join(",");
    let input = r#"{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}"#;
    let text = "a list is longer than the 1024 that any model has";
    for body in [
        format!(r#"{{"inputs":[{}]}}"#, many(input, 60_000)),
        // Eleven bytes each, and many times as many in memory.
        format!(r#"{{"inputs":[{input}],"outputs":[{}]}}"#, many(r#"{"name":""}"#, 340_000)),
        format!(
            r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[{}]}}]}}"#,
            many("1", 1_000_000)
        ),
    ] {
        let (status, told) = bounded.refuses("", body.as_bytes());
        assert_eq!(status, 400, "{told}");
        assert!(told.contains(text), "{told}");
    }
    let body = format!(r#"{{"inputs":[{}]}}"#, many(input, 2));
    assert_eq!(bounded.refuses("", body.as_bytes()).1, "input `x` is given twice; it takes x");
    let request = ModelInferRequest {
        model_name: "mlp".to_owned(),
        inputs: vec![Default::default(); 100_000],
        ..ModelInferRequest::default()
    };
    let channel = Channel::open(bounded.server.grpc);
    let failed = channel.call::<ModelInferResponse>("ModelInfer", &[], &request).unwrap_err();
    assert_eq!(failed.code, INVALID_ARGUMENT);
    assert!(failed.text.contains("more inputs than the 1024"), "{}", failed.text);
    bounded.holds();
}
