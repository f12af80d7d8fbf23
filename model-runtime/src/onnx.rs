//! ONNX models: the protobuf messages of ONNX's own `onnx.proto` (`src/onnx/onnx.proto`), and how to read a model and its signature.
//!
//! Raw tensor data is [`bytes::Bytes`], so that a model read by [`read`] keeps its weights in the mapped file until they are changed.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use plimsoll_package::manifest::{Datatype, TensorSpec};
use prost::Message as _;

pub mod external;
mod fold;
pub mod mapping;
#[allow(missing_docs, clippy::all, rustdoc::all)]
mod proto;
pub mod weights;

pub use fold::fold_dequantize;
pub use proto::*;

/// A file that is not an ONNX model, or one whose signature cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OnnxError {
    /// The file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The bytes are no ONNX model.
    #[error("{path} is not an ONNX model: {reason}", path = path.display())]
    NotOnnx {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An input or output that is not a tensor of a known type and rank.
    #[error("{role} `{name}` {reason}")]
    Signature {
        /// `input` or `output`.
        role: &'static str,
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A weight that cannot be read.
    #[error("tensor `{name}` {reason}")]
    Weight {
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads the model at `path` with its external data; the weights stay in the mapped files.
///
/// # Errors
/// [`OnnxError::Read`] and [`OnnxError::NotOnnx`]; [`OnnxError::Weight`] where external data is missing or does not fit.
pub fn read(path: &Path) -> Result<ModelProto, OnnxError> {
    let mut model = read_alone(path)?;
    external::resolve(&mut model, path.parent().unwrap_or(Path::new("")))?;
    Ok(model)
}

/// Reads the model at `path` without its external data, which stays a reference.
///
/// # Errors
/// [`OnnxError::Read`] and [`OnnxError::NotOnnx`].
pub fn read_alone(path: &Path) -> Result<ModelProto, OnnxError> {
    let unreadable = |source| OnnxError::Read {
        path: path.to_owned(),
        source,
    };
    let model = decode(mapping::map(path).map_err(unreadable)?);
    model.map_err(|reason| OnnxError::NotOnnx {
        path: path.to_owned(),
        reason,
    })
}

fn decode(bytes: bytes::Bytes) -> Result<ModelProto, String> {
    let model = ModelProto::decode(bytes).map_err(|error| error.to_string())?;
    // Protobuf takes nearly any short text for a message; a model has a graph with outputs.
    match &model.graph {
        Some(graph) if !graph.output.is_empty() => Ok(model),
        Some(_) => Err("its graph has no output".into()),
        None => Err("it holds no graph".into()),
    }
}

/// The inputs (without those that an initialiser gives) and the outputs of a model, in the graph's order.
///
/// # Errors
/// [`OnnxError::Signature`] where one is a sequence, map or optional, or a tensor of a type without a name in the Open Inference
/// Protocol, or an input of unknown rank.
pub fn signature(model: &ModelProto) -> Result<(Vec<TensorSpec>, Vec<TensorSpec>), OnnxError> {
    let Some(graph) = &model.graph else { return Ok((vec![], vec![])) };
    let given: HashSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
    let inputs = graph.input.iter().filter(|input| !given.contains(input.name()));
    Ok((
        inputs.map(|input| spec("input", input)).collect::<Result<_, _>>()?,
        graph.output.iter().map(|output| spec("output", output)).collect::<Result<_, _>>()?,
    ))
}

fn spec(role: &'static str, info: &ValueInfoProto) -> Result<TensorSpec, OnnxError> {
    let refuse = |reason: &str| OnnxError::Signature {
        role,
        name: info.name().to_owned(),
        reason: reason.to_owned(),
    };
    let tensor = match info.r#type.as_ref().and_then(|kind| kind.value.as_ref()) {
        Some(type_proto::Value::TensorType(tensor)) => tensor,
        Some(_) => return Err(refuse("is not a tensor; sequences, maps and optionals cannot be served")),
        None => return Err(refuse("has no type")),
    };
    let datatype = datatype(tensor.elem_type()).ok_or_else(|| {
        refuse(&format!(
            "has element type {}, which the Open Inference Protocol does not know",
            tensor.elem_type()
        ))
    })?;
    let shape = match &tensor.shape {
        Some(shape) => shape.dim.iter().map(dimension).collect(),
        None if role == "input" => return Err(refuse("has no shape, not even a rank; run ONNX's shape inference on the model")),
        None => vec![-1],
    };
    Ok(TensorSpec {
        name: info.name().to_owned(),
        datatype,
        shape,
    })
}

fn dimension(dimension: &tensor_shape_proto::Dimension) -> i64 {
    match &dimension.value {
        Some(tensor_shape_proto::dimension::Value::DimValue(size)) if *size >= 0 => *size,
        _ => -1,
    }
}

/// The protocol's name of an ONNX element type; `None` where it has none (complex, 8-bit floats, 4-bit integers).
#[must_use]
pub fn datatype(elem_type: i32) -> Option<Datatype> {
    use tensor_proto::DataType;
    Some(match DataType::try_from(elem_type).ok()? {
        DataType::Bool => Datatype::Bool,
        DataType::Uint8 => Datatype::Uint8,
        DataType::Uint16 => Datatype::Uint16,
        DataType::Uint32 => Datatype::Uint32,
        DataType::Uint64 => Datatype::Uint64,
        DataType::Int8 => Datatype::Int8,
        DataType::Int16 => Datatype::Int16,
        DataType::Int32 => Datatype::Int32,
        DataType::Int64 => Datatype::Int64,
        DataType::Float16 => Datatype::Fp16,
        DataType::Bfloat16 => Datatype::Bf16,
        DataType::Float => Datatype::Fp32,
        DataType::Double => Datatype::Fp64,
        DataType::String => Datatype::Bytes,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_not_a_model() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.onnx");
        std::fs::write(&path, "hello").unwrap();
        assert!(matches!(read(&path), Err(OnnxError::NotOnnx { .. })));
        std::fs::write(&path, "").unwrap();
        assert!(
            read(&path)
                .unwrap_err()
                .to_string()
                .ends_with("is not an ONNX model: it holds no graph")
        );
    }
}
