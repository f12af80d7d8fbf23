//! What every scheme of quantisation gives loads on the engines that may serve it, and agrees with the original.

use std::fs;
use std::path::{Path, PathBuf};

use plimsoll_optimizer::convert;
use plimsoll_package::manifest::{Engine as EngineKind, Manifest, Probe};
use plimsoll_package::report::{Report, Verdict};
use plimsoll_runtime::engine::{self, LoadOptions, probe};

use super::{generator, model, onnxruntime, program};

/// Every scheme with the least signal to noise ratio that it keeps, in decibels, and whether tract runs what it gives.
const SCHEMES: [(&str, f64, bool); 7] = [
    ("Float16", 50.0, true),
    ("Int8Weights", 30.0, true),
    ("Int8Blocks", 30.0, false),
    ("Int8", 15.0, true),
    ("Int8Dynamic", 15.0, true),
    ("Int8Static", 15.0, true),
    ("Int4", 10.0, false),
];

/// Optimises by that scheme and returns the report; `data` are samples, drawn ones where there are none.
fn optimize(source: &Path, scheme: &str, data: Option<&Path>, package: &Path) -> Report {
    let recipe = package.with_extension("yaml");
    let calibration = data
        .map(|data| format!("calibration: {{uri: \"{}\"}}\n", data.display()))
        .unwrap_or_default();
    fs::write(
        &recipe,
        format!("recipe: [{{quantize: {{scheme: {scheme}}}}}]\n{calibration}budget: {{minFidelity: \"0.9\"}}\n"),
    )
    .unwrap();
    let mut command = program();
    command
        .arg("optimize")
        .arg(source)
        .arg("--recipe")
        .arg(&recipe)
        .arg("--output")
        .arg(package)
        .arg("--json");
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{} as {scheme}: {}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

fn check(source: &Path, data: Option<&Path>) {
    let folder = tempfile::tempdir().unwrap();
    for (scheme, sqnr_db_min, in_tract) in SCHEMES {
        let package = folder.path().join(scheme);
        let report = optimize(source, scheme, data, &package);
        let name = format!("{} as {scheme}", source.display());
        assert_eq!(report.gate.verdict, Verdict::WithinBudget);
        for output in &report.outputs {
            assert!(output.sqnr_db.is_none_or(|sqnr_db| sqnr_db >= sqnr_db_min), "{name}: {output:?}");
        }
        let manifest = Manifest::read(&package).unwrap();
        let recorded = Probe::read(&package).unwrap();
        for measured in &report.engines {
            let refused = measured.refused.as_deref();
            assert!(
                measured.engine == EngineKind::Tract && !in_tract || refused.is_none(),
                "{name}, {}: {refused:?}",
                measured.engine
            );
            if refused.is_none() {
                let options = LoadOptions {
                    fold_dequantize: manifest.fold_dequantize,
                    library: Some(onnxruntime()),
                    ..LoadOptions::default()
                };
                let engine = engine::load(measured.engine, &package.join("model.onnx"), &options).unwrap();
                probe::check(&*engine, &recorded).unwrap_or_else(|error| panic!("{name}, {}: {error}", measured.engine));
            }
        }
    }
}

#[test]
fn digits_agree_in_every_scheme() {
    for name in ["digits/digits-v1.onnx", "digits/digits-v2.onnx"] {
        check(&model(name), Some(&model("digits/digits-heldout.npz")));
    }
}

#[test]
fn a_block_of_a_transformer_agrees_in_every_scheme() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("block.onnx");
    let (mut builder, x) = generator::Builder::new(42, &[12, 64]);
    let attended = builder.attention(&x, 4);
    let sum = builder.add(&attended, &x);
    let normal = builder.layer_norm(&sum);
    let inner = builder.feed_forward(&normal, 128);
    let sum = builder.add(&inner, &normal);
    let y = builder.layer_norm(&sum);
    convert::write(&builder.finish(&y), &path).unwrap();
    // Samples of the same distribution as the drawn ones, but others.
    let data = folder.path().join("samples.npy");
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (16, 12, 64), }";
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend((0..16 * 12 * 64).flat_map(|_| ((0..12).map(|_| next()).sum::<f32>() - 6.0).to_le_bytes()));
    fs::write(&data, bytes).unwrap();
    check(&path, Some(&data));
}

#[test]
fn magika_agrees_in_every_scheme() {
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| std::env::home_dir().unwrap().join(".cache"), PathBuf::from);
    let magika = cache.join("plimsoll/magika");
    let source = std::env::var_os("PLIMSOLL_MAGIKA").map_or_else(|| magika.join("magika.onnx"), PathBuf::from);
    if !source.is_file() {
        return println!("skipped: {} is missing; tests/models/magika/fetch.py fetches it", source.display());
    }
    check(&source, Some(&source.with_file_name("magika-inputs.npz")));
}
