//! Tensors as bytes: little-endian values in row-major order, a boolean as one byte, a string of bytes after its length in 32 bits
//! (Triton, "Binary Tensor Data Extension"; the raw contents of the gRPC protocol are the same).

use half::{bf16, f16};
use plimsoll_package::manifest::Datatype;

use super::{Data, element_count};

/// Bytes that are no tensor of the type and shape that they are said to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BytesError {
    /// The shape's product overflows.
    #[error("shape {0:?} is more than memory holds")]
    Shape(Vec<usize>),
    /// Too few bytes, or too many.
    #[error("{datatype} of shape {shape:?} takes {expected} bytes, {given} were given")]
    Length {
        /// The type.
        datatype: Datatype,
        /// The shape.
        shape: Vec<usize>,
        /// How many bytes fill it.
        expected: usize,
        /// How many there are.
        given: usize,
    },
    /// A string's length leads beyond the end, or bytes are left after the last.
    #[error("the lengths of the {expected} strings of shape {shape:?} do not add up to the {given} bytes that were given")]
    Strings {
        /// The shape.
        shape: Vec<usize>,
        /// How many strings fill it.
        expected: usize,
        /// How many bytes there are.
        given: usize,
    },
}

/// Bytes of one value of that type; `None` for strings, which have a length each.
fn width(datatype: Datatype) -> Option<usize> {
    Some(match datatype {
        Datatype::Bool | Datatype::Uint8 | Datatype::Int8 => 1,
        Datatype::Uint16 | Datatype::Int16 | Datatype::Fp16 | Datatype::Bf16 => 2,
        Datatype::Uint32 | Datatype::Int32 | Datatype::Fp32 => 4,
        Datatype::Uint64 | Datatype::Int64 | Datatype::Fp64 => 8,
        Datatype::Bytes => return None,
    })
}

impl Data {
    /// Reads the values of a tensor of that type and shape.
    ///
    /// # Errors
    /// [`BytesError`] where `bytes` are not as many as fill the shape.
    pub fn from_bytes(datatype: Datatype, shape: &[usize], bytes: &[u8]) -> Result<Self, BytesError> {
        let count = element_count(shape).ok_or_else(|| BytesError::Shape(shape.to_vec()))?;
        let Some(width) = width(datatype) else {
            return strings(shape, count, bytes).map(Self::Bytes);
        };
        let expected = count.checked_mul(width).ok_or_else(|| BytesError::Shape(shape.to_vec()))?;
        if bytes.len() != expected {
            return Err(BytesError::Length {
                datatype,
                shape: shape.to_vec(),
                expected,
                given: bytes.len(),
            });
        }
        macro_rules! read {
            ($($name:ident: $type:ty),*) => {
                match datatype {
                    Datatype::Bool => Self::Bool(bytes.iter().map(|&byte| byte != 0).collect()),
                    $(Datatype::$name => Self::$name(values::<$type>(bytes)),)*
                    Datatype::Bytes => Self::Bytes(vec![]),
                }
            };
        }
        Ok(read!(
            Uint8: u8, Uint16: u16, Uint32: u32, Uint64: u64, Int8: i8, Int16: i16, Int32: i32, Int64: i64,
            Fp16: f16, Bf16: bf16, Fp32: f32, Fp64: f64
        ))
    }

    /// How many bytes [`write_bytes`](Self::write_bytes) appends.
    #[must_use]
    pub fn byte_count(&self) -> usize {
        match self {
            Self::Bytes(values) => values.iter().map(|value| 4 + value.len()).sum(),
            other => other.len() * width(other.datatype()).unwrap_or_default(),
        }
    }

    /// Appends the values to `out`.
    pub fn write_bytes(&self, out: &mut Vec<u8>) {
        macro_rules! write {
            ($($name:ident),*) => {
                match self {
                    Self::Bool(values) => out.extend(values.iter().map(|&value| u8::from(value))),
                    $(Self::$name(values) => extend(out, values),)*
                    Self::Bytes(values) => for value in values {
                        // A tensor with a string of 4 GiB does not fit into any message.
                        out.extend((value.len() as u32).to_le_bytes());
                        out.extend(value);
                    },
                }
            };
        }
        write!(Uint8, Uint16, Uint32, Uint64, Int8, Int16, Int32, Int64, Fp16, Bf16, Fp32, Fp64);
    }
}

