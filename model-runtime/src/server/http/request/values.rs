//! The values of a tensor: flat, or nested as its shape.

use std::borrow::Cow;

use half::{bf16, f16};
use plimsoll_package::manifest::Datatype;

use super::super::json::{Reader, is_number};
use crate::engine::Data;
use crate::engine::tensor::element_count;

/// Reads the next value as those of a tensor.
///
/// # Errors
/// Where it is no JSON, more than the shape takes, not nested as it, or does not fit the datatype.
pub(super) fn read(json: &mut Reader, datatype: Datatype, shape: &[usize]) -> Result<Data, String> {
    macro_rules! read {
        ($($name:ident),*) => {
            match datatype { $(Datatype::$name => Values::read(json, datatype, shape).map(Data::$name)),* }
        };
    }
    read!(
        Bool, Uint8, Uint16, Uint32, Uint64, Int8, Int16, Int32, Int64, Fp16, Bf16, Fp32, Fp64, Bytes
    )
}

struct Values<'a, T> {
    datatype: Datatype,
    shape: &'a [usize],
    /// How many the shape takes.
    count: usize,
    read: Vec<T>,
    /// How deep they lie, once one was met: 1 where they are flat, the rank where they are nested.
    depth: Option<usize>,
}

impl<'a, T: Element> Values<'a, T> {
    fn read(json: &mut Reader, datatype: Datatype, shape: &'a [usize]) -> Result<Vec<T>, String> {
        let count = element_count(shape).ok_or_else(|| format!("shape {shape:?} is more than memory holds"))?;
        let mut values = Self {
            datatype,
            shape,
            count,
            // A shape is a few bytes of a body: it may not make us take memory that the values do not fill.
            read: Vec::with_capacity(count.min(4096)),
            depth: None,
        };
        values.next(json, 0)?;
        Ok(values.read)
    }

    /// A list at that depth, or a value there.
    fn next(&mut self, json: &mut Reader, depth: usize) -> Result<(), String> {
        match json.peek() {
            Some(b'[') => self.list(json, depth),
            Some(b'-' | b'0'..=b'9') => {
                let number = T::number(json.rest()).filter(|_| is_number(json.rest()));
                let Some((value, length)) = number else {
                    return Err(json.wrong("invalid number"));
                };
                self.push(json, depth, value, || String::from_utf8_lossy(&json.rest()[..length]).into_owned())?;
                json.advance(length);
                Ok(())
            }
            Some(b'"') => {
                let text = json.string()?;
                self.push(json, depth, T::text(text), || "a string".to_owned())
            }
            Some(b't' | b'f') => {
                let value: bool = json.value()?;
                self.push(json, depth, T::boolean(value), || value.to_string())
            }
            Some(b'n') => {
                json.value::<()>()?;
                self.push(json, depth, None, || "null".to_owned())
            }
            _ => Err(json.wrong(&format!("expected a list of {} values", self.datatype))),
        }
    }

    fn list(&mut self, json: &mut Reader, depth: usize) -> Result<(), String> {
        let shape = self.shape;
        if depth >= shape.len().max(1) {
            return Err(json.wrong(&format!("data is nested deeper than shape {shape:?}")));
        }
        let length = json.list(|json| self.next(json, depth + 1))?;
        // An empty list is flat: it holds the values of a shape that has none.
        let nested = depth > 0 || self.depth.map_or(length > 0, |depth| depth > 1);
        match shape.get(depth) {
            Some(&expected) if nested && expected != length => Err(json.wrong(&format!(
                "a list at depth {depth} holds {length} values, shape {shape:?} says {expected}"
            ))),
            _ => Ok(()),
        }
    }

    /// Takes a value, `None` where it does not fit; `written` is how the client wrote it.
    #[inline]
    fn push(&mut self, json: &Reader, depth: usize, value: Option<T>, written: impl FnOnce() -> String) -> Result<(), String> {
        let shape = self.shape;
        if self.depth != Some(depth) {
            let fits = depth == 1 || depth == shape.len();
            if depth == 0 || !fits || self.depth.is_some() {
                return Err(json.wrong(&format!("data is neither a flat list nor nested as shape {shape:?}")));
            }
            self.depth = Some(depth);
        }
        if self.read.len() == self.count {
            return Err(json.wrong(&format!("shape {shape:?} takes {} values, more were given", self.count)));
        }
        let value = value.ok_or_else(|| json.wrong(&format!("{} does not fit {}", written(), self.datatype)))?;
        self.read.push(value);
        Ok(())
    }
}

/// How a datatype takes a JSON value; `None` where the value does not fit.
trait Element: Sized {
    fn boolean(_: bool) -> Option<Self> {
        None
    }
    fn text(_: Cow<'_, str>) -> Option<Self> {
        None
    }
    /// The number that `text` begins with, and its length in bytes; `None` where it begins with none.
    fn number(text: &[u8]) -> Option<(Option<Self>, usize)>;
}

impl Element for bool {
    fn boolean(value: bool) -> Option<Self> {
        Some(value)
    }
    fn number(text: &[u8]) -> Option<(Option<Self>, usize)> {
        let (value, length) = u8::number(text)?;
        Some((value.filter(|&value| value <= 1).map(|value| value == 1), length))
    }
}

impl Element for Vec<u8> {
    fn text(value: Cow<'_, str>) -> Option<Self> {
        Some(value.into_owned().into_bytes())
    }
    fn number(text: &[u8]) -> Option<(Option<Self>, usize)> {
        let (_, length) = f64::number(text)?;
        Some((None, length))
    }
}

/// A whole number and its length, where neither a point nor an exponent follows and 64 bits hold its digits.
fn whole(text: &[u8]) -> Option<(i128, usize)> {
    let negative = text.first() == Some(&b'-');
    let begin = usize::from(negative);
    let (mut value, mut end) = (0_u64, begin);
    while let Some(digit) = text.get(end).filter(|byte| byte.is_ascii_digit()) {
        value = value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))?;
        end += 1;
    }
    let goes_on = matches!(text.get(end), Some(b'.' | b'e' | b'E'));
    let value = if negative { -i128::from(value) } else { value.into() };
    (end > begin && !goes_on).then_some((value, end))
}

macro_rules! integers {
    ($($type:ty),*) => {
        $(impl Element for $type {
            fn number(text: &[u8]) -> Option<(Option<Self>, usize)> {
                if let Some((value, length)) = whole(text) {
                    return Some((value.try_into().ok(), length));
                }
                // `1.0` and `1e3`, as some languages write whole numbers; beyond 2^53 a float is no longer exact.
                let (value, length) = fast_float2::parse_partial::<f64, _>(text).ok()?;
                let exact = value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0;
                Some((exact.then(|| (value as i64).try_into().ok()).flatten(), length))
            }
        })*
    };
}
integers!(u8, u16, u32, u64, i8, i16, i32, i64);

macro_rules! floats {
    ($($type:ty: $read:ty, $convert:expr),*) => {
        $(impl Element for $type {
            fn number(text: &[u8]) -> Option<(Option<Self>, usize)> {
                let (value, length) = fast_float2::parse_partial::<$read, _>(text).ok()?;
                let value: $type = $convert(value);
                Some((value.is_finite().then_some(value), length))
            }
        })*
    };
}
floats!(f16: f64, f16::from_f64, bf16: f64, bf16::from_f64, f32: f32, |value| value, f64: f64, |value| value);
