//! What every scheme of quantisation gives loads on the engines that may serve it, and agrees with the original.

use std::path::Path;

use plimsoll_optimizer::calibration::Calibration;
use plimsoll_optimizer::compress::{self, Setting};
use plimsoll_optimizer::convert;
use plimsoll_optimizer::evaluate::dataset::Dataset;
use plimsoll_optimizer::graph::simplify::simplify;
use plimsoll_optimizer::progress::Console;
use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_package::recipe::Technique;
use plimsoll_runtime::engine::{self, Engine, LoadOptions};
use plimsoll_runtime::onnx::{self, ModelProto};
use serde_json::json;

use super::{generator, model, onnxruntime, real_model};

/// Every scheme with the least signal to noise ratio that it keeps of each output, in decibels, and whether tract runs what it gives.
const SCHEMES: [(&str, f64, bool); 7] = [
    ("Float16", 40.0, true),
    ("Int8Weights", 30.0, true),
    ("Int8Blocks", 30.0, false),
    ("Int8", 15.0, true),
    ("Int8Dynamic", 15.0, true),
    ("Int8Static", 15.0, true),
    ("Int4", 10.0, false),
];
/// Most samples that are calibrated on and compared.
const SAMPLES: usize = 8;
/// The same of models that take long.
const FEW: usize = 2;

fn load(kind: EngineKind, model: &ModelProto, fold_dequantize: bool) -> Result<Box<dyn Engine>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    convert::write(model, &path).unwrap();
    let options = LoadOptions {
        fold_dequantize,
        library: Some(onnxruntime()),
        ..LoadOptions::default()
    };
    engine::load(kind, &path, &options).map_err(|error| error.to_string())
}

/// The least signal to noise ratio of an output, in decibels.
fn sqnr_db(before: &dyn Engine, after: &dyn Engine, samples: &Dataset) -> Result<f64, String> {
    let mut sums = vec![(0.0, 0.0); before.outputs().len()];
    for range in samples.batches() {
        let inputs = samples.batch(range).unwrap();
        let given = after.run(&inputs).map_err(|error| error.to_string())?;
        for ((sums, before), after) in sums.iter_mut().zip(before.run(&inputs).unwrap()).zip(given) {
            assert_eq!(before.shape(), after.shape());
            for (before, after) in before.data().to_f64().unwrap().iter().zip(after.data().to_f64().unwrap()) {
                sums.0 += before * before;
                sums.1 += (after - before).powi(2);
            }
        }
    }
    let ratio = |(signal, noise): &(f64, f64)| 10.0 * (signal / noise.max(f64::MIN_POSITIVE)).log10();
    Ok(sums.iter().map(ratio).fold(f64::INFINITY, f64::min))
}

/// What is peculiar to a model.
struct Peculiar {
    /// Most samples that are compared.
    samples: usize,
    /// Schemes that have nothing to do in it, and say so.
    nothing: &'static [&'static str],
    engines: &'static [EngineKind],
    /// By how many decibels errors add up from layer to layer where nothing but weights is rounded.
    depth_db: f64,
}

const PLAIN: Peculiar = Peculiar {
    samples: SAMPLES,
    nothing: &[],
    engines: &[EngineKind::OnnxRuntime, EngineKind::Tract],
    depth_db: 0.0,
};

fn check(name: &str, original: ModelProto, data: &Path, peculiar: &Peculiar) {
    let (inputs, _) = onnx::signature(&original).unwrap();
    let samples = Dataset::read(data, &inputs, None, 1 << 30).unwrap();
    check_on(name, original, &samples, peculiar);
}

