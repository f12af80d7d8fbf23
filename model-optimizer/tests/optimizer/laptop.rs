//! `plimsoll-optimizer optimize` on real models, with both engines.

use std::fs;
use std::path::Path;
use std::process::Output;

use plimsoll_package::manifest::{Engine as EngineKind, Manifest, Probe};
use plimsoll_package::recipe::QuantizeScheme;
use plimsoll_package::report::{Report, SampleSource, Spread, Verdict, exit_code};
use plimsoll_runtime::engine::{self, LoadOptions, probe};

use super::{model, onnxruntime, program};

fn optimize(source: &Path, output: &Path, flags: &[&str]) -> Output {
    program()
        .arg("optimize")
        .arg(source)
        .arg("--output")
        .arg(output)
        .args(flags)
        .output()
        .unwrap()
}

fn report(output: &Output) -> Report {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn heldout() -> String {
    model("digits/digits-heldout.npz").to_str().unwrap().to_owned()
}

/// Every engine that the report measured gives the probe's outputs.
fn check_package(package: &Path, report: &Report) {
    let manifest = Manifest::read(package).unwrap();
    manifest.verify(package).unwrap();
    if report.gate.verdict == Verdict::NotGated {
        return;
    }
    let recorded = Probe::read(package).unwrap();
    assert_eq!(report.engines.len(), 2, "both engines were tried");
    for measured in report.engines.iter().filter(|measured| measured.latency.is_some()) {
        let options = LoadOptions {
            fold_dequantize: manifest.fold_dequantize,
            library: Some(onnxruntime()),
            ..LoadOptions::default()
        };
        let engine = engine::load(measured.engine, &package.join("model.onnx"), &options).unwrap();
        probe::check(&*engine, &recorded).unwrap_or_else(|error| panic!("{}: {error}", measured.engine));
    }
}

#[test]
fn digits_become_several_times_smaller_within_a_point_of_accuracy() {
    for scheme in ["int8", "int8-dynamic", "int8-weights"] {
        for name in ["digits/digits-v1.onnx", "digits/digits-v2.onnx"] {
            let dir = tempfile::tempdir().unwrap();
            let package = dir.path().join("package");
            let flags = [
                "--quantize",
                scheme,
                "--evaluation",
                &heldout(),
                "--metric",
                "accuracy",
                "--max-accuracy-drop",
                "1%",
                "--json",
            ];
            let report = report(&optimize(&model(name), &package, &flags));
            let ratio = report.summary.size_before as f64 / report.summary.size_after as f64;
            assert!(ratio >= 3.5, "{name} as {scheme} is {ratio:.2} times smaller");
            assert_eq!(report.classes.len(), 10);
            assert_eq!(report.classes.iter().map(|class| class.samples).sum::<u64>(), 450);
            let engines: Vec<EngineKind> = report
                .engines
                .iter()
                .filter(|measured| measured.latency.is_some())
                .map(|measured| measured.engine)
                .collect();
            assert_eq!(engines.len(), 2, "{name} as {scheme}: {:?}", report.engines);
            check_package(&package, &report);
        }
    }
}

#[test]
fn half_of_the_weights_go_when_half_shall_go() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let flags = ["--prune", "50%", "--evaluation", &heldout(), "--max-accuracy-drop", "1%", "--json"];
    let report = report(&optimize(&model("digits/digits-v1.onnx"), &package, &flags));
    assert!((report.summary.sparsity - 0.5).abs() < 0.001, "{}", report.summary.sparsity);
    check_package(&package, &report);
}

#[test]
fn a_model_without_data_is_judged_by_its_fidelity() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let flags = ["--quantize", "int8-dynamic", "--json"];
    let first = report(&optimize(&model("digits/digits-v1.onnx"), &package, &flags));
    assert_eq!(first.samples.as_ref().unwrap().from, SampleSource::Signature);
    assert!(first.summary.metric.is_none());
    assert!(first.summary.fidelity.unwrap() >= 0.99);
    assert_eq!(first.outputs.len(), 1);
    assert!(first.outputs[0].sqnr_db.unwrap() > 15.0, "{:?}", first.outputs);
    let model_before = fs::read(package.join("model.onnx")).unwrap();
    let second = report(&optimize(&model("digits/digits-v1.onnx"), &package, &flags));
    assert_eq!(
        model_before,
        fs::read(package.join("model.onnx")).unwrap(),
        "the same inputs give the same model"
    );
    assert_eq!(
        first.summary.fidelity.map(|f| (f * 1e4).round()),
        second.summary.fidelity.map(|f| (f * 1e4).round())
    );
}

