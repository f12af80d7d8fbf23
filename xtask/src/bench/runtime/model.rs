//! What the servers serve, and what they are asked.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Value, json};

use crate::bench::load::Request;
use crate::bench::load::grpc::{Call, Tensor};

/// By name: datatype and shape.
pub(super) type Specs = BTreeMap<&'static str, (&'static str, Vec<usize>)>;

/// A model, and the inputs of one request.
pub(super) struct Model {
    pub name: &'static str,
    pub path: PathBuf,
    pub inputs: Specs,
    pub outputs: Specs,
}

/// A request as clients write it, the keys in their order.
#[derive(Serialize)]
struct Body<'a> {
    inputs: Vec<Input<'a>>,
}

#[derive(Serialize)]
struct Input<'a> {
    name: &'a str,
    shape: &'a [usize],
    datatype: &'a str,
    data: Vec<Value>,
}

/// How a request is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wire {
    Json,
    /// The binary tensor extension, both ways.
    Binary,
    Grpc,
}

impl Model {
    /// The model's file; `path` may be a package's folder.
    pub(super) fn file(&self) -> PathBuf {
        if self.path.is_dir() {
            self.path.join("model.onnx")
        } else {
            self.path.clone()
        }
    }

    pub(super) fn request(&self, wire: Wire) -> Request {
        match wire {
            Wire::Json => self.json(),
            Wire::Binary => self.binary(),
            Wire::Grpc => self.grpc(),
        }
    }

    fn json(&self) -> Request {
        let inputs: Vec<Input> = self
            .inputs
            .iter()
            .map(|(name, (datatype, shape))| {
                let count: usize = shape.iter().product();
                let data = (0..count).map(|i| if *datatype == "FP32" { json!(float(i)) } else { json!(1) });
                Input {
                    name,
                    shape,
                    datatype,
                    data: data.collect(),
                }
            })
            .collect();
        let body = serde_json::to_vec(&Body { inputs }).expect("numbers are JSON");
        Request::post(&self.infer(), "content-type: application/json\r\n", &body)
    }

    fn binary(&self) -> Request {
        let mut bytes = vec![];
        let inputs: Vec<Value> = self
            .inputs
            .iter()
            .map(|(name, (datatype, shape))| {
                let own = values(datatype, shape);
                bytes.extend_from_slice(&own);
                json!({"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": own.len()}})
            })
            .collect();
        let json = json!({"inputs": inputs, "parameters": {"binary_data_output": true}}).to_string();
        let headers = format!("inference-header-content-length: {}\r\n", json.len());
        Request::post(&self.infer(), &headers, &[json.as_bytes(), &bytes].concat())
    }

    fn grpc(&self) -> Request {
        let tensors = self.inputs.iter().map(|(name, (datatype, shape))| Tensor {
            name,
            datatype,
            shape,
            bytes: values(datatype, shape),
        });
        Request::Grpc(Call::infer(self.name, &tensors.collect::<Vec<_>>()))
    }

    fn infer(&self) -> String {
        format!("/v2/models/{}/infer", self.name)
    }
}

fn float(index: usize) -> f32 {
    (index % 97) as f32 / 97.0
}

fn values(datatype: &str, shape: &[usize]) -> Vec<u8> {
    let indices = 0..shape.iter().product::<usize>();
    match datatype {
        "FP32" => indices.flat_map(|index| float(index).to_le_bytes()).collect(),
        _ => indices.flat_map(|_| 1_i64.to_le_bytes()).collect(),
    }
}
