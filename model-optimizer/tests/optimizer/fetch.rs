//! Downloads from a server that breaks off, lies, refuses and sends too much.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use axum::routing::get;
use plimsoll_optimizer::failure::{Failure, FailureReason};
use plimsoll_optimizer::progress::Console;
use plimsoll_optimizer::source::{self, Content, Limits};
use plimsoll_package::digest::Digest;
use plimsoll_package::manifest::Engine;
use plimsoll_package::registry::{Access, Credentials, Registry};
use plimsoll_package::report::Summary;

use super::proxy::Proxy;
use super::server::Server;

const LENGTH: usize = 1_000_000;

fn content() -> Vec<u8> {
    (0..LENGTH).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[derive(Default)]
struct Requests {
    all: AtomicUsize,
    ranged: AtomicUsize,
}

/// `/file`: also from where a range begins. `/changes`: another file the second time.
async fn serve(State(requests): State<Arc<Requests>>, UrlPath(path): UrlPath<String>, headers: HeaderMap) -> Response<Body> {
    let number = requests.all.fetch_add(1, Ordering::SeqCst);
    let start = headers.get(header::RANGE).and_then(|range| {
        range
            .to_str()
            .ok()?
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let answer = Response::builder();
    let (first, last) = path.split_once('/').unwrap_or((&path, ""));
    match first {
        "file" => {
            let (start, status) = match start {
                Some(start) if headers.get(header::IF_RANGE).is_some_and(|tag| tag == "\"v1\"") => {
                    requests.ranged.fetch_add(1, Ordering::SeqCst);
                    (start, StatusCode::PARTIAL_CONTENT)
                }
                _ => (0, StatusCode::OK),
            };
            answer
                .status(status)
                .header(header::ETAG, "\"v1\"")
                .header(header::CONTENT_RANGE, format!("bytes {start}-{}/{LENGTH}", LENGTH - 1))
                .header(header::CONTENT_LENGTH, LENGTH - start)
                .body(content().split_off(start).into())
        }
        "changes" => {
            let mut bytes = content();
            if number == 0 {
                bytes.fill(1);
            }
            let tag = if number == 0 { "\"old\"" } else { "\"new\"" };
            answer
                .header(header::ETAG, tag)
                .header(header::CONTENT_LENGTH, LENGTH)
                .body(bytes.into())
        }
        "endless" => answer.body(endless()),
        "announced" => answer.header(header::CONTENT_LENGTH, 5_000_000_000_u64).body(endless()),
        "status" => answer.status(last.parse::<u16>().unwrap()).body(Body::empty()),
        "secret" => {
            let known = headers.get(header::AUTHORIZATION).is_some_and(|value| value == "Bearer t0k");
            answer.status(if known { 200 } else { 403 }).body(Body::from("secret"))
        }
        _ => answer.status(404).body(Body::empty()),
    }
    .unwrap()
}

fn endless() -> Body {
    let pieces = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![0; 64 << 10])));
    Body::from_stream(pieces)
}

/// The server's `127.0.0.1:PORT`, and what it was asked.
async fn start() -> (String, Arc<Requests>) {
    let requests = Arc::new(Requests::default());
    let router = Router::new().route("/{*path}", get(serve)).with_state(Arc::clone(&requests));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (host, requests)
}

fn limits() -> Limits {
    Limits {
        size_max: 2_000_000,
        plain_http_hosts: vec!["127.0.0.1".into()],
        extra_ca: None,
        claims: "/nowhere".into(),
        retries: 1,
    }
}

async fn fetch(uri: &str, limits: &Limits, credentials: Credentials, destination: &Path) -> Result<Content, Failure> {
    source::fetch(
        "model",
        uri,
        credentials,
        limits,
        destination,
        Console::silent().activity("", "bytes"),
    )
    .await
}

#[tokio::test]
async fn a_download_that_breaks_off_goes_on_where_it_was() {
    let (host, requests) = start().await;
    let proxy = Proxy::start(&host, &[300_000; 3], true);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model");
    // More breaks than retries: each attempt gets somewhere.
    let uri = format!("http://{}/file", proxy.host());
    let fetched = fetch(&uri, &limits(), Credentials::Anonymous, &file).await.unwrap();
    assert_eq!(
        fetched,
        Content {
            digest: Digest::of(&content()),
            size: LENGTH as u64
        }
    );
    assert_eq!(std::fs::read(&file).unwrap(), content());
    assert_eq!(
        (requests.all.load(Ordering::SeqCst), requests.ranged.load(Ordering::SeqCst)),
        (4, 3)
    );
}

#[tokio::test]
async fn an_artifact_whose_transfer_breaks_off_goes_on_where_it_was() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.onnx"), noise()).unwrap();
    let access = Access {
        plain_http_hosts: vec![server.host()],
        ..Access::default()
    };
    let summary = Summary {
        artifact: None,
        reused: false,
        source_digest: Digest::of(b"source"),
        evaluation_digest: None,
        size_before: 1,
        size_after: 1,
        size_layer_before: None,
        size_layer_after: None,
        sparsity: 0.0,
        metric: None,
        fidelity: None,
        latency: None,
        engine: Engine::Tract,
        toolchain: "0.1.0".into(),
    };
    let repository = format!("{}/models", server.host());
    let registry = Registry::new(access).unwrap();
    registry
        .push(dir.path(), &repository, &["v1"], &Default::default(), &summary)
        .await
        .unwrap();

    // More breaks than retries: each attempt gets somewhere.
    let proxy = Proxy::start(&server.host(), &[300_000, 200_000, 100_000], true);
    let file = dir.path().join("fetched");
    let uri = format!("oci://{}/models:v1", proxy.host());
    let fetched = fetch(&uri, &limits(), Credentials::Anonymous, &file).await.unwrap();
    assert_eq!(
        fetched,
        Content {
            digest: Digest::of(&noise()),
            size: LENGTH as u64
        }
    );
    assert_eq!(std::fs::read(&file).unwrap(), noise());
    assert_eq!(proxy.ranged(), 3);
}

