//! Inference answers: JSON with the data flat, in row-major order, or the tensors as bytes behind it.

use serde::ser::Error as _;
use serde::{Serialize, Serializer};

use crate::engine::Data;
use crate::server::inference::Output;

/// An answer's body.
pub(in crate::server) struct Written {
    pub(in crate::server) body: Vec<u8>,
    /// Length of the JSON at its start, where tensors follow as bytes.
    pub(in crate::server) json_length: Option<usize>,
}

#[derive(Serialize)]
struct Answer<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: Vec<Described<'a>>,
}

#[derive(Serialize)]
struct Described<'a> {
    name: &'a str,
    datatype: plimsoll_package::manifest::Datatype,
    shape: &'a [usize],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<Parameters>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Values<'a>>,
}

#[derive(Serialize)]
struct Parameters {
    binary_data_size: usize,
}

struct Values<'a>(&'a Data);

/// Writes an answer; `binary` is what holds of outputs for which nothing was said. JSON knows no NaN and no infinity: both become `null`.
///
/// # Errors
/// Where a string of bytes is not UTF-8, which JSON cannot hold.
pub(in crate::server) fn write(
    name: &str,
    version: &str,
    id: Option<&str>,
    outputs: &[Output],
    binary: bool,
) -> serde_json::Result<Written> {
    let is_binary = |output: &&Output| output.binary.unwrap_or(binary);
    let describe = |output| {
        let binary = is_binary(&output);
        let data = output.tensor.data();
        Described {
            name: &output.name,
            datatype: output.tensor.datatype(),
            shape: output.tensor.shape(),
            parameters: binary.then(|| Parameters {
                binary_data_size: data.byte_count(),
            }),
            data: (!binary).then_some(Values(data)),
        }
    };
    let answer = Answer {
        model_name: name,
        model_version: version,
        id,
        outputs: outputs.iter().map(describe).collect(),
    };
    // Digits and commas of single precision take about as many bytes.
    let guess = |output: &Output| 128 + output.tensor.data().byte_count() * if is_binary(&output) { 1 } else { 3 };
    let mut body = Vec::with_capacity(128 + outputs.iter().map(guess).sum::<usize>());
    serde_json::to_writer(&mut body, &answer)?;
    let json_length = outputs.iter().any(|output| is_binary(&output)).then_some(body.len());
    for output in outputs.iter().filter(is_binary) {
        output.tensor.data().write_bytes(&mut body);
    }
    Ok(Written { body, json_length })
}

impl Serialize for Values<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Data::Bool(values) => values.serialize(serializer),
            Data::Uint8(values) => values.serialize(serializer),
            Data::Uint16(values) => values.serialize(serializer),
            Data::Uint32(values) => values.serialize(serializer),
            Data::Uint64(values) => values.serialize(serializer),
            Data::Int8(values) => values.serialize(serializer),
            Data::Int16(values) => values.serialize(serializer),
            Data::Int32(values) => values.serialize(serializer),
            Data::Int64(values) => values.serialize(serializer),
            Data::Fp16(values) => serializer.collect_seq(values.iter().map(|value| value.to_f32())),
            Data::Bf16(values) => serializer.collect_seq(values.iter().map(|value| value.to_f32())),
            Data::Fp32(values) => values.serialize(serializer),
            Data::Fp64(values) => values.serialize(serializer),
            Data::Bytes(values) => {
                let texts = values.iter().map(|bytes| std::str::from_utf8(bytes)).collect::<Result<Vec<_>, _>>();
                texts
                    .map_err(|_| S::Error::custom("the model gave bytes that are not UTF-8, which JSON cannot hold; ask for binary data"))?
                    .serialize(serializer)
            }
        }
    }
}
