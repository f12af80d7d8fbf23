//! The architecture's invariants, as far as the source shows them.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .collect()
}

/// Architecture invariant: `decide` and `build` import no client, clock, randomness or environment.
#[test]
fn deciding_and_building_are_pure() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = [sources(&source.join("decide")), sources(&source.join("build"))].concat();
    files.extend([source.join("decide.rs"), source.join("build.rs")]);
    assert!(files.len() > 10, "{files:?}");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for forbidden in [
            "kube::Client",
            "kube::Api",
            "Timestamp::now",
            "SystemTime",
            "Instant::now",
            "std::env",
            "rand::",
            "tokio::",
            "async fn",
            "std::fs",
        ] {
            assert!(!text.contains(forbidden), "{} uses {forbidden}", file.display());
        }
    }
}

/// Architecture invariant: the operator links no inference engine.
#[test]
fn the_operator_links_no_engine() {
    let output = std::process::Command::new(env!("CARGO"))
        .args([
            "tree",
            "--package",
            "plimsoll-operator",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--offline",
            "--locked",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && tree.contains("plimsoll-package"),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for engine in ["tract-", "ort v", "plimsoll-runtime", "plimsoll-optimizer"] {
        assert!(
            !tree.lines().any(|line| line.starts_with(engine)),
            "the operator depends on {engine}"
        );
    }
}