#[cfg(not(target_endian = "little"))]
compile_error!("tensors are copied as little-endian bytes");

fn values<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    // Copies, since the bytes of a message are aligned to nothing.
    bytemuck::pod_collect_to_vec(bytes)
}

fn extend<T: bytemuck::Pod>(out: &mut Vec<u8>, values: &[T]) {
    out.extend_from_slice(bytemuck::cast_slice(values));
}

fn strings(shape: &[usize], count: usize, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BytesError> {
    let broken = || BytesError::Strings {
        shape: shape.to_vec(),
        expected: count,
        given: bytes.len(),
    };
    // Each has four bytes of length at least, so that no shape can ask for more memory than the message took.
    if bytes.len() / 4 < count {
        return Err(broken());
    }
    let mut rest = bytes;
    let mut strings = Vec::with_capacity(count);
    for _ in 0..count {
        let (length, after) = rest.split_first_chunk::<4>().ok_or_else(broken)?;
        let length = u32::from_le_bytes(*length) as usize;
        let (string, after) = after.split_at_checked(length).ok_or_else(broken)?;
        strings.push(string.to_vec());
        rest = after;
    }
    if rest.is_empty() { Ok(strings) } else { Err(broken()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use strum::IntoEnumIterator as _;

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_protocol() {
        let bytes = |data: Data| {
            let mut out = vec![];
            data.write_bytes(&mut out);
            assert_eq!(out.len(), data.byte_count());
            out
        };
        assert_eq!(bytes(vec![1.0_f32, -2.0].into()), [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
        assert_eq!(bytes(vec![258_u16].into()), [2, 1]);
        assert_eq!(bytes(vec![true, false].into()), [1, 0]);
        assert_eq!(bytes(vec![b"ab".to_vec(), vec![]].into()), [2, 0, 0, 0, b'a', b'b', 0, 0, 0, 0]);
    }

    #[test]
    fn what_does_not_fill_the_shape_is_refused_in_words() {
        let refuse = |datatype, shape: &[usize], bytes: &[u8]| Data::from_bytes(datatype, shape, bytes).unwrap_err().to_string();
        assert_eq!(
            refuse(Datatype::Fp32, &[2, 2], &[0; 12]),
            "FP32 of shape [2, 2] takes 16 bytes, 12 were given"
        );
        assert_eq!(
            refuse(Datatype::Fp64, &[usize::MAX, 2], &[]),
            format!("shape [{}, 2] is more than memory holds", usize::MAX)
        );
        assert_eq!(
            refuse(Datatype::Int64, &[usize::MAX / 2], &[]),
            format!("shape [{}] is more than memory holds", usize::MAX / 2)
        );
        let strings = "the lengths of the 1 strings of shape [1] do not add up to the";
        for bytes in [&[9, 0, 0, 0, 1][..], &[0, 0, 0], &[0, 0, 0, 0, 7], &[255, 255, 255, 255]] {
            assert!(refuse(Datatype::Bytes, &[1], bytes).starts_with(strings), "{bytes:?}");
        }
        // A trillion strings in no bytes take no memory.
        assert!(refuse(Datatype::Bytes, &[1 << 40], &[]).starts_with("the lengths of the 1099511627776 strings"));
    }

    proptest! {
        #[test]
        fn any_tensor_is_read_back(shape in prop::collection::vec(0_usize..4, 0..4), seed in any::<u64>()) {
            let count: usize = shape.iter().product();
            for datatype in Datatype::iter() {
                let values: Vec<f64> = (0..count as u64).map(|i| (seed.wrapping_mul(i + 1) % 200) as f64 - 100.0).collect();
                let data = Data::from_f64(datatype, &values);
                let mut bytes = vec![];
                data.write_bytes(&mut bytes);
                prop_assert_eq!(Data::from_bytes(datatype, &shape, &bytes), Ok(data));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(shape in prop::collection::vec(0_usize..5, 0..4), bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            for datatype in Datatype::iter() {
                let _ = Data::from_bytes(datatype, &shape, &bytes);
            }
        }
    }
}
