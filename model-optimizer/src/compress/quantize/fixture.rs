//! Small models for the tests of techniques, and how they run.

use plimsoll_package::manifest::Engine as EngineKind;
use plimsoll_package::recipe::Quantize;
use plimsoll_runtime::engine::{self, LoadOptions, Tensor};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, ValueInfoProto, tensor_shape_proto,
};

use super::technique;
use crate::calibration::Calibration;
use crate::compress::{Change, Setting};
use crate::convert;
use crate::evaluate::dataset::Dataset;
use crate::failure::Failure;
use crate::graph::value_info;
use crate::progress::Console;

/// Numbers of a fixed sequence, about normally distributed with variance 1.
pub(super) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| next()).sum::<f32>() - 6.0).collect()
}

/// A value of that type, whose first axis is open.
pub(super) fn value(name: &str, kind: DataType, sizes: &[i64]) -> ValueInfoProto {
    use tensor_shape_proto::{Dimension, dimension::Value};
    let sizes = std::iter::once(None).chain(sizes.iter().copied().map(Some));
    let dim = sizes.map(|size| Dimension {
        value: size.map(Value::DimValue),
        ..Dimension::default()
    });
    value_info(name, kind, Some(TensorShapeProto { dim: dim.collect() }))
}

/// A model of opset 17.
pub(super) fn model(
    input: Vec<ValueInfoProto>,
    node: Vec<NodeProto>,
    initializer: Vec<TensorProto>,
    output: Vec<ValueInfoProto>,
) -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto {
            domain: None,
            version: Some(17),
        }],
        graph: Some(GraphProto {
            name: Some("test".into()),
            input,
            node,
            initializer,
            output,
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

/// A node of that name.
pub(super) fn named(name: &str, node: NodeProto) -> NodeProto {
    NodeProto {
        name: Some(name.to_owned()),
        ..node
    }
}

/// Applies a recipe's entry to a copy of the model, with `samples` for calibration where there are any.
pub(super) fn apply(original: &ModelProto, quantize: &Quantize, samples: Option<Vec<Tensor>>) -> Result<(ModelProto, Change), Failure> {
    let calibration = samples.map(|inputs| {
        let (specs, _) = plimsoll_runtime::onnx::signature(original).unwrap();
        Calibration::new(Dataset::of_tensors(inputs, &specs, None).unwrap(), 1)
    });
    let setting = Setting {
        calibration: calibration.as_ref(),
        original,
        threads: 1,
        engine: None,
        console: &Console::silent(),
    };
    let mut model = original.clone();
    let change = technique(quantize)?.apply(&mut model, &setting)?;
    Ok((model, change))
}

/// What the engine makes of `inputs`: the first output's values.
pub(super) fn run(kind: EngineKind, model: &ModelProto, fold_dequantize: bool, inputs: &[Tensor]) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    convert::write(model, &path).unwrap();
    let options = LoadOptions {
        fold_dequantize,
        ..LoadOptions::default()
    };
    let engine = engine::load(kind, &path, &options).unwrap_or_else(|error| panic!("{kind}: {error}"));
    let outputs = engine.run(inputs).unwrap_or_else(|error| panic!("{kind}: {error}"));
    outputs[0].as_f32().unwrap().to_vec()
}

/// The signal to noise ratio of `after` in decibels.
pub(super) fn sqnr(before: &[f32], after: &[f32]) -> f64 {
    assert_eq!(before.len(), after.len());
    let square = |value: f32| f64::from(value).powi(2);
    let signal: f64 = before.iter().map(|value| square(*value)).sum();
    let noise: f64 = before.iter().zip(after).map(|(before, after)| square(after - before)).sum();
    10.0 * (signal / noise).log10()
}

/// The types of the nodes, in order.
pub(super) fn operators(model: &ModelProto) -> Vec<&str> {
    model.graph.as_ref().unwrap().node.iter().map(NodeProto::op_type).collect()
}
