//! Whether two models give the same on drawn inputs.

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_runtime::engine::{self, LoadOptions, Tensor};
use plimsoll_runtime::onnx::ModelProto;

use plimsoll_optimizer::calibration::Calibration;
use plimsoll_optimizer::convert;
use plimsoll_optimizer::evaluate::dataset::Dataset;

/// Samples drawn from the signature of `model`.
fn samples(model: &ModelProto) -> Dataset {
    let (inputs, _) = plimsoll_runtime::onnx::signature(model).unwrap();
    Dataset::drawn(&inputs, 8, false).unwrap()
}

/// All samples drawn from the signature of `model` as one batch.
pub(crate) fn inputs(model: &ModelProto) -> Vec<Tensor> {
    let samples = samples(model);
    samples.batch(0..samples.samples()).unwrap()
}

/// Calibration data drawn from the signature of `model`.
pub(crate) fn calibration(model: &ModelProto) -> Calibration {
    Calibration::new(samples(model), 1)
}

/// The outputs of `model` on `inputs` by one engine, or its words.
pub(crate) fn try_run(kind: EngineKind, model: &ModelProto, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    convert::write(model, &path).unwrap();
    let engine = engine::load(kind, &path, &LoadOptions::default()).map_err(|error| error.to_string())?;
    engine.run(inputs).map_err(|error| error.to_string())
}

/// The outputs of `model` on `inputs`, by each engine that is here.
pub(crate) fn run(model: &ModelProto, inputs: &[Tensor]) -> Vec<(EngineKind, Vec<Tensor>)> {
    let run = |kind| (kind, try_run(kind, model, inputs).unwrap_or_else(|error| panic!("{kind}: {error}")));
    convert::engines().into_iter().map(run).collect()
}

/// Asserts that two models give the same outputs on drawn inputs, by every engine that runs the first of them, of which there is one at
/// least; values may differ by `tolerance`, relative to those above 1.
pub(crate) fn assert_same(before: &ModelProto, after: &ModelProto, tolerance: f64) {
    let inputs = inputs(before);
    let mut refusals = Vec::new();
    let engines = convert::engines();
    for &kind in &engines {
        let expected = match try_run(kind, before, &inputs) {
            Ok(expected) => expected,
            Err(refusal) => {
                refusals.push(format!("{kind}: {refusal}"));
                continue;
            }
        };
        let given = try_run(kind, after, &inputs).unwrap_or_else(|error| panic!("{kind} runs the model before and not after: {error}"));
        assert_eq!(expected.len(), given.len());
        for (expected, given) in expected.iter().zip(&given) {
            assert_eq!(expected.shape(), given.shape(), "{kind}");
            let (expected, given) = (expected.data().to_f64().unwrap(), given.data().to_f64().unwrap());
            for (expected, given) in expected.iter().zip(&given) {
                let same = expected == given || (expected - given).abs() <= tolerance * expected.abs().max(1.0);
                assert!(same, "{kind}: {given} is not {expected}");
            }
        }
    }
    assert!(refusals.len() < engines.len(), "no engine runs the model: {refusals:?}");
}
