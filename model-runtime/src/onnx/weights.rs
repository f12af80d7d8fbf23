//! The values of an ONNX initialiser, whichever of protobuf's fields they lie in.

use std::ops::Range;

use half::{bf16, f16};

use super::tensor_proto::{DataLocation, DataType};
use super::{OnnxError, TensorProto};

/// The dimensions of a tensor.
///
/// # Errors
/// [`OnnxError::Weight`] where one is negative, or the number of values overflows.
pub fn shape(tensor: &TensorProto) -> Result<Vec<usize>, OnnxError> {
    let shape: Vec<usize> = tensor
        .dims
        .iter()
        .map(|&size| usize::try_from(size).map_err(|_| refuse(tensor, "has a negative dimension")))
        .collect::<Result<_, _>>()?;
    // Eight bytes are the widest element; what fits so fits into memory's addresses.
    let bytes = shape
        .iter()
        .try_fold(8_isize, |product, &size| product.checked_mul(isize::try_from(size).ok()?));
    bytes
        .map(|_| shape)
        .ok_or_else(|| refuse(tensor, "has more values than memory has addresses"))
}

/// The number of bytes that a tensor's shape and type ask for; `None` where the type has no fixed width.
///
/// # Errors
/// [`OnnxError::Weight`] where the shape makes no sense.
pub fn byte_length(tensor: &TensorProto) -> Result<Option<u64>, OnnxError> {
    let values = shape(tensor)?.iter().product::<usize>() as u64;
    Ok(match DataType::try_from(tensor.data_type()) {
        Ok(DataType::Uint4 | DataType::Int4 | DataType::Float4e2m1) => Some(values.div_ceil(2)),
        Ok(DataType::Bool | DataType::Int8 | DataType::Uint8) => Some(values),
        Ok(DataType::Float8e4m3fn | DataType::Float8e4m3fnuz | DataType::Float8e5m2 | DataType::Float8e5m2fnuz) => Some(values),
        Ok(DataType::Int16 | DataType::Uint16 | DataType::Float16 | DataType::Bfloat16) => Some(values * 2),
        Ok(DataType::Int32 | DataType::Uint32 | DataType::Float) => Some(values * 4),
        Ok(DataType::Int64 | DataType::Uint64 | DataType::Double | DataType::Complex64) => Some(values * 8),
        _ => None,
    })
}

/// A tensor's values as single-precision floats, in row-major order; 8-bit and wider integers are taken exactly where a float can.
///
/// # Errors
/// [`OnnxError::Weight`] where the data lies in another file, is of a type without numbers, or does not fill the shape.
pub fn floats(tensor: &TensorProto) -> Result<Vec<f32>, OnnxError> {
    let length: usize = shape(tensor)?.iter().product();
    let values = if tensor.raw_data().is_empty() {
        typed(tensor)?
    } else {
        raw(tensor)?
    };
    if values.len() == length {
        Ok(values)
    } else {
        Err(refuse(tensor, "does not hold as many values as its shape says"))
    }
}

fn refuse(tensor: &TensorProto, reason: &str) -> OnnxError {
    OnnxError::Weight {
        name: tensor.name().to_owned(),
        reason: reason.to_owned(),
    }
}

fn kind(tensor: &TensorProto) -> Result<DataType, OnnxError> {
    if tensor.data_location() == DataLocation::External {
        return Err(refuse(tensor, "lies in another file, which cannot be folded"));
    }
    DataType::try_from(tensor.data_type()).map_err(|_| refuse(tensor, "has an unknown element type"))
}

fn raw(tensor: &TensorProto) -> Result<Vec<f32>, OnnxError> {
    let data = tensor.raw_data();
    Ok(match kind(tensor)? {
        DataType::Float => words(data, f32::from_le_bytes),
        DataType::Double => words(data, |word| f64::from_le_bytes(word) as f32),
        DataType::Float16 => words(data, |word| f16::from_le_bytes(word).to_f32()),
        DataType::Bfloat16 => words(data, |word| bf16::from_le_bytes(word).to_f32()),
        DataType::Int8 => words(data, |word| f32::from(i8::from_le_bytes(word))),
        DataType::Uint8 | DataType::Bool => words(data, |word| f32::from(u8::from_le_bytes(word))),
        DataType::Int16 => words(data, |word| f32::from(i16::from_le_bytes(word))),
        DataType::Uint16 => words(data, |word| f32::from(u16::from_le_bytes(word))),
        DataType::Int32 => words(data, |word| i32::from_le_bytes(word) as f32),
        DataType::Uint32 => words(data, |word| u32::from_le_bytes(word) as f32),
        DataType::Int64 => words(data, |word| i64::from_le_bytes(word) as f32),
        DataType::Uint64 => words(data, |word| u64::from_le_bytes(word) as f32),
        other => {
            return Err(refuse(
                tensor,
                &format!("is of type {}, which holds no plain numbers", other.as_str_name()),
            ));
        }
    })
}

fn words<const N: usize>(data: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    data.as_chunks::<N>().0.iter().map(|word| convert(*word)).collect()
}

/// Types narrower than 32 bits lie in `int32_data`, one value a word (onnx.proto, `TensorProto`).
fn typed(tensor: &TensorProto) -> Result<Vec<f32>, OnnxError> {
    let words = &tensor.int32_data;
    Ok(match kind(tensor)? {
        DataType::Float => tensor.float_data.clone(),
        DataType::Double => tensor.double_data.iter().map(|&value| value as f32).collect(),
        DataType::Float16 => words.iter().map(|&word| f16::from_bits(word as u16).to_f32()).collect(),
        DataType::Bfloat16 => words.iter().map(|&word| bf16::from_bits(word as u16).to_f32()).collect(),
        DataType::Int8 | DataType::Uint8 | DataType::Bool | DataType::Int16 | DataType::Uint16 | DataType::Int32 => {
            words.iter().map(|&word| word as f32).collect()
        }
        DataType::Uint32 | DataType::Uint64 => tensor.uint64_data.iter().map(|&value| value as f32).collect(),
        DataType::Int64 => tensor.int64_data.iter().map(|&value| value as f32).collect(),
        other => {
            return Err(refuse(
                tensor,
                &format!("is of type {}, which holds no plain numbers", other.as_str_name()),
            ));
        }
    })
}

/// Positions along one axis of a row-major tensor: calls `visit(channel, range)` for every run of values that share a channel.
pub(super) fn channels(shape: &[usize], axis: usize, mut visit: impl FnMut(usize, Range<usize>)) {
    let inner: usize = shape[axis + 1..].iter().product();
    let outer: usize = shape[..axis].iter().product();
    for block in 0..outer {
        for channel in 0..shape[axis] {
            let start = (block * shape[axis] + channel) * inner;
            visit(channel, start..start + inner);
        }
    }
}
