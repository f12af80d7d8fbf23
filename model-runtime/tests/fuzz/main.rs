//! Damaged requests over each protocol (see `fuzz/bounded.rs`).

#[path = "../../../fuzz/bounded.rs"]
mod bounded;
mod targets;

use std::path::Path;

fn check(kind: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    bounded::check(&corpus, target);
}

#[test]
fn bodies_of_json() {
    check("http", targets::http);
}

#[test]
fn bodies_with_tensors_as_bytes() {
    check("binary", targets::binary);
}

#[test]
fn messages_of_grpc() {
    check("grpc", targets::grpc);
}
