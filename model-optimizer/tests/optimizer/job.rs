//! The whole Job, from a source to a real registry.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Instant;

use plimsoll_package::manifest::Manifest;
use plimsoll_package::recipe::{Budget, Dataset, Evaluation, Inputs, ModelFormat, Optimization, Quantize, QuantizeScheme, Technique};
use plimsoll_package::registry::{Access, Registry};
use plimsoll_package::report::{FailureReason, Summary, Termination, exit_code};

use super::chain::{STEPS, message, start};
use super::server::Server;
use super::{inputs, model};

fn digits(repository: &str) -> Inputs {
    let uri = model("digits/digits-heldout.npz").to_str().unwrap().to_owned();
    Inputs {
        optimize: Optimization {
            recipe: vec![Technique {
                quantize: Some(Quantize::of(QuantizeScheme::Int8Dynamic)),
                ..Technique::default()
            }],
            evaluation: Some(Evaluation {
                dataset: Dataset {
                    uri,
                    digest: None,
                    credentials_secret: None,
                },
                metric: None,
                labels: None,
            }),
            budget: Some(Budget {
                max_accuracy_drop: Some("1%".parse().unwrap()),
                ..Budget::default()
            }),
            ..Optimization::default()
        },
        run_tag: Some("run-1".into()),
        ..inputs(model("digits/digits-v1.onnx").to_str().unwrap(), repository)
    }
}

fn run(dir: &Path, inputs: &Inputs) -> Vec<u8> {
    let mut children: Vec<Child> = STEPS.iter().map(|step| start(step, dir, inputs)).collect();
    children
        .iter_mut()
        .map(|child| child.wait().unwrap().code().unwrap() as u8)
        .collect()
}

fn succeeded(step: &str, dir: &Path) -> Summary {
    let log = || {
        STEPS
            .map(|step| fs::read_to_string(dir.join(format!("{step}.log"))).unwrap())
            .concat()
    };
    match message(step, dir) {
        Some(Termination::Succeeded(summary)) => *summary,
        other => panic!("{other:?}\n{}", log()),
    }
}

fn registry(server: &Server) -> Registry {
    Registry::new(Access {
        plain_http_hosts: vec![server.host()],
        ..Access::default()
    })
    .unwrap()
}

#[tokio::test]
async fn a_job_publishes_what_it_measured_and_a_second_one_reuses_it() {
    let server = Server::start();
    let repository = format!("{}/models", server.host());
    let dir = tempfile::tempdir().unwrap();
    let inputs = digits(&repository);
    let begun = Instant::now();
    assert_eq!(
        run(dir.path(), &inputs),
        [exit_code::DONE; 5],
        "{:?}",
        STEPS.map(|step| message(step, dir.path()))
    );
    println!("the whole job took {:?}", begun.elapsed());
    let summary = succeeded("publish", dir.path());
    let said = fs::metadata(dir.path().join("publish.message")).unwrap().len();
    assert!(
        said <= 4096,
        "Kubernetes cuts a termination message off after 4 KiB; this one has {said} bytes"
    );
    let log = STEPS
        .map(|step| fs::read_to_string(dir.path().join(format!("{step}.log"))).unwrap())
        .concat();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let is_whole = |line: &serde_json::Value| {
        line["time"].is_string() && line["level"].is_string() && line["step"].as_str().is_some_and(|step| STEPS.contains(&step))
    };
    assert!(lines.iter().all(is_whole), "{log}");
    assert!(
        lines
            .iter()
            .any(|line| line["done"].is_u64() && line["total"].is_u64() && line["unit"].is_string()),
        "no progress in\n{log}"
    );
    assert!(summary.size_before as f64 / summary.size_after as f64 >= 3.5, "{summary:?}");
    let metric = summary.metric.unwrap();
    assert!(metric.before - metric.after <= 0.01 && metric.samples == 450, "{metric:?}");
    assert!(
        STEPS[..4].iter().all(|step| message(step, dir.path()).is_none()),
        "only the last step has a result"
    );

    let artifact = summary.artifact.clone().unwrap();
    let found = registry(&server).lookup(&format!("{repository}:run-1")).await.unwrap().unwrap();
    assert_eq!((&found.digest, found.summary.as_ref()), (&artifact, Some(&summary)));
    let pulled = dir.path().join("pulled");
    registry(&server).pull(&format!("{repository}@{artifact}"), &pulled).await.unwrap();
    let manifest = Manifest::read(&pulled).unwrap();
    manifest.verify(&pulled).unwrap();
    assert_eq!(manifest.files["model.onnx"].size, summary.size_after);

    let again = tempfile::tempdir().unwrap();
    let inputs = Inputs {
        run_tag: Some("run-2".into()),
        ..inputs
    };
    assert_eq!(run(again.path(), &inputs), [exit_code::DONE; 5]);
    assert_eq!(succeeded("fetch", again.path()), Summary { reused: true, ..summary });
    assert!(STEPS[1..].iter().all(|step| message(step, again.path()).is_none()));
    assert_eq!(
        registry(&server)
            .lookup(&format!("{repository}:run-2"))
            .await
            .unwrap()
            .unwrap()
            .digest,
        artifact
    );
}

#[test]
fn a_result_outside_of_the_budget_is_measured_and_not_published() {
    let server = Server::start();
    let repository = format!("{}/models", server.host());
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = digits(&repository);
    inputs.optimize.budget = Some(Budget {
        max_size: Some("10Ki".parse().unwrap()),
        ..Budget::default()
    });
    let codes = run(dir.path(), &inputs);
    assert_eq!(codes, [0, 0, 0, exit_code::BUDGET_EXCEEDED, exit_code::EARLIER_STEP_FAILED]);
    let Some(Termination::Failed(failed)) = message("evaluate", dir.path()) else {
        panic!("evaluate says nothing")
    };
    assert_eq!(failed.reason, FailureReason::BudgetExceeded);
    assert!(failed.message.contains("maxSize allows 10Ki"), "{failed}");
    assert!(failed.measured.unwrap().size_after > 10 << 10);
}

#[test]
fn a_registry_that_is_down_fails_the_publication_alone() {
    let dir = tempfile::tempdir().unwrap();
    let codes = run(dir.path(), &digits("127.0.0.1:9/models"));
    assert_eq!(codes, [0, 0, 0, 0, exit_code::TRANSIENT]);
    assert!(
        matches!(message("publish", dir.path()), Some(Termination::Failed(failed)) if failed.reason == FailureReason::RegistryUnavailable)
    );
}

#[test]
fn content_that_is_not_the_pinned_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = digits("127.0.0.1:9/models");
    inputs.source.digest = Some(plimsoll_package::digest::Digest::of(b"another"));
    assert_eq!(run(dir.path(), &inputs)[0], exit_code::UNUSABLE);
    assert!(matches!(message("fetch", dir.path()), Some(Termination::Failed(failed)) if failed.reason == FailureReason::DigestMismatch));
}

#[test]
fn what_this_version_does_not_have_is_refused_before_anything_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = digits("127.0.0.1:9/models");
    inputs.source.uri = "http://127.0.0.1:9/never".into();
    inputs.source.format = Some(ModelFormat::Keras);
    assert_eq!(run(dir.path(), &inputs)[0], exit_code::UNUSABLE);
    let Some(Termination::Failed(failed)) = message("fetch", dir.path()) else {
        panic!("fetch says nothing")
    };
    assert_eq!(failed.reason, FailureReason::Unsupported);
    assert!(
        failed.message.contains("source.format") && failed.message.contains("Keras") && failed.message.contains("export the model to ONNX"),
        "{failed}"
    );
}
