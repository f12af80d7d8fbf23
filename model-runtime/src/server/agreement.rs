//! Whatever protocol a tensor comes and goes by, it is the same tensor: JSON, the binary extension, and gRPC with raw and typed contents.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request};
use http_body_util::BodyExt as _;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use plimsoll_package::manifest::{Datatype, TensorSpec};
use proptest::prelude::*;
use prost::Message as _;
use serde_json::{Value, json};
use strum::IntoEnumIterator as _;
use tokio::sync::watch;

use super::grpc::proto::inference::model_infer_request::InferInputTensor;
use super::grpc::proto::inference::{InferTensorContents, ModelInferRequest, ModelInferResponse};
use super::model::Model;
use super::scheduler::{Batching, Client};
use super::untrusted::as_request;
use super::{Config, Limits, State, grpc, http};
use crate::engine::{Data, Device, Engine, EngineError, EngineKind, Tensor};

/// Gives its inputs back.
struct Echo {
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
}

impl Engine for Echo {
    fn kind(&self) -> EngineKind {
        EngineKind::Tract
    }

    fn inputs(&self) -> &[TensorSpec] {
        &self.inputs
    }

    fn outputs(&self) -> &[TensorSpec] {
        &self.outputs
    }

    fn infer(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        Ok(inputs.to_vec())
    }
}

/// A server of a model that takes tensors of those types and ranks and gives them back.
fn server(tensors: &[Tensor]) -> Arc<State> {
    let spec = |letter: &str| {
        let spec = |(index, tensor): (usize, &Tensor)| TensorSpec {
            name: format!("{letter}{index}"),
            datatype: tensor.datatype(),
            shape: vec![-1; tensor.shape().len()],
        };
        tensors.iter().enumerate().map(spec).collect()
    };
    let batching = Batching {
        rows_max: 1,
        bytes_max: 1 << 20,
        delay: Duration::ZERO,
    };
    let patience = Duration::from_secs(60);
    let config = Config {
        path: "echo.onnx".into(),
        name: "echo".to_owned(),
        version: "1".to_owned(),
        engine: None,
        http: "127.0.0.1:0".parse().unwrap(),
        grpc: None,
        metrics: None,
        tls: None,
        tokens: None,
        device: Device::Cpu,
        shadow: None,
        sampling: None,
        traces: None,
        access_log: 0.0,
        drift_window: Duration::ZERO,
        threads: 1,
        instances: 1,
        batching: batching.clone(),
        limits: Limits {
            body_bytes_max: 1 << 20,
            concurrency_max: 1,
            memory_bytes_max: 1 << 20,
            connections_max: 1,
            device_bytes_max: None,
            request_timeout: patience,
            header_timeout: patience,
            busy_poll: Duration::ZERO,
        },
        stuck_after: patience,
        drain_delay: Duration::ZERO,
        grace: Duration::ZERO,
    };
    let state = State::new(config, None).unwrap_or_else(|error| panic!("{error}"));
    let echo = Echo {
        inputs: spec("x"),
        outputs: spec("y"),
    };
    let model = Model::of(Arc::new(echo), batching);
    assert!(state.model.set(model).is_ok());
    Arc::new(state)
}

async fn call(router: axum::Router, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> (HeaderMap, Bytes) {
    let mut request = Request::post(path).extension(Client::default());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::from(body)).unwrap();
    let answer = TowerToHyperService::new(router).call(request).await.unwrap();
    let status = answer.status();
    let headers = answer.headers().clone();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
    (headers, body)
}

async fn over_http(state: &Arc<State>, headers: &[(&str, &str)], body: Vec<u8>) -> (HeaderMap, Bytes) {
    call(http::router(Arc::clone(state), false), "/v2/models/echo/infer", headers, body).await
}

fn json_value(tensor: &Tensor) -> Value {
    match tensor.data() {
        Data::Bool(values) => json!(values),
        Data::Uint8(values) => json!(values),
        Data::Uint16(values) => json!(values),
        Data::Uint32(values) => json!(values),
        Data::Uint64(values) => json!(values),
        Data::Int8(values) => json!(values),
        Data::Int16(values) => json!(values),
        Data::Int32(values) => json!(values),
        Data::Int64(values) => json!(values),
        Data::Fp16(values) => values.iter().map(|value| json!(value.to_f32())).collect(),
        Data::Bf16(values) => values.iter().map(|value| json!(value.to_f32())).collect(),
        Data::Fp32(values) => json!(values),
        Data::Fp64(values) => json!(values),
        Data::Bytes(values) => values.iter().map(|value| json!(std::str::from_utf8(value).unwrap())).collect(),
    }
}

