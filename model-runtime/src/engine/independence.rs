//! Whether the rows of a model's batch are independent of each other: the condition for serving several requests in one inference.
//!
//! A graph whose first dimension is open need not compute each row by itself: a softmax over the batch, a normalisation by its mean, a
//! sort would give each client an answer that depends on who else asked. So it is measured, on the engine that serves.

use plimsoll_package::manifest::{Datatype, TensorSpec};

use super::{Data, Engine, EngineError, Tensor, probe};

/// Largest difference between a row computed alone and in a batch, relative to the output's largest absolute value, where the package
/// allows no more: kernels for other sizes sum in another order, in which single precision keeps four digits and more.
pub const TOLERANCE: f64 = 1e-4;

/// Why requests may not be batched.
#[derive(Debug, thiserror::Error)]
pub enum Dependent {
    /// An input or output has no open first dimension.
    #[error("the first dimension of `{0}` is not open")]
    Fixed(String),
    /// The batch could not be run.
    #[error("a batch of two fails: {0}")]
    Engine(#[from] EngineError),
    /// The output of a batch does not have a row for each of its inputs'.
    #[error("output `{0}` of a batch has other shapes than its parts")]
    Rows(String),
    /// A row is computed otherwise beside another.
    #[error("output `{output}` of a batch differs from its parts by {difference:.1e} of its largest value")]
    Differs {
        /// The output.
        output: String,
        /// The difference.
        difference: f64,
    },
}

/// Shows that a batch gives each of its parts what it gets alone, on `inputs` and on others made from them: the values in the
/// opposite order, and floats halved.
///
/// # Errors
/// [`Dependent`], with the reason for which the requests of this model must be run one by one.
pub fn check(engine: &dyn Engine, inputs: &[Tensor], tolerance: f64) -> Result<(), Dependent> {
    let closed = |spec: &&TensorSpec| spec.shape.first().is_none_or(|&size| size >= 0);
    if let Some(spec) = engine.inputs().iter().chain(engine.outputs()).find(closed) {
        return Err(Dependent::Fixed(spec.name.clone()));
    }
    if inputs.is_empty() {
        return Err(Dependent::Fixed("the model's inputs, for it has none".to_owned()));
    }
    let other: Vec<Tensor> = inputs.iter().map(another).collect();
    let batch: Vec<Tensor> = inputs.iter().zip(&other).map(|(one, other)| Tensor::join(&[one, other])).collect();
    let rows = [inputs[0].rows().unwrap_or_default(), other[0].rows().unwrap_or_default()];
    let alone = [engine.run(inputs)?, engine.run(&other)?];
    let together = engine.run(&batch)?;
    for (index, (spec, output)) in engine.outputs().iter().zip(together).enumerate() {
        let parts = output.part(&rows).ok_or_else(|| Dependent::Rows(spec.name.clone()))?;
        for (part, alone) in parts.iter().zip(&alone) {
            let alone = &alone[index];
            if part.shape() != alone.shape() {
                return Err(Dependent::Rows(spec.name.clone()));
            }
            let difference = match alone.data().to_f64() {
                Some(values) => probe::difference(part, &values),
                None if part == alone => 0.0,
                None => f64::INFINITY,
            };
            // Not `difference > tolerance`, which a NaN would pass.
            let passes = difference <= tolerance;
            if !passes {
                return Err(Dependent::Differs {
                    output: spec.name.clone(),
                    difference,
                });
            }
        }
    }
    Ok(())
}

/// Another tensor of the same shape, whose values are as valid: an index stays one.
fn another(tensor: &Tensor) -> Tensor {
    let reversed = tensor.reversed();
    let is_float = matches!(tensor.datatype(), Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
    let halved = reversed.data().to_f64().filter(|_| is_float).and_then(|values| {
        let values: Vec<f64> = values.iter().map(|value| value / 2.0).collect();
        Tensor::new(tensor.shape().to_vec(), Data::from_f64(tensor.datatype(), &values)).ok()
    });
    halved.unwrap_or(reversed)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::engine::{EngineKind, LoadOptions, load};
    use crate::onnx::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto, TypeProto, ValueInfoProto,
        attribute_proto::AttributeType, tensor_shape_proto, type_proto,
    };
    use prost::Message as _;

    /// A model of one node from `x` to `y`, both FP32 of shape `[-1, 3]`.
    fn model(operator: &str, axis: i64) -> tempfile::NamedTempFile {
        use tensor_shape_proto::{Dimension, dimension::Value};
        let dimension = |value| Dimension {
            value: Some(value),
            ..Dimension::default()
        };
        let value = |name: &str| ValueInfoProto {
            name: Some(name.to_owned()),
            r#type: Some(TypeProto {
                value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                    elem_type: Some(1),
                    shape: Some(TensorShapeProto {
                        dim: vec![dimension(Value::DimParam("n".to_owned())), dimension(Value::DimValue(3))],
                    }),
                })),
                ..TypeProto::default()
            }),
            ..ValueInfoProto::default()
        };
        let node = NodeProto {
            op_type: Some(operator.to_owned()),
            input: vec!["x".to_owned()],
            output: vec!["y".to_owned()],
            attribute: vec![AttributeProto {
                name: Some("axis".to_owned()),
                r#type: Some(AttributeType::Int as i32),
                i: Some(axis),
                ..AttributeProto::default()
            }],
            ..NodeProto::default()
        };
        let model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto {
                domain: None,
                version: Some(17),
            }],
            graph: Some(GraphProto {
                name: Some("g".to_owned()),
                node: vec![node],
                input: vec![value("x")],
                output: vec![value("y")],
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        };
        let file = tempfile::Builder::new().suffix(".onnx").tempfile().unwrap();
        std::fs::write(file.path(), model.encode_to_vec()).unwrap();
        file
    }

    fn check_file(path: &Path) -> Result<(), Dependent> {
        let engine = load(EngineKind::Tract, path, &LoadOptions::default()).unwrap();
        let input = Tensor::new(vec![1, 3], vec![1.0_f32, 2.0, 4.0]).unwrap();
        check(&*engine, &[input], TOLERANCE)
    }

    #[test]
    fn rows_that_are_computed_by_themselves_may_be_batched_and_others_may_not() {
        assert!(check_file(model("Softmax", 1).path()).is_ok());
        let text = check_file(model("Softmax", 0).path()).unwrap_err().to_string();
        assert!(text.starts_with("output `y` of a batch differs from its parts by"), "{text}");
    }
}
