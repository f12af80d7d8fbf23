//! What it takes to have OpenVINO compute the model whose accuracy was measured, and tell where it cannot.

use ort::ep::{self, ArbitrarilyConfigurableExecutionProvider as _};
use ort::session::builder::SessionBuilder;
use ort::value::TensorRef;
use plimsoll_package::manifest::TensorSpec;
use prost::Message as _;

use crate::engine::{Data, InputError, Tensor};
use crate::onnx::tensor_shape_proto::{Dimension, dimension};
use crate::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto};

/// OpenVINO on the processor. By itself it takes every processor there is, may multiply in bfloat16, and rounds what is multiplied with 8-bit
/// weights to 8 bits as well.
///
/// On one thread its streams lose the errors of an inference (2025.4), and what is given is whatever the memory of the outputs holds, such as
/// another request's: without streams it computes in the thread that asks.
pub(super) fn provider(threads: usize) -> ep::OpenVINO {
    let streams = usize::from(threads > 1);
    ep::OpenVINO::default()
        .with_device_type("CPU")
        .with_num_threads(threads)
        .with_precision("FP32")
        .with_arbitrary_config(
            "load_config",
            format!(r#"{{"CPU": {{"EXECUTION_MODE_HINT": "ACCURACY", "NUM_STREAMS": "{streams}"}}}}"#),
        )
}

/// Checks that OpenVINO tells of an inference that fails: it has one thread on a single processor however many it is given (see [`provider`]).
///
/// # Errors
/// Where it does not, or cannot be used at all.
pub(super) fn check_errors(mut builder: SessionBuilder) -> ort::Result<()> {
    let mut session = builder.commit_from_memory(&sum_of_any_sizes().encode_to_vec())?;
    let (two, three) = (
        TensorRef::from_array_view(([2_usize], &[0.0_f32; 2][..]))?,
        TensorRef::from_array_view(([3_usize], &[0.0_f32; 3][..]))?,
    );
    match session.run(ort::inputs![two, three]) {
        Err(_) => Ok(()),
        Ok(_) => Err(ort::Error::new(
            "OpenVINO does not tell of failed inferences on this processor; give --threads 1",
        )),
    }
}

/// A model of `z = x + y`, vectors whose sizes are known when it runs alone.
fn sum_of_any_sizes() -> ModelProto {
    const FLOAT: i32 = 1;
    let value = |name: &str| {
        let size = Dimension {
            value: Some(dimension::Value::DimParam(format!("size of {name}"))),
            ..Dimension::default()
        };
        let vector = type_proto::Tensor {
            elem_type: Some(FLOAT),
            shape: Some(TensorShapeProto { dim: vec![size] }),
        };
        ValueInfoProto {
            name: Some(name.to_owned()),
            r#type: Some(TypeProto {
                value: Some(type_proto::Value::TensorType(vector)),
                ..TypeProto::default()
            }),
            ..ValueInfoProto::default()
        }
    };
    let sum = NodeProto {
        op_type: Some("Add".to_owned()),
        input: vec!["x".to_owned(), "y".to_owned()],
        output: vec!["z".to_owned()],
        ..NodeProto::default()
    };
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto {
            domain: None,
            version: Some(17),
        }],
        graph: Some(GraphProto {
            name: Some("sum".to_owned()),
            node: vec![sum],
            input: vec![value("x"), value("y")],
            output: vec![value("z")],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

/// OpenVINO computes 64-bit integers in 32 bits, and cuts off what is larger.
///
/// # Errors
/// Where an input holds one.
pub(super) fn check_integers(specs: &[TensorSpec], inputs: &[Tensor]) -> Result<(), InputError> {
    for (spec, input) in specs.iter().zip(inputs) {
        if let Data::Int64(values) = input.data()
            && let Some(&value) = values.iter().find(|&&value| i32::try_from(value).is_err())
        {
            return Err(InputError::Integer {
                name: spec.name.clone(),
                value,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use plimsoll_package::manifest::Datatype;

    use super::*;

    #[test]
    fn what_was_measured_is_computed_on_as_many_threads_as_are_given() {
        for (threads, streams) in [("1", "0"), ("3", "1")] {
            let written = format!("{:?}", provider(threads.parse().unwrap()));
            let config = format!(r#"{{"CPU": {{"EXECUTION_MODE_HINT": "ACCURACY", "NUM_STREAMS": "{streams}"}}}}"#);
            for (option, value) in [
                ("device_type", "CPU"),
                ("num_of_threads", threads),
                ("precision", "FP32"),
                ("load_config", &config),
            ] {
                let expected = format!("{option:?}: {value:?}");
                assert!(written.contains(&expected), "{expected} is not in {written}");
            }
        }
    }

    #[test]
    fn integers_that_would_be_cut_off_are_refused_by_name() {
        let specs = ["mask", "ids"].map(|name| TensorSpec {
            name: name.to_owned(),
            datatype: Datatype::Int64,
            shape: vec![-1],
        });
        let tensor = |values: Vec<i64>| Tensor::new(vec![values.len()], values).unwrap();
        let widest = tensor(vec![i32::MIN.into(), i32::MAX.into()]);
        assert_eq!(check_integers(&specs, &[widest.clone(), widest.clone()]), Ok(()));
        let refused = check_integers(&specs, &[widest, tensor(vec![7, 1 << 31])]).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "input `ids` holds 2147483648, and OpenVINO computes integers in 32 bits"
        );
    }
}
