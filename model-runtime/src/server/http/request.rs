//! Inference requests: JSON read straight into typed tensors, and tensors as bytes behind it (Triton, "Binary Tensor Data Extension").

use std::fmt;
use std::marker::PhantomData;

use half::{bf16, f16};
use plimsoll_package::manifest::Datatype;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::engine::tensor::element_count;
use crate::engine::{Data, Tensor};
use crate::server::inference::{InferRequest, LENGTH_MAX, Options, RequestedOutput, check_extensions};
use crate::server::text::Pooling;

/// Reads the body of a request: JSON of `json_length` bytes and tensors as bytes behind it, or JSON alone. Gives the request, and whether
/// outputs of which it says nothing come as bytes.
///
/// # Errors
/// In words for the client: not JSON, a field of the wrong kind, values that do not fill the shape or fit the datatype, an extension
/// that is not there.
pub(in crate::server) fn parse(body: &[u8], json_length: Option<usize>) -> Result<(InferRequest, bool), String> {
    #[derive(Deserialize)]
    struct Raw {
        #[serde(default)]
        id: Option<String>,
        #[serde(default)]
        parameters: Parameters,
        inputs: List<Input>,
        #[serde(default)]
        outputs: Option<List<Wanted>>,
    }
    #[derive(Deserialize)]
    struct Wanted {
        name: String,
        #[serde(default)]
        parameters: Parameters,
    }
    let json_length = json_length.unwrap_or(body.len());
    let (json, mut bytes) = body.split_at_checked(json_length).ok_or_else(|| {
        format!(
            "Inference-Header-Content-Length is {json_length}, the body has {} bytes",
            body.len()
        )
    })?;
    let raw: Raw = serde_json::from_slice(json).map_err(|error| format!("the body is not an inference request: {error}"))?;
    raw.parameters.check()?;
    let List(inputs) = raw.inputs;
    let inputs = inputs
        .into_iter()
        .map(|input| input.fill(&mut bytes))
        .collect::<Result<Vec<_>, _>>()?;
    if !bytes.is_empty() {
        return Err(format!("{} bytes are left behind the last binary tensor", bytes.len()));
    }
    // An empty list is what some clients send for "all".
    let List(outputs) = raw.outputs.unwrap_or_default();
    let outputs = outputs.into_iter().map(|wanted| {
        wanted
            .parameters
            .check()
            .map_err(|text| format!("output `{}`: {text}", wanted.name))?;
        Ok(RequestedOutput {
            classes: wanted.parameters.classification,
            binary: wanted.parameters.binary_data,
            name: wanted.name,
        })
    });
    let request = InferRequest {
        id: raw.id,
        inputs,
        outputs: outputs.collect::<Result<_, String>>()?,
        options: Options {
            priority: raw.parameters.priority,
            timeout: raw.parameters.timeout,
            pooling: raw.parameters.pooling,
            normalize: raw.parameters.normalize,
            truncate: raw.parameters.truncate,
        },
    };
    Ok((request, raw.parameters.binary_data_output.unwrap_or(false)))
}

/// The parameters that are understood; all others are for servers that know them.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Parameters {
    binary_data: Option<bool>,
    binary_data_output: Option<bool>,
    binary_data_size: Option<usize>,
    classification: usize,
    priority: Option<u64>,
    timeout: Option<u64>,
    pooling: Option<Pooling>,
    normalize: Option<bool>,
    truncate: Option<bool>,
    shared_memory_region: Option<IgnoredAny>,
    #[serde(deserialize_with = "sequence")]
    sequence_id: bool,
}

/// Whether a sequence is named: clients send 0 or nothing for none.
fn sequence<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    let id = serde_json::Value::deserialize(deserializer)?;
    Ok(!id.is_null() && id != 0 && id != "")
}

impl Parameters {
    /// Refuses what changes the meaning of a request and is not there.
    fn check(&self) -> Result<(), String> {
        check_extensions(self.shared_memory_region.is_some(), self.sequence_id)
    }
}

struct Input {
    name: String,
    datatype: Datatype,
    shape: Vec<usize>,
    values: Given,
}

enum Given {
    Here(Data),
    /// So many of the bytes behind the JSON.
    Behind(usize),
}

impl Input {
    /// The tensor, its bytes taken from those behind the JSON.
    fn fill(self, bytes: &mut &[u8]) -> Result<(String, Tensor), String> {
        let Self {
            name,
            datatype,
            shape,
            values,
        } = self;
        let data = match values {
            Given::Here(data) => data,
            Given::Behind(size) => {
                let (own, rest) = bytes.split_at_checked(size).ok_or_else(|| {
                    format!(
                        "input `{name}` has binary_data_size {size}, {} bytes are left in the body",
                        bytes.len()
                    )
                })?;
                *bytes = rest;
                Data::from_bytes(datatype, &shape, own).map_err(|error| format!("input `{name}`: {error}"))?
            }
        };
        let tensor = Tensor::new(shape, data).map_err(|error| format!("input `{name}`: {error}"))?;
        Ok((name, tensor))
    }
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InputVisitor)
    }
}