fn check_on(name: &str, mut original: ModelProto, samples: &Dataset, peculiar: &Peculiar) {
    simplify(&mut original).unwrap();
    let (inputs, _) = onnx::signature(&original).unwrap();
    let some = samples.batch(0..peculiar.samples.min(samples.samples())).unwrap();
    let samples = Dataset::of_tensors(some, &inputs, None).unwrap();
    let calibration = Calibration::new(samples.clone(), 1);
    let before: Vec<_> = peculiar.engines.iter().map(|kind| load(*kind, &original, false).unwrap()).collect();
    for (scheme, sqnr_db_min, in_tract) in SCHEMES {
        let entry: Technique = serde_json::from_value(json!({"quantize": {"scheme": scheme}})).unwrap();
        let setting = Setting {
            calibration: Some(&calibration),
            original: &original,
            threads: 1,
            engine: None,
            console: &Console::silent(),
        };
        let mut compressed = original.clone();
        let applied = compress::technique(&entry).unwrap().apply(&mut compressed, &setting);
        if peculiar.nothing.contains(&scheme) {
            let refused = applied.unwrap_err();
            assert!(refused.message.contains("nothing to quantise"), "{name} as {scheme}: {refused}");
            continue;
        }
        let change = applied.unwrap_or_else(|refused| panic!("{name} as {scheme}: {refused}"));
        assert!(!change.changed.is_empty(), "{name} as {scheme}");
        let weights_alone = matches!(scheme, "Int8Weights" | "Int8Blocks");
        let sqnr_db_min = sqnr_db_min - if weights_alone { peculiar.depth_db } else { 0.0 };
        for before in &before {
            let kind = before.kind();
            if kind == EngineKind::Tract && !in_tract {
                continue;
            }
            let measured = load(kind, &compressed, change.fold_dequantize).and_then(|after| sqnr_db(&**before, &*after, &samples));
            let measured = measured.unwrap_or_else(|error| panic!("{name} as {scheme}, {kind}: {error}"));
            assert!(measured >= sqnr_db_min, "{name} as {scheme}, {kind}: {measured:.1} dB");
        }
    }
}

#[test]
fn digits_agree_in_every_scheme() {
    for name in ["digits/digits-v1.onnx", "digits/digits-v2.onnx"] {
        check(name, onnx::read(&model(name)).unwrap(), &model("digits/digits-heldout.npz"), &PLAIN);
    }
}

#[test]
fn a_block_of_a_transformer_agrees_in_every_scheme() {
    let (mut builder, x) = generator::Builder::new(42, &[12, 64]);
    let attended = builder.attention(&x, 4);
    let sum = builder.add(&attended, &x);
    let normal = builder.layer_norm(&sum);
    let inner = builder.feed_forward(&normal, 128);
    let sum = builder.add(&inner, &normal);
    let y = builder.layer_norm(&sum);
    // Numbers that are about normally distributed.
    let mut next = || builder.below(1 << 20) as f32 / (1 << 20) as f32;
    let values: Vec<f32> = (0..16 * 12 * 64).map(|_| (0..12).map(|_| next()).sum::<f32>() - 6.0).collect();
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (16, 12, 64), }";
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    let data = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(data.path(), bytes).unwrap();
    check("a block of a transformer", builder.finish(&y), data.path(), &PLAIN);
}

fn check_real(model: &str, data: &str, peculiar: &Peculiar) {
    check(model, onnx::read(&real_model(model)).unwrap(), &real_model(data), peculiar);
}

#[test]
fn magika_agrees_in_every_scheme() {
    check_real("magika.onnx", "magika-inputs.npz", &PLAIN);
}

#[test]
fn a_sentence_encoder_agrees_in_every_scheme() {
    let peculiar = Peculiar {
        samples: FEW,
        depth_db: 5.0,
        ..PLAIN
    };
    check_real("minilm.onnx", "evaluation.npz", &peculiar);
}

#[test]
fn a_detector_agrees_in_every_scheme() {
    let peculiar = Peculiar {
        samples: 1,
        nothing: &["Int8Blocks", "Int4"],
        ..PLAIN
    };
    check_real("detector.onnx", "detector-inputs.npz", &peculiar);
}

#[test]
fn a_recogniser_agrees_in_every_scheme() {
    let peculiar = Peculiar { samples: FEW, ..PLAIN };
    check_real("recogniser.onnx", "recogniser-inputs.npz", &peculiar);
}

#[test]
fn the_body_of_a_scan_is_compressed_and_agrees_in_every_scheme() {
    let (mut builder, x) = generator::Builder::new(8, &[5, 32]);
    let y = builder.scan(&x);
    let model = builder.finish(&y);
    let (inputs, _) = onnx::signature(&model).unwrap();
    let samples = Dataset::drawn(&inputs, SAMPLES, false).unwrap();
    let peculiar = Peculiar {
        nothing: &["Int8Static", "Int8Blocks", "Int4"],
        engines: &[EngineKind::OnnxRuntime],
        ..PLAIN
    };
    check_on("a scan", model, &samples, &peculiar);
}