#[test]
fn every_scheme_has_a_flag_and_a_share_may_be_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let training = model("digits/digits-training.npz").to_str().unwrap().to_owned();
    for (flag, scheme) in [
        ("int8-static", QuantizeScheme::Int8Static),
        ("int8-blocks", QuantizeScheme::Int8Blocks),
        ("int4", QuantizeScheme::Int4),
        ("fp16", QuantizeScheme::Float16),
    ] {
        let flags = [
            "--prune",
            "0.1",
            "--quantize",
            flag,
            "--calibration",
            &training,
            "--min-fidelity",
            "0.8",
            "--threads",
            "1",
            "--json",
        ];
        let report = report(&optimize(&model("digits/digits-v1.onnx"), &dir.path().join("package"), &flags));
        let prune = report.steps[0].technique.prune.as_ref().unwrap();
        assert_eq!(prune.amount, Some("10%".parse().unwrap()), "{flag}");
        assert_eq!(report.steps[1].technique.quantize.as_ref().unwrap().scheme, scheme, "{flag}");
        assert_eq!(report.samples.as_ref().unwrap().from, SampleSource::Calibration, "{flag}");
    }
}

#[test]
fn progress_is_json_lines_where_nobody_looks_and_drawn_on_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let digits = model("digits/digits-v1.onnx");
    let output = optimize(
        &digits,
        &dir.path().join("package"),
        &["--quantize", "int8", "--evaluation", &heldout()],
    );
    let said = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<serde_json::Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|why| panic!("{why}: {line}")))
        .collect();
    let is_whole = |line: &serde_json::Value| ["time", "level", "step", "message"].iter().all(|field| line[field].is_string());
    assert!(lines.iter().all(is_whole), "{said}");
    assert!(lines.iter().any(|line| line["unit"].is_string() && line["done"].is_u64()), "{said}");
    // `script` of Debian's essential package bsdutils gives it a terminal.
    let program = program();
    let shown = format!(
        "{} optimize {} --quantize int8 --output {}",
        program.get_program().display(),
        digits.display(),
        dir.path().join("other").display()
    );
    let mut script = std::process::Command::new("script");
    script.args(["-qec", &shown, "/dev/null"]);
    script.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let shown = String::from_utf8_lossy(&script.output().unwrap().stdout).into_owned();
    assert!(!shown.contains("\"level\"") && shown.contains("\u{1b}["), "{shown}");
}

#[test]
fn a_person_reads_a_table_and_a_failure_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let output = optimize(
        &model("digits/digits-v1.onnx"),
        &package,
        &["--quantize", "int8", "--evaluation", &heldout()],
    );
    let table = String::from_utf8(output.stdout).unwrap();
    for words in [
        "281Ki",
        "size as pulled",
        "memory, OnnxRuntime",
        "within the budget",
        "accuracy (450 samples)",
        "98.4%",
        "latency, Tract",
        "latency, OnnxRuntime",
        "x smaller)",
    ] {
        assert!(table.contains(words), "{words} is missing:\n{table}");
    }

    let failed = optimize(
        &model("digits/digits-v1.onnx"),
        &dir.path().join("other"),
        &["--quantize", "int8", "--max-size", "10Ki"],
    );
    assert_eq!(failed.status.code(), Some(i32::from(exit_code::BUDGET_EXCEEDED)));
    let said = String::from_utf8(failed.stderr).unwrap();
    let last = said.lines().last().unwrap();
    assert!(
        last.starts_with("error: the model has") && last.contains("maxSize allows 10Ki"),
        "{last}"
    );
    assert_eq!(
        files(&dir.path().join("other")),
        ["report.html", "report.json"],
        "of what is outside of the budget there is the report alone"
    );

    fs::create_dir(dir.path().join("mine")).unwrap();
    fs::write(dir.path().join("mine/notes.txt"), "").unwrap();
    let refused = optimize(&model("digits/digits-v1.onnx"), &dir.path().join("mine"), &[]);
    assert_eq!(refused.status.code(), Some(i32::from(exit_code::USAGE)));
}

