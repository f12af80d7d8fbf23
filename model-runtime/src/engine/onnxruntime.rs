//! ONNX Runtime, from its shared library.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::Environment;
use ort::ep;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{RunOptions, Session, SessionInputValue};
use ort::value::{DynValue, TensorRef, Value};
use plimsoll_package::manifest::{Datatype, TensorSpec};

use super::{Data, Device, Engine, EngineError, EngineKind, LoadOptions, Tensor};
use crate::onnx;

mod openvino;

/// The environment variable that names ONNX Runtime's shared library.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Inputs of more bytes than this give the memory that they took back to the system at once; smaller ones leave it to the next request.
const KEPT_INPUT_BYTES_MAX: usize = 4 << 20;

/// A model in ONNX Runtime.
pub(super) struct OnnxRuntime {
    environment: &'static Environment,
    path: PathBuf,
    options: LoadOptions,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    /// None where the next inference begins a new one.
    session: Mutex<Option<Session>>,
}

impl OnnxRuntime {
    pub(super) fn load(path: &Path, options: &LoadOptions) -> Result<Self, EngineError> {
        // The library first: where it is missing, that is the reason to give.
        let environment = environment(options)?;
        let (inputs, outputs) = onnx::signature(&onnx::read(path)?)?;
        let session = session(environment, path, options);
        let session = session.map_err(|error| EngineError::Load {
            engine: EngineKind::OnnxRuntime,
            path: path.to_owned(),
            reason: match options.device.is_gpu() {
                // It may be a library of NVIDIA's that ONNX Runtime misses.
                true => format!(
                    "{}; {} needs NVIDIA's driver and the libraries that docs/gpus.md names",
                    one_line(&error),
                    options.device
                ),
                false => one_line(&error),
            },
        })?;
        Ok(Self {
            environment,
            path: path.to_owned(),
            options: options.clone(),
            inputs,
            outputs,
            session: Mutex::new(Some(session)),
        })
    }

    fn try_infer(&self, inputs: &[Tensor]) -> ort::Result<Vec<Tensor>> {
        let values = inputs.iter().map(to_value).collect::<ort::Result<Vec<_>>>()?;
        let large = inputs.iter().map(byte_count).sum::<usize>() > KEPT_INPUT_BYTES_MAX;
        let shrink = large.then(shrinkage).transpose()?;
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = match &mut *session {
            Some(begun) => begun,
            none => none.insert(self::session(self.environment, &self.path, &self.options)?),
        };
        let run = match &shrink {
            Some(options) => begun.run_with_options(&values[..], options),
            None => begun.run(&values[..]),
        };
        let outputs = run.and_then(|outputs| {
            let outputs = self.outputs.iter().map(|spec| from_value(spec, &outputs[spec.name.as_str()]));
            outputs.collect()
        });
        if outputs.is_err() && self.options.device == Device::OpenVino {
            // From then on it would fail what has the same shapes as what succeeded last.
            *session = None;
        }
        outputs
    }
}

impl Engine for OnnxRuntime {
    fn kind(&self) -> EngineKind {
        EngineKind::OnnxRuntime
    }

    fn inputs(&self) -> &[TensorSpec] {
        &self.inputs
    }

    fn outputs(&self) -> &[TensorSpec] {
        &self.outputs
    }

    fn infer(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        if self.options.device == Device::OpenVino {
            openvino::check_integers(&self.inputs, inputs)?;
        }
        self.try_infer(inputs).map_err(|error| EngineError::Run {
            engine: EngineKind::OnnxRuntime,
            reason: one_line(&error),
        })
    }
}

/// Where ONNX Runtime's library is, as [`LIBRARY_VARIABLE`] says.
#[must_use]
pub fn default_library() -> Option<PathBuf> {
    env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn environment(options: &LoadOptions) -> Result<&'static Environment, EngineError> {
    // ONNX Runtime allows one environment a process.
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    static LOADING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = ENVIRONMENT.get();
    if let (Some(environment), Device::Cpu) = (loaded, options.device) {
        return Ok(environment);
    }
    let library = options.library.clone().or_else(default_library);
    let library = library.ok_or_else(|| EngineError::Library(format!("{LIBRARY_VARIABLE} names none")))?;
    if !library.is_file() {
        return Err(EngineError::Library(format!("{} is not a file", library.display())));
    }
    options.device.check(&library).map_err(EngineError::Library)?;
    if let Some(environment) = loaded {
        return Ok(environment);
    }
    let builder = ort::init_from(&library).map_err(|error| EngineError::Library(one_line(&error)))?;
    let environment = builder.with_name("plimsoll").with_telemetry(false).build();
    let environment = environment.map_err(|error| EngineError::Library(one_line(&error)))?;
    // Its errors come back to us as errors; its own lines would break the log's form.
    environment.set_log_level(ort::logging::LogLevel::Fatal);
    Ok(ENVIRONMENT.get_or_init(|| environment))
}

fn session(environment: &Environment, path: &Path, options: &LoadOptions) -> ort::Result<Session> {
    if options.device == Device::OpenVino {
        openvino::check_errors(builder(environment, options)?)?;
    }
    builder(environment, options)?.commit_from_file(path)
}

