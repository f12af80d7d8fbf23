//! Constants: tensors whose elements are looked at.

use bytes::Bytes;
use plimsoll_runtime::onnx::TensorProto;
use plimsoll_runtime::onnx::tensor_proto::{DataLocation, DataType};
use plimsoll_runtime::onnx::weights;

use crate::graph::serialize::spilled;

/// A tensor of elements of a fixed width.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Constant {
    pub(super) kind: DataType,
    pub(super) shape: Vec<usize>,
    /// Little-endian, in row-major order; they fill the shape.
    pub(super) bytes: Bytes,
}

/// The bytes of an element; `None` for texts, complex numbers and elements of less than a byte.
pub(super) fn width(kind: DataType) -> Option<usize> {
    Some(match kind {
        DataType::Bool | DataType::Int8 | DataType::Uint8 => 1,
        DataType::Int16 | DataType::Uint16 | DataType::Float16 | DataType::Bfloat16 => 2,
        DataType::Int32 | DataType::Uint32 | DataType::Float => 4,
        DataType::Int64 | DataType::Uint64 | DataType::Double => 8,
        _ => return None,
    })
}

impl Constant {
    /// The values of `tensor`, which stay where they are where they are raw bytes; `None` where their width is not fixed or they do not
    /// fill the shape.
    pub(super) fn of(tensor: &TensorProto) -> Option<Self> {
        if tensor.data_location() == DataLocation::External {
            return None;
        }
        let kind = DataType::try_from(tensor.data_type()).ok()?;
        let (width, shape) = (width(kind)?, weights::shape(tensor).ok()?);
        let words = &tensor.int32_data;
        let raw = tensor.raw_data.as_ref().filter(|raw| !raw.is_empty());
        let bytes: Bytes = match raw {
            Some(raw) => raw.clone(),
            None => match kind {
                DataType::Float => little_endian(&tensor.float_data, |value| value.to_le_bytes()),
                DataType::Double => little_endian(&tensor.double_data, |value| value.to_le_bytes()),
                DataType::Int64 => little_endian(&tensor.int64_data, |value| value.to_le_bytes()),
                DataType::Uint64 => little_endian(&tensor.uint64_data, |value| value.to_le_bytes()),
                DataType::Uint32 => little_endian(&tensor.uint64_data, |value| (value as u32).to_le_bytes()),
                // Narrower ones lie one in a word (onnx.proto, `TensorProto.int32_data`).
                _ => match width {
                    1 => little_endian(words, |value| [value as u8]),
                    2 => little_endian(words, |value| (value as u16).to_le_bytes()),
                    _ => little_endian(words, |value| value.to_le_bytes()),
                },
            }
            .into(),
        };
        (bytes.len() == width * shape.iter().product::<usize>()).then_some(Self { kind, shape, bytes })
    }

    /// Of new values.
    pub(super) fn made(kind: DataType, shape: Vec<usize>, bytes: Vec<u8>) -> Self {
        Self {
            kind,
            shape,
            bytes: spilled(bytes),
        }
    }

    /// Of 64-bit integers.
    pub(super) fn of_integers(shape: Vec<usize>, values: &[i64]) -> Self {
        Self::made(DataType::Int64, shape, little_endian(values, |value| value.to_le_bytes()))
    }

    /// The tensor of that name.
    pub(super) fn tensor(self, name: &str) -> TensorProto {
        TensorProto {
            name: Some(name.to_owned()),
            dims: self.shape.iter().map(|&size| size as i64).collect(),
            data_type: Some(self.kind as i32),
            raw_data: Some(self.bytes),
            ..TensorProto::default()
        }
    }

    /// The bytes of an element.
    pub(super) fn width(&self) -> usize {
        width(self.kind).unwrap_or(1)
    }

    /// How many elements there are.
    pub(super) fn count(&self) -> usize {
        self.bytes.len() / self.width()
    }

    /// The elements, where they are 32- or 64-bit integers.
    pub(super) fn integers(&self) -> Option<Vec<i64>> {
        match self.kind {
            DataType::Int64 => Some(self.words(i64::from_le_bytes)),
            DataType::Int32 => Some(self.words(|word| i64::from(i32::from_le_bytes(word)))),
            _ => None,
        }
    }

    /// The elements, each made of its bytes.
    pub(super) fn words<const N: usize, T>(&self, of: impl Fn([u8; N]) -> T) -> Vec<T> {
        self.bytes.as_chunks::<N>().0.iter().map(|word| of(*word)).collect()
    }
}

/// The bytes of `values`, one after another.
pub(super) fn little_endian<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| bytes(*value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_and_raw_values_are_the_same_constant() {
        let raw = crate::graph::tensor("t", DataType::Int8, &[3], vec![1, 254, 3]);
        let typed = TensorProto {
            raw_data: None,
            int32_data: vec![1, -2, 3],
            ..raw.clone()
        };
        assert_eq!(Constant::of(&typed), Constant::of(&raw));
        assert_eq!(Constant::of(&typed).unwrap().tensor("t"), raw);
        let unfilled = TensorProto { dims: vec![4], ..raw };
        assert_eq!(Constant::of(&unfilled), None);
    }
}