#[test]
fn a_recipe_is_the_yaml_of_spec_optimize() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.yaml");
    let text = format!(
        "recipe:\n- prune: {{amount: \"30%\", scope: PerLayer}}\n- quantize: {{scheme: Int8}}\nevaluation:\n  dataset: {{uri: \"{}\"}}\nbudget: {{maxAccuracyDrop: \"2%\"}}\n",
        heldout()
    );
    fs::write(&recipe, text).unwrap();
    let output = optimize(
        &model("digits/digits-v2.onnx"),
        &dir.path().join("package"),
        &["--recipe", recipe.to_str().unwrap(), "--json"],
    );
    let report = report(&output);
    assert_eq!(report.steps.len(), 2);
    assert!(report.summary.sparsity > 0.299);
    fs::write(&recipe, "recipe: []\nbudgte: {maxSize: 1Mi}\n").unwrap();
    let refused = optimize(
        &model("digits/digits-v2.onnx"),
        &dir.path().join("package"),
        &["--recipe", recipe.to_str().unwrap()],
    );
    assert_eq!(refused.status.code(), Some(i32::from(exit_code::USAGE)));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("recipe.yaml") && said.contains("unknown field `budgte`") && said.contains("did you mean `budget`?"),
        "{said}"
    );
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn a_report_of_what_failed_takes_the_place_of_an_older_package() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let digits = model("digits/digits-v1.onnx");
    report(&optimize(&digits, &package, &["--quantize", "int8", "--json"]));
    let all = ["manifest.json", "model.onnx", "probe.json", "report.html", "report.json"];
    assert_eq!(files(&package), all);
    let failed = optimize(&digits, &package, &["--max-size", "10Ki", "--json"]);
    assert_eq!(failed.status.code(), Some(i32::from(exit_code::BUDGET_EXCEEDED)));
    assert_eq!(files(&package), ["report.html", "report.json"]);
    let written: Report = serde_json::from_slice(&fs::read(package.join("report.json")).unwrap()).unwrap();
    assert_eq!(written, serde_json::from_slice::<Report>(&failed.stdout).unwrap());
    assert_eq!(written.gate.verdict, Verdict::BudgetExceeded);
    let size = written.gate.limits.iter().find(|limit| limit.limit == "maxSize").unwrap();
    assert!(!size.passed && size.allowed == 10_240.0 && size.measured > 280_000.0, "{size:?}");
    // And the other way round.
    report(&optimize(&digits, &package, &["--quantize", "int8", "--json"]));
    assert_eq!(files(&package), all);
    assert_eq!(files(dir.path()), ["package"], "nothing is left beside it");
}

#[test]
fn nothing_is_left_of_a_run_that_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (package, work) = (dir.path().join("package"), dir.path().join("work"));
    fs::create_dir(&work).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let source = format!("http://{}/model.onnx", listener.local_addr().unwrap());
    let mut child = program()
        .args(["optimize", &source, "--plain-http", "127.0.0.1", "--output"])
        .arg(&package)
        .env("TMPDIR", &work)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // It waits for an answer.
    let _connection = listener.accept().unwrap();
    assert_eq!(files(&work).len(), 1);
    let kill = std::process::Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(i32::from(exit_code::TRANSIENT)));
    assert_eq!((files(&work), files(dir.path())), (vec![], vec!["work".to_owned()]));
}

#[test]
fn an_unusable_model_and_contradictory_flags_have_exit_codes_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let code = |source: &Path, flags: &[&str]| optimize(source, &dir.path().join("package"), flags).status.code().unwrap();
    assert_eq!(code(&model("unsupported/truncated.onnx"), &[]), i32::from(exit_code::UNUSABLE));
    let digits = model("digits/digits-v1.onnx");
    assert_eq!(code(&digits, &["--no-gate", "--min-fidelity", "0.9"]), i32::from(exit_code::USAGE));
    assert_eq!(code(&digits, &["--max-accuracy-drop", "1%"]), i32::from(exit_code::USAGE));
    assert_eq!(code(&digits, &["--evaluation", "no-such-file"]), i32::from(exit_code::UNUSABLE));
    assert!(!dir.path().join("package").exists());
}

