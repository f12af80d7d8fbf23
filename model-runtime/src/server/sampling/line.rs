//! A sample as JSON lines: an object for each row, whose fields are the model's inputs, as the optimiser's evaluation data have them. What else
//! is known of the request stands in the field `_request`, which the optimiser passes over.

use std::time::UNIX_EPOCH;

use serde::ser::{Error as _, SerializeMap as _};
use serde::{Serialize, Serializer};

use super::Sample;
use crate::engine::{Data, Tensor};

/// The field of what is no input.
const REQUEST: &str = "_request";

/// Adds the sample's lines.
///
/// # Errors
/// Where JSON, or the optimiser, cannot hold an input.
pub(super) fn write(lines: &mut Vec<u8>, sample: &Sample, model: &str, version: &str, redacted: &[String]) -> serde_json::Result<()> {
    for row in 0..sample.rows.unwrap_or(1) {
        let row = sample.rows.map(|_| row);
        let line = Line {
            sample,
            row,
            request: Request {
                model,
                version,
                id: sample.id.as_deref(),
                time_ms: sample.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
                row,
                outputs: Outputs { sample, row },
                redacted,
            },
        };
        serde_json::to_writer(&mut *lines, &line)?;
        lines.push(b'\n');
    }
    Ok(())
}

struct Line<'a> {
    sample: &'a Sample,
    row: Option<usize>,
    request: Request<'a>,
}

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    /// Since 1970.
    time_ms: u64,
    /// Of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    row: Option<usize>,
    outputs: Outputs<'a>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    redacted: &'a [String],
}

struct Outputs<'a> {
    sample: &'a Sample,
    row: Option<usize>,
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, tensor) in &self.sample.inputs {
            if tensor.data().is_empty() {
                return Err(S::Error::custom(format!("input `{name}` is empty")));
            }
            map.serialize_entry(name, &Nested::of(tensor, self.row, true))?;
        }
        if self.sample.inputs.iter().all(|(name, _)| name != REQUEST) {
            map.serialize_entry(REQUEST, &self.request)?;
        }
        map.end()
    }
}

impl Serialize for Outputs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // An output that has not a row for each of the inputs' is that of the whole request.
        let row = |tensor: &Tensor| self.row.filter(|_| tensor.rows() == self.sample.rows);
        let outputs = self.sample.outputs.iter();
        serializer.collect_map(outputs.map(|(name, tensor)| (name, Nested::of(tensor, row(tensor), false))))
    }
}

/// Values as lists of the tensor's shape.
struct Nested<'a> {
    data: &'a Data,
    shape: &'a [usize],
    start: usize,
    /// Whether what JSON has no number for is refused rather than `null`.
    is_input: bool,
}

impl<'a> Nested<'a> {
    /// A row of the tensor, or all of it.
    fn of(tensor: &'a Tensor, row: Option<usize>, is_input: bool) -> Self {
        let (shape, start) = match (row, tensor.shape()) {
            (Some(row), [_, rest @ ..]) => (rest, row * rest.iter().product::<usize>()),
            (_, shape) => (shape, 0),
        };
        Self {
            data: tensor.data(),
            shape,
            start,
            is_input,
        }
    }

    fn number<S: Serializer>(&self, value: impl Serialize + Into<f64> + Copy, serializer: S) -> Result<S::Ok, S::Error> {
        if self.is_input && !value.into().is_finite() {
            return Err(S::Error::custom("an input is NaN or infinite"));
        }
        value.serialize(serializer)
    }
}

impl Serialize for Nested<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Some((size, shape)) = self.shape.split_first() {
            let width: usize = shape.iter().product();
            return serializer.collect_seq((0..*size).map(|index| Self {
                shape,
                start: self.start + index * width,
                ..*self
            }));
        }
        let index = self.start;
        match self.data {
            Data::Bool(values) => values[index].serialize(serializer),
            Data::Uint8(values) => values[index].serialize(serializer),
            Data::Uint16(values) => values[index].serialize(serializer),
            Data::Uint32(values) => values[index].serialize(serializer),
            Data::Uint64(values) => values[index].serialize(serializer),
            Data::Int8(values) => values[index].serialize(serializer),
            Data::Int16(values) => values[index].serialize(serializer),
            Data::Int32(values) => values[index].serialize(serializer),
            Data::Int64(values) => values[index].serialize(serializer),
            Data::Fp16(values) => self.number(values[index].to_f32(), serializer),
            Data::Bf16(values) => self.number(values[index].to_f32(), serializer),
            Data::Fp32(values) => self.number(values[index], serializer),
            Data::Fp64(values) => self.number(values[index], serializer),
            Data::Bytes(values) => {
                let text = str::from_utf8(&values[index]);
                text.map_err(|_| S::Error::custom("a string is not UTF-8"))?.serialize(serializer)
            }
        }
    }
}
