//! Input that cannot be used, each with its sentence and its exit code, and runs that end before they are done.

use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use plimsoll_optimizer::graph::{float_tensor, node};
use plimsoll_package::manifest::Manifest;
use plimsoll_package::report::{Report, exit_code};
use plimsoll_runtime::onnx::tensor_proto::{DataLocation, DataType};
use plimsoll_runtime::onnx::{
    self, ModelProto, StringStringEntryProto, TensorProto, ValueInfoProto, tensor_shape_proto::dimension::Value as Size, type_proto,
};
use prost::Message as _;
use zip::write::SimpleFileOptions;

use super::{model, program};

const V1: &str = "digits/digits-v1.onnx";

fn command(source: &Path, output: &Path, flags: &[&str]) -> Command {
    let mut command = program();
    // A backtrace would show even where one is asked for.
    command.env("RUST_BACKTRACE", "1");
    command.arg("optimize").arg(source).arg("--output").arg(output).args(flags);
    command
}

fn optimize(source: &Path, output: &Path, flags: &[&str]) -> Output {
    command(source, output, flags).output().unwrap()
}

/// The one line that says why nothing came of it.
fn said(output: &Output, code: u8) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(i32::from(code)), "{text}");
    assert!(!text.contains("panicked") && !text.contains("stack backtrace"), "{text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{text}");
    errors[0].to_owned()
}

fn assert_says(output: &Output, code: u8, words: &[&str]) {
    let line = said(output, code);
    for words in words {
        assert!(line.contains(words), "`{words}` is missing: {line}");
    }
}

/// A folder with a model that `change` makes of the digits model.
fn changed(name: &str, change: impl FnOnce(&mut ModelProto)) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let mut changed = onnx::read(&model(name)).unwrap();
    change(&mut changed);
    let path = folder.path().join("changed.onnx");
    fs::write(&path, changed.encode_to_vec()).unwrap();
    (folder, path)
}

fn refuses_model(change: impl FnOnce(&mut ModelProto), flags: &[&str], words: &[&str]) {
    let (folder, path) = changed(V1, change);
    let package = folder.path().join("package");
    assert_says(&optimize(&path, &package, flags), exit_code::UNUSABLE, words);
    assert!(!package.exists());
}

fn first_weight(model: &mut ModelProto) -> &mut TensorProto {
    let tensors = &mut model.graph.as_mut().unwrap().initializer;
    tensors
        .iter_mut()
        .find(|tensor| tensor.dims.len() >= 2 && tensor.data_type() == DataType::Float as i32)
        .unwrap()
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_refused() {
    let whole = fs::read(model(V1)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.onnx");
    for share in [1, 100, 500, 900, 999] {
        fs::write(&path, &whole[..whole.len() * share / 1000]).unwrap();
        let line = said(&optimize(&path, &folder.path().join("package"), &[]), exit_code::UNUSABLE);
        assert!(line.contains("cut.onnx"), "{line}");
        assert!(!folder.path().join("package").exists());
    }
}

#[test]
fn graphs_that_break_onnx_own_rules_are_refused_by_the_name_of_the_node() {
    refuses_model(
        |model| {
            let graph = model.graph.as_mut().unwrap();
            let (first, last) = (graph.node[0].input[0].clone(), graph.node.last().unwrap().output[0].clone());
            graph.node[0].name = Some("first".into());
            graph.node[0].input[0] = "around".into();
            graph.node.push(node("Add", &[&last, &first], "around", vec![]));
        },
        &[],
        &["is a broken ONNX model: its graph has a cycle: the node `", "depends on itself"],
    );
    refuses_model(
        |model| model.graph.as_mut().unwrap().node[0].input[0] = "gone".into(),
        &["--no-gate"],
        &["reads `gone`, which nothing makes"],
    );
    refuses_model(
        |model| model.graph.as_mut().unwrap().output[0].name = Some("elsewhere".into()),
        &["--no-gate"],
        &["nothing makes its output `elsewhere`"],
    );
}

#[test]
fn sizes_beyond_any_memory_are_refused() {
    refuses_model(
        |model| first_weight(model).dims = vec![1 << 60, 1],
        &["--no-gate"],
        &["has more values than memory has addresses"],
    );
    refuses_model(
        |model| first_weight(model).dims = vec![1 << 40],
        &["--no-gate"],
        &["and its shape [1099511627776] says 4398046511104", "export the model again"],
    );
    let wide = |size: i64| {
        move |model: &mut ModelProto| {
            // A model that takes what no machine holds, and nothing else that is wrong.
            let graph = model.graph.as_mut().unwrap();
            graph.input.truncate(1);
            let value = |name: &str, input: &ValueInfoProto| ValueInfoProto {
                name: Some(name.into()),
                ..input.clone()
            };
            let mut input = value("x", &graph.input[0]);
            if let Some(type_proto::Value::TensorType(tensor)) = input.r#type.as_mut().and_then(|kind| kind.value.as_mut()) {
                for (axis, dim) in tensor.shape.as_mut().unwrap().dim.iter_mut().enumerate() {
                    dim.value = Some(Size::DimValue(if axis == 0 { size } else { 1 }));
                }
            }
            graph.output = vec![value("y", &input)];
            graph.input = vec![input];
            graph.initializer.clear();
            graph.value_info.clear();
            graph.node = vec![node("Relu", &["x"], "y", vec![])];
        }
    };
    for size in [1 << 60, 1 << 45] {
        refuses_model(wide(size), &[], &["larger than memory", "name evaluation data"]);
    }
}

/// Writes the digits model with its weights in the file `weights` beside it.
fn write_external(folder: &Path) -> PathBuf {
    let mut digits = onnx::read(&model(V1)).unwrap();
    let tensor = first_weight(&mut digits);
    let raw = tensor.raw_data.take().unwrap();
    tensor.data_location = Some(DataLocation::External as i32);
    tensor.external_data = vec![StringStringEntryProto {
        key: Some("location".into()),
        value: Some("weights".into()),
    }];
    fs::write(folder.join("weights"), raw).unwrap();
    let path = folder.join("digits.onnx");
    fs::write(&path, digits.encode_to_vec()).unwrap();
    path
}

#[test]
fn weights_behind_a_link_out_of_the_folder_are_refused_and_links_within_are_followed() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = write_external(folder.path());
    fs::rename(folder.path().join("weights"), elsewhere.path().join("weights")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path().join("weights"), folder.path().join("weights")).unwrap();
    let package = folder.path().join("package");
    assert_says(
        &optimize(&path, &package, &["--no-gate"]),
        exit_code::UNUSABLE,
        &["is a link that leaves the model's folder", "put the file itself beside the model"],
    );
    assert!(!package.exists());
    // As caches of model hubs keep them: both are links into one folder.
    fs::rename(&path, elsewhere.path().join("blob")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path().join("blob"), &path).unwrap();
    let followed = optimize(&path, &package, &["--no-gate"]);
    assert!(followed.status.success(), "{}", String::from_utf8_lossy(&followed.stderr));
}

