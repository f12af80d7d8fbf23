use std::thread;
use std::time::{Duration, Instant};

use crate::channel::proto::model_infer_request::InferInputTensor;
use crate::channel::proto::{
    InferTensorContents, ModelInferRequest, ModelInferResponse, ModelReadyRequest, ModelReadyResponse, ModelStatisticsRequest,
    ModelStatisticsResponse, ModelStreamInferResponse, ServerLiveRequest, ServerLiveResponse,
};
use crate::channel::{
    Channel, DEADLINE_EXCEEDED, Failed, INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNAVAILABLE, UNIMPLEMENTED, framed,
};
use crate::client::{get, post};
use crate::process::{Server, model};

const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// A message of `grpc.health.v1`: the name asked for, and the standing that is the answer (1 is serving, 2 is not).
#[derive(Clone, PartialEq, prost::Message)]
struct Health {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Standing {
    #[prost(int32, tag = "1")]
    status: i32,
}

fn request(name: &str, shape: [i64; 2], values: &[f32]) -> ModelInferRequest {
    let contents = InferTensorContents {
        fp32_contents: values.to_vec(),
        ..InferTensorContents::default()
    };
    let input = InferInputTensor {
        name: "x".to_owned(),
        datatype: "FP32".to_owned(),
        shape: shape.to_vec(),
        contents: Some(contents),
        ..InferInputTensor::default()
    };
    ModelInferRequest {
        model_name: name.to_owned(),
        id: "a-1".to_owned(),
        inputs: vec![input],
        ..ModelInferRequest::default()
    }
}

fn mlp() -> ModelInferRequest {
    request("mlp", [1, 4], &[1.0, 2.0, 3.0, 4.0])
}

fn slow() -> ModelInferRequest {
    request("slow", [1, 1], &[1.0])
}

fn infer(channel: &Channel, request: &ModelInferRequest) -> Result<ModelInferResponse, Failed> {
    channel.call("ModelInfer", &[], request)
}

fn in_flight(server: &Server, count: usize) -> bool {
    let line = format!("plimsoll_runtime_requests_in_flight {count}\n");
    get(server.http, "/metrics").text.contains(&line)
}

fn wait_for(server: &Server, count: usize) {
    while !in_flight(server, count) {
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_refusal_is_logged_with_its_method_its_status_and_its_trace() {
    let mut server = Server::ready(&model("mlp"), &["--engine", "tract"]);
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    let channel = Channel::open(server.grpc);
    let refused = channel.call::<ModelInferResponse>("ModelInfer", &[("traceparent", &parent)], &request("other", [1, 4], &[0.0; 4]));
    assert_eq!(refused.unwrap_err().code, NOT_FOUND);
    let line = server.line("inference refused");
    assert_eq!((&line["code"], &line["trace"]), (&NOT_FOUND.into(), &trace.into()));
    assert_eq!(line["method"], "inference.GRPCInferenceService/ModelInfer");
}

#[test]
fn typed_contents_are_bounded_as_they_will_be_in_memory() {
    let server = Server::ready(&model("mlp"), &["--engine", "tract", "--max-body", "64Ki"]);
    let channel = Channel::open(server.grpc);
    // Of 10,000 numbers each takes a byte on the wire and eight in memory.
    let mut many = mlp();
    many.inputs[0].contents = Some(InferTensorContents {
        int64_contents: vec![1; 10_000],
        ..InferTensorContents::default()
    });
    assert_eq!(infer(&channel, &many).unwrap_err().code, RESOURCE_EXHAUSTED);
    assert!(infer(&channel, &mlp()).is_ok());
}

#[test]
fn the_same_model_answers_both_protocols_and_they_are_counted_together() {
    let server = Server::ready(&model("mlp"), &["--engine", "tract"]);
    let channel = Channel::open(server.grpc);
    let answer = infer(&channel, &mlp()).unwrap();
    assert_eq!(
        (answer.model_name.as_str(), answer.model_version.as_str(), answer.id.as_str()),
        ("mlp", "1", "a-1")
    );
    let body = serde_json::json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]});
    let other = post(server.http, "/v2/models/mlp/infer", &body).json();
    let values: Vec<f32> = serde_json::from_value(other["outputs"][0]["data"].clone()).unwrap();
    assert_eq!(answer.outputs[0].contents.as_ref().unwrap().fp32_contents, values);
    let statistics: ModelStatisticsResponse = channel.call("ModelStatistics", &[], &ModelStatisticsRequest::default()).unwrap();
    let success = statistics.model_stats[0].inference_stats.as_ref().unwrap().success;
    assert_eq!(success.unwrap().count, 2);
}

