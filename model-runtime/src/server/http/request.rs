//! Inference requests: JSON read straight into typed tensors, and tensors as bytes behind it (Triton, "Binary Tensor Data Extension").

use plimsoll_package::manifest::Datatype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny};

use super::json::Reader;
use crate::engine::{Data, Tensor};
use crate::server::inference::{InferRequest, LENGTH_MAX, Options, RequestedOutput, check_extensions};
use crate::server::text::Pooling;

mod values;

/// Reads the body of a request: JSON of `json_length` bytes and tensors as bytes behind it, or JSON alone. Gives the request, and whether
/// outputs of which it says nothing come as bytes.
///
/// # Errors
/// In words for the client: not JSON, a field of the wrong kind, values that do not fill the shape or fit the datatype, an extension
/// that is not there.
pub(in crate::server) fn parse(body: &[u8], json_length: Option<usize>) -> Result<(InferRequest, bool), String> {
    let json_length = json_length.unwrap_or(body.len());
    let (json, mut bytes) = body.split_at_checked(json_length).ok_or_else(|| {
        format!(
            "Inference-Header-Content-Length is {json_length}, the body has {} bytes",
            body.len()
        )
    })?;
    let raw = Raw::read(&mut Reader::new(json)).map_err(|text| format!("the body is not an inference request: {text}"))?;
    raw.parameters.check()?;
    let inputs = raw
        .inputs
        .into_iter()
        .map(|input| input.fill(&mut bytes))
        .collect::<Result<Vec<_>, _>>()?;
    if !bytes.is_empty() {
        return Err(format!("{} bytes are left behind the last binary tensor", bytes.len()));
    }
    let outputs = raw.outputs.into_iter().map(|wanted| {
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

/// A request as it is written.
struct Raw {
    id: Option<String>,
    parameters: Parameters,
    inputs: Vec<Input>,
    /// None where all are wanted.
    outputs: Vec<Wanted>,
}

#[derive(Deserialize)]
struct Wanted {
    name: String,
    #[serde(default)]
    parameters: Parameters,
}

impl Raw {
    fn read(json: &mut Reader) -> Result<Self, String> {
        let (mut id, mut parameters, mut inputs, mut outputs) = (None, None, None, None);
        json.object(|json, key| {
            match key {
                "id" => once(&mut id, key, json, Reader::value)?,
                "parameters" => once(&mut parameters, key, json, Reader::value)?,
                "inputs" => once(&mut inputs, key, json, |json| bounded(json, Input::read))?,
                "outputs" => once(&mut outputs, key, json, |json| match json.peek() {
                    // Some clients send null for what they leave out.
                    Some(b'n') => json.value().map(|()| vec![]),
                    _ => bounded(json, Reader::value),
                })?,
                _ => drop(json.value::<IgnoredAny>()?),
            }
            Ok(())
        })?;
        json.end()?;
        Ok(Self {
            id: id.flatten(),
            parameters: parameters.unwrap_or_default(),
            inputs: inputs.ok_or("missing field `inputs`")?,
            outputs: outputs.unwrap_or_default(),
        })
    }
}

/// Reads a field that a request may have once.
fn once<'a, T>(
    field: &mut Option<T>,
    key: &str,
    json: &mut Reader<'a>,
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, String>,
) -> Result<(), String> {
    if field.is_some() {
        return Err(json.wrong(&format!("duplicate field `{key}`")));
    }
    *field = Some(read(json)?);
    Ok(())
}

/// A list of what a request may name: no more of them than any model has, so that a few bytes of a body each do not become many of memory.
fn bounded<'a, T>(json: &mut Reader<'a>, mut read: impl FnMut(&mut Reader<'a>) -> Result<T, String>) -> Result<Vec<T>, String> {
    let mut list = vec![];
    json.list(|json| {
        if list.len() == LENGTH_MAX {
            return Err(json.wrong(&format!("a list is longer than the {LENGTH_MAX} that any model has")));
        }
        list.push(read(json)?);
        Ok(())
    })?;
    Ok(list)
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

    fn read(json: &mut Reader) -> Result<Self, String> {
        let (mut name, mut datatype, mut shape): (Option<String>, Option<Datatype>, Option<Vec<usize>>) = (None, None, None);
        let (mut data, mut unread) = (None, None);
        let mut behind = None;
        json.object(|json, key| {
            match key {
                "name" => name = Some(json.string()?.into_owned()),
                "datatype" => datatype = Some(json.value()?),
                "shape" => shape = Some(bounded(json, Reader::value)?),
                "data" => match (datatype, &shape) {
                    (Some(datatype), Some(shape)) => data = Some(values::read(json, datatype, shape).map_err(|text| named(&name, &text))?),
                    // Its type is told only after it.
                    _ => {
                        unread = Some(json.clone());
                        json.value::<IgnoredAny>()?;
                    }
                },
                "parameters" => {
                    let parameters: Parameters = json.value()?;
                    parameters.check().map_err(|text| named(&name, &text))?;
                    behind = parameters.binary_data_size;
                }
                _ => drop(json.value::<IgnoredAny>()?),
            }
            Ok(())
        })?;
        let name = name.ok_or_else(|| json.wrong("missing field `name`"))?;
        let missing = |field: &str| json.wrong(&format!("input `{name}` has no {field}"));
        let datatype = datatype.ok_or_else(|| missing("datatype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        if let Some(mut json) = unread {
            data = Some(values::read(&mut json, datatype, &shape).map_err(|text| format!("input `{name}`: {text}"))?);
        }
        let values = match (data, behind) {
            (Some(_), Some(_)) => return Err(json.wrong(&format!("input `{name}` has both data and binary_data_size"))),
            (Some(data), None) => Given::Here(data),
            (None, Some(size)) => Given::Behind(size),
            (None, None) => return Err(missing("data")),
        };
        Ok(Self {
            name,
            datatype,
            shape,
            values,
        })
    }
}

/// What is wrong with an input, of which the name is not known yet where it comes late.
fn named(name: &Option<String>, text: &str) -> String {
    match name {
        Some(name) => format!("input `{name}`: {text}"),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