#[test]
fn weights_that_are_no_numbers_are_refused_or_left_alone_and_listed() {
    let mut name = String::new();
    let (folder, path) = changed(V1, |model| {
        let weight = first_weight(model);
        let mut bytes = weight.raw_data().to_vec();
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        weight.raw_data = Some(bytes.into());
        name = weight.name().to_owned();
    });
    let heldout = model("digits/digits-heldout.npz");
    for technique in [
        "prune: {amount: \"50%\"}",
        "prune: {amount: \"50%\", scope: PerLayer}",
        "prune: {structure: SemiStructured, pattern: \"2:4\"}",
        "prune: {amount: \"50%\", structure: Channels}",
        "quantize: {scheme: Int8}",
        "quantize: {scheme: Int8Dynamic}",
        "quantize: {scheme: Int8Weights}",
        "quantize: {scheme: Int8Static}",
        "quantize: {scheme: Int8Blocks}",
        "quantize: {scheme: Int4}",
        "quantize: {scheme: Int4, rounding: Gptq}",
        "quantize: {scheme: Float16}",
        "distill: {epochs: 1}",
    ] {
        let recipe = folder.path().join("recipe.yaml");
        fs::write(
            &recipe,
            format!("recipe: [{{{technique}}}]\ncalibration: {{uri: \"{}\"}}\n", heldout.display()),
        )
        .unwrap();
        let package = folder.path().join("package");
        let output = optimize(&path, &package, &["--recipe", recipe.to_str().unwrap(), "--no-gate", "--json"]);
        if output.status.success() {
            let report: Report = serde_json::from_slice(&output.stdout).unwrap();
            let listed = report
                .skipped
                .iter()
                .any(|skipped| skipped.name == name && skipped.reason.contains("NaN"));
            let named = report.skipped.iter().any(|skipped| skipped.name == name);
            assert!(
                listed || named && !technique.contains("Float16"),
                "{technique}: {:?}",
                report.skipped
            );
            assert!(
                report.steps.iter().all(|step| !step.changed.contains(&name)),
                "{technique} changed it"
            );
        } else {
            let line = said(&output, exit_code::UNUSABLE);
            assert!(
                line.contains("NaN") || line.contains("finite") || line.contains("nothing to"),
                "{technique}: {line}"
            );
        }
    }
}

