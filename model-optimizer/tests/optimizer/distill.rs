//! Distillation by the program, on a real model.

use std::fs;
use std::path::Path;
use std::process::Output;

use plimsoll_optimizer::graph::node;
use plimsoll_package::report::{Report, exit_code};
use plimsoll_runtime::onnx;
use prost::Message as _;

use super::{model, program};

fn run(source: &str, package: &Path, flags: &[&str]) -> Output {
    let mut command = program();
    command.arg("optimize").arg(model(source)).arg("--output").arg(package);
    command.args(flags).arg("--json").output().unwrap()
}

fn data(name: &str) -> String {
    model(&format!("digits/{name}.npz")).to_str().unwrap().to_owned()
}

fn report(output: &Output) -> Report {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The losses on the held-out data that the messages of a run tell, before the first and after each epoch.
fn losses(output: &Output) -> Vec<f64> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let number = |text: &str| text.split([' ', '"']).next().and_then(|number| number.parse().ok());
    let before = said.split("held out; loss ").nth(1).and_then(number);
    let after = said.split(", held out ").skip(1).filter_map(number);
    before.into_iter().chain(after).collect()
}

#[test]
fn digits_pruned_quantised_and_distilled_are_six_times_smaller_within_half_a_point() {
    for name in ["digits/digits-v1.onnx", "digits/digits-v2.onnx"] {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("recipe.yaml");
        let text = format!(
            "recipe:\n- prune: {{amount: \"50%\"}}\n- quantize: {{scheme: Int8}}\n- distill: {{epochs: 6, learningRate: \"0.001\"}}\ncalibration: {{uri: \"{}\"}}\nevaluation:\n  dataset: {{uri: \"{}\"}}\nbudget: {{maxAccuracyDrop: \"0.5%\"}}\n",
            data("digits-training"),
            data("digits-heldout"),
        );
        fs::write(&recipe, text).unwrap();
        let package = dir.path().join("package");
        let output = run(name, &package, &["--recipe", recipe.to_str().unwrap()]);
        let report = report(&output);
        let shipped = report.summary.size_layer_after.unwrap();
        let ratio = report.summary.size_before as f64 / shipped as f64;
        assert!(ratio >= 6.0, "{name}: {shipped} bytes are shipped, {ratio:.2} times fewer");
        let metric = report.summary.metric.unwrap();
        assert!(metric.after >= metric.before - 0.005, "{name}: {metric:?}");
        assert!(
            report.summary.sparsity >= 0.495,
            "what was pruned stays zero: {}",
            report.summary.sparsity
        );
        let losses = losses(&output);
        assert_eq!(losses.len(), 7, "{losses:?}");
        let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(best < losses[0] / 3.0, "training mends what compression broke: {losses:?}");
    }
}

#[test]
fn gradual_pruning_ends_at_its_share_and_the_same_seed_gives_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.yaml");
    let text = format!(
        "recipe:\n- distill: {{epochs: 3, batchSize: 64, learningRate: \"0.001\", loss: MeanSquaredError, pruneTo: \"60%\", data: {{uri: \"{}\"}}}}\nevaluation:\n  dataset: {{uri: \"{}\"}}\nbudget: {{maxAccuracyDrop: \"1%\"}}\n",
        data("digits-training"),
        data("digits-heldout"),
    );
    fs::write(&recipe, text).unwrap();
    let models = ["first", "second"].map(|name| {
        let package = dir.path().join(name);
        let report = report(&run("digits/digits-v1.onnx", &package, &["--recipe", recipe.to_str().unwrap()]));
        assert!((report.summary.sparsity - 0.6).abs() < 0.001, "{}", report.summary.sparsity);
        fs::read(package.join("model.onnx")).unwrap()
    });
    assert!(models[0] == models[1]);
}

#[test]
fn a_model_learns_from_a_teacher_that_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let teacher = model("digits/digits-v2.onnx");
    let training = data("digits-training");
    let flags = ["--epochs", "2", "--teacher", teacher.to_str().unwrap(), "--calibration", &training];
    let output = run("digits/digits-v1.onnx", &dir.path().join("package"), &flags);
    // Towards its original there is nothing to learn.
    assert!(losses(&output)[0] > 1e-3, "{}", String::from_utf8_lossy(&output.stderr));

    let flags = ["--teacher", teacher.to_str().unwrap(), "--calibration", &training];
    let refused = run("digits/digits-v1.onnx", &dir.path().join("other"), &flags);
    assert_eq!(refused.status.code(), Some(i32::from(exit_code::USAGE)));
}

#[test]
fn operators_without_a_gradient_are_named_before_training_starts() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("stepped.onnx");
    let mut stepped = onnx::read(&model("digits/digits-v1.onnx")).unwrap();
    let graph = stepped.graph.as_mut().unwrap();
    let place = graph.node.iter().position(|node| node.op_type() == "Relu").unwrap();
    let given = graph.node[place].output[0].clone();
    graph.node[place].output[0] = "plain".into();
    for (index, (operator, input, output)) in [("Round", "plain", "rounded"), ("Softsign", "rounded", &given)]
        .into_iter()
        .enumerate()
    {
        let mut added = node(operator, &[input], output, vec![]);
        added.name = Some(format!("{operator} of the test"));
        graph.node.insert(place + 1 + index, added);
    }
    fs::write(&source, stepped.encode_to_vec()).unwrap();
    let package = dir.path().join("package");
    let output = run(
        source.to_str().unwrap(),
        &package,
        &["--epochs", "2", "--calibration", &data("digits-training"), "--no-gate"],
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(i32::from(exit_code::UNUSABLE)), "{said}");
    let named = "there is no gradient for Round (node `Round of the test`), a step, Softsign (node `Softsign of the test`)";
    assert!(said.contains(named), "{said}");
    assert!(losses(&output).is_empty(), "nothing was trained: {said}");
    assert!(!package.exists());
}
