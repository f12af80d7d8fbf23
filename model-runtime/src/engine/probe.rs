//! The probe of a package: an input, and the outputs that the optimiser saw for it.

use plimsoll_package::manifest::{Datatype, Probe, ProbeTensor, TensorSpec};

use super::{Engine, EngineError, InputError, Tensor};
use crate::engine::tensor::{Data, ShapeError, element_count};

/// Why an engine does not pass a probe.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The probe names no tensor for an input or output of the model, or one of another kind.
    #[error("the probe does not fit the model: {0}")]
    Mismatch(String),
    /// The inference failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The outputs differ.
    #[error("output `{output}` differs from the recorded one by {difference:.3e} of its largest value, {tolerance:.3e} is allowed")]
    Differs {
        /// The output.
        output: String,
        /// Largest difference, relative to the largest absolute value recorded; infinite where shapes differ or a value is not finite.
        difference: f64,
        /// What is allowed.
        tolerance: f64,
    },
}

/// Runs the probe's inputs and compares the outputs with the recorded ones.
///
/// # Errors
/// [`ProbeError`], for the first output that differs.
pub fn check(engine: &dyn Engine, probe: &Probe) -> Result<(), ProbeError> {
    let outputs = engine.run(&inputs(engine, probe)?)?;
    for (spec, output) in engine.outputs().iter().zip(outputs) {
        let recorded = find(&probe.outputs, spec)?;
        let difference = if output.shape() == recorded.shape {
            difference(&output, &recorded.data)
        } else {
            f64::INFINITY
        };
        // Not `difference > tolerance`, which a NaN would pass.
        let passes = difference <= probe.tolerance;
        if !passes {
            return Err(ProbeError::Differs {
                output: spec.name.clone(),
                difference,
                tolerance: probe.tolerance,
            });
        }
    }
    Ok(())
}

/// The probe's inputs, in the engine's order.
///
/// # Errors
/// [`ProbeError::Mismatch`] where one is missing or cannot be held.
pub fn inputs(engine: &dyn Engine, probe: &Probe) -> Result<Vec<Tensor>, ProbeError> {
    engine.inputs().iter().map(|spec| tensor(find(&probe.inputs, spec)?)).collect()
}

/// Most values of an input of zeros.
const ZEROS_MAX: usize = 1 << 28;

/// Runs zeros of the smallest shape that the model takes (1 where a dimension is open): shows that the model runs at all.
///
/// # Errors
/// Whatever the engine fails with; [`EngineError::Input`] where an input has more than 2^28 values.
pub fn check_zeros(engine: &dyn Engine) -> Result<(), EngineError> {
    engine.run(&zeros(engine)?).map(drop)
}

/// Zeros of the smallest shape that the model takes, one tensor for each input.
///
/// # Errors
/// [`InputError::Shape`] where an input has more than 2^28 values.
pub fn zeros(engine: &dyn Engine) -> Result<Vec<Tensor>, InputError> {
    let zeros = |spec: &TensorSpec| {
        let shape: Vec<usize> = spec.shape.iter().map(|&size| usize::try_from(size).unwrap_or(1)).collect();
        let zeros = element_count(&shape)
            .filter(|count| *count <= ZEROS_MAX)
            .and_then(|_| Tensor::zeros(spec.datatype, shape.clone()).ok());
        zeros.ok_or_else(|| InputError::Shape {
            name: spec.name.clone(),
            expected: spec.shape.clone(),
            given: shape,
        })
    };
    engine.inputs().iter().map(zeros).collect()
}

/// Values that tell rows apart, of the smallest shape that the model takes: between 0 and 1 for floats, zeros (which are an index into
/// anything) for all else.
///
/// # Errors
/// As [`zeros`].
pub fn ramp(engine: &dyn Engine) -> Result<Vec<Tensor>, InputError> {
    let ramp = |zeros: Tensor| {
        if !matches!(zeros.datatype(), Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64) {
            return zeros;
        }
        let values: Vec<f64> = (0..zeros.data().len()).map(|index| (index % 7 + 1) as f64 / 8.0).collect();
        let data = Data::from_f64(zeros.datatype(), &values);
        Tensor::new(zeros.shape().to_vec(), data).unwrap_or(zeros)
    };
    Ok(zeros(engine)?.into_iter().map(ramp).collect())
}

/// A tensor as a probe records it; `None` for strings of bytes, which a probe cannot hold.
#[must_use]
pub fn record(spec: &TensorSpec, tensor: &Tensor) -> Option<ProbeTensor> {
    let data = tensor.data().to_f64()?;
    Some(ProbeTensor {
        name: spec.name.clone(),
        datatype: tensor.datatype(),
        shape: tensor.shape().to_vec(),
        data,
    })
}

fn find<'a>(tensors: &'a [ProbeTensor], spec: &TensorSpec) -> Result<&'a ProbeTensor, ProbeError> {
    let found = tensors.iter().find(|tensor| tensor.name == spec.name);
    found.ok_or_else(|| ProbeError::Mismatch(format!("it holds no `{}`", spec.name)))
}

fn tensor(recorded: &ProbeTensor) -> Result<Tensor, ProbeError> {
    if recorded.datatype == Datatype::Bytes {
        return Err(ProbeError::Mismatch(format!(
            "`{}` is of strings, which a probe cannot hold",
            recorded.name
        )));
    }
    let mismatch = |error: ShapeError| ProbeError::Mismatch(format!("`{}`: {error}", recorded.name));
    Tensor::new(recorded.shape.clone(), Data::from_f64(recorded.datatype, &recorded.data)).map_err(mismatch)
}

/// Largest difference of values, relative to the largest absolute value of `recorded`; infinite where there are more or fewer, where one is
/// not finite, or for strings.
pub(crate) fn difference(output: &Tensor, recorded: &[f64]) -> f64 {
    let Some(values) = output.data().to_f64().filter(|values| values.len() == recorded.len()) else {
        return f64::INFINITY;
    };
    let largest = recorded.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    let difference = values.iter().zip(recorded).fold(0.0_f64, |difference, (value, expected)| {
        let this = if value == expected { 0.0 } else { (value - expected).abs() };
        // `max` would drop a NaN.
        if this.is_nan() { f64::INFINITY } else { difference.max(this) }
    });
    if largest > 0.0 { difference / largest } else { difference }
}