#[test]
fn the_gate_refuses_a_broken_model_and_is_turned_off_in_the_open() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let digits = model("digits/digits-v1.onnx");
    let refused = optimize(&digits, &package, &["--prune", "99%", "--json"]);
    assert_eq!(refused.status.code(), Some(i32::from(exit_code::BUDGET_EXCEEDED)));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("the default minFidelity asks for 0.99"), "{said}");
    assert!(said.contains("state in optimize.budget what may be lost"), "{said}");
    let report = report(&optimize(&digits, &package, &["--prune", "99%", "--no-gate", "--json"]));
    assert_eq!(report.gate.verdict, Verdict::NotGated);
    assert!(report.inputs.no_gate && report.gate.limits.is_empty() && report.engines.is_empty());
    assert_eq!(files(&package), ["manifest.json", "model.onnx", "report.html", "report.json"]);
    assert!(
        report.summary.size_layer_after.unwrap() < report.summary.size_after / 4,
        "{:?}",
        report.summary
    );
    check_package(&package, &report);
}

#[test]
fn one_dataset_for_both_is_split_and_one_class_may_be_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let flags = [
        "--quantize",
        "int8",
        "--calibration",
        &heldout(),
        "--evaluation",
        &heldout(),
        "--metric",
        "top5-accuracy",
        "--max-class-accuracy-drop",
        "10%",
        "--json",
    ];
    let report = report(&optimize(&model("digits/digits-v1.onnx"), &dir.path().join("package"), &flags));
    let samples = report.samples.unwrap();
    assert_eq!((samples.from, samples.count), (SampleSource::EvaluationPart, 338));
    assert!(samples.seed.is_some());
    assert_eq!(report.summary.metric.unwrap().samples, 338);
    let class = report
        .gate
        .limits
        .iter()
        .find(|limit| limit.limit == "maxClassAccuracyDrop")
        .unwrap();
    assert!(class.passed && !class.default && class.allowed == 0.1, "{class:?}");
}

#[test]
fn both_engines_are_compared_with_the_original_by_their_ratio_and_memory() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--quantize", "int8-weights", "--max-latency", "10s", "--json"];
    let output = optimize(&model("digits/digits-v1.onnx"), &dir.path().join("package"), &flags);
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    for engine in &report.engines {
        let ratio = engine.latency_ratio.unwrap();
        assert!(
            0.0 < ratio.p10 && ratio.p10 <= ratio.median && ratio.median <= ratio.p90,
            "{engine:?}"
        );
        // Of so small a model it may be that nothing can be said of its memory.
        assert_eq!(engine.memory.is_some(), engine.memory_ratio.is_some(), "{engine:?}");
        let is_ordered = |ratio: Spread| 0.0 < ratio.p10 && ratio.p10 <= ratio.median && ratio.median <= ratio.p90;
        assert!(engine.memory_ratio.is_none_or(is_ordered), "{engine:?}");
    }
    assert!(
        report.engines.iter().any(|engine| engine.memory_ratio.is_some()),
        "{:?}",
        report.engines
    );
    assert!(
        report
            .gate
            .limits
            .iter()
            .any(|limit| limit.limit == "maxLatency" && limit.allowed == 1e7 && limit.passed)
    );
}

#[test]
fn the_engine_that_will_serve_is_measured_alone() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let digits = model("digits/digits-v2.onnx");
    for (name, engine) in [("tract", EngineKind::Tract), ("onnxruntime", EngineKind::OnnxRuntime)] {
        let report = report(&optimize(&digits, &package, &["--quantize", "int8", "--engine", name, "--json"]));
        let measured: Vec<EngineKind> = report.engines.iter().map(|measured| measured.engine).collect();
        assert_eq!((measured, report.summary.engine), (vec![engine], engine));
        assert_eq!(Manifest::read(&package).unwrap().engine, engine);
    }
    // What only the other engine runs is refused.
    let halves = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-runtime/tests/models/bfloat16.onnx");
    let refused = optimize(&halves, &package, &["--quantize", "int8", "--engine", "tract"]);
    assert_eq!(refused.status.code(), Some(i32::from(exit_code::UNUSABLE)));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("Tract: `x` is of type BF16, which tract does not run") && !said.contains("OnnxRuntime"),
        "{said}"
    );
    let missing = program()
        .args(["optimize", digits.to_str().unwrap(), "--engine", "onnxruntime", "--output"])
        .arg(&package)
        .env_remove("ORT_DYLIB_PATH")
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(i32::from(exit_code::UNUSABLE)));
    let said = String::from_utf8(missing.stderr).unwrap();
    assert!(
        said.contains("the engine OnnxRuntime is asked for, and its library is not here"),
        "{said}"
    );
}

