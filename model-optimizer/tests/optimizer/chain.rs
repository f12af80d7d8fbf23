//! Steps as processes that start together: who waits, who works, and what becomes of the rest when one ends.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use plimsoll_package::recipe::{INPUTS_ENV, Inputs};
use plimsoll_package::report::{FailureReason, Termination, exit_code};

use super::{inputs, model, program};

pub(crate) const STEPS: [&str; 5] = ["fetch", "convert", "compress", "evaluate", "publish"];

/// Starts a step as its container would.
pub(crate) fn start(step: &str, dir: &Path, inputs: &Inputs) -> Child {
    let mut command = program();
    command
        .args(["step", step, "--work"])
        .arg(dir.join("work"))
        .arg("--termination-log")
        .arg(dir.join(format!("{step}.message")));
    command
        .arg("--secrets")
        .arg(dir.join("secrets"))
        .arg("--claims")
        .arg(dir.join("pvc"));
    command
        .env(INPUTS_ENV, serde_json::to_string(inputs).unwrap())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
        .stderr(fs::File::create(dir.join(format!("{step}.log"))).unwrap())
        .spawn()
        .unwrap()
}

pub(crate) fn message(step: &str, dir: &Path) -> Option<Termination> {
    let text = fs::read_to_string(dir.join(format!("{step}.message"))).ok()?;
    Some(serde_json::from_str(&text).unwrap())
}

fn code(child: &mut Child) -> u8 {
    child.wait().unwrap().code().map_or(255, |code| code as u8)
}

/// Whether the kernel holds a process until it gets a lock.
fn waits_for_a_lock(process: &Child) -> bool {
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let id = process.id().to_string();
    locks
        .lines()
        .any(|lock| lock.contains("-> FLOCK") && lock.split(' ').any(|word| word == id))
}

/// Inputs whose source accepts a connection and then says nothing.
fn hanging() -> (std::net::TcpListener, Inputs) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("http://{}/model", listener.local_addr().unwrap());
    (listener, inputs(&uri, "127.0.0.1:9/models"))
}

#[test]
fn a_killed_step_ends_all_that_follow_at_once_and_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let (listener, inputs) = hanging();
    // The last ones first: nobody may depend on the order in which containers start.
    let mut waiting: Vec<Child> = STEPS[1..].iter().rev().map(|step| start(step, dir.path(), &inputs)).collect();
    let mut fetch = start("fetch", dir.path(), &inputs);
    let _connection = listener.accept().unwrap();
    // The kernel wakes who waits for a lock when its holder ends, however that came about.
    let begun = Instant::now();
    while !waiting.iter().all(waits_for_a_lock) {
        assert!(waiting.iter_mut().all(|step| step.try_wait().unwrap().is_none()));
        assert!(begun.elapsed() < Duration::from_secs(60), "a step that waits does something else");
        std::thread::sleep(Duration::from_millis(5));
    }
    fetch.kill().unwrap();
    fetch.wait().unwrap();
    let codes: Vec<u8> = waiting.iter_mut().map(code).collect();
    assert_eq!(codes, [exit_code::EARLIER_STEP_FAILED; 4]);
    for step in STEPS {
        assert_eq!(message(step, dir.path()), None, "{step} has nothing to say");
    }
}

#[test]
fn a_step_that_is_asked_to_end_says_that_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (listener, inputs) = hanging();
    let mut convert = start("convert", dir.path(), &inputs);
    let mut fetch = start("fetch", dir.path(), &inputs);
    let _connection = listener.accept().unwrap();
    for child in [&convert, &fetch] {
        assert!(
            std::process::Command::new("kill")
                .args(["-TERM", &child.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
    }
    assert_eq!(
        (code(&mut fetch), code(&mut convert)),
        (exit_code::TRANSIENT, exit_code::EARLIER_STEP_FAILED)
    );
    assert!(matches!(message("fetch", dir.path()), Some(Termination::Failed(failed)) if failed.reason == FailureReason::Interrupted));
    assert_eq!(message("convert", dir.path()), None);
}

#[test]
fn the_step_that_fails_is_the_only_one_that_speaks() {
    for (file, failing, reason) in [
        ("unsupported/not-a-model.onnx", "convert", FailureReason::UnreadableModel),
        ("unsupported/truncated.onnx", "convert", FailureReason::UnreadableModel),
        ("unsupported/custom-operator.onnx", "convert", FailureReason::UnsupportedOperator),
        ("unsupported/missing.onnx", "fetch", FailureReason::SourceRefused),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let inputs = inputs(model(file).to_str().unwrap(), "127.0.0.1:9/models");
        let mut children: Vec<Child> = STEPS.iter().map(|step| start(step, dir.path(), &inputs)).collect();
        let codes: Vec<u8> = children.iter_mut().map(code).collect();
        for (index, step) in STEPS.iter().enumerate() {
            let message = message(step, dir.path());
            if *step == failing {
                assert_eq!(codes[index], exit_code::UNUSABLE, "{file}");
                assert!(
                    matches!(&message, Some(Termination::Failed(failed)) if failed.reason == reason),
                    "{file}: {message:?}"
                );
            } else {
                assert_eq!(message, None, "{file}: {step}");
                let expected = if codes[..index].contains(&exit_code::UNUSABLE) {
                    exit_code::EARLIER_STEP_FAILED
                } else {
                    exit_code::DONE
                };
                assert_eq!(codes[index], expected, "{file}: {step}");
            }
        }
    }
}

#[test]
fn a_custom_operator_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = inputs(model("unsupported/custom-operator.onnx").to_str().unwrap(), "127.0.0.1:9/models");
    let mut children = ["fetch", "convert"].map(|step| start(step, dir.path(), &inputs));
    children.iter_mut().for_each(|child| drop(child.wait()));
    let Some(Termination::Failed(failed)) = message("convert", dir.path()) else {
        panic!("convert says nothing")
    };
    for word in ["Murmurate", "com.example.birds", "flock"] {
        assert!(failed.message.contains(word), "{failed}");
    }
}
