//! A package's way to a real CNCF Distribution registry and back.

mod proxy;
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use oci_client::client::{ClientConfig, ClientProtocol, Config, ImageLayer};
use oci_client::secrets::RegistryAuth;
use plimsoll_package::digest::Digest;
use plimsoll_package::manifest::Engine;
use plimsoll_package::registry::{Access, Credentials, Problem, Progress, Registry};
use plimsoll_package::report::Summary;
use proxy::Proxy;
use server::Server;

fn client(server: &Server) -> Registry {
    Registry::new(Access {
        plain_http_hosts: vec![server.host()],
        ..Access::default()
    })
    .unwrap()
}

fn summary() -> Summary {
    Summary {
        artifact: None,
        reused: false,
        source_digest: Digest::of(b"source"),
        evaluation_digest: None,
        size_before: 4_000_000,
        size_after: 1_000_000,
        size_layer_before: None,
        size_layer_after: None,
        sparsity: 0.5,
        metric: None,
        fidelity: Some(0.999),
        latency: None,
        engine: Engine::Tract,
        toolchain: "0.1.0".into(),
    }
}

fn package() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    // Larger than a piece of the stream, not a multiple of a tar block, and such that compression does not pay.
    let mut state = 1_u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let bytes: Vec<u8> = (0..3_000_001).map(|_| random()).collect();
    fs::write(dir.path().join("model.onnx"), bytes).unwrap();
    fs::write(dir.path().join("manifest.json"), "{}").unwrap();
    fs::write(dir.path().join("probe.json"), "[]").unwrap();
    dir
}

async fn push(registry: &Registry, dir: &Path, repository: &str) -> Digest {
    let annotations = BTreeMap::from([("org.opencontainers.image.title".to_owned(), "digits".to_owned())]);
    registry
        .push(dir, repository, &["opt-1", "run-1"], &annotations, &summary())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_package_is_found_by_its_tag_and_comes_back_as_it_was() {
    let server = Server::start();
    let (registry, package) = (client(&server), package());
    let repository = format!("{}/models/digits", server.host());
    assert_eq!(registry.lookup(&format!("{repository}:opt-1")).await.unwrap(), None);

    let digest = push(&registry, package.path(), &repository).await;
    let found = registry.lookup(&format!("{repository}:opt-1")).await.unwrap().unwrap();
    assert_eq!(found.digest, digest);
    assert_eq!(
        found.summary,
        Some(Summary {
            artifact: Some(digest.clone()),
            ..summary()
        })
    );

    registry.tag(&repository, &digest, "run-2").await.unwrap();
    for tag in ["run-1", "run-2"] {
        assert_eq!(
            registry.lookup(&format!("{repository}:{tag}")).await.unwrap().unwrap().digest,
            digest
        );
    }

    for reference in [format!("{repository}:opt-1"), format!("{repository}@{digest}")] {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        assert_eq!(registry.pull(&reference, &target).await.unwrap(), digest);
        let mut names: Vec<_> = fs::read_dir(&target)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["manifest.json", "model.onnx", "probe.json"]);
        for name in names {
            assert_eq!(
                fs::read(target.join(&name)).unwrap(),
                fs::read(package.path().join(&name)).unwrap(),
                "{name}"
            );
        }
    }
}

#[tokio::test]
async fn the_same_package_gives_the_same_digest_and_is_not_sent_twice() {
    let server = Server::start();
    let registry = client(&server);
    let repository = format!("{}/models/digits", server.host());
    let first = push(&registry, package().path(), &repository).await;
    let sent = server.bytes_received();
    let again = package();
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    fs::File::options()
        .write(true)
        .open(again.path().join("model.onnx"))
        .unwrap()
        .set_modified(old)
        .unwrap();
    assert_eq!(push(&registry, again.path(), &repository).await, first);
    assert_eq!(server.bytes_received(), sent, "a blob was uploaded again");
}