#[test]
fn a_metric_may_count_any_number_of_the_largest_scores() {
    let dir = tempfile::tempdir().unwrap();
    let package = dir.path().join("package");
    let value = |metric: &str| {
        let flags = ["--quantize", "int8", "--evaluation", &heldout(), "--metric", metric, "--json"];
        let metric = report(&optimize(&model("digits/digits-v1.onnx"), &package, &flags))
            .summary
            .metric
            .unwrap();
        (metric.name.to_string(), metric.before)
    };
    let [accuracy, first, third, all] = ["accuracy", "top-1", "top3-accuracy", "Top10Accuracy"].map(value);
    assert_eq!((first.0.as_str(), third.0.as_str()), ("Top1Accuracy", "Top3Accuracy"));
    assert_eq!(first.1, accuracy.1);
    assert!(accuracy.1 < third.1 && third.1 <= 1.0, "{} and {}", accuracy.1, third.1);
    assert_eq!(all.1, 1.0, "there are ten classes");
    let refused = optimize(
        &model("digits/digits-v1.onnx"),
        &package,
        &["--evaluation", &heldout(), "--metric", "top-0"],
    );
    assert_eq!(refused.status.code(), Some(i32::from(exit_code::USAGE)));
    assert!(
        String::from_utf8(refused.stderr)
            .unwrap()
            .contains("it is no metric; write accuracy, top-5")
    );
}

#[test]
fn help_tells_the_exit_codes() {
    for command in [&[][..], &["optimize"], &["step"]] {
        let output = program().args(command).arg("--help").output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        for code in [
            exit_code::DONE,
            exit_code::TRANSIENT,
            exit_code::USAGE,
            exit_code::BUDGET_EXCEEDED,
            exit_code::UNUSABLE,
            exit_code::EARLIER_STEP_FAILED,
        ] {
            assert!(help.contains(&format!("\n  {code:<4}")), "{code}: {help}");
        }
    }
}

#[test]
fn data_come_in_other_forms_and_as_a_folder_of_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let header: Vec<String> = (0..64).map(|pixel| format!("p{pixel}")).collect();
    let row = |value: u8| {
        (0..64)
            .map(|pixel| ((pixel * 7 + u32::from(value)) % 17).to_string())
            .collect::<Vec<_>>()
    };
    let csv = format!("{},y\n{},3\n{},4\n", header.join(","), row(1).join(","), row(5).join(","));
    let lines: String = [1, 5]
        .map(|value| format!("{{\"image\": [{}], \"y\": {value}}}\n", row(value).join(",")))
        .concat();
    for text in [csv, lines] {
        let data = dir.path().join("data");
        fs::write(&data, text).unwrap();
        let flags = ["--quantize", "int8-weights", "--evaluation", data.to_str().unwrap(), "--json"];
        let report = report(&optimize(&model("digits/digits-v1.onnx"), &dir.path().join("package"), &flags));
        assert_eq!(report.summary.metric.unwrap().samples, 2);
    }
    let pictures = dir.path().join("pictures");
    fs::create_dir(&pictures).unwrap();
    for (name, shade) in [("dark.png", 20), ("light.png", 200)] {
        image::GrayImage::from_pixel(16, 16, image::Luma([shade]))
            .save(pictures.join(name))
            .unwrap();
    }
    let evaluate = |labels: &str| {
        fs::write(pictures.join("labels.csv"), labels).unwrap();
        let flags = ["--quantize", "int8-weights", "--evaluation", pictures.to_str().unwrap(), "--json"];
        optimize(&model("digits/digits-v1.onnx"), &dir.path().join("package"), &flags)
    };
    let report = report(&evaluate("file,label\ndark.png,3\nlight.png,4\n"));
    assert_eq!(report.classes.iter().map(|class| class.class).collect::<Vec<_>>(), [3, 4]);
    let refused = evaluate("file,label\nmissing.png,3\n");
    assert_eq!(refused.status.code(), Some(i32::from(exit_code::UNUSABLE)));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("labels.csv names `missing.png`, which it does not hold"), "{said}");
}