/// An archive of arrays of floats, each with the shape that comes with it.
fn archive(path: &Path, arrays: &[(&str, &[usize], &[f32])]) {
    let mut archive = zip::ZipWriter::new(fs::File::create(path).unwrap());
    for (name, shape, values) in arrays {
        archive.start_file(format!("{name}.npy"), SimpleFileOptions::default()).unwrap();
        let sizes: String = shape.iter().map(|size| format!("{size},")).collect();
        let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({sizes}), }}");
        archive.write_all(b"\x93NUMPY\x01\x00").unwrap();
        archive.write_all(&(header.len() as u16).to_le_bytes()).unwrap();
        archive.write_all(header.as_bytes()).unwrap();
        archive
            .write_all(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
            .unwrap();
    }
    archive.finish().unwrap();
}

#[test]
fn data_that_do_not_fit_the_model_are_refused_with_both_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.npz");
    let package = folder.path().join("package");
    let evaluate = |flags: &[&str]| {
        let all = [&["--quantize", "int8", "--evaluation", data.to_str().unwrap()], flags].concat();
        optimize(&model(V1), &package, &all)
    };
    archive(&data, &[("x", &[2, 63], &[0.5; 126])]);
    assert_says(
        &evaluate(&[]),
        exit_code::UNUSABLE,
        &["a sample for `", "has shape [63], the model takes ["],
    );
    archive(&data, &[("x", &[2, 64], &[0.5; 128]), ("y", &[2], &[3.0, 10.0])]);
    assert_says(
        &evaluate(&[]),
        exit_code::UNUSABLE,
        &["the label of sample 2 is 10, the model knows the 10 classes 0 to 9"],
    );
    archive(&data, &[("x", &[2, 64], &[0.5; 128]), ("y", &[2], &[3.0, 2.5])]);
    assert_says(
        &evaluate(&[]),
        exit_code::UNUSABLE,
        &["the label of sample 2 is 2.5, which is no class number"],
    );
    archive(&data, &[("x", &[2, 64], &[0.5; 128]), ("y", &[3], &[3.0, 2.0, 1.0])]);
    assert_says(
        &evaluate(&[]),
        exit_code::UNUSABLE,
        &["write one label, or row of labels, for each of the 2 samples"],
    );
    archive(&data, &[("x", &[2, 64], &[0.5; 128])]);
    assert_says(
        &evaluate(&["--metric", "accuracy"]),
        exit_code::UNUSABLE,
        &["hold no labels (a field `y`)"],
    );
    assert!(!package.exists());
}

#[test]
fn calibration_without_a_sample_is_refused_whatever_its_form() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let calibrate = || {
        let flags = ["--quantize", "int8", "--calibration", data.to_str().unwrap()];
        optimize(&model(V1), &folder.path().join("package"), &flags)
    };
    archive(&data, &[("x", &[0, 64], &[])]);
    assert_says(&calibrate(), exit_code::UNUSABLE, &["the calibration data", "it holds no sample"]);
    fs::write(&data, "a,b\n").unwrap();
    assert_says(&calibrate(), exit_code::UNUSABLE, &["it holds no sample"]);
    fs::write(&data, "").unwrap();
    assert_says(&calibrate(), exit_code::UNUSABLE, &["it is empty"]);
    fs::write(&data, "{}\n").unwrap();
    said(&calibrate(), exit_code::UNUSABLE);
}

#[test]
fn recipes_that_contradict_themselves_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.yaml");
    for (text, words) in [
        (
            "recipe: [{prune: {amount: \"50%\"}, quantize: {scheme: Int8}}]",
            "optimize.recipe[0] has not exactly one key; write one list entry per technique",
        ),
        ("recipe: [{}]", "optimize.recipe[0] has not exactly one key"),
        (
            "recipe: [{prune: {amount: \"50%\", structure: SemiStructured, pattern: \"2:4\"}}]",
            "pattern says how many weights go; leave amount out",
        ),
        (
            "recipe: [{prune: {structure: SemiStructured, pattern: \"4:2\"}}]",
            "`4:2` is not N:M with N less than M",
        ),
        ("recipe: [{prune: {}}]", "amount is missing"),
        (
            "recipe: [{prune: {amount: \"150%\"}}]",
            "`150%` is not a percentage from 0% to 100%",
        ),
        (
            "recipe: [{quantize: {scheme: Int8, blockSize: 32}}]",
            "blockSize and rounding belong to the schemes Int4 and Int8Blocks",
        ),
        (
            "recipe: [{quantize: {scheme: Int4, blockSize: 33}}]",
            "blockSize is 33; write 16, 32, 64, 128 or 256",
        ),
        ("recipe: [{quantize: {scheme: Int9}}]", "is no recipe as in spec.optimize"),
        ("recipe: [{distill: {epochs: 1}}]", "distill needs samples to train on"),
        (
            "recipe: [{quantize: {scheme: Int8, exclude: [nowhere]}}]",
            "no node of the model has the name `nowhere`",
        ),
        (
            "recipe: [{quantize: {scheme: Int8}}]\nsearch: {}",
            "set either recipe or search, not both",
        ),
        ("budget: {maxAccuracyDrop: \"1%\"}", "maxAccuracyDrop needs labelled data"),
        ("budget: {maxSize: lots}", "`lots` is not a size such as \"10Mi\""),
    ] {
        fs::write(&recipe, text).unwrap();
        let package = folder.path().join("package");
        let output = optimize(&model(V1), &package, &["--recipe", recipe.to_str().unwrap()]);
        assert_says(&output, exit_code::USAGE, &[words]);
        assert!(!package.exists());
    }
}