struct InputVisitor;

impl<'de> Visitor<'de> for InputVisitor {
    type Value = Input;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an input with name, datatype, shape and data")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Input, A::Error> {
        let (mut name, mut datatype, mut shape): (Option<String>, Option<Datatype>, Option<Vec<usize>>) = (None, None, None);
        let (mut data, mut unread): (Option<Data>, Option<&RawValue>) = (None, None);
        let mut behind = None;
        let named = |name: &Option<String>, text: String| match name {
            Some(name) => A::Error::custom(format!("input `{name}`: {text}")),
            None => A::Error::custom(text),
        };
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            match &*key {
                "name" => name = Some(map.next_value()?),
                "datatype" => datatype = Some(map.next_value()?),
                "shape" => shape = Some(map.next_value::<List<usize>>()?.0),
                "data" => match (datatype, &shape) {
                    (Some(datatype), Some(shape)) => {
                        data = Some(map.next_value_seed(Values {
                            datatype,
                            shape,
                            name: name.as_deref(),
                        })?);
                    }
                    // Its type is told only after it.
                    _ => unread = Some(map.next_value()?),
                },
                "parameters" => {
                    let parameters: Parameters = map.next_value()?;
                    parameters.check().map_err(|text| named(&name, text))?;
                    behind = parameters.binary_data_size;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let name = name.ok_or_else(|| A::Error::missing_field("name"))?;
        let missing = |field: &str| A::Error::custom(format!("input `{name}` has no {field}"));
        let datatype = datatype.ok_or_else(|| missing("datatype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let values = match (data, unread, behind) {
            (None, None, Some(size)) => Given::Behind(size),
            (None, None, None) => return Err(missing("data")),
            (_, _, Some(_)) => return Err(A::Error::custom(format!("input `{name}` has both data and binary_data_size"))),
            (Some(data), _, None) => Given::Here(data),
            (None, Some(unread), None) => {
                let mut deserializer = serde_json::Deserializer::from_str(unread.get());
                let values = Values {
                    datatype,
                    shape: &shape,
                    name: Some(&name),
                };
                Given::Here(values.deserialize(&mut deserializer).map_err(A::Error::custom)?)
            }
        };
        Ok(Input {
            name,
            datatype,
            shape,
            values,
        })
    }
}

/// A list of what a request may name: no more of them than any model has, so that a few bytes of a body each do not become many of memory.
struct List<T>(Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(vec![])
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ListVisitor(PhantomData))
    }
}

struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ListVisitor<T> {
    type Value = List<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut given: A) -> Result<List<T>, A::Error> {
        let mut list = vec![];
        while let Some(item) = given.next_element()? {
            if list.len() == LENGTH_MAX {
                return Err(A::Error::custom(format!(
                    "a list is longer than the {LENGTH_MAX} that any model has"
                )));
            }
            list.push(item);
        }
        Ok(List(list))
    }
}

/// The values of a tensor: flat, or nested as its shape.
#[derive(Clone, Copy)]
struct Values<'a> {
    datatype: Datatype,
    shape: &'a [usize],
    name: Option<&'a str>,
}

impl<'de> DeserializeSeed<'de> for Values<'_> {
    type Value = Data;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Data, D::Error> {
        macro_rules! read {
            ($($name:ident),*) => {
                match self.datatype { $(Datatype::$name => self.read(deserializer).map(Data::$name)),* }
            };
        }
        read!(
            Bool, Uint8, Uint16, Uint32, Uint64, Int8, Int16, Int32, Int64, Fp16, Bf16, Fp32, Fp64, Bytes
        )
    }
}

impl Values<'_> {
    fn read<'de, T: Element, D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<T>, D::Error> {
        let context = |text: String| match self.name {
            Some(name) => D::Error::custom(format!("input `{name}`: {text}")),
            None => D::Error::custom(text),
        };
        let count = element_count(self.shape).ok_or_else(|| context(format!("shape {:?} is more than memory holds", self.shape)))?;
        // A shape is a few bytes of a body: it may not make us take memory that the values do not fill.
        let mut out = Vec::with_capacity(count.min(4096));
        let mut leaf_depth = None;
        Level {
            values: self,
            count,
            depth: 0,
            out: &mut out,
            leaf_depth: &mut leaf_depth,
        }
        .deserialize(deserializer)?;
        Ok(out)
    }
}

