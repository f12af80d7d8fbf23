//! Inference requests and answers as messages of the protocol: tensors raw, or typed in the list that is for their datatype.

use std::collections::HashMap;

use axum::body::Bytes;
use plimsoll_package::manifest::Datatype;
use prost::Message as _;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use super::frame;
use super::proto::inference::infer_parameter::ParameterChoice;
use super::proto::inference::model_infer_request::InferInputTensor;
use super::proto::inference::model_infer_response::InferOutputTensor;
use super::proto::inference::{InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use crate::engine::{Data, Tensor};
use crate::server::Config;
use crate::server::inference::{InferRequest, LENGTH_MAX, Options, Output, RequestedOutput, check_extensions};
use crate::server::refusal::Refusal;
use crate::server::text::Pooling;

/// Field of [`ModelInferResponse`] that holds the raw values.
const RAW_OUTPUT_CONTENTS: u32 = 6;
/// Field of [`ModelStreamInferResponse`] that holds the answer.
const INFER_RESPONSE: u32 = 2;

/// How the values of an answer are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::server) enum Form {
    /// As bytes, as Triton does and as most clients ask.
    Raw,
    /// As numbers, for a client that sent its own so.
    Typed,
}

/// Reads a request for the model of `config`.
///
/// # Errors
/// Not a message of the protocol, another model, values that do not fill the shape or fit the datatype, an extension that is not there.
pub(super) fn parse(message: Bytes, config: &Config) -> Result<(InferRequest, Form), Refusal> {
    let request = decode(message).map_err(Refusal::invalid)?;
    config.check_target(&request.model_name, version(&request.model_version))?;
    read(request).map_err(Refusal::invalid)
}

/// The version that is asked for; the protocol has no other word for any.
pub(super) fn version(version: &str) -> Option<&str> {
    Some(version).filter(|version| !version.is_empty())
}

/// The message, where it holds no more tensors, dimensions and parameters than any model takes.
pub(in crate::server) fn decode(message: Bytes) -> Result<ModelInferRequest, String> {
    check_counts(&message)?;
    ModelInferRequest::decode(message).map_err(|error| format!("the message is not an inference request: {error}"))
}

/// The tensors of a request, and how they came.
pub(in crate::server) fn read(request: ModelInferRequest) -> Result<(InferRequest, Form), String> {
    check_extensions(false, is_sequence(&request.parameters))?;
    let (raw, inputs) = (request.raw_input_contents, request.inputs);
    if !raw.is_empty() && raw.len() != inputs.len() {
        return Err(format!(
            "raw_input_contents holds {} tensors, inputs has {}",
            raw.len(),
            inputs.len()
        ));
    }
    let typed = raw.is_empty() && inputs.iter().any(|input| input.contents.is_some());
    let mut raw = raw.into_iter();
    let inputs = inputs.into_iter().map(|mut input| {
        let name = std::mem::take(&mut input.name);
        match fill(input, raw.next()) {
            Ok(tensor) => Ok((name, tensor)),
            Err(text) => Err(format!("input `{name}`: {text}")),
        }
    });
    let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
    let outputs = request.outputs.into_iter().map(|output| {
        let refuse = |text| format!("output `{}`: {text}", output.name);
        check_extensions(output.parameters.contains_key("shared_memory_region"), false).map_err(refuse)?;
        let classes = number(&output.parameters, "classification").map_err(refuse)?.unwrap_or_default();
        Ok(RequestedOutput {
            classes: usize::try_from(classes).unwrap_or(usize::MAX),
            binary: None,
            name: output.name,
        })
    });
    let request = InferRequest {
        id: Some(request.id),
        inputs,
        outputs: outputs.collect::<Result<_, String>>()?,
        options: Options {
            priority: number(&request.parameters, "priority")?,
            timeout: number(&request.parameters, "timeout")?,
            pooling: pooling(&request.parameters)?,
            normalize: flag(&request.parameters, "normalize")?,
            truncate: flag(&request.parameters, "truncate")?,
        },
    };
    Ok((request, if typed { Form::Typed } else { Form::Raw }))
}

type Parameters = HashMap<String, InferParameter>;

fn choice<'a>(parameters: &'a Parameters, name: &str) -> Option<&'a ParameterChoice> {
    parameters.get(name)?.parameter_choice.as_ref()
}

