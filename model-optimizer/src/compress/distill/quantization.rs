//! Quantisation in the forward pass, through which gradients pass straight.
//!
//! A quantised value is a float that holds the whole number of ONNX's integer, so that the graph is computed as it is written. Rounding
//! has the gradient of the identity; what is clamped has none (Bengio et al. 2013, "Estimating or Propagating Gradients Through
//! Stochastic Neurons", the straight-through estimator; Jacob et al. 2018, section 3).

use candle_core::{DType, Result, Tensor, bail};
use plimsoll_runtime::onnx::tensor_proto::DataType;

use super::operators::{Call, axis_of, matmul};

/// The attribute of `QuantizeLinear` that holds the type of its integers (since version 21; before, the zero point's type says it).
pub(super) const OUTPUT_TYPE: &str = "output_dtype";

/// The nearest whole number, ties to even.
pub(super) fn round(x: &Tensor) -> Result<Tensor> {
    // Beyond half of this a float has no digits after the point, so adding it rounds as the processor does.
    let large = match x.dtype() {
        DType::F64 => 1.5 * (1_u64 << 52) as f64,
        _ => f64::from(1.5 * (1_u32 << 23) as f32),
    };
    x.affine(1.0, large)?.affine(1.0, -large)
}

/// The value of `to` with the gradient of `x`.
pub(super) fn straight(x: &Tensor, to: &Tensor) -> Result<Tensor> {
    x + to.detach().sub(&x.detach())?
}

/// A vector of one value for each place of an axis, or a single value, in a shape that goes with `x`.
fn along(values: &Tensor, x: &Tensor, axis: i64) -> Result<Tensor> {
    if values.elem_count() == 1 {
        return values.reshape(());
    }
    let axis = axis_of(axis, x.rank())?;
    let mut shape = vec![1; x.rank()];
    shape[axis] = values.elem_count();
    values.reshape(shape)
}

fn float(call: &Call, x: &Tensor) -> Result<Tensor> {
    x.to_dtype(call.place.dtype)?.to_device(&call.place.device)
}

fn refuse_blocks(call: &Call) -> Result<()> {
    if call.integer("block_size", 0) != 0 {
        bail!("it quantises in blocks");
    }
    Ok(())
}

/// `DequantizeLinear`: `(x - zero) * scale`.
pub(super) fn dequantize(call: &Call) -> Result<Vec<Tensor>> {
    refuse_blocks(call)?;
    let (x, axis) = (float(call, call.input(0)?)?, call.integer("axis", 1));
    let centred = match call.optional(2) {
        Some(zero) => x.broadcast_sub(&along(&float(call, zero)?, &x, axis)?)?,
        None => x.clone(),
    };
    Ok(vec![centred.broadcast_mul(&along(call.input(1)?, &x, axis)?)?])
}

/// The bounds of the integers that a node quantises to: `uint8` where nothing else is said.
fn bounds(call: &Call) -> Result<(f64, f64)> {
    match DataType::try_from(call.integer(OUTPUT_TYPE, 0) as i32).unwrap_or_default() {
        DataType::Uint8 | DataType::Undefined => Ok((0.0, 255.0)),
        DataType::Int8 => Ok((-128.0, 127.0)),
        DataType::Uint16 => Ok((0.0, 65535.0)),
        DataType::Int16 => Ok((-32768.0, 32767.0)),
        kind => bail!("it quantises to {}", kind.as_str_name()),
    }
}

/// `QuantizeLinear`: `x / scale`, rounded, plus the zero point, clamped.
pub(super) fn quantize(call: &Call) -> Result<Vec<Tensor>> {
    refuse_blocks(call)?;
    let (x, axis) = (call.input(0)?, call.integer("axis", 1));
    let (low, high) = bounds(call)?;
    let scaled = x.broadcast_div(&along(call.input(1)?, x, axis)?)?;
    let (shifted, whole) = match call.optional(2) {
        Some(zero) => {
            let zero = along(&float(call, zero)?, x, axis)?;
            (scaled.broadcast_add(&zero)?, round(&scaled.detach())?.broadcast_add(&zero)?)
        }
        None => (scaled.clone(), round(&scaled.detach())?),
    };
    let inside = whole.ge(low)?.mul(&whole.le(high)?)?.to_dtype(x.dtype())?;
    Ok(vec![straight(&shifted.mul(&inside)?, &whole.clamp(low, high)?)?])
}

/// `DynamicQuantizeLinear`: to `uint8` over the range of the values, which includes 0; with the scale and the zero point.
pub(super) fn quantize_dynamically(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let flat = x.detach().flatten_all()?;
    let (low, high) = (flat.min(0)?.minimum(0.0)?, flat.max(0)?.maximum(0.0)?);
    let span = (high - &low)?;
    // All zeros stay zeros under any scale.
    let scale = ((&span / 255.0)? + span.eq(0.0)?.to_dtype(x.dtype())?)?;
    let zero = round(&low.div(&scale)?.neg()?)?.clamp(0.0, 255.0)?;
    let scaled = x.broadcast_div(&scale)?;
    let whole = round(&scaled.detach())?.broadcast_add(&zero)?.clamp(0.0, 255.0)?;
    Ok(vec![straight(&scaled.broadcast_add(&zero)?, &whole)?, scale, zero])
}

/// `MatMulInteger`: `(a - a's zero) (b - b's zero)`, the zeros of single rows of `a` and columns of `b` included.
pub(super) fn matmul_integer(call: &Call) -> Result<Vec<Tensor>> {
    let side = |index: usize, axis: i64| {
        let x = float(call, call.input(index)?)?;
        match call.optional(index + 2) {
            Some(zero) => x.broadcast_sub(&along(&float(call, zero)?, &x, axis)?),
            None => Ok(x),
        }
    };
    Ok(vec![matmul(&side(0, -2)?, &side(1, -1)?)?])
}