/// The tensors through JSON, read back from the answer's digits.
async fn through_json(state: &Arc<State>, tensors: &[Tensor]) -> Vec<Tensor> {
    let input = |(index, tensor): (usize, &Tensor)| {
        let data = json_value(tensor);
        json!({"name": format!("x{index}"), "datatype": tensor.datatype(), "shape": tensor.shape(), "data": data})
    };
    let inputs: Vec<Value> = tensors.iter().enumerate().map(input).collect();
    let (_, body) = over_http(state, &[], json!({"inputs": inputs}).to_string().into_bytes()).await;
    let mut answer: Value = serde_json::from_slice(&body).unwrap();
    // What the server gives can be sent to it: its outputs are inputs.
    let outputs = answer["outputs"].take();
    let (request, _) = http::request::parse(json!({"inputs": outputs}).to_string().as_bytes(), None).unwrap();
    request.inputs.into_iter().map(|(_, tensor)| tensor).collect()
}

/// The tensors through the binary extension.
async fn through_bytes(state: &Arc<State>, tensors: &[Tensor]) -> Vec<Tensor> {
    let input = |(index, tensor): (usize, &Tensor)| {
        let parameters = json!({"binary_data_size": tensor.data().byte_count()});
        json!({"name": format!("x{index}"), "datatype": tensor.datatype(), "shape": tensor.shape(), "parameters": parameters})
    };
    let inputs: Vec<Value> = tensors.iter().enumerate().map(input).collect();
    let mut body = json!({"inputs": inputs, "parameters": {"binary_data_output": true}})
        .to_string()
        .into_bytes();
    let length = body.len().to_string();
    tensors.iter().for_each(|tensor| tensor.data().write_bytes(&mut body));
    let (headers, body) = over_http(state, &[("inference-header-content-length", &length)], body).await;
    let length: usize = headers["inference-header-content-length"].to_str().unwrap().parse().unwrap();
    let answer: Value = serde_json::from_slice(&body[..length]).unwrap();
    let mut bytes = &body[length..];
    let mut tensor = |output: &Value| {
        let shape: Vec<usize> = serde_json::from_value(output["shape"].clone()).unwrap();
        let datatype = output["datatype"].as_str().unwrap().parse().unwrap();
        let size = output["parameters"]["binary_data_size"].as_u64().unwrap() as usize;
        let (own, rest) = bytes.split_at(size);
        bytes = rest;
        Tensor::new(shape.clone(), Data::from_bytes(datatype, &shape, own).unwrap()).unwrap()
    };
    answer["outputs"].as_array().unwrap().iter().map(&mut tensor).collect()
}

fn raw(tensor: &Tensor) -> Vec<u8> {
    let mut out = vec![];
    tensor.data().write_bytes(&mut out);
    out
}

/// Values in the lists of the protocol; `None` where it has none for the type.
fn contents(tensor: &Tensor) -> Option<InferTensorContents> {
    let mut contents = InferTensorContents::default();
    match tensor.data().clone() {
        Data::Bool(values) => contents.bool_contents = values,
        Data::Int8(values) => contents.int_contents = values.into_iter().map(i32::from).collect(),
        Data::Int16(values) => contents.int_contents = values.into_iter().map(i32::from).collect(),
        Data::Int32(values) => contents.int_contents = values,
        Data::Int64(values) => contents.int64_contents = values,
        Data::Uint8(values) => contents.uint_contents = values.into_iter().map(u32::from).collect(),
        Data::Uint16(values) => contents.uint_contents = values.into_iter().map(u32::from).collect(),
        Data::Uint32(values) => contents.uint_contents = values,
        Data::Uint64(values) => contents.uint64_contents = values,
        Data::Fp32(values) => contents.fp32_contents = values,
        Data::Fp64(values) => contents.fp64_contents = values,
        Data::Bytes(values) => contents.bytes_contents = values,
        Data::Fp16(_) | Data::Bf16(_) => return None,
    }
    Some(contents)
}