/// Bytes that do not compress, so that they are sent as they are (a linear congruential generator).
fn noise() -> Vec<u8> {
    let mut state = 1_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..LENGTH).map(next).collect()
}

#[tokio::test]
async fn a_file_that_changed_meanwhile_is_fetched_from_its_beginning() {
    let (host, requests) = start().await;
    let proxy = Proxy::start(&host, &[LENGTH as u64 / 2], true);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model");
    let uri = format!("http://{}/changes", proxy.host());
    let fetched = fetch(&uri, &limits(), Credentials::Anonymous, &file).await.unwrap();
    assert_eq!((requests.all.load(Ordering::SeqCst), proxy.ranged()), (2, 1));
    assert_eq!(fetched.digest, Digest::of(&content()));
    assert_eq!(std::fs::read(&file).unwrap(), content());
}

#[tokio::test]
async fn what_is_too_large_is_refused_at_once_or_when_it_has_come_that_far() {
    let (host, requests) = start().await;
    let dir = tempfile::tempdir().unwrap();
    for path in ["announced", "endless"] {
        let failed = fetch(
            &format!("http://{host}/{path}"),
            &limits(),
            Credentials::Anonymous,
            &dir.path().join("model"),
        )
        .await
        .unwrap_err();
        assert_eq!(failed.reason, FailureReason::SourceTooLarge, "{failed}");
        assert!(failed.message.contains("the limit is 2000000 bytes"), "{failed}");
        assert!(std::fs::metadata(dir.path().join("model")).unwrap().len() <= 2_000_000);
    }
    assert_eq!(requests.all.load(Ordering::SeqCst), 2, "nothing final is tried again");
}

#[tokio::test]
async fn each_refusal_says_whether_it_may_pass_and_what_to_do() {
    let (host, _) = start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model");
    for (status, reason, words) in [
        (404, FailureReason::SourceRefused, "check the address"),
        (401, FailureReason::SourceRefused, "credentialsSecret"),
        (403, FailureReason::SourceRefused, "credentialsSecret"),
        (503, FailureReason::SourceUnreachable, "503"),
    ] {
        let failed = fetch(&format!("http://{host}/status/{status}"), &limits(), Credentials::Anonymous, &file)
            .await
            .unwrap_err();
        assert_eq!(failed.reason, reason, "{status}: {failed}");
        assert!(failed.message.contains(words), "{status}: {failed}");
    }
    let closed = fetch("http://127.0.0.1:9/model", &limits(), Credentials::Anonymous, &file)
        .await
        .unwrap_err();
    assert_eq!(closed.reason, FailureReason::SourceUnreachable);

    let token = Credentials::Token("t0k".into());
    assert_eq!(
        fetch(&format!("http://{host}/secret"), &limits(), token, &file)
            .await
            .unwrap()
            .digest,
        Digest::of(b"secret")
    );
}

#[tokio::test]
async fn plain_http_goes_only_where_it_is_allowed() {
    let (host, requests) = start().await;
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        plain_http_hosts: vec!["other.example".into()],
        ..limits()
    };
    let failed = fetch(
        &format!("http://{host}/file"),
        &limits,
        Credentials::Anonymous,
        &dir.path().join("model"),
    )
    .await
    .unwrap_err();
    assert_eq!(failed.reason, FailureReason::SourceRefused);
    assert!(failed.message.contains("plainHttpHosts"), "{failed}");
    assert_eq!(requests.all.load(Ordering::SeqCst), 0);
    let failed = fetch("s3://bucket/model", &limits, Credentials::Anonymous, &dir.path().join("model"))
        .await
        .unwrap_err();
    assert_eq!(failed.reason, FailureReason::Unsupported, "{failed}");
}

#[tokio::test]
async fn a_claim_gives_its_files_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let claims = dir.path().join("pvc");
    std::fs::create_dir_all(claims.join("data/sub")).unwrap();
    std::fs::write(claims.join("data/sub/model"), "model").unwrap();
    std::fs::write(dir.path().join("outside"), "secret").unwrap();
    std::os::unix::fs::symlink(dir.path().join("outside"), claims.join("data/leak")).unwrap();
    std::os::unix::fs::symlink("sub/model", claims.join("data/latest")).unwrap();
    let limits = Limits { claims, ..limits() };
    let target = dir.path().join("fetched");
    for uri in ["pvc://data/sub/model", "pvc://data/latest"] {
        assert_eq!(
            fetch(uri, &limits, Credentials::Anonymous, &target).await.unwrap().digest,
            Digest::of(b"model"),
            "{uri}"
        );
    }
    for (uri, reason) in [
        ("pvc://data/leak", FailureReason::SourceRefused),
        ("pvc://data/missing", FailureReason::SourceRefused),
        ("pvc://data/sub", FailureReason::SourceRefused),
        ("pvc://data/../../outside", FailureReason::InvalidInputs),
        ("pvc://data", FailureReason::InvalidInputs),
    ] {
        assert_eq!(
            fetch(uri, &limits, Credentials::Anonymous, &target).await.unwrap_err().reason,
            reason,
            "{uri}"
        );
    }
}
