//! tract: ONNX inference in pure Rust.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use plimsoll_package::manifest::{Datatype, TensorSpec};
use prost::Message as _;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::plan;
use tract_onnx::tract_core::tract_linalg::multithread::Executor;

use super::{Data, Device, Engine, EngineError, EngineKind, LoadOptions, Tensor};
use crate::onnx;

mod misread;

/// Most plans kept, one for each combination of input shapes in use; each holds weights packed for its own shapes.
const PLANS_MAX: usize = 8;

/// A model in tract.
pub(super) struct Tract {
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    model: InferenceModel,
    options: RunOptions,
    /// Most recently used last.
    plans: Mutex<Vec<(Shapes, Plan)>>,
}

type Shapes = Vec<Vec<usize>>;
type Plan = Arc<TypedRunnableModel>;

impl Tract {
    pub(super) fn load(path: &Path, options: &LoadOptions) -> Result<Self, EngineError> {
        let refuse = |reason: String| EngineError::Load {
            engine: EngineKind::Tract,
            path: path.to_owned(),
            reason,
        };
        if options.device != Device::Cpu {
            return Err(refuse(format!("tract computes on the CPU, not on {}", options.device)));
        }
        let mut proto = onnx::read(path)?;
        let (inputs, outputs) = onnx::signature(&proto)?;
        if let Some(spec) = inputs
            .iter()
            .chain(&outputs)
            .find(|spec| matches!(spec.datatype, Datatype::Bytes | Datatype::Bf16))
        {
            return Err(refuse(format!(
                "`{}` is of type {}, which tract does not run",
                spec.name, spec.datatype
            )));
        }
        onnx::fold_dequantize(&mut proto)?;
        if let Some(graph) = &mut proto.graph {
            if let Some(reason) = misread::find(graph) {
                return Err(refuse(reason));
            }
            split_biases(graph);
        }
        let model = parse(&proto, path.parent()).map_err(|error| refuse(words(&error)))?;
        let executor = (options.threads > 1).then(|| Executor::multithread_with_name(options.threads, "tract"));
        let tract = Self {
            inputs,
            outputs,
            model,
            options: RunOptions {
                executor,
                ..RunOptions::default()
            },
            plans: Mutex::default(),
        };
        // A model of fixed shapes is optimised now, so that its refusal is a refusal to load.
        if let Some(shapes) = fixed_shapes(&tract.inputs) {
            let plan = tract.optimize(&shapes).map_err(|error| refuse(words(&error)))?;
            tract.plans.lock().unwrap_or_else(PoisonError::into_inner).push((shapes, plan));
        }
        Ok(tract)
    }

    fn plan(&self, shapes: Shapes) -> TractResult<Plan> {
        let take = |plans: &mut Vec<(Shapes, Plan)>| {
            let index = plans.iter().position(|(known, _)| *known == shapes)?;
            let entry = plans.remove(index);
            plans.push(entry);
            plans.last().map(|(_, plan)| Arc::clone(plan))
        };
        if let Some(plan) = take(&mut self.plans.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(plan);
        }
        // Not under the lock: requests of known shapes go on meanwhile.
        let plan = self.optimize(&shapes)?;
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.len() == PLANS_MAX {
            plans.remove(0);
        }
        plans.push((shapes, Arc::clone(&plan)));
        Ok(plan)
    }

    fn optimize(&self, shapes: &Shapes) -> TractResult<Plan> {
        let mut model = self.model.clone();
        for (index, (spec, shape)) in self.inputs.iter().zip(shapes).enumerate() {
            model.set_input_fact(index, InferenceFact::dt_shape(datum_type(spec.datatype)?, shape))?;
        }
        model.into_optimized()?.into_runnable_with_options(&self.options)
    }

    fn try_infer(&self, inputs: &[Tensor], limit: Option<Duration>) -> TractResult<Vec<Tensor>> {
        let runnable = self.plan(inputs.iter().map(|input| input.shape().to_vec()).collect())?;
        let inputs = inputs.iter().map(to_tract).collect::<TractResult<_>>()?;
        let outputs = match limit {
            None => runnable.run(inputs)?,
            Some(limit) => {
                let begun = Instant::now();
                runnable
                    .spawn()?
                    .run_plan_with_eval(inputs, |context, state, node, inputs| match begun.elapsed() > limit {
                        true => Err(TractError::new(TooLate)),
                        false => plan::eval(context, state, node, inputs),
                    })?
            }
        };
        self.outputs
            .iter()
            .zip(outputs)
            .map(|(spec, output)| from_tract(spec.datatype, &output))
            .collect()
    }
}

impl Engine for Tract {
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
        self.try_infer(inputs, None).map_err(|error| failed(&error))
    }

    fn infer_within(&self, inputs: &[Tensor], limit: Duration) -> Result<Vec<Tensor>, EngineError> {
        self.try_infer(inputs, Some(limit)).map_err(|error| match error.is::<TooLate>() {
            true => EngineError::Late {
                engine: EngineKind::Tract,
                limit,
            },
            false => failed(&error),
        })
    }
}

/// An inference took longer than it was given.
#[derive(Debug, thiserror::Error)]
#[error("too late")]
struct TooLate;

fn failed(error: &TractError) -> EngineError {
    EngineError::Run {
        engine: EngineKind::Tract,
        reason: words(error),
    }
}

