use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::channel::proto::{ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse};
use crate::channel::{Channel, UNAUTHENTICATED};
use crate::client::Connection;
use crate::process::{Server, failure, model};

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn issuer() -> Issuer {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate for that name, and its key.
fn issue(issuer: &Issuer, name: &str) -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    (params.signed_by(&key, issuer).unwrap(), key)
}

fn write(dir: &Path, certificate: &rcgen::Certificate, key: &KeyPair) {
    std::fs::write(dir.join("tls.crt"), certificate.pem()).unwrap();
    std::fs::write(dir.join("tls.key"), key.serialize_pem()).unwrap();
}

/// What the server answers to `GET /v2/health/live` of a client that trusts `root` and shows `identity`.
fn ask(server: &Server, root: &Issuer, name: &str, identity: Option<&(rcgen::Certificate, KeyPair)>) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(root.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = builder.with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            let chain = vec![CertificateDer::from(certificate.der().to_vec())];
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    let connection = ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(connection, TcpStream::connect(server.http)?);
    stream.write_all(b"GET /v2/health/live HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn serve(dir: &Path, more: &[&str]) -> Server {
    let (certificate, key) = (dir.join("tls.crt"), dir.join("tls.key"));
    let arguments = [
        "--engine",
        "tract",
        "--tls-certificate",
        certificate.to_str().unwrap(),
        "--tls-key",
        key.to_str().unwrap(),
    ];
    Server::ready(&model("mlp"), &[&arguments, more].concat())
}

#[test]
fn a_renewed_certificate_is_served_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = issuer();
    let (certificate, key) = issue(&issuer, "first.test");
    write(dir.path(), &certificate, &key);
    let server = serve(dir.path(), &[]);
    assert!(ask(&server, &issuer, "first.test", None).unwrap().contains("{\"live\":true}"));
    assert!(ask(&server, &issuer, "second.test", None).is_err());
    let (certificate, key) = issue(&issuer, "second.test");
    write(dir.path(), &certificate, &key);
    let renewed = (0..200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        ask(&server, &issuer, "second.test", None).is_ok()
    });
    assert!(renewed);
}

#[test]
fn clients_without_a_certificate_of_the_roots_are_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, others) = (issuer(), issuer());
    let (certificate, key) = issue(&ours, "server.test");
    write(dir.path(), &certificate, &key);
    let roots = dir.path().join("roots.pem");
    std::fs::write(&roots, ours.pem()).unwrap();
    let server = serve(dir.path(), &["--tls-client-roots", roots.to_str().unwrap()]);
    let known = issue(&ours, "client.test");
    assert!(
        ask(&server, &ours, "server.test", Some(&known))
            .unwrap()
            .starts_with("HTTP/1.1 200")
    );
    assert!(ask(&server, &ours, "server.test", None).is_err());
    assert!(ask(&server, &ours, "server.test", Some(&issue(&others, "client.test"))).is_err());
}

#[test]
fn a_certificate_that_cannot_be_read_stops_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.crt");
    let path = path.to_str().unwrap();
    let (code, reason) = failure(&mut crate::process::command(
        &model("mlp"),
        &["--tls-certificate", path, "--tls-key", path],
    ));
    assert_eq!(code, Some(1));
    assert!(reason.starts_with(path), "{reason}");
}

#[test]
fn a_token_is_asked_for_by_all_but_probes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens");
    std::fs::write(&path, "secret\n").unwrap();
    let server = Server::ready(&model("mlp"), &["--engine", "tract", "--token-file", path.to_str().unwrap()]);
    let status = |path: &str, headers: &str| {
        let answer = Connection::open(server.http).unwrap().send("GET", path, headers, "").unwrap();
        (answer.status, answer.header("www-authenticate").map(str::to_owned))
    };
    assert_eq!(status("/v2/health/ready", "").0, 200);
    assert_eq!(status("/v2/models/mlp/ready", "").0, 200);
    assert_eq!(status("/v2/models/mlp", ""), (401, Some("Bearer".to_owned())));
    assert_eq!(status("/metrics", "authorization: Bearer wrong\r\n").0, 401);
    assert_eq!(status("/v2/models/mlp", "authorization: Bearer secret\r\n").0, 200);
}

#[test]
fn a_token_is_asked_for_over_grpc_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens");
    std::fs::write(&path, "secret\n").unwrap();
    let server = Server::ready(&model("mlp"), &["--engine", "tract", "--token-file", path.to_str().unwrap()]);
    let channel = Channel::open(server.grpc);
    let ask = |headers: &[(&str, &str)]| channel.call::<ServerMetadataResponse>("ServerMetadata", headers, &ServerMetadataRequest {});
    assert!(
        channel
            .call::<ServerReadyResponse>("ServerReady", &[], &ServerReadyRequest {})
            .unwrap()
            .ready
    );
    assert_eq!(ask(&[]).unwrap_err().code, UNAUTHENTICATED);
    assert_eq!(
        ask(&[("authorization", "Bearer wrong")]).unwrap_err().text,
        "this token is not known"
    );
    assert_eq!(ask(&[("authorization", "Bearer secret")]).unwrap().name, "plimsoll-runtime");
}
