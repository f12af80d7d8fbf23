//! Runs cases of ONNX's backend suite on an engine: `conformance tract|onnxruntime DEVICE FOLDER`, where `tests/conformance/cases.py` made the
//! folder. Each line on standard input is a case; each is answered by a line with what came of it. A case may take the process with it:
//! `cargo xtask conformance`, which asks, goes on with a new one.

use std::fs;
use std::io::{self, BufRead as _, Write as _};
use std::path::Path;

use plimsoll_runtime::engine::{self, Data, EngineError, EngineKind, LoadOptions, Tensor};
use plimsoll_runtime::onnx::{self, OnnxError, TensorProto};
use prost::Message as _;
use serde::{Deserialize, Serialize};

/// A case, and how far its outputs may be from the recorded ones.
#[derive(Deserialize)]
struct Case {
    name: String,
    rtol: f64,
    atol: f64,
}

/// What came of a case.
#[derive(Serialize)]
struct Answer {
    outcome: Outcome,
    /// The engine's words, or what differs.
    words: String,
}

#[derive(Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Passed,
    /// An input or output is of a type that the protocol or the engine does not have.
    Type,
    /// An input has no rank.
    Rank,
    /// The engine does not have the operator, or not of that version or type.
    Operator,
    /// The engine refuses the model for another reason.
    Load,
    /// The inference failed.
    Run,
    Panicked,
    /// The outputs are not the recorded ones.
    Differs,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, device, folder] = &arguments[..] else {
        return Err("usage: conformance tract|onnxruntime DEVICE FOLDER".into());
    };
    let options = LoadOptions {
        device: device.parse()?,
        ..LoadOptions::default()
    };
    let kind = match kind.as_str() {
        "tract" => EngineKind::Tract,
        "onnxruntime" => EngineKind::OnnxRuntime,
        other => return Err(format!("`{other}` is neither tract nor onnxruntime").into()),
    };
    for line in io::stdin().lock().lines() {
        let case: Case = serde_json::from_str(&line?)?;
        let (outcome, words) = match run(kind, &options, &Path::new(folder).join(&case.name), &case) {
            Ok(()) => (Outcome::Passed, String::new()),
            Err(Failure::Engine(EngineError::Library(reason))) => return Err(reason.into()),
            Err(failure) => failure.told(),
        };
        println!("{}", serde_json::to_string(&Answer { outcome, words })?);
        io::stdout().flush()?;
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("{0}")]
    Differs(String),
}

impl Failure {
    fn told(&self) -> (Outcome, String) {
        let words = self.to_string();
        let says = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
        let outcome = match self {
            Self::Differs(_) => Outcome::Differs,
            Self::Engine(EngineError::Model(OnnxError::Signature { reason, .. })) if reason.contains("rank") => Outcome::Rank,
            Self::Engine(EngineError::Model(_)) => Outcome::Type,
            Self::Engine(EngineError::Load { .. }) if says(&["which tract does not run"]) => Outcome::Type,
            Self::Engine(_) if says(&OPERATOR) => Outcome::Operator,
            Self::Engine(EngineError::Panicked(_)) => Outcome::Panicked,
            Self::Engine(EngineError::Load { .. }) => Outcome::Load,
            Self::Engine(_) => Outcome::Run,
        };
        (outcome, words)
    }
}

/// How the engines say that they do not have an operator.
const OPERATOR: [&str; 7] = [
    "Unimplemented(",
    "not implemented",
    "NOT_IMPLEMENTED",
    "is not a registered function/op",
    "Could not find an implementation",
    "No Op registered",
    "tract does not",
];

fn run(kind: EngineKind, options: &LoadOptions, folder: &Path, case: &Case) -> Result<(), Failure> {
    let model = engine::load(kind, &folder.join("model.onnx"), options)?;
    let inputs = (0..model.inputs().len()).map(|index| read(&folder.join(format!("input_{index}.pb"))));
    let outputs = model.run(&inputs.collect::<Vec<_>>())?;
    for (index, (spec, output)) in model.outputs().iter().zip(&outputs).enumerate() {
        let recorded = read(&folder.join(format!("output_{index}.pb")));
        compare(output, &recorded, case).map_err(|text| Failure::Differs(format!("output `{}` {text}", spec.name)))?;
    }
    Ok(())
}

/// A recorded tensor. What is wrong with one is a fault of the script that wrote it, and no engine's.
fn read(path: &Path) -> Tensor {
    let read = || -> Result<Tensor, Box<dyn std::error::Error>> {
        let proto = TensorProto::decode(&*fs::read(path)?)?;
        let shape = onnx::weights::shape(&proto)?;
        let datatype = onnx::datatype(proto.data_type()).ok_or("a type that the protocol does not have")?;
        let data = if proto.string_data.is_empty() {
            Data::from_bytes(datatype, &shape, proto.raw_data())?
        } else {
            Data::Bytes(proto.string_data.iter().map(|text| text.to_vec()).collect())
        };
        Ok(Tensor::new(shape, data)?)
    };
    match read() {
        Ok(tensor) => tensor,
        Err(error) => {
            eprintln!("{}: {error}", path.display());
            std::process::exit(1);
        }
    }
}

/// Least tolerance of bfloat16, relative: two units in the last place, as the suite's own runner has it (`onnx/backend/test/runner`).
const BFLOAT16_RTOL: f64 = 1.0 / 64.0;

/// Compares as the suite's own runner does: the same type and shape, and every value within `atol + rtol * |recorded|`; NaN is equal to NaN.
fn compare(output: &Tensor, recorded: &Tensor, case: &Case) -> Result<(), String> {
    if output.datatype() != recorded.datatype() || output.shape() != recorded.shape() {
        let of = |tensor: &Tensor| format!("{} {:?}", tensor.datatype(), tensor.shape());
        return Err(format!("is {}, {} is recorded", of(output), of(recorded)));
    }
    if output == recorded {
        return Ok(());
    }
    let (Some(values), Some(expected)) = (output.data().to_f64(), recorded.data().to_f64()) else {
        return Err("holds other strings than are recorded".to_owned());
    };
    let rtol = match output.data() {
        Data::Bf16(_) => case.rtol.max(BFLOAT16_RTOL),
        _ => case.rtol,
    };
    let close = |value: f64, expected: f64| {
        value == expected || (value.is_nan() && expected.is_nan()) || (value - expected).abs() <= case.atol + rtol * expected.abs()
    };
    match values.iter().zip(&expected).position(|(&value, &expected)| !close(value, expected)) {
        None => Ok(()),
        Some(index) => Err(format!("is {} at {index}, {} is recorded", values[index], expected[index])),
    }
}
