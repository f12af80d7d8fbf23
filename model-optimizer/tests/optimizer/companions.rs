//! Files beside a model that say what its inputs and outputs mean.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;

use plimsoll_package::digest::Digest;
use plimsoll_package::manifest::Manifest;

use super::program;

const PATHS: [&str; 5] = [
    "1_Pooling/config.json",
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
];

fn sentences() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-runtime/tests/models/sentences")
}

/// A folder as Hugging Face's hub has them, with the model at `model`.
fn folder(model: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for path in PATHS {
        let to = dir.path().join(path);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(sentences().join(path), to).unwrap();
    }
    fs::write(dir.path().join("README.md"), "not a companion").unwrap();
    let model = dir.path().join(model);
    fs::create_dir_all(model.parent().unwrap()).unwrap();
    fs::copy(sentences().join("sentences.onnx"), model).unwrap();
    dir
}

fn optimize(source: &Path, output: &Path) -> Output {
    program()
        .arg("optimize")
        .arg(source)
        .arg("--output")
        .arg(output)
        .args(["--prune", "10%"])
        .output()
        .unwrap()
}

#[test]
fn a_package_holds_the_companions_of_its_model_and_its_source_digest_covers_them() {
    let mut digests = vec![];
    for model in ["model.onnx", "onnx/model.onnx"] {
        let folder = folder(model);
        let output = folder.path().join("package");
        let run = optimize(&folder.path().join(model), &output);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let manifest = Manifest::read(&output).unwrap();
        manifest.verify(&output).unwrap();
        for path in PATHS {
            let content = fs::read(sentences().join(path)).unwrap();
            assert_eq!(manifest.files[path].digest, Digest::of(&content), "{path}");
            assert_eq!(fs::read(output.join(path)).unwrap(), content, "{path}");
        }
        assert!(!manifest.files.contains_key("README.md"));
        let mut all = fs::read(sentences().join("sentences.onnx")).unwrap();
        PATHS.iter().for_each(|path| all.extend(fs::read(sentences().join(path)).unwrap()));
        assert_eq!(manifest.source_digest, Digest::of(&all), "`cat` of the files in their order");

        fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        let run = optimize(&folder.path().join(model), &output);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        digests.extend([manifest.source_digest, Manifest::read(&output).unwrap().source_digest]);
    }
    assert_eq!(digests[0], digests[2]);
    assert_ne!(digests[0], digests[1]);
}

#[test]
fn a_companion_that_is_a_link_to_elsewhere_is_refused() {
    let folder = folder("model.onnx");
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    symlink(secret.path(), folder.path().join("tokenizer.json")).unwrap();
    let run = optimize(&folder.path().join("model.onnx"), &folder.path().join("package"));
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(!run.status.success(), "{said}");
    assert!(said.contains("tokenizer.json is a link that leaves the model's folder"), "{said}");
}
