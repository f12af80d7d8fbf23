//! The methods that ask something: whether the server is live and ready, and what the model is.

use plimsoll_package::manifest::{Datatype, TensorSpec};

use super::Grpc;
use super::message::version;
use super::proto::inference::model_config::SchedulingChoice;
use super::proto::inference::model_metadata_response::TensorMetadata;
use super::proto::inference::repository_index_response::ModelIndex;
use super::proto::inference::{self as proto, model_instance_group, model_version_policy};
use crate::server::model::Model;
use crate::server::refusal::{Reason, Refusal};
use crate::server::statistics::Total;
use crate::server::{self, Config, State, signature};

type Answer<A> = Result<A, Refusal>;

pub(super) async fn live(grpc: Grpc, _: proto::ServerLiveRequest) -> Answer<proto::ServerLiveResponse> {
    Ok(proto::ServerLiveResponse {
        live: grpc.state.is_live(),
    })
}

pub(super) async fn ready(grpc: Grpc, _: proto::ServerReadyRequest) -> Answer<proto::ServerReadyResponse> {
    grpc.state.settle().await;
    Ok(proto::ServerReadyResponse {
        ready: grpc.state.is_ready(),
    })
}

/// Another model than the one that is served is not ready, as Triton says of those that it has not.
pub(super) async fn model_ready(grpc: Grpc, asked: proto::ModelReadyRequest) -> Answer<proto::ModelReadyResponse> {
    let ready = grpc.state.config.check_target(&asked.name, version(&asked.version)).is_ok() && {
        grpc.state.settle().await;
        grpc.state.is_ready()
    };
    Ok(proto::ModelReadyResponse { ready })
}

pub(super) async fn server(_: Grpc, _: proto::ServerMetadataRequest) -> Answer<proto::ServerMetadataResponse> {
    Ok(proto::ServerMetadataResponse {
        name: server::NAME.to_owned(),
        version: server::VERSION.to_owned(),
        extensions: server::EXTENSIONS.map(str::to_owned).to_vec(),
    })
}

pub(super) async fn model(grpc: Grpc, asked: proto::ModelMetadataRequest) -> Answer<proto::ModelMetadataResponse> {
    let model = find(&grpc.state, &asked.name, &asked.version)?;
    let tensors = |specs: &[TensorSpec]| {
        let tensor = |spec: &TensorSpec| TensorMetadata {
            name: spec.name.clone(),
            datatype: spec.datatype.to_string(),
            shape: spec.shape.clone(),
        };
        specs.iter().map(tensor).collect()
    };
    Ok(proto::ModelMetadataResponse {
        name: grpc.state.config.name.clone(),
        versions: vec![grpc.state.config.version.clone()],
        platform: signature::platform(model.kind()),
        inputs: tensors(&model.described_inputs()),
        outputs: tensors(&model.described_outputs()),
    })
}

pub(super) async fn configuration(grpc: Grpc, asked: proto::ModelConfigRequest) -> Answer<proto::ModelConfigResponse> {
    let model = find(&grpc.state, &asked.name, &asked.version)?;
    Ok(proto::ModelConfigResponse {
        config: Some(model_config(&grpc.state.config, model)),
    })
}

/// As [`signature::configuration`], in the messages of this protocol.
fn model_config(config: &Config, model: &Model) -> proto::ModelConfig {
    let rows_max = model.scheduler.rows_max();
    let batched = rows_max > 1;
    let dims = |spec: &TensorSpec| spec.shape[usize::from(batched)..].to_vec();
    let input = |spec: &TensorSpec| proto::ModelInput {
        name: spec.name.clone(),
        data_type: data_type(spec.datatype).into(),
        dims: dims(spec),
    };
    let output = |spec: &TensorSpec| proto::ModelOutput {
        name: spec.name.clone(),
        data_type: data_type(spec.datatype).into(),
        dims: dims(spec),
    };
    let latest = model_version_policy::Latest { num_versions: 1 };
    let batching = proto::ModelDynamicBatching {
        preferred_batch_size: vec![],
        max_queue_delay_microseconds: u64::try_from(config.batching.delay.as_micros()).unwrap_or(u64::MAX),
    };
    let instances = proto::ModelInstanceGroup {
        name: config.name.clone(),
        count: i32::try_from(config.instances).unwrap_or(i32::MAX),
        kind: match config.device.is_gpu() {
            true => model_instance_group::Kind::Gpu.into(),
            false => model_instance_group::Kind::Cpu.into(),
        },
    };
    proto::ModelConfig {
        name: config.name.clone(),
        platform: signature::platform(model.kind()),
        version_policy: Some(proto::ModelVersionPolicy {
            policy_choice: Some(model_version_policy::PolicyChoice::Latest(latest)),
        }),
        max_batch_size: if batched { i32::try_from(rows_max).unwrap_or(i32::MAX) } else { 0 },
        input: model.inputs().iter().map(input).collect(),
        output: model.outputs().iter().map(output).collect(),
        instance_group: vec![instances],
        backend: model.kind().to_string().to_lowercase(),
        scheduling_choice: batched.then_some(SchedulingChoice::DynamicBatching(batching)),
    }
}

