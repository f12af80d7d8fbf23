//! Models that keep their weights in a file beside them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use plimsoll_package::digest::Digest;
use plimsoll_package::report::{Report, exit_code};
use plimsoll_runtime::onnx::{self, ModelProto, StringStringEntryProto, tensor_proto::DataLocation};
use prost::Message as _;

use super::{model, program};

/// Writes the digits model to `folder`, its weights to the file `data` beside it, under the name `location`.
fn write_external(folder: &Path, data: &str, location: &str) -> PathBuf {
    let mut digits: ModelProto = onnx::read(&model("digits/digits-v1.onnx")).unwrap();
    let mut bytes = Vec::new();
    for tensor in &mut digits.graph.as_mut().unwrap().initializer {
        let Some(raw) = tensor.raw_data.take() else { continue };
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: Some(key.into()),
            value: Some(value),
        };
        tensor.data_location = Some(DataLocation::External as i32);
        tensor.external_data = vec![
            entry("location", location.into()),
            entry("offset", bytes.len().to_string()),
            entry("length", raw.len().to_string()),
        ];
        bytes.extend_from_slice(&raw);
    }
    let path = folder.join("digits.onnx");
    fs::write(folder.join(data), bytes).unwrap();
    fs::write(&path, digits.encode_to_vec()).unwrap();
    path
}

fn optimize(source: &Path, output: &Path) -> Output {
    let flags = ["--quantize", "int8", "--json", "--output"];
    program().arg("optimize").arg(source).args(flags).arg(output).output().unwrap()
}

#[test]
fn weights_beside_the_model_count_for_its_size_and_its_digest() {
    let folder = tempfile::tempdir().unwrap();
    let source = write_external(folder.path(), "digits.weights", "digits.weights");
    let done = optimize(&source, &folder.path().join("package"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let report: Report = serde_json::from_slice(&done.stdout).unwrap();
    let both = [fs::read(&source).unwrap(), fs::read(folder.path().join("digits.weights")).unwrap()].concat();
    assert_eq!(report.summary.source_digest, Digest::of(&both), "as `cat` of the two would have it");
    assert_eq!(report.summary.size_before, both.len() as u64);
    assert!(report.summary.fidelity.unwrap() > 0.999);
    assert!(report.summary.size_before > 3 * report.summary.size_after);
}

#[test]
fn weights_that_are_missing_cut_off_or_elsewhere_are_refused_in_one_line() {
    for (data, location, words) in [
        ("other.weights", "digits.weights", "digits.weights"),
        ("digits.weights", "../digits.weights", "which is not a file beside the model"),
        ("digits.weights", "/etc/hostname", "which is not a file beside the model"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let source = write_external(folder.path(), data, location);
        let failed = optimize(&source, &folder.path().join("package"));
        let said = String::from_utf8_lossy(&failed.stderr);
        assert_eq!(failed.status.code(), Some(i32::from(exit_code::UNUSABLE)), "{said}");
        assert!(said.contains(words), "{said}");
        assert!(!folder.path().join("package").exists());
    }
    let folder = tempfile::tempdir().unwrap();
    let source = write_external(folder.path(), "digits.weights", "digits.weights");
    let whole = fs::read(folder.path().join("digits.weights")).unwrap();
    fs::write(folder.path().join("digits.weights"), &whole[..1000]).unwrap();
    let failed = optimize(&source, &folder.path().join("package"));
    let said = String::from_utf8_lossy(&failed.stderr);
    assert_eq!(failed.status.code(), Some(i32::from(exit_code::UNUSABLE)), "{said}");
    assert!(said.contains("the file is cut off or another one"), "{said}");
}