/// A parameter that is a number, which clients send in whichever way they have it.
fn number(parameters: &Parameters, name: &str) -> Result<Option<u64>, String> {
    let number = match choice(parameters, name) {
        None => return Ok(None),
        Some(ParameterChoice::Uint64Param(number)) => Some(*number),
        Some(ParameterChoice::Int64Param(number)) => u64::try_from(*number).ok(),
        Some(_) => None,
    };
    let refuse = || format!("parameter `{name}` takes a whole number that is not negative");
    number.map(Some).ok_or_else(refuse)
}

/// A parameter that is a boolean.
fn flag(parameters: &Parameters, name: &str) -> Result<Option<bool>, String> {
    match choice(parameters, name) {
        None => Ok(None),
        Some(ParameterChoice::BoolParam(flag)) => Ok(Some(*flag)),
        Some(_) => Err(format!("parameter `{name}` takes a boolean")),
    }
}

fn pooling(parameters: &Parameters) -> Result<Option<Pooling>, String> {
    let name = match choice(parameters, "pooling") {
        None => return Ok(None),
        Some(ParameterChoice::StringParam(name)) => name,
        Some(_) => return Err("parameter `pooling` takes a name".to_owned()),
    };
    let pooling = name.parse().map_err(|_| {
        let known = <Pooling as strum::IntoEnumIterator>::iter().map(|pooling| pooling.to_string());
        format!("`{name}` is no pooling; there are {}", known.collect::<Vec<_>>().join(", "))
    });
    pooling.map(Some)
}

/// Whether a sequence is named: clients send 0 or nothing for none.
fn is_sequence(parameters: &Parameters) -> bool {
    match choice(parameters, "sequence_id") {
        None | Some(ParameterChoice::Int64Param(0) | ParameterChoice::Uint64Param(0)) => false,
        Some(ParameterChoice::StringParam(id)) => !id.is_empty(),
        Some(_) => true,
    }
}

/// The tensor of an input; its values are `raw`, or else its own.
fn fill(input: InferInputTensor, raw: Option<Bytes>) -> Result<Tensor, String> {
    check_extensions(input.parameters.contains_key("shared_memory_region"), false)?;
    let datatype: Datatype = input.datatype.parse().map_err(|_| {
        let known = <Datatype as strum::IntoEnumIterator>::iter().map(|datatype| datatype.to_string());
        format!(
            "`{}` is no datatype; there are {}",
            input.datatype,
            known.collect::<Vec<_>>().join(", ")
        )
    })?;
    let shape = input.shape.iter().map(|&size| usize::try_from(size)).collect::<Result<Vec<_>, _>>();
    let shape = shape.map_err(|_| format!("shape {:?} has a negative dimension", input.shape))?;
    let data = match (raw, input.contents) {
        // Some clients send an empty message of contents beside the bytes.
        (Some(raw), contents) if contents.as_ref().is_none_or(|contents| *contents == InferTensorContents::default()) => {
            Data::from_bytes(datatype, &shape, &raw).map_err(|error| error.to_string())?
        }
        (Some(_), _) => return Err("values are both in contents and in raw_input_contents".to_owned()),
        (None, contents) => typed(datatype, contents.unwrap_or_default())?,
    };
    Tensor::new(shape, data).map_err(|error| error.to_string())
}

/// The values of that datatype.
fn typed(datatype: Datatype, mut contents: InferTensorContents) -> Result<Data, String> {
    use std::mem::take;
    let (list, data) = match datatype {
        Datatype::Bool => ("bool_contents", Data::Bool(take(&mut contents.bool_contents))),
        Datatype::Int8 => ("int_contents", Data::Int8(narrow(datatype, take(&mut contents.int_contents))?)),
        Datatype::Int16 => ("int_contents", Data::Int16(narrow(datatype, take(&mut contents.int_contents))?)),
        Datatype::Int32 => ("int_contents", Data::Int32(take(&mut contents.int_contents))),
        Datatype::Int64 => ("int64_contents", Data::Int64(take(&mut contents.int64_contents))),
        Datatype::Uint8 => ("uint_contents", Data::Uint8(narrow(datatype, take(&mut contents.uint_contents))?)),
        Datatype::Uint16 => ("uint_contents", Data::Uint16(narrow(datatype, take(&mut contents.uint_contents))?)),
        Datatype::Uint32 => ("uint_contents", Data::Uint32(take(&mut contents.uint_contents))),
        Datatype::Uint64 => ("uint64_contents", Data::Uint64(take(&mut contents.uint64_contents))),
        Datatype::Fp32 => ("fp32_contents", Data::Fp32(take(&mut contents.fp32_contents))),
        Datatype::Fp64 => ("fp64_contents", Data::Fp64(take(&mut contents.fp64_contents))),
        Datatype::Bytes => ("bytes_contents", Data::Bytes(take(&mut contents.bytes_contents))),
        Datatype::Fp16 | Datatype::Bf16 => ("raw_input_contents", Data::zeros(datatype, 0)),
    };
    if contents == InferTensorContents::default() {
        Ok(data)
    } else {
        Err(format!("values of {datatype} come in {list}, and in no other list"))
    }
}

