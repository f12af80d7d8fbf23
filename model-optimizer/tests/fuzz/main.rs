//! Damaged files of every kind that is read (see `fuzz/bounded.rs`).

#[path = "../../../fuzz/bounded.rs"]
mod bounded;
mod targets;

use std::fs;
use std::path::Path;

fn check(kind: &str, target: fn(&[u8], &Path)) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("weights"), [7; 4096]).unwrap();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    bounded::check(&corpus, |bytes| target(bytes, folder.path()));
}

#[test]
fn models() {
    check("model", targets::model);
}

#[test]
fn archives_of_arrays() {
    check("npz", targets::dataset);
}

#[test]
fn tables_of_text() {
    check("text", targets::dataset);
}

#[test]
fn parquet_files() {
    check("parquet", targets::dataset);
}

#[test]
fn archives_of_pictures() {
    check("pictures", targets::dataset);
}
