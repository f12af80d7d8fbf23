//! Tensors: a shape and typed values in row-major order.

use half::{bf16, f16};
use plimsoll_package::manifest::Datatype;

mod bytes;
mod rows;

pub use bytes::BytesError;

/// A tensor whose values fill its shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

/// The values of a tensor, in row-major order.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Data {
    Bool(Vec<bool>),
    Uint8(Vec<u8>),
    Uint16(Vec<u16>),
    Uint32(Vec<u32>),
    Uint64(Vec<u64>),
    Int8(Vec<i8>),
    Int16(Vec<i16>),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Fp16(Vec<f16>),
    Bf16(Vec<bf16>),
    Fp32(Vec<f32>),
    Fp64(Vec<f64>),
    Bytes(Vec<Vec<u8>>),
}

/// Runs `$body` with `$values` bound to the vector of whichever type `$data` holds.
macro_rules! for_each_type {
    ($data:expr, $values:ident => $body:expr) => {
        match $data {
            Self::Bool($values) => $body,
            Self::Uint8($values) => $body,
            Self::Uint16($values) => $body,
            Self::Uint32($values) => $body,
            Self::Uint64($values) => $body,
            Self::Int8($values) => $body,
            Self::Int16($values) => $body,
            Self::Int32($values) => $body,
            Self::Int64($values) => $body,
            Self::Fp16($values) => $body,
            Self::Bf16($values) => $body,
            Self::Fp32($values) => $body,
            Self::Fp64($values) => $body,
            Self::Bytes($values) => $body,
        }
    };
}

/// Values that do not fill a shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shape {shape:?} takes {expected} values, {given} were given")]
pub struct ShapeError {
    /// The shape.
    pub shape: Vec<usize>,
    /// How many values it takes; `more than memory holds` where their number overflows.
    pub expected: String,
    /// How many were given.
    pub given: usize,
}

/// The number of values of a tensor of that shape; `None` where it overflows.
#[must_use]
pub fn element_count(shape: &[usize]) -> Option<usize> {
    // A zero anywhere makes the product zero, however large the other dimensions are.
    if shape.contains(&0) {
        Some(0)
    } else {
        shape.iter().try_fold(1_usize, |count, &size| count.checked_mul(size))
    }
}

impl Data {
    /// The values' type.
    #[must_use]
    pub fn datatype(&self) -> Datatype {
        match self {
            Self::Bool(_) => Datatype::Bool,
            Self::Uint8(_) => Datatype::Uint8,
            Self::Uint16(_) => Datatype::Uint16,
            Self::Uint32(_) => Datatype::Uint32,
            Self::Uint64(_) => Datatype::Uint64,
            Self::Int8(_) => Datatype::Int8,
            Self::Int16(_) => Datatype::Int16,
            Self::Int32(_) => Datatype::Int32,
            Self::Int64(_) => Datatype::Int64,
            Self::Fp16(_) => Datatype::Fp16,
            Self::Bf16(_) => Datatype::Bf16,
            Self::Fp32(_) => Datatype::Fp32,
            Self::Fp64(_) => Datatype::Fp64,
            Self::Bytes(_) => Datatype::Bytes,
        }
    }