fn narrow<T: TryFrom<U>, U: Copy + std::fmt::Display>(datatype: Datatype, values: Vec<U>) -> Result<Vec<T>, String> {
    let one = |value: U| T::try_from(value).map_err(|_| format!("{value} does not fit {datatype}"));
    values.into_iter().map(one).collect()
}

/// The values typed.
///
/// # Errors
/// The data, where the protocol has no list for it.
fn contents(data: Data) -> Result<InferTensorContents, Data> {
    fn widen<T, U: From<T>>(values: Vec<T>) -> Vec<U> {
        values.into_iter().map(U::from).collect()
    }
    let mut contents = InferTensorContents::default();
    match data {
        Data::Bool(values) => contents.bool_contents = values,
        Data::Int8(values) => contents.int_contents = widen(values),
        Data::Int16(values) => contents.int_contents = widen(values),
        Data::Int32(values) => contents.int_contents = values,
        Data::Int64(values) => contents.int64_contents = values,
        Data::Uint8(values) => contents.uint_contents = widen(values),
        Data::Uint16(values) => contents.uint_contents = widen(values),
        Data::Uint32(values) => contents.uint_contents = values,
        Data::Uint64(values) => contents.uint64_contents = values,
        Data::Fp32(values) => contents.fp32_contents = values,
        Data::Fp64(values) => contents.fp64_contents = values,
        Data::Bytes(values) => contents.bytes_contents = values,
        other @ (Data::Fp16(_) | Data::Bf16(_)) => return Err(other),
    }
    Ok(contents)
}

/// Writes an answer as the frame of a [`ModelInferResponse`]. All values come raw where those of one output can come in no other way.
pub(in crate::server) fn write(name: &str, version: &str, id: String, outputs: Vec<Output>, form: Form) -> Vec<u8> {
    let raw_only = |output: &Output| matches!(output.tensor.datatype(), Datatype::Fp16 | Datatype::Bf16);
    let raw = form == Form::Raw || outputs.iter().any(raw_only);
    let mut described = Vec::with_capacity(outputs.len());
    let mut datas = vec![];
    for output in outputs {
        let datatype = output.tensor.datatype().to_string();
        let shape = output.tensor.shape().iter().map(|&size| size as i64).collect();
        let data = output.tensor.into_data();
        let contents = if raw { Err(data) } else { contents(data) };
        described.push(InferOutputTensor {
            name: output.name,
            datatype,
            shape,
            contents: contents.map_err(|data| datas.push(data)).ok(),
            ..InferOutputTensor::default()
        });
    }
    let answer = ModelInferResponse {
        model_name: name.to_owned(),
        model_version: version.to_owned(),
        id,
        outputs: described,
        ..ModelInferResponse::default()
    };
    // The values are written straight behind the rest, since they are most of it.
    let bytes: usize = datas.iter().map(|data| data.byte_count() + 16).sum();
    let mut frame = frame::frame(&answer, bytes);
    frame::extend(&mut frame, |out| {
        for data in datas {
            encode_key(RAW_OUTPUT_CONTENTS, WireType::LengthDelimited, out);
            encode_varint(data.byte_count() as u64, out);
            data.write_bytes(out);
        }
    });
    frame
}

/// The frame of a [`ModelStreamInferResponse`] that holds an answer, or says why there is none.
pub(super) fn in_stream(answer: Result<Vec<u8>, Refusal>) -> Vec<u8> {
    match answer {
        Ok(answer) => {
            let answer = frame::message(&answer);
            let mut out = frame::frame(&ModelStreamInferResponse::default(), answer.len() + 16);
            frame::extend(&mut out, |out| {
                encode_key(INFER_RESPONSE, WireType::LengthDelimited, out);
                encode_varint(answer.len() as u64, out);
                out.extend_from_slice(answer);
            });
            out
        }
        Err(refusal) => {
            let answer = ModelStreamInferResponse {
                error_message: refusal.text.into_owned(),
                infer_response: None,
            };
            frame::frame(&answer, 0)
        }
    }
}

