//! Inference answers as JSON: data flat, in row-major order.

use serde::ser::Error as _;
use serde::{Serialize, Serializer};

use crate::engine::{Data, Tensor};

#[derive(Serialize)]
struct Answer<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: Vec<Output<'a>>,
}

#[derive(Serialize)]
struct Output<'a> {
    name: &'a str,
    datatype: plimsoll_package::manifest::Datatype,
    shape: &'a [usize],
    data: Values<'a>,
}

struct Values<'a>(&'a Data);

/// Writes an answer. JSON knows no NaN and no infinity: both become `null`.
///
/// # Errors
/// Where a string of bytes is not UTF-8, which JSON cannot hold.
pub(super) fn write<'a>(
    name: &'a str,
    version: &'a str,
    id: Option<&'a str>,
    outputs: impl Iterator<Item = (&'a str, &'a Tensor)>,
) -> serde_json::Result<Vec<u8>> {
    let output = |(name, tensor): (&'a str, &'a Tensor)| Output {
        name,
        datatype: tensor.datatype(),
        shape: tensor.shape(),
        data: Values(tensor.data()),
    };
    serde_json::to_vec(&Answer {
        model_name: name,
        model_version: version,
        id,
        outputs: outputs.map(output).collect(),
    })
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
                    .map_err(|_| S::Error::custom("the model gave bytes that are not UTF-8, which JSON cannot hold"))?
                    .serialize(serializer)
            }
        }
    }
}