#[test]
fn a_budget_that_nothing_meets_leaves_a_report_and_no_model() {
    for (flag, value, words) in [
        ("--max-size", "1", "maxSize allows 1"),
        ("--max-latency", "0.001us", "maxLatency"),
        ("--min-fidelity", "1", "minFidelity"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let package = folder.path().join("package");
        let output = optimize(&model(V1), &package, &["--quantize", "int8", flag, value]);
        assert_says(&output, exit_code::BUDGET_EXCEEDED, &[words]);
        let files: Vec<_> = fs::read_dir(&package).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, ["report.html", "report.json"]);
    }
}

#[test]
fn a_disk_that_is_full_is_said_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    // A file system of its own, in a mount namespace that ends with the program; without root in a namespace of users as well.
    let spaces: [&[&str]; 2] = [&["--mount"], &["--user", "--map-root-user", "--mount"]];
    let run = |space: &[&str], environment: &str, output: &Path| {
        let script = "mount -t tmpfs -o size=64k tmpfs \"$1\" || exit 99; shift; exec \"$@\"";
        let program = program();
        let mut command = Command::new("unshare");
        command
            .args(space)
            .args(["sh", "-c", script, "sh"])
            .arg(&small)
            .arg(program.get_program());
        command.arg("optimize").arg(model(V1)).args(["--no-gate", "--output"]).arg(output);
        command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if !environment.is_empty() {
            command.env(environment, &small);
        }
        command.output().unwrap()
    };
    let mounts = |space: &&[&str]| {
        let mut probe = Command::new("unshare");
        probe
            .args(*space)
            .args(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(&small);
        probe.output().is_ok_and(|output| output.status.success())
    };
    let space = spaces
        .into_iter()
        .find(mounts)
        .expect("a small file system takes root, or namespaces of users");
    for (environment, output) in [("TMPDIR", folder.path().join("package")), ("", small.join("package"))] {
        let full = run(space, environment, &output);
        assert_says(&full, exit_code::TRANSIENT, &["cannot write", "No space left on device"]);
        assert!(!output.exists());
    }
}

#[test]
fn whenever_a_run_is_killed_the_older_package_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let package = folder.path().join("package");
    let flags = ["--quantize", "int8", "--json"];
    let begun = Instant::now();
    assert!(optimize(&model(V1), &package, &flags).status.success());
    let whole_run = begun.elapsed();
    let absent = folder.path().join("absent");
    for step in 0..12_u32 {
        let fresh = step % 2 == 1;
        let output = if fresh { &absent } else { &package };
        let mut child = command(&model("digits/digits-v2.onnx"), output, &flags)
            .env("TMPDIR", folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        std::thread::sleep(whole_run * step / 11 + Duration::from_millis(1));
        child.kill().unwrap();
        child.wait().unwrap();
        if output.exists() {
            Manifest::read(output).unwrap().verify(output).unwrap();
        }
        assert!(fresh || package.exists());
    }
}

#[test]
fn a_damaged_weight_is_named() {
    refuses_model(
        |model| {
            let weight = first_weight(model);
            *weight = TensorProto {
                raw_data: Some(weight.raw_data().to_vec()[4..].to_vec().into()),
                ..weight.clone()
            };
        },
        &["--quantize", "int8", "--no-gate"],
        &["tensor `", "the file is damaged, export the model again"],
    );
    let tensor = float_tensor("lonely", &[1], &[1.0]);
    refuses_model(
        move |model| {
            let graph = model.graph.as_mut().unwrap();
            let made = graph.node[0].output[0].clone();
            graph.initializer.push(TensorProto {
                name: Some(made),
                ..tensor
            });
        },
        &["--no-gate"],
        &["which something else gives as well; each value has one maker"],
    );
}