/// Refuses what would take far more memory than its bytes: an input of two bytes on the wire is a structure of hundreds here.
fn check_counts(message: &[u8]) -> Result<(), String> {
    /// Fields of a request, and of an input.
    const PARAMETERS: u32 = 4;
    const INPUTS: u32 = 5;
    const OUTPUTS: u32 = 6;
    const RAW_INPUT_CONTENTS: u32 = 7;
    const INPUT_SHAPE: u32 = 3;
    const INPUT_PARAMETERS: u32 = 4;
    const OUTPUT_PARAMETERS: u32 = 2;
    let (mut inputs, mut outputs, mut raw, mut parameters) = (0, 0, 0, 0);
    let add = |what: &str, count: &mut usize, more: usize| {
        *count += more;
        if *count > LENGTH_MAX {
            return Err(format!("there are more {what} than the {LENGTH_MAX} that any model takes"));
        }
        Ok(())
    };
    for_each_field(message, &mut |field, bytes| match field {
        PARAMETERS => add("parameters", &mut parameters, 1),
        RAW_INPUT_CONTENTS => add("raw tensors", &mut raw, 1),
        INPUTS => {
            add("inputs", &mut inputs, 1)?;
            let mut dimensions = 0;
            for_each_field(bytes, &mut |field, bytes| match field {
                // A varint ends with the byte that has not its highest bit.
                INPUT_SHAPE => add(
                    "dimensions",
                    &mut dimensions,
                    bytes.iter().filter(|&&byte| byte < 0x80).count().max(1),
                ),
                INPUT_PARAMETERS => add("parameters", &mut parameters, 1),
                _ => Ok(()),
            })
        }
        OUTPUTS => {
            add("outputs", &mut outputs, 1)?;
            for_each_field(bytes, &mut |field, _| match field {
                OUTPUT_PARAMETERS => add("parameters", &mut parameters, 1),
                _ => Ok(()),
            })
        }
        _ => Ok(()),
    })
}

/// Bytes that the values of typed contents take once they are read: a number of one byte on the wire is one of up to eight here.
pub(super) fn typed_bytes(message: &[u8]) -> usize {
    const INPUTS: u32 = 5;
    const CONTENTS: u32 = 5;
    const BOOL: u32 = 1;
    const INT: u32 = 2;
    const INT64: u32 = 3;
    const UINT: u32 = 4;
    const UINT64: u32 = 5;
    const BYTES: u32 = 8;
    let mut total = 0_usize;
    // Nothing in here is refused.
    let _ = for_each_field(message, &mut |field, input| match field {
        INPUTS => for_each_field(input, &mut |field, contents| match field {
            CONTENTS => for_each_field(contents, &mut |list, values| {
                // Values are packed; one that is not comes alone, and without its bytes.
                let numbers = || values.iter().filter(|&&byte| byte < 0x80).count().max(1);
                total += match list {
                    BOOL => numbers(),
                    INT | UINT => 4 * numbers(),
                    INT64 | UINT64 => 8 * numbers(),
                    BYTES => size_of::<Vec<u8>>() + values.len(),
                    _ => values.len().max(8),
                };
                Ok(())
            }),
            _ => Ok(()),
        }),
        _ => Ok(()),
    });
    total
}

/// Calls `visit` with the number of each field and its bytes, which are none where it is a number, up to where `message` is none.
fn for_each_field(mut message: &[u8], visit: &mut impl FnMut(u32, &[u8]) -> Result<(), String>) -> Result<(), String> {
    while let Ok((field, wire_type)) = decode_key(&mut message) {
        let length = match wire_type {
            WireType::Varint => decode_varint(&mut message).map(|_| 0),
            WireType::SixtyFourBit => Ok(8),
            WireType::ThirtyTwoBit => Ok(4),
            WireType::LengthDelimited => decode_varint(&mut message),
            // Its fields come next, as though they were the message's own.
            WireType::StartGroup | WireType::EndGroup => Ok(0),
        };
        let Ok(length) = length else { return Ok(()) };
        // What is cut off is read as far as it goes before it is refused.
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(message.len());
        let (bytes, rest) = message.split_at(length);
        visit(field, if wire_type == WireType::LengthDelimited { bytes } else { &[] })?;
        message = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