/// A builder's error carries the builder, which only a further attempt would need: `?` drops it.
fn builder(environment: &Environment, options: &LoadOptions) -> ort::Result<SessionBuilder> {
    let builder = Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_intra_threads(options.threads)?
        .with_inter_threads(1)?
        // Spinning threads burn the CPU quota of a container that waits for requests.
        .with_intra_op_spinning(false)?
        .with_config_entry("session.disable_quant_qdq", if options.fold_dequantize { "1" } else { "0" })?
        .with_execution_providers(providers(options))?;
    Ok(builder)
}

/// ONNX Runtime's providers for the device, the preferred one first. One that cannot be used is an error: nobody asks for a GPU to be
/// served by the processor.
fn providers(options: &LoadOptions) -> Vec<ep::ExecutionProviderDispatch> {
    let cuda = |number: u16| {
        let cuda = ep::CUDA::default()
            .with_device_id(number.into())
            // Products in TF32 have 10 bits of mantissa: not the model whose accuracy was measured.
            .with_tf32(false)
            // The exhaustive search is done again for every new shape, while its request waits.
            .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic)
            // By powers of two the arena takes up to twice what it needs.
            .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested);
        let cuda = match options.device_bytes_max {
            Some(limit) => cuda.with_memory_limit(limit),
            None => cuda,
        };
        cuda.build().error_on_failure()
    };
    let cpu = ep::CPU::default().with_arena_allocator(true).build();
    match options.device {
        Device::Cpu => vec![cpu],
        Device::Cuda(number) => vec![cuda(number), cpu],
        Device::TensorRt(number) => {
            let tensorrt = ep::TensorRT::default().with_device_id(number.into()).build().error_on_failure();
            vec![tensorrt, cuda(number), cpu]
        }
        Device::OpenVino => vec![openvino::provider(options.threads).build().error_on_failure(), cpu],
    }
}

/// Gives memory back after the run.
fn shrinkage() -> ort::Result<RunOptions> {
    let mut options = RunOptions::new()?;
    options.set("memory.enable_memory_arena_shrinkage", "cpu:0")?;
    Ok(options)
}

fn one_line(error: &dyn std::error::Error) -> String {
    error.to_string().replace('\n', " ")
}

fn byte_count(tensor: &Tensor) -> usize {
    match tensor.data() {
        Data::Bool(values) => values.len(),
        Data::Uint8(values) => values.len(),
        Data::Int8(values) => values.len(),
        Data::Uint16(values) => 2 * values.len(),
        Data::Int16(values) => 2 * values.len(),
        Data::Fp16(values) => 2 * values.len(),
        Data::Bf16(values) => 2 * values.len(),
        Data::Uint32(values) => 4 * values.len(),
        Data::Int32(values) => 4 * values.len(),
        Data::Fp32(values) => 4 * values.len(),
        Data::Uint64(values) => 8 * values.len(),
        Data::Int64(values) => 8 * values.len(),
        Data::Fp64(values) => 8 * values.len(),
        Data::Bytes(values) => values.iter().map(Vec::len).sum(),
    }
}

fn to_value(tensor: &Tensor) -> ort::Result<SessionInputValue<'_>> {
    let shape = tensor.shape();
    Ok(match tensor.data() {
        Data::Bool(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Uint8(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Uint16(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Uint32(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Uint64(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Int8(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Int16(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Int32(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Int64(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Fp16(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Bf16(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Fp32(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Fp64(values) => TensorRef::from_array_view((shape, &values[..]))?.into(),
        Data::Bytes(values) => {
            let texts = values.iter().cloned().map(String::from_utf8).collect::<Result<Vec<_>, _>>();
            let texts = texts.map_err(|_| ort::Error::new("a string is not UTF-8, and ONNX Runtime takes no other"))?;
            Value::from_string_array((shape, &texts[..]))?.into()
        }
    })
}

fn from_value(spec: &TensorSpec, value: &DynValue) -> ort::Result<Tensor> {
    macro_rules! extract {
        ($name:ident, $type:ty) => {{
            let (shape, values) = value.try_extract_tensor::<$type>()?;
            (shape, Data::$name(values.to_vec()))
        }};
    }
    let (shape, data) = match spec.datatype {
        Datatype::Bool => extract!(Bool, bool),
        Datatype::Uint8 => extract!(Uint8, u8),
        Datatype::Uint16 => extract!(Uint16, u16),
        Datatype::Uint32 => extract!(Uint32, u32),
        Datatype::Uint64 => extract!(Uint64, u64),
        Datatype::Int8 => extract!(Int8, i8),
        Datatype::Int16 => extract!(Int16, i16),
        Datatype::Int32 => extract!(Int32, i32),
        Datatype::Int64 => extract!(Int64, i64),
        Datatype::Fp16 => extract!(Fp16, half::f16),
        Datatype::Bf16 => extract!(Bf16, half::bf16),
        Datatype::Fp32 => extract!(Fp32, f32),
        Datatype::Fp64 => extract!(Fp64, f64),
        Datatype::Bytes => {
            let (shape, values) = value.try_extract_strings()?;
            (shape, Data::Bytes(values.into_iter().map(String::into_bytes).collect()))
        }
    };
    let shape = shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
    Tensor::new(shape, data).map_err(|error| ort::Error::new(error.to_string()))
}