#[tokio::test]
async fn a_corrupted_layer_is_noticed_and_leaves_no_file() {
    let server = Server::start();
    let registry = client(&server);
    let repository = format!("{}/models/digits", server.host());
    push(&registry, package().path(), &repository).await;
    server.corrupt_blobs_larger_than(1_000_000);
    let dir = tempfile::tempdir().unwrap();
    let error = registry.pull(&format!("{repository}:opt-1"), dir.path()).await.unwrap_err();
    assert_eq!(error.problem, Problem::DigestMismatch, "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn each_way_of_not_getting_an_artifact_has_its_own_name() {
    let server = Server::start_with_password("user", "pass");
    let reference = format!("{}/models/digits:v1", server.host());
    let dir = tempfile::tempdir().unwrap();
    let access = |credentials| Access {
        credentials,
        plain_http_hosts: vec![server.host()],
        ..Access::default()
    };
    let user = |password: &str| Credentials::Basic {
        username: "user".into(),
        password: password.into(),
    };

    for credentials in [Credentials::Anonymous, user("wrong")] {
        let refused = Registry::new(access(credentials)).unwrap().lookup(&reference).await.unwrap_err();
        assert_eq!(refused.problem, Problem::Refused, "{refused}");
        assert!(!refused.is_transient());
    }
    let known = Registry::new(access(user("pass"))).unwrap();
    assert_eq!(known.lookup(&reference).await.unwrap(), None);
    assert_eq!(known.pull(&reference, dir.path()).await.unwrap_err().problem, Problem::NotFound);
    push(&known, package().path(), &format!("{}/models/digits", server.host())).await;

    let tls = Registry::new(Access::default()).unwrap().lookup(&reference).await.unwrap_err();
    assert_eq!(tls.problem, Problem::Unreachable);
    assert!(tls.message.contains("name it among the plain-HTTP hosts"), "{tls}");

    drop(server);
    let gone = known.lookup(&reference).await.unwrap_err();
    assert_eq!(gone.problem, Problem::Unreachable, "{gone}");
    assert!(gone.is_transient());
}

/// Pushes an artifact as other tools do.
async fn push_foreign(server: &Server, tag: &str, layers: Vec<ImageLayer>) -> String {
    let protocol = ClientProtocol::HttpsExcept(vec![server.host()]);
    let client = oci_client::Client::new(ClientConfig {
        protocol,
        ..ClientConfig::default()
    });
    let reference = format!("{}/foreign:{tag}", server.host());
    let config = Config::oci_v1(b"{}".to_vec(), None);
    client
        .push(&reference.parse().unwrap(), &layers, config, &RegistryAuth::Anonymous, None)
        .await
        .unwrap();
    reference
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_TAR_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

#[tokio::test]
async fn a_model_is_found_in_whatever_form_other_tools_push_it() {
    let server = Server::start();
    let registry = client(&server);
    let titled = |title: &str, bytes: &[u8]| {
        let annotations = BTreeMap::from([("org.opencontainers.image.title".to_owned(), title.to_owned())]);
        // ORAS's own default for a plain file is the media type of a tar archive.
        ImageLayer::new(bytes.to_vec(), TAR.into(), Some(annotations))
    };
    let layer = |media_type: &str, bytes: Vec<u8>| ImageLayer::new(bytes, media_type.into(), None);
    let forms = [
        ("oras", "m.onnx", vec![titled("m.onnx", b"model")]),
        (
            "oras-readme",
            "m.onnx",
            vec![titled("README.md", b"read"), titled("m.onnx", b"model")],
        ),
        ("tar", "some/m.onnx", vec![layer(TAR, tar(&[("some/m.onnx", b"model")]))]),
        (
            "tar-readme",
            "m.onnx",
            vec![layer(TAR, tar(&[("README", b"read"), ("m.onnx", b"model"), ("z", b"")]))],
        ),
        ("tar-noname", "weights", vec![layer(TAR, tar(&[("weights", b"model")]))]),
        (
            "docker",
            "m.onnx",
            vec![layer(DOCKER_TAR_GZIP, gzip(&tar(&[("m.onnx", b"model")])))],
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("fetched");
    for (tag, name, layers) in forms {
        let reference = push_foreign(&server, tag, layers).await;
        let fetched = registry
            .fetch_artifact(&reference, None, false, &target, 1000, &Progress::default())
            .await
            .unwrap();
        assert_eq!((fetched.name.as_str(), fetched.size), (name, 5), "{tag}");
        assert_eq!(
            (fetched.digest, fs::read(&target).unwrap().as_slice()),
            (Digest::of(b"model"), b"model".as_slice()),
            "{tag}"
        );
    }

    let refused = [
        (
            "two",
            Problem::Invalid,
            "several models",
            vec![layer(TAR, tar(&[("a.onnx", b"a"), ("b.onnx", b"b")]))],
        ),
        ("none", Problem::Invalid, "no file", vec![layer(TAR, tar(&[]))]),
        (
            "nameless",
            Problem::Invalid,
            "none ends in .onnx",
            vec![layer(TAR, tar(&[("a", b"a"), ("b", b"b")]))],
        ),
        (
            "titles",
            Problem::Invalid,
            "several files (a, b)",
            vec![titled("a", b"a"), titled("b", b"b")],
        ),
        ("large", Problem::TooLarge, "limit", vec![titled("m.onnx", &[0; 1001])]),
        (
            "bomb",
            Problem::TooLarge,
            "more than the limit",
            vec![layer(DOCKER_TAR_GZIP, gzip(&tar(&[("m.onnx", &[0; 100_000])])))],
        ),
        (
            "zstd",
            Problem::Invalid,
            "zstd",
            vec![layer("application/vnd.oci.image.layer.v1.tar+zstd", vec![1])],
        ),
        (
            "broken",
            Problem::Invalid,
            "",
            vec![layer(DOCKER_TAR_GZIP, b"not gzip at all".to_vec())],
        ),
    ];
    for (tag, problem, words, layers) in refused {
        let reference = push_foreign(&server, tag, layers).await;
        let error = registry
            .fetch_artifact(&reference, None, false, &target, 1000, &Progress::default())
            .await
            .unwrap_err();
        assert_eq!(error.problem, problem, "{tag}: {error}");
        assert!(error.message.contains(words), "{tag}: {error}");
    }
}

#[tokio::test]
async fn companions_come_with_the_model_that_they_lie_beside() {
    let server = Server::start();
    let registry = client(&server);
    let layer = |media_type: &str, bytes: Vec<u8>| ImageLayer::new(bytes, media_type.into(), None);
    let forms = [
        (
            "oras",
            vec![
                titled("onnx/m.onnx", b"model"),
                titled("tokenizer.json", b"tokens"),
                titled("1_Pooling/config.json", b"pooling"),
                titled("README.md", b"read"),
            ],
        ),
        (
            "tar",
            vec![
                layer(TAR, tar(&[("m/tokenizer.json", b"older"), ("other/config.json", b"another's")])),
                layer(
                    TAR,
                    tar(&[
                        ("m/1_Pooling/config.json", b"pooling"),
                        ("m/tokenizer.json", b"tokens"),
                        ("m/m.onnx", b"model"),
                    ]),
                ),
            ],
        ),
    ];
    for (tag, layers) in forms {
        let reference = push_foreign(&server, tag, layers).await;
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("content");
        let fetched = registry
            .fetch_artifact(&reference, None, true, &target, 1000, &Progress::default())
            .await
            .unwrap();
        assert_eq!(fetched.companions, ["1_Pooling/config.json", "tokenizer.json"], "{tag}");
        let read = |path: &str| fs::read_to_string(dir.path().join(path)).unwrap();
        assert_eq!(
            (read("content"), read("tokenizer.json"), read("1_Pooling/config.json")),
            ("model".into(), "tokens".into(), "pooling".into())
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "{tag}");
    }
}

#[tokio::test]
async fn a_package_serves_as_a_source_again() {
    let server = Server::start();
    let (registry, package) = (client(&server), package());
    let repository = format!("{}/models/digits", server.host());
    push(&registry, package.path(), &repository).await;
    let target = package.path().join("again");
    let fetched = registry
        .fetch_artifact(
            &format!("{repository}:opt-1"),
            None,
            false,
            &target,
            10_000_000,
            &Progress::default(),
        )
        .await
        .unwrap();
    assert_eq!((fetched.name.as_str(), fetched.size), ("model/model.onnx", 3_000_001));
}

/// What comes over more connections than one try would take, in a package of 3 MB.
const CUTS: [u64; 4] = [500_000, 900_000, 300_000, 1_000];

fn client_through(proxy: &Proxy, retries: usize) -> Registry {
    let access = Access {
        plain_http_hosts: vec![proxy.host()],
        ..Access::default()
    };
    Registry::new(access).unwrap().with_retries(retries)
}

#[tokio::test]
async fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    let server = Server::start();
    let package = package();
    push(&client(&server), package.path(), &format!("{}/models/digits", server.host())).await;
    let dir = tempfile::tempdir().unwrap();

    let proxy = Proxy::start(&server.host(), &CUTS, true);
    let registry = client_through(&proxy, 1);
    registry
        .pull(&format!("{}/models/digits:opt-1", proxy.host()), dir.path())
        .await
        .unwrap();
    assert_eq!(
        fs::read(dir.path().join("model.onnx")).unwrap(),
        fs::read(package.path().join("model.onnx")).unwrap()
    );
    assert_eq!(proxy.ranged(), CUTS.len());
    assert!(
        proxy.answered() < 3_200_000,
        "{} bytes for 3 MB: something came twice",
        proxy.answered()
    );

    let proxy = Proxy::start(&server.host(), &CUTS, true);
    let file = dir.path().join("fetched");
    let reference = format!("{}/models/digits:opt-1", proxy.host());
    let fetched = client_through(&proxy, 1)
        .fetch_artifact(&reference, None, false, &file, 4_000_000, &Progress::default())
        .await
        .unwrap();
    assert_eq!(fetched.digest, Digest::of(&fs::read(package.path().join("model.onnx")).unwrap()));
    assert_eq!(proxy.ranged(), CUTS.len());
}

#[tokio::test]
async fn a_registry_without_ranges_sends_all_again_and_nothing_is_taken_twice() {
    let server = Server::start();
    let package = package();
    push(&client(&server), package.path(), &format!("{}/models/digits", server.host())).await;
    let dir = tempfile::tempdir().unwrap();
    let proxy = Proxy::start(&server.host(), &[500_000, 900_000], false);
    client_through(&proxy, 1)
        .pull(&format!("{}/models/digits:opt-1", proxy.host()), dir.path())
        .await
        .unwrap();
    assert_eq!(
        fs::read(dir.path().join("model.onnx")).unwrap(),
        fs::read(package.path().join("model.onnx")).unwrap()
    );
    assert_eq!(proxy.ranged(), 2);
}

#[tokio::test]
async fn without_retries_a_transfer_that_breaks_off_is_given_up() {
    let server = Server::start();
    push(&client(&server), package().path(), &format!("{}/models/digits", server.host())).await;
    let dir = tempfile::tempdir().unwrap();
    let proxy = Proxy::start(&server.host(), &[500_000], true);
    let failed = client_through(&proxy, 0)
        .pull(&format!("{}/models/digits:opt-1", proxy.host()), dir.path())
        .await
        .unwrap_err();
    assert_eq!(failed.problem, Problem::Unreachable, "{failed}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left of it");
}