/// A list at `depth`, or a value there.
struct Level<'a, T> {
    values: Values<'a>,
    count: usize,
    depth: usize,
    out: &'a mut Vec<T>,
    /// How deep the values lie, once one was met: 1 where they are flat, the rank where they are nested.
    leaf_depth: &'a mut Option<usize>,
}

impl<T: Element> Level<'_, T> {
    fn refuse<E: Error>(&self, text: &str) -> E {
        match self.values.name {
            Some(name) => E::custom(format!("input `{name}`: {text}")),
            None => E::custom(text),
        }
    }

    fn push<E: Error>(self, value: Option<T>, written: &dyn fmt::Display) -> Result<(), E> {
        let (rank, shape, datatype) = (self.values.shape.len(), self.values.shape, self.values.datatype);
        let fits = self.depth == 1 || self.depth == rank;
        if self.depth == 0 || !fits || self.leaf_depth.is_some_and(|depth| depth != self.depth) {
            return Err(self.refuse(&format!("data is neither a flat list nor nested as shape {shape:?}")));
        }
        if self.out.len() == self.count {
            return Err(self.refuse(&format!("shape {shape:?} takes {} values, more were given", self.count)));
        }
        *self.leaf_depth = Some(self.depth);
        match value {
            Some(value) => {
                self.out.push(value);
                Ok(())
            }
            None => Err(self.refuse(&format!("{written} does not fit {datatype}"))),
        }
    }
}

impl<'de, T: Element> DeserializeSeed<'de> for Level<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Element> Visitor<'de> for Level<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {} values", self.values.datatype)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let shape = self.values.shape;
        if self.depth >= shape.len().max(1) {
            return Err(self.refuse(&format!("data is nested deeper than shape {shape:?}")));
        }
        let mut length = 0;
        loop {
            let (values, count, depth) = (self.values, self.count, self.depth + 1);
            let level = Level {
                values,
                count,
                depth,
                out: &mut *self.out,
                leaf_depth: &mut *self.leaf_depth,
            };
            match list.next_element_seed(level)? {
                Some(()) => length += 1,
                None => break,
            }
        }
        // An empty list is flat: it holds the values of a shape that has none.
        let nested = self.depth > 0 || self.leaf_depth.map_or(length > 0, |depth| depth > 1);
        if nested && shape.get(self.depth).is_some_and(|&size| size != length) {
            let expected = shape[self.depth];
            return Err(self.refuse(&format!(
                "a list at depth {} holds {length} values, shape {shape:?} says {expected}",
                self.depth
            )));
        }
        Ok(())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.push(T::boolean(value), &value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.push(T::unsigned(value), &value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.push(T::signed(value), &value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.push(T::float(value), &value)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        self.push(T::text(value), &"a string")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.push(None, &"null")
    }
}

/// How a datatype takes a JSON value; `None` where the value does not fit.
trait Element: Sized {
    fn boolean(_: bool) -> Option<Self> {
        None
    }
    fn unsigned(_: u64) -> Option<Self> {
        None
    }
    fn signed(_: i64) -> Option<Self> {
        None
    }
    fn float(_: f64) -> Option<Self> {
        None
    }
    fn text(_: &str) -> Option<Self> {
        None
    }
}

impl Element for bool {
    fn boolean(value: bool) -> Option<Self> {
        Some(value)
    }
    fn unsigned(value: u64) -> Option<Self> {
        (value <= 1).then_some(value == 1)
    }
}

impl Element for Vec<u8> {
    fn text(value: &str) -> Option<Self> {
        Some(value.as_bytes().to_vec())
    }
}

macro_rules! integers {
    ($($type:ty),*) => {
        $(impl Element for $type {
            fn unsigned(value: u64) -> Option<Self> {
                value.try_into().ok()
            }
            fn signed(value: i64) -> Option<Self> {
                value.try_into().ok()
            }
            // `1.0` and `1e3`, as some languages write whole numbers; beyond 2^53 a float is no longer exact.
            fn float(value: f64) -> Option<Self> {
                (value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0).then(|| (value as i64).try_into().ok())?
            }
        })*
    };
}
integers!(u8, u16, u32, u64, i8, i16, i32, i64);

macro_rules! floats {
    ($($type:ty: $convert:expr),*) => {
        $(impl Element for $type {
            fn unsigned(value: u64) -> Option<Self> {
                Self::float(value as f64)
            }
            fn signed(value: i64) -> Option<Self> {
                Self::float(value as f64)
            }
            fn float(value: f64) -> Option<Self> {
                let converted: $type = $convert(value);
                converted.is_finite().then_some(converted)
            }
        })*
    };
}
floats!(f16: f16::from_f64, bf16: bf16::from_f64, f32: |value| value as f32, f64: |value| value);

#[cfg(test)]
mod tests;