#[test]
fn a_refusal_is_a_status_with_its_text() {
    let server = Server::ready(&model("mlp"), &["--engine", "tract", "--max-body", "1Ki"]);
    let channel = Channel::open(server.grpc);
    let refuse = |request: &ModelInferRequest| {
        let failed = infer(&channel, request).unwrap_err();
        assert_eq!(failed.pushback, None);
        (failed.code, failed.text)
    };
    assert_eq!(
        refuse(&request("mlp", [1, 3], &[1.0, 2.0, 3.0])),
        (
            INVALID_ARGUMENT,
            "input `x` takes shape [-1, 4] (-1 is any size), [1, 3] was given".to_owned()
        )
    );
    let mut other = mlp();
    other.model_version = "2".to_owned();
    assert_eq!(refuse(&other), (NOT_FOUND, "model `mlp` has no version `2`; it has `1`".to_owned()));
    assert_eq!(
        refuse(&request("mlp", [100, 4], &[0.0; 400])),
        (
            RESOURCE_EXHAUSTED,
            "the body is larger than the 1024 bytes that this server takes".to_owned()
        )
    );
    let unknown = channel
        .call::<ServerLiveResponse>("RepositoryModelLoad", &[], &ServerLiveRequest {})
        .unwrap_err();
    assert_eq!(
        (unknown.code, unknown.text.as_str()),
        (UNIMPLEMENTED, "this server has no such method")
    );
    // What is not gRPC is told so.
    let answer = post(server.grpc, "/inference.GRPCInferenceService/ServerLive", &serde_json::json!({}));
    assert_eq!((answer.status, answer.text.as_str()), (415, "this address speaks gRPC\n"));
    // No model of another name is ready.
    let asked = ModelReadyRequest {
        name: "other".to_owned(),
        ..ModelReadyRequest::default()
    };
    assert!(!channel.call::<ModelReadyResponse>("ModelReady", &[], &asked).unwrap().ready);
}

#[test]
fn a_call_beyond_the_bound_is_told_when_to_come_back() {
    let server = Server::ready(&model("slow"), &["--max-concurrency", "1"]);
    let grpc = server.grpc;
    let first = thread::spawn(move || infer(&Channel::open(grpc), &slow()));
    wait_for(&server, 1);
    let channel = Channel::open(grpc);
    let second = infer(&channel, &slow()).unwrap_err();
    assert_eq!((second.code, second.pushback.as_deref()), (RESOURCE_EXHAUSTED, Some("1000")));
    // On a stream it is said in the answer, and the stream goes on.
    let (sender, mut answers) = channel.stream(STREAM);
    sender.unbounded_send(framed(&slow())).unwrap();
    let answer: ModelStreamInferResponse = answers.next(&channel).unwrap().unwrap();
    assert!(
        answer.error_message.starts_with("the server has as many requests"),
        "{}",
        answer.error_message
    );
    first.join().unwrap().unwrap();
    sender.unbounded_send(framed(&slow())).unwrap();
    let answer: ModelStreamInferResponse = answers.next(&channel).unwrap().unwrap();
    assert!(answer.infer_response.is_some(), "{}", answer.error_message);
}