    /// How many values there are.
    #[must_use]
    pub fn len(&self) -> usize {
        for_each_type!(self, values => values.len())
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `count` zeros (`false`, empty strings).
    #[must_use]
    pub fn zeros(datatype: Datatype, count: usize) -> Self {
        match datatype {
            Datatype::Bool => Self::Bool(vec![false; count]),
            Datatype::Bytes => Self::Bytes(vec![vec![]; count]),
            numeric => Self::from_f64(numeric, &vec![0.0; count]),
        }
    }

    /// The values converted to `datatype`: integers saturate, a boolean is whether the value is not zero, and a string of bytes is the
    /// number as text.
    #[must_use]
    pub fn from_f64(datatype: Datatype, values: &[f64]) -> Self {
        macro_rules! converted {
            ($($name:ident: $convert:expr),*) => {
                match datatype { $(Datatype::$name => Self::$name(values.iter().map($convert).collect())),* }
            };
        }
        converted!(
            Bool: |&v| v != 0.0, Uint8: |&v| v as u8, Uint16: |&v| v as u16, Uint32: |&v| v as u32, Uint64: |&v| v as u64,
            Int8: |&v| v as i8, Int16: |&v| v as i16, Int32: |&v| v as i32, Int64: |&v| v as i64,
            Fp16: |&v| f16::from_f64(v), Bf16: |&v| bf16::from_f64(v), Fp32: |&v| v as f32, Fp64: |&v| v,
            Bytes: |v| v.to_string().into_bytes()
        )
    }

    /// The values as double-precision floats (64-bit integers beyond 2^53 are rounded), booleans as 0 and 1; `None` for strings of bytes.
    #[must_use]
    pub fn to_f64(&self) -> Option<Vec<f64>> {
        Some(match self {
            Self::Bool(values) => values.iter().map(|&v| f64::from(u8::from(v))).collect(),
            Self::Uint8(values) => values.iter().map(|&v| f64::from(v)).collect(),
            Self::Uint16(values) => values.iter().map(|&v| f64::from(v)).collect(),
            Self::Uint32(values) => values.iter().map(|&v| f64::from(v)).collect(),
            Self::Uint64(values) => values.iter().map(|&v| v as f64).collect(),
            Self::Int8(values) => values.iter().map(|&v| f64::from(v)).collect(),
            Self::Int16(values) => values.iter().map(|&v| f64::from(v)).collect(),
            Self::Int32(values) => values.iter().map(|&v| f64::from(v)).collect(),
            Self::Int64(values) => values.iter().map(|&v| v as f64).collect(),
            Self::Fp16(values) => values.iter().map(|&v| v.to_f64()).collect(),
            Self::Bf16(values) => values.iter().map(|&v| v.to_f64()).collect(),
            Self::Fp32(values) => values.iter().map(|&v| f64::from(v)).collect(),
            Self::Fp64(values) => values.clone(),
            Self::Bytes(_) => return None,
        })
    }
}

macro_rules! from_vec {
    ($($name:ident: $type:ty),*) => {
        $(impl From<Vec<$type>> for Data {
            fn from(values: Vec<$type>) -> Self {
                Self::$name(values)
            }
        })*
    };
}
from_vec!(
    Bool: bool, Uint8: u8, Uint16: u16, Uint32: u32, Uint64: u64, Int8: i8, Int16: i16, Int32: i32, Int64: i64,
    Fp16: f16, Bf16: bf16, Fp32: f32, Fp64: f64, Bytes: Vec<u8>
);

impl Tensor {
    /// A tensor of that shape.
    ///
    /// # Errors
    /// [`ShapeError`] where `data` does not fill `shape`.
    pub fn new(shape: Vec<usize>, data: impl Into<Data>) -> Result<Self, ShapeError> {
        let data = data.into();
        match element_count(&shape) {
            Some(count) if count == data.len() => Ok(Self { shape, data }),
            count => {
                let expected = count.map_or_else(|| "more than memory holds".to_owned(), |count| count.to_string());
                Err(ShapeError {
                    shape,
                    expected,
                    given: data.len(),
                })
            }
        }
    }

    /// Zeros of that type and shape.
    ///
    /// # Errors
    /// [`ShapeError`] where their number overflows.
    pub fn zeros(datatype: Datatype, shape: Vec<usize>) -> Result<Self, ShapeError> {
        let count = element_count(&shape).filter(|&count| count < isize::MAX as usize / 16);
        Self::new(shape, Data::zeros(datatype, count.unwrap_or_default()))
    }

    /// The dimensions.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values.
    #[must_use]
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// The values alone.
    #[must_use]
    pub fn into_data(self) -> Data {
        self.data
    }

    /// The values' type.
    #[must_use]
    pub fn datatype(&self) -> Datatype {
        self.data.datatype()
    }

    /// The values, where they are single-precision floats.
    #[must_use]
    pub fn as_f32(&self) -> Option<&[f32]> {
        if let Data::Fp32(values) = &self.data { Some(values) } else { None }
    }
}