fn data_type(datatype: Datatype) -> proto::DataType {
    match datatype {
        Datatype::Bool => proto::DataType::TypeBool,
        Datatype::Uint8 => proto::DataType::TypeUint8,
        Datatype::Uint16 => proto::DataType::TypeUint16,
        Datatype::Uint32 => proto::DataType::TypeUint32,
        Datatype::Uint64 => proto::DataType::TypeUint64,
        Datatype::Int8 => proto::DataType::TypeInt8,
        Datatype::Int16 => proto::DataType::TypeInt16,
        Datatype::Int32 => proto::DataType::TypeInt32,
        Datatype::Int64 => proto::DataType::TypeInt64,
        Datatype::Fp16 => proto::DataType::TypeFp16,
        Datatype::Bf16 => proto::DataType::TypeBf16,
        Datatype::Fp32 => proto::DataType::TypeFp32,
        Datatype::Fp64 => proto::DataType::TypeFp64,
        Datatype::Bytes => proto::DataType::TypeString,
    }
}

pub(super) async fn statistics(grpc: Grpc, asked: proto::ModelStatisticsRequest) -> Answer<proto::ModelStatisticsResponse> {
    if !asked.name.is_empty() {
        grpc.state.config.check_target(&asked.name, version(&asked.version))?;
    }
    let snapshot = grpc.state.statistics.snapshot();
    let total = |total: Total| {
        Some(proto::StatisticDuration {
            count: total.count,
            ns: total.ns,
        })
    };
    let of_batch = |batch: &server::statistics::BatchTotals| proto::InferBatchStatistics {
        batch_size: batch.batch_size as u64,
        compute_input: total(batch.compute_input),
        compute_infer: total(batch.compute_infer),
        compute_output: total(batch.compute_output),
    };
    let totals = &snapshot.inference_stats;
    let of_model = proto::ModelStatistics {
        name: grpc.state.config.name.clone(),
        version: grpc.state.config.version.clone(),
        last_inference: snapshot.last_inference,
        inference_count: snapshot.inference_count,
        execution_count: snapshot.execution_count,
        inference_stats: Some(proto::InferStatistics {
            success: total(totals.success),
            fail: total(totals.fail),
            queue: total(totals.queue),
            compute_input: total(totals.compute_input),
            compute_infer: total(totals.compute_infer),
            compute_output: total(totals.compute_output),
        }),
        batch_stats: snapshot.batch_stats.iter().map(of_batch).collect(),
    };
    Ok(proto::ModelStatisticsResponse {
        model_stats: vec![of_model],
    })
}

pub(super) async fn index(grpc: Grpc, asked: proto::RepositoryIndexRequest) -> Answer<proto::RepositoryIndexResponse> {
    let (standing, reason) = grpc.state.standing();
    let model = ModelIndex {
        name: grpc.state.config.name.clone(),
        version: grpc.state.config.version.clone(),
        state: standing.to_owned(),
        reason: reason.to_owned(),
    };
    let left_out = asked.ready && grpc.state.model().is_none();
    Ok(proto::RepositoryIndexResponse {
        models: if left_out { vec![] } else { vec![model] },
    })
}

/// The model, where it is the one that is asked for.
fn find<'a>(state: &'a State, name: &str, asked: &str) -> Result<&'a Model, Refusal> {
    if name.is_empty() {
        return Err(Refusal::new(Reason::InvalidArgument, "the request names no model"));
    }
    state.config.check_target(name, version(asked))?;
    state.model().ok_or_else(Refusal::loading)
}
