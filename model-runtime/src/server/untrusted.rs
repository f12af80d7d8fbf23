//! The readers of what anybody may send, for fuzzing: each gives a request or a refusal, in memory that the bytes bound, and what it gave is
//! written and reads the same again.

use bytes::Bytes;
use prost::Message as _;

use super::grpc::proto::inference::model_infer_request::InferInputTensor;
use super::grpc::proto::inference::{ModelInferRequest, ModelInferResponse};
use super::grpc::{frame, message};
use super::http::{request, response};
use super::inference::{InferRequest, Output};
use crate::engine::Data;

/// The body of an inference request over HTTP; where `json_length` is given, the JSON ends there and tensors as bytes follow.
pub fn body(bytes: &[u8], json_length: Option<usize>) {
    let Ok((request, binary)) = request::parse(bytes, json_length) else {
        return;
    };
    let id = request.id.clone();
    let outputs = echo(request);
    // Fails where a string is not UTF-8, which JSON cannot hold.
    let _ = response::write("model", "1", id.as_deref(), &outputs, binary);
    for output in &outputs {
        let data = output.tensor.data();
        let mut written = vec![];
        data.write_bytes(&mut written);
        let read = Data::from_bytes(data.datatype(), output.tensor.shape(), &written).expect("what is written can be read");
        let mut again = vec![];
        read.write_bytes(&mut again);
        assert_eq!(written, again);
    }
}

/// The message of an inference request over gRPC.
pub fn infer_message(bytes: &[u8]) {
    let Ok((request, form)) = message::decode(Bytes::copy_from_slice(bytes)).and_then(message::read) else {
        return;
    };
    let outputs = echo(request);
    let count = outputs.len();
    let written = message::write("model", "1", String::new(), outputs, form);
    let answer = ModelInferResponse::decode(frame::message(&written)).expect("what is written can be read");
    let (again, _) = message::read(as_request(answer)).expect("what is written can be read");
    assert_eq!(again.inputs.len(), count);
}

/// The tensors of an answer over gRPC as those of a request.
pub(super) fn as_request(answer: ModelInferResponse) -> ModelInferRequest {
    let inputs = answer.outputs.into_iter().map(|output| InferInputTensor {
        name: output.name,
        datatype: output.datatype,
        shape: output.shape,
        parameters: output.parameters,
        contents: output.contents,
    });
    ModelInferRequest {
        inputs: inputs.collect(),
        raw_input_contents: answer.raw_output_contents.into_iter().map(Bytes::from).collect(),
        ..ModelInferRequest::default()
    }
}

/// The tensors of a request as those of an answer.
fn echo(request: InferRequest) -> Vec<Output> {
    let output = |(name, tensor)| Output {
        name,
        tensor,
        binary: None,
    };
    request.inputs.into_iter().map(output).collect()
}