#[test]
fn the_clients_deadline_is_kept() {
    let server = Server::ready(&model("slow"), &[]);
    let channel = Channel::open(server.grpc);
    let late = channel
        .call::<ModelInferResponse>("ModelInfer", &[("grpc-timeout", "20m")], &slow())
        .unwrap_err();
    // Whichever it was that took the time.
    assert_eq!(late.code, DEADLINE_EXCEEDED);
    assert!(late.text.ends_with(" within 0.02 s"), "{}", late.text);
    let half = framed(&slow())[..9].to_vec();
    let late = channel.exchange(
        "/inference.GRPCInferenceService/ModelInfer",
        &[("grpc-timeout", "soon")],
        vec![half],
    );
    assert_eq!(late.err().unwrap().code, INVALID_ARGUMENT);
}

#[test]
fn a_call_whose_client_is_gone_is_not_computed() {
    let server = Server::ready(&model("slow"), &[]);
    let grpc = server.grpc;
    let first = thread::spawn(move || infer(&Channel::open(grpc), &slow()));
    wait_for(&server, 1);
    Channel::open(grpc).abandon("ModelInfer", &slow(), || in_flight(&server, 2));
    first.join().unwrap().unwrap();
    wait_for(&server, 0);
    let statistics = get(server.http, "/v2/models/slow/stats").json();
    assert_eq!(statistics["model_stats"][0]["execution_count"], 1);
}

#[test]
fn a_stream_is_answered_in_order_and_a_refusal_ends_nothing() {
    let server = Server::ready(&model("mlp"), &["--engine", "tract"]);
    let channel = Channel::open(server.grpc);
    let (sender, mut answers) = channel.stream(STREAM);
    for number in 0..40 {
        let mut request = if number == 7 { request("mlp", [1, 1], &[1.0]) } else { mlp() };
        request.id = number.to_string();
        sender.unbounded_send(framed(&request)).unwrap();
    }
    for number in 0..40 {
        let answer: ModelStreamInferResponse = answers.next(&channel).unwrap().unwrap();
        if number == 7 {
            assert!(
                answer.error_message.starts_with("input `x` takes shape"),
                "{}",
                answer.error_message
            );
        } else {
            assert_eq!(answer.infer_response.unwrap().id, number.to_string());
        }
    }
    drop(sender);
    assert_eq!(answers.next::<ModelStreamInferResponse>(&channel), Ok(None));
}

#[test]
fn the_end_of_the_server_is_told_to_health_and_to_streams_and_loses_no_call() {
    let mut server = Server::ready(&model("slow"), &["--drain-delay", "1s"]);
    let channel = Channel::open(server.grpc);
    let mut health = channel
        .exchange("/grpc.health.v1.Health/Watch", &[], vec![framed(&Health::default())])
        .unwrap();
    assert_eq!(health.next(&channel), Ok(Some(Standing { status: 1 })));
    let (sender, mut answers) = channel.stream(STREAM);
    let started = Instant::now();
    server.terminate();
    assert_eq!(health.next(&channel), Ok(Some(Standing { status: 2 })));
    // While endpoints go, calls are still served.
    sender.unbounded_send(framed(&slow())).unwrap();
    assert!(
        answers
            .next::<ModelStreamInferResponse>(&channel)
            .unwrap()
            .unwrap()
            .infer_response
            .is_some()
    );
    let stopping = Failed {
        code: UNAVAILABLE,
        text: "the server is stopping".to_owned(),
        pushback: Some("1000".to_owned()),
    };
    assert_eq!(answers.next::<ModelStreamInferResponse>(&channel).unwrap_err(), stopping);
    assert_eq!(health.next::<Standing>(&channel).unwrap_err(), stopping);
    assert!(server.wait().success());
    assert!(started.elapsed() < Duration::from_secs(20), "nothing holds up the end");
}

#[test]
fn nothing_listens_where_none_is_asked_for() {
    let server = Server::ready(&model("mlp"), &["--engine", "tract", "--grpc", "none"]);
    assert_eq!(server.grpc.port(), 0);
    assert_eq!(get(server.http, "/v2/health/ready").status, 200);
}
