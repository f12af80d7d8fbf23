//! Sources behind TLS: whom the optimiser believes.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use plimsoll_optimizer::failure::FailureReason;
use plimsoll_optimizer::progress::Console;
use plimsoll_optimizer::source::{self, Limits};
use plimsoll_package::digest::Digest;
use plimsoll_package::registry::Credentials;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::crypto::ring::default_provider;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// Serves `body` at whatever path with a certificate of a root of its own; gives its address and the root, in PEM.
fn serve(body: &'static str) -> (String, String) {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &root).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key.serialize_der().try_into().unwrap())
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = StreamOwned::new(connection, stream.unwrap());
            // Who does not believe the certificate ends the handshake.
            if stream.read(&mut [0; 4096]).is_ok() {
                let _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        }
    });
    (address, root.pem())
}

async fn fetch(uri: &str, extra_ca: Option<&Path>, destination: &Path) -> Result<Digest, (FailureReason, String)> {
    let limits = Limits {
        size_max: 1000,
        plain_http_hosts: vec![],
        extra_ca: extra_ca.map(Path::to_owned),
        claims: "/nowhere".into(),
        retries: 0,
    };
    let progress = Console::silent().activity("", "bytes");
    let fetched = source::fetch("model", uri, Credentials::Anonymous, &limits, destination, progress).await;
    fetched
        .map(|content| content.digest)
        .map_err(|failure| (failure.reason, failure.message))
}

#[tokio::test]
async fn a_certificate_of_a_given_root_is_believed_and_a_strangers_is_not() {
    let (address, root) = serve("model");
    let dir = tempfile::tempdir().unwrap();
    let (file, roots) = (dir.path().join("model"), dir.path().join("ca.crt"));
    std::fs::write(&roots, root).unwrap();
    let uri = format!("{address}/model.onnx");
    let (_, message) = fetch(&uri, None, &file).await.unwrap_err();
    assert!(message.contains("certificate"), "{message}");
    assert_eq!(fetch(&uri, Some(&roots), &file).await.unwrap(), Digest::of(b"model"));
    assert_eq!(std::fs::read(&file).unwrap(), b"model");
}