/// Adds the bias of every `Gemm` without factors in a node of its own: tract takes it times `beta` in single precision whatever its type,
/// and then finds a sum of two types.
fn split_biases(graph: &mut onnx::GraphProto) {
    for mut node in std::mem::take(&mut graph.node) {
        let factor = |name: &str| node.attribute.iter().find(|attribute| attribute.name() == name);
        let plain = ["alpha", "beta"]
            .iter()
            .all(|name| factor(name).is_none_or(|factor| factor.f() == 1.0));
        let is_gemm = node.op_type() == "Gemm" && matches!(node.domain(), "" | "ai.onnx");
        let biased = node.input.len() == 3 && !node.input[2].is_empty() && node.output.len() == 1;
        if !is_gemm || !plain || !biased {
            graph.node.push(node);
            continue;
        }
        let product = format!("{}/without-bias", node.output[0]);
        let sum = onnx::NodeProto {
            op_type: Some("Add".to_owned()),
            // Names are unique in tract, and nodes may have none; values have their own.
            name: Some(format!("{}/bias", node.output[0])),
            input: vec![product.clone(), node.input.remove(2)],
            output: std::mem::replace(&mut node.output, vec![product]),
            ..onnx::NodeProto::default()
        };
        graph.node.extend([node, sum]);
    }
}

fn parse(proto: &onnx::ModelProto, folder: Option<&Path>) -> TractResult<InferenceModel> {
    // tract has messages of its own for the same format.
    let proto = tract_onnx::pb::ModelProto::decode(&*proto.encode_to_vec())?;
    // Exporters write sizes of the example batch into these, which tract would take as given.
    let framework = tract_onnx::onnx().with_ignore_value_info(true).with_ignore_output_shapes(true);
    let parsed = framework.parse(&proto, folder.and_then(Path::to_str))?;
    if parsed.unresolved_inputs.is_empty() {
        Ok(parsed.model)
    } else {
        Err(TractError::msg(format!(
            "nothing in the graph makes {}",
            parsed.unresolved_inputs.join(", ")
        )))
    }
}

fn fixed_shapes(specs: &[TensorSpec]) -> Option<Shapes> {
    specs
        .iter()
        .map(|spec| spec.shape.iter().map(|&size| usize::try_from(size).ok()).collect())
        .collect()
}

/// tract's chain of errors in one line; each level says what it was about.
fn words(error: &TractError) -> String {
    format!("{error:#}").replace('\n', " ")
}

fn datum_type(datatype: Datatype) -> TractResult<DatumType> {
    Ok(match datatype {
        Datatype::Bool => DatumType::Bool,
        Datatype::Uint8 => DatumType::U8,
        Datatype::Uint16 => DatumType::U16,
        Datatype::Uint32 => DatumType::U32,
        Datatype::Uint64 => DatumType::U64,
        Datatype::Int8 => DatumType::I8,
        Datatype::Int16 => DatumType::I16,
        Datatype::Int32 => DatumType::I32,
        Datatype::Int64 => DatumType::I64,
        Datatype::Fp16 => DatumType::F16,
        Datatype::Fp32 => DatumType::F32,
        Datatype::Fp64 => DatumType::F64,
        Datatype::Bf16 | Datatype::Bytes => return Err(TractError::msg(format!("tract does not run {datatype}"))),
    })
}

fn to_tract(tensor: &Tensor) -> TractResult<TValue> {
    use tract_onnx::prelude::Tensor as TractTensor;
    let shape = tensor.shape();
    let converted = match tensor.data() {
        Data::Bool(values) => TractTensor::from_shape(shape, values),
        Data::Uint8(values) => TractTensor::from_shape(shape, values),
        Data::Uint16(values) => TractTensor::from_shape(shape, values),
        Data::Uint32(values) => TractTensor::from_shape(shape, values),
        Data::Uint64(values) => TractTensor::from_shape(shape, values),
        Data::Int8(values) => TractTensor::from_shape(shape, values),
        Data::Int16(values) => TractTensor::from_shape(shape, values),
        Data::Int32(values) => TractTensor::from_shape(shape, values),
        Data::Int64(values) => TractTensor::from_shape(shape, values),
        Data::Fp16(values) => TractTensor::from_shape(shape, values),
        Data::Fp32(values) => TractTensor::from_shape(shape, values),
        Data::Fp64(values) => TractTensor::from_shape(shape, values),
        Data::Bf16(_) | Data::Bytes(_) => Err(TractError::msg(format!("tract does not run {}", tensor.datatype()))),
    };
    converted.map(IntoTValue::into_tvalue)
}

fn from_tract(datatype: Datatype, output: &TValue) -> TractResult<Tensor> {
    // tract computes shapes and some integers in a type of its own; the model's signature decides.
    let output = output.cast_to_dt(datum_type(datatype)?)?;
    let view = output.try_as_plain_ram()?;
    let data = match datatype {
        Datatype::Bool => Data::Bool(view.as_slice()?.to_vec()),
        Datatype::Uint8 => Data::Uint8(view.as_slice()?.to_vec()),
        Datatype::Uint16 => Data::Uint16(view.as_slice()?.to_vec()),
        Datatype::Uint32 => Data::Uint32(view.as_slice()?.to_vec()),
        Datatype::Uint64 => Data::Uint64(view.as_slice()?.to_vec()),
        Datatype::Int8 => Data::Int8(view.as_slice()?.to_vec()),
        Datatype::Int16 => Data::Int16(view.as_slice()?.to_vec()),
        Datatype::Int32 => Data::Int32(view.as_slice()?.to_vec()),
        Datatype::Int64 => Data::Int64(view.as_slice()?.to_vec()),
        Datatype::Fp16 => Data::Fp16(view.as_slice()?.to_vec()),
        Datatype::Fp32 => Data::Fp32(view.as_slice()?.to_vec()),
        Datatype::Fp64 => Data::Fp64(view.as_slice()?.to_vec()),
        Datatype::Bf16 | Datatype::Bytes => return Err(TractError::msg(format!("tract does not run {datatype}"))),
    };
    Tensor::new(output.shape().to_vec(), data).map_err(TractError::msg)
}