/// The tensors through gRPC, with typed contents or raw ones.
async fn through_grpc(state: &Arc<State>, tensors: &[Tensor], typed: bool) -> Vec<Tensor> {
    let input = |(index, tensor): (usize, &Tensor)| InferInputTensor {
        name: format!("x{index}"),
        datatype: tensor.datatype().to_string(),
        shape: tensor.shape().iter().map(|&size| size as i64).collect(),
        contents: typed.then(|| contents(tensor).unwrap()),
        ..InferInputTensor::default()
    };
    let request = ModelInferRequest {
        model_name: "echo".to_owned(),
        inputs: tensors.iter().enumerate().map(input).collect(),
        raw_input_contents: if typed {
            vec![]
        } else {
            tensors.iter().map(|tensor| raw(tensor).into()).collect()
        },
        ..ModelInferRequest::default()
    };
    let message = request.encode_to_vec();
    let mut body = vec![0];
    body.extend((message.len() as u32).to_be_bytes());
    body.extend(message);
    let router = grpc::router(Arc::clone(state), watch::channel(true).1, watch::channel(false).1);
    let path = "/inference.GRPCInferenceService/ModelInfer";
    let (headers, body) = call(router, path, &[("content-type", "application/grpc")], body).await;
    assert!(!headers.contains_key("grpc-status"), "{headers:?}");
    let answer = ModelInferResponse::decode(&body[5..]).unwrap();
    assert_eq!(answer.raw_output_contents.is_empty(), typed || tensors.is_empty());
    let (request, _) = grpc::message::read(as_request(answer)).unwrap();
    request.inputs.into_iter().map(|(_, tensor)| tensor).collect()
}

/// A tensor of any shape up to three dimensions, empty ones and scalars among them, whose values are any bytes.
fn tensor(datatype: Datatype) -> impl Strategy<Value = Tensor> {
    let shape = prop::collection::vec(0_usize..4, 0..4);
    shape.prop_flat_map(move |shape| {
        let count: usize = shape.iter().product();
        let data: BoxedStrategy<Data> = match datatype {
            Datatype::Bool => prop::collection::vec(any::<bool>(), count).prop_map(Data::Bool).boxed(),
            Datatype::Bytes => {
                let text = "\\PC{0,8}".prop_map(String::into_bytes);
                prop::collection::vec(text, count).prop_map(Data::Bytes).boxed()
            }
            number => prop::collection::vec(any::<u64>(), count)
                .prop_map(move |bits| {
                    let width = Data::zeros(number, 1).byte_count();
                    let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()[..width].to_vec()).collect();
                    Data::from_bytes(number, &[bits.len()], &bytes).unwrap()
                })
                .boxed(),
        };
        data.prop_map(move |data| Tensor::new(shape.clone(), data).unwrap())
    })
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor
        .data()
        .to_f64()
        .is_none_or(|values| values.iter().all(|value| value.is_finite()))
}

fn every_type() -> impl Strategy<Value = Vec<Tensor>> {
    Datatype::iter().map(|datatype| tensor(datatype).boxed()).collect::<Vec<_>>()
}

/// As bytes, so that what is no number is compared too.
fn described(tensors: &[Tensor]) -> Vec<(Datatype, Vec<usize>, Vec<u8>)> {
    tensors
        .iter()
        .map(|tensor| (tensor.datatype(), tensor.shape().to_vec(), raw(tensor)))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_protocol_gives_the_tensor_that_was_sent(tensors in every_type()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let all = server(&tensors);
            prop_assert_eq!(described(&through_bytes(&all, &tensors).await), described(&tensors), "as bytes");
            prop_assert_eq!(described(&through_grpc(&all, &tensors, false).await), described(&tensors), "raw over gRPC");
            // JSON has no word for what is no number, and the lists of gRPC are not for every type.
            let finite: Vec<Tensor> = tensors.iter().filter(|tensor| is_finite(tensor)).cloned().collect();
            prop_assert_eq!(described(&through_json(&server(&finite), &finite).await), described(&finite), "as JSON");
            let listed: Vec<Tensor> = tensors.iter().filter(|tensor| contents(tensor).is_some()).cloned().collect();
            let over = server(&listed);
            prop_assert_eq!(described(&through_grpc(&over, &listed, true).await), described(&listed), "typed over gRPC");
            Ok(())
        })?;
    }
}
