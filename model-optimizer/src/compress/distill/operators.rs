//! The operators that gradients flow through, in one table, as ONNX's operator reference defines them for inference.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{D, DType, Device, Result, Tensor, bail};
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, NodeProto};

use super::forward::{Place, of_proto};
use super::{quantization, window};
use crate::graph::attribute;

/// What computes a node's outputs.
pub(super) type Operator = fn(&Call) -> Result<Vec<Tensor>>;

/// A node with the values of its inputs.
pub(super) struct Call<'a> {
    pub(super) node: &'a NodeProto,
    pub(super) inputs: Vec<Option<Tensor>>,
    /// The version of the standard operators.
    pub(super) opset: i64,
    pub(super) place: &'a Place,
}

/// Every operator by its type.
pub(super) const OPERATORS: &[(&str, Operator)] = &[
    ("Abs", |call| call.map(Tensor::abs)),
    ("Add", |call| call.combine(Tensor::broadcast_add)),
    ("And", |call| call.combine(Tensor::broadcast_mul)),
    ("AveragePool", window::average_pool),
    ("BatchNormalization", batch_normalization),
    ("Cast", cast),
    ("Ceil", |call| call.map(Tensor::ceil)),
    ("Clip", clip),
    ("Concat", concat),
    ("Constant", constant),
    ("ConstantOfShape", constant_of_shape),
    ("Conv", window::convolve),
    ("ConvTranspose", window::convolve_transposed),
    ("Cos", |call| call.map(Tensor::cos)),
    ("DequantizeLinear", quantization::dequantize),
    ("Div", |call| call.combine(Tensor::broadcast_div)),
    ("Dropout", |call| call.map(|x| Ok(x.clone()))),
    ("DynamicQuantizeLinear", quantization::quantize_dynamically),
    ("Elu", |call| call.map(|x| x.elu(call.float("alpha", 1.0)))),
    ("Equal", |call| call.combine(Tensor::broadcast_eq)),
    ("Erf", |call| call.map(Tensor::erf)),
    ("Exp", |call| call.map(Tensor::exp)),
    ("Expand", expand),
    ("Flatten", flatten),
    ("Floor", |call| call.map(Tensor::floor)),
    ("Gather", gather),
    ("Gelu", gelu),
    ("Gemm", gemm),
    ("GlobalAveragePool", |call| {
        call.map(|x| reduce(x, &spatial(x), true, Tensor::mean_keepdim))
    }),
    ("GlobalMaxPool", |call| call.map(|x| reduce(x, &spatial(x), true, largest))),
    ("Greater", |call| call.combine(Tensor::broadcast_gt)),
    ("GreaterOrEqual", |call| call.combine(Tensor::broadcast_ge)),
    ("HardSigmoid", |call| {
        call.map(|x| hard_sigmoid(x, call.float("alpha", 0.2), call.float("beta", 0.5)))
    }),
    ("HardSwish", |call| call.map(|x| x.mul(&hard_sigmoid(x, 1.0 / 6.0, 0.5)?))),
    ("Identity", |call| call.map(|x| Ok(x.clone()))),
    ("InstanceNormalization", instance_normalization),
    ("LayerNormalization", layer_normalization),
    ("LeakyRelu", |call| {
        call.map(|x| x.relu()? - (x.neg()?.relu()? * call.float("alpha", 0.01))?)
    }),
    ("Less", |call| call.combine(Tensor::broadcast_lt)),
    ("LessOrEqual", |call| call.combine(Tensor::broadcast_le)),
    ("Log", |call| call.map(Tensor::log)),
    ("LogSoftmax", |call| softmax_family(call, log_softmax)),
    ("MatMul", |call| Ok(vec![matmul(call.input(0)?, call.input(1)?)?])),
    ("MatMulInteger", quantization::matmul_integer),
    ("Max", |call| call.fold(Tensor::broadcast_maximum)),
    ("MaxPool", window::max_pool),
    ("Min", |call| call.fold(Tensor::broadcast_minimum)),
    ("Mul", |call| call.combine(Tensor::broadcast_mul)),
    ("Neg", |call| call.map(Tensor::neg)),
    ("Not", |call| call.map(|x| x.eq(0_u8))),
    ("Or", |call| call.combine(Tensor::broadcast_maximum)),
    ("PRelu", |call| {
        call.combine(|x, slope| x.relu()? - x.neg()?.relu()?.broadcast_mul(slope)?)
    }),
    ("Pad", pad),
    ("Pow", pow),
    ("QuantizeLinear", quantization::quantize),
    ("Range", range),
    ("Reciprocal", |call| call.map(Tensor::recip)),
    ("ReduceL2", |call| {
        reduce_axes(call, |x, axes, keep| reduce(&x.sqr()?, axes, keep, Tensor::sum_keepdim)?.sqrt())
    }),
    ("ReduceMax", |call| {
        reduce_axes(call, |x, axes, keep| reduce(x, axes, keep, largest))
    }),
    ("ReduceMean", |call| {
        reduce_axes(call, |x, axes, keep| reduce(x, axes, keep, Tensor::mean_keepdim))
    }),
    ("ReduceMin", |call| {
        reduce_axes(call, |x, axes, keep| reduce(&x.neg()?, axes, keep, largest)?.neg())
    }),
    ("ReduceSum", |call| {
        reduce_axes(call, |x, axes, keep| reduce(x, axes, keep, Tensor::sum_keepdim))
    }),
    ("Relu", |call| call.map(Tensor::relu)),
    ("Reshape", reshape),
    ("Round", |call| call.map(quantization::round)),
    ("Shape", shape),
    ("Sigmoid", |call| call.map(sigmoid)),
    ("Sign", |call| call.map(Tensor::sign)),
    ("Sin", |call| call.map(Tensor::sin)),
    ("Slice", slice),
    ("Softmax", |call| softmax_family(call, |x, axis| log_softmax(x, axis)?.exp())),
    ("Softplus", |call| call.map(softplus)),
    ("Split", split),
    ("Sqrt", |call| call.map(Tensor::sqrt)),
    ("Squeeze", squeeze),
    ("Sub", |call| call.combine(Tensor::broadcast_sub)),
    ("Sum", |call| call.fold(Tensor::broadcast_add)),
    ("Tanh", |call| call.map(Tensor::tanh)),
    ("Tile", tile),
    ("Transpose", transpose),
    ("Trilu", trilu),
    ("Unsqueeze", unsqueeze),
    ("Where", select),
    ("Xor", |call| call.combine(Tensor::broadcast_ne)),
];

/// What computes `node`; `None` where nothing here does.
pub(super) fn find(node: &NodeProto) -> Option<Operator> {
    let found = OPERATORS.binary_search_by_key(&node.op_type(), |(name, _)| name).ok()?;
    Some(OPERATORS[found].1)
}

/// Whether an operator's result is constant wherever it has a slope.
pub(super) fn is_step(node: &NodeProto) -> bool {
    matches!(node.op_type(), "Ceil" | "Floor" | "Round" | "Sign")
}

impl Call<'_> {
    /// An input that the operator cannot do without.
    pub(super) fn input(&self, index: usize) -> Result<&Tensor> {
        match self.optional(index) {
            Some(input) => Ok(input),
            None => bail!("its input {index} is missing"),
        }
    }

    pub(super) fn optional(&self, index: usize) -> Option<&Tensor> {
        self.inputs.get(index)?.as_ref()
    }

    fn map(&self, compute: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Vec<Tensor>> {
        Ok(vec![compute(self.input(0)?)?])
    }

    fn combine(&self, compute: fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Vec<Tensor>> {
        let (a, b) = self.alike(self.input(0)?, self.input(1)?)?;
        Ok(vec![compute(&a, &b)?])
    }

    fn fold(&self, compute: fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Vec<Tensor>> {
        let mut total = self.input(0)?.clone();
        for index in 1..self.inputs.len() {
            let (a, b) = self.alike(&total, self.input(index)?)?;
            total = compute(&a, &b)?;
        }
        Ok(vec![total])
    }

    /// Two tensors of one type on one device: an integer beside a quantised value, or one in main memory beside one on the device.
    fn alike(&self, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        let (mut a, mut b) = (a.clone(), b.clone());
        if a.dtype() != b.dtype() {
            let dtype = if a.dtype().is_float() || b.dtype().is_float() {
                self.place.dtype
            } else {
                DType::I64
            };
            (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
        }
        if !a.device().same_device(b.device()) {
            (a, b) = (a.to_device(&self.place.device)?, b.to_device(&self.place.device)?);
        }
        Ok((a, b))
    }

    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        attribute(self.node, name)
    }

    pub(super) fn integer(&self, name: &str, default: i64) -> i64 {
        self.attribute(name).map_or(default, AttributeProto::i)
    }

    pub(super) fn float(&self, name: &str, default: f32) -> f64 {
        f64::from(self.attribute(name).map_or(default, AttributeProto::f))
    }

    pub(super) fn text(&self, name: &str) -> &str {
        self.attribute(name)
            .and_then(|value| std::str::from_utf8(value.s()).ok())
            .unwrap_or_default()
    }

    pub(super) fn ints(&self, name: &str) -> Option<Vec<i64>> {
        self.attribute(name).map(|value| value.ints.clone())
    }

    pub(super) fn size(&self, name: &str, default: i64) -> Result<usize> {
        let value = self.integer(name, default);
        usize::try_from(value).map_err(|_| candle_core::Error::msg(format!("its {name} is {value}")))
    }

    /// As many sizes as an attribute of `count` holds; `default` each where it is left out.
    pub(super) fn sizes(&self, name: &str, count: usize, default: usize) -> Result<Vec<usize>> {
        let Some(values) = self.ints(name) else {
            return Ok(vec![default; count]);
        };
        let sizes: Vec<usize> = values.iter().filter_map(|&value| usize::try_from(value).ok()).collect();
        if sizes.len() != count {
            bail!("its {name} is {values:?}, where {count} sizes are expected");
        }
        Ok(sizes)
    }

    /// The whole numbers of an input; `None` where it is left out.
    fn numbers(&self, index: usize) -> Result<Option<Vec<i64>>> {
        let Some(input) = self.optional(index) else { return Ok(None) };
        input.flatten_all()?.to_dtype(DType::I64)?.to_vec1().map(Some)
    }

    /// The one number of an input; `None` where it is left out.
    fn number(&self, index: usize) -> Result<Option<f64>> {
        let Some(input) = self.optional(index) else { return Ok(None) };
        match input.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?[..] {
            [value] => Ok(Some(value)),
            _ => bail!(
                "its input {index} holds {} values, and only one number is computed with",
                input.elem_count()
            ),
        }
    }

    /// What is an attribute in old versions of an operator and an input in newer ones.
    fn axes(&self, index: usize) -> Result<Option<Vec<i64>>> {
        Ok(self.numbers(index)?.or_else(|| self.ints("axes")))
    }
}

pub(super) fn axis_of(axis: i64, rank: usize) -> Result<usize> {
    let counted = if axis < 0 { axis + rank as i64 } else { axis };
    match usize::try_from(counted) {
        Ok(counted) if counted < rank.max(1) => Ok(counted),
        _ => bail!("it has no axis {axis}: its input has {rank}"),
    }
}

fn axes_of(axes: &[i64], rank: usize) -> Result<Vec<usize>> {
    axes.iter().map(|&axis| axis_of(axis, rank)).collect()
}

fn spatial(x: &Tensor) -> Vec<usize> {
    (2..x.rank()).collect()
}

/// The product of matrices, batch by batch.
pub(super) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (left, right) = (a.rank() == 1, b.rank() == 1);
    let a = if left { a.unsqueeze(0)? } else { a.clone() };
    let b = if right { b.unsqueeze(1)? } else { b.clone() };
    let (rows, inner, columns) = (a.dim(D::Minus2)?, a.dim(D::Minus1)?, b.dim(D::Minus1)?);
    let mut product = if b.rank() == 2 {
        // One matrix for every batch: their rows are rows of one product.
        let mut shape = a.dims().to_vec();
        let last = shape.len() - 1;
        shape[last] = columns;
        a.contiguous()?.reshape(((), inner))?.matmul(&b)?.reshape(shape)?
    } else {
        let batches = |x: &Tensor| candle_core::Shape::from(&x.dims()[..x.rank() - 2]);
        let batches = batches(&a).broadcast_shape_binary_op(&batches(&b), "matmul")?;
        let batched = |x: &Tensor, matrix: [usize; 2]| {
            let shape = [batches.dims(), &matrix].concat();
            x.broadcast_as(shape)?.contiguous()?.reshape(((), matrix[0], matrix[1]))
        };
        let flat = batched(&a, [rows, inner])?.matmul(&batched(&b, [inner, columns])?)?;
        let shape = [batches.dims(), &[rows, columns]].concat();
        flat.reshape(shape)?
    };
    if right {
        product = product.squeeze(D::Minus1)?;
    }
    if left {
        product = product.squeeze(if right { D::Minus1 } else { D::Minus2 })?;
    }
    Ok(product)
}

fn gemm(call: &Call) -> Result<Vec<Tensor>> {
    let side = |index: usize, name: &str| {
        let matrix = call.input(index)?;
        if call.integer(name, 0) == 0 {
            Ok(matrix.clone())
        } else {
            matrix.t()
        }
    };
    let mut product = side(0, "transA")?.matmul(&side(1, "transB")?)?;
    let (alpha, beta) = (call.float("alpha", 1.0), call.float("beta", 1.0));
    if alpha != 1.0 {
        product = (product * alpha)?;
    }
    if let Some(bias) = call.optional(2) {
        let bias = if beta == 1.0 { bias.clone() } else { (bias * beta)? };
        product = product.broadcast_add(&bias)?;
    }
    Ok(vec![product])
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    // By the hyperbolic tangent, whose gradient overflows nowhere.
    ((x * 0.5)?.tanh()? * 0.5)? + 0.5
}

fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

fn hard_sigmoid(x: &Tensor, alpha: f64, beta: f64) -> Result<Tensor> {
    x.affine(alpha, beta)?.clamp(0.0, 1.0)
}

fn gelu(call: &Call) -> Result<Vec<Tensor>> {
    call.map(|x| {
        let bent = if call.text("approximate") == "tanh" {
            let cubic = (x.sqr()?.mul(x)? * 0.044_715)?;
            ((x + cubic)? * (2.0 / PI).sqrt())?.tanh()?
        } else {
            (x * FRAC_1_SQRT_2)?.erf()?
        };
        ((bent + 1.0)? * 0.5)?.mul(x)
    })
}

fn pow(call: &Call) -> Result<Vec<Tensor>> {
    let base = call.input(0)?;
    let exponent = call.number(1)?.unwrap_or(1.0);
    if !base.dtype().is_float() {
        bail!("it raises integers");
    }
    Ok(vec![match exponent {
        1.0 => base.clone(),
        2.0 => base.sqr()?,
        3.0 => base.sqr()?.mul(base)?,
        0.5 => base.sqrt()?,
        exponent => base.powf(exponent)?,
    }])
}

fn clip(call: &Call) -> Result<Vec<Tensor>> {
    let bound = |index: usize, name: &str| -> Result<Option<f64>> {
        Ok(call
            .number(index)?
            .or_else(|| call.attribute(name).map(|value| f64::from(value.f()))))
    };
    let mut x = call.input(0)?.clone();
    if let Some(low) = bound(1, "min")? {
        x = x.maximum(low)?;
    }
    if let Some(high) = bound(2, "max")? {
        x = x.minimum(high)?;
    }
    Ok(vec![x])
}

/// `x - log(sum(exp(x)))` along one axis.
pub(super) fn log_softmax(x: &Tensor, axis: usize) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(axis)?)?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(axis)?.log()?)
}

/// Along the one axis of version 13 and later, or along all from the axis on as before.
fn softmax_family(call: &Call, compute: fn(&Tensor, usize) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    call.map(|x| {
        let axis = axis_of(call.integer("axis", if call.opset < 13 { 1 } else { -1 }), x.rank())?;
        if call.opset >= 13 || axis + 1 == x.rank() {
            return compute(x, axis);
        }
        compute(&x.contiguous()?.reshape((x.dims()[..axis].iter().product::<usize>(), ()))?, 1)?.reshape(x.dims())
    })
}

/// `(x - mean) / sqrt(variance + epsilon)` over the given axes.
fn normalized(x: &Tensor, axes: &[usize], epsilon: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(axes)?)?;
    let variance = centred.sqr()?.mean_keepdim(axes)?;
    centred.broadcast_div(&(variance + epsilon)?.sqrt()?)
}

fn layer_normalization(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let axes: Vec<usize> = (axis_of(call.integer("axis", -1), x.rank())?..x.rank()).collect();
    let mut y = normalized(x, &axes, call.float("epsilon", 1e-5))?.broadcast_mul(call.input(1)?)?;
    if let Some(bias) = call.optional(2) {
        y = y.broadcast_add(bias)?;
    }
    Ok(vec![y])
}

/// A vector of one value for each channel, in the shape that goes with `x`.
fn by_channel(vector: &Tensor, x: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; x.rank()];
    shape[1] = vector.elem_count();
    vector.reshape(shape)
}

fn batch_normalization(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let channel = |index: usize| by_channel(call.input(index)?, x);
    let deviation = (channel(4)? + call.float("epsilon", 1e-5))?.sqrt()?;
    let factor = channel(1)?.div(&deviation)?;
    Ok(vec![
        x.broadcast_sub(&channel(3)?)?.broadcast_mul(&factor)?.broadcast_add(&channel(2)?)?,
    ])
}

fn instance_normalization(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let y = normalized(x, &spatial(x), call.float("epsilon", 1e-5))?;
    let (scale, bias) = (by_channel(call.input(1)?, x)?, by_channel(call.input(2)?, x)?);
    Ok(vec![y.broadcast_mul(&scale)?.broadcast_add(&bias)?])
}

/// Reduces `axes` to one, or drops them.
fn reduce(x: &Tensor, axes: &[usize], keep: bool, compute: fn(&Tensor, usize) -> Result<Tensor>) -> Result<Tensor> {
    let mut y = x.clone();
    for &axis in axes {
        y = compute(&y, axis)?;
    }
    if keep { Ok(y) } else { without_axes(&y, axes) }
}

/// The largest value along an axis; of equal ones the first takes the gradient.
fn largest(x: &Tensor, axis: usize) -> Result<Tensor> {
    if !x.dtype().is_float() {
        return x.max_keepdim(axis);
    }
    let x = x.contiguous()?;
    x.gather(&x.detach().argmax_keepdim(axis)?, axis)
}

fn reduce_axes(call: &Call, compute: fn(&Tensor, &[usize], bool) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let axes = match call.axes(1)?.filter(|axes| !axes.is_empty()) {
        Some(axes) => axes_of(&axes, x.rank())?,
        None if call.integer("noop_with_empty_axes", 0) != 0 => return Ok(vec![x.clone()]),
        None => (0..x.rank()).collect(),
    };
    Ok(vec![compute(x, &axes, call.integer("keepdims", 1) != 0)?])
}

fn without_axes(x: &Tensor, axes: &[usize]) -> Result<Tensor> {
    let kept = x.dims().iter().enumerate().filter(|(axis, _)| !axes.contains(axis));
    x.reshape(kept.map(|(_, &size)| size).collect::<Vec<_>>())
}

fn squeeze(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let axes = match call.axes(1)? {
        Some(axes) => axes_of(&axes, x.rank())?,
        None => (0..x.rank()).filter(|&axis| x.dims()[axis] == 1).collect(),
    };
    Ok(vec![without_axes(x, &axes)?])
}

fn unsqueeze(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let axes = call.axes(1)?.unwrap_or_default();
    let axes = axes_of(&axes, x.rank() + axes.len())?;
    let mut sizes = x.dims().iter();
    let shape = (0..x.rank() + axes.len()).map(|axis| if axes.contains(&axis) { Some(1) } else { sizes.next().copied() });
    match shape.collect::<Option<Vec<usize>>>() {
        Some(shape) => Ok(vec![x.reshape(shape)?]),
        None => bail!("its axes {axes:?} are no axes of its output"),
    }
}

fn reshape(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let asked = call.numbers(1)?.or_else(|| call.ints("shape")).unwrap_or_default();
    let keeps_zero = call.integer("allowzero", 0) != 0;
    let mut shape = Vec::with_capacity(asked.len());
    for (axis, &size) in asked.iter().enumerate() {
        shape.push(match size {
            0 if !keeps_zero => x.dims().get(axis).copied().unwrap_or_default(),
            -1 => 1,
            size => size.max(0) as usize,
        });
    }
    if let Some(open) = asked.iter().position(|&size| size == -1) {
        let known: usize = shape.iter().product();
        shape[open] = x.elem_count().checked_div(known).unwrap_or_default();
    }
    Ok(vec![x.reshape(shape)?])
}

fn flatten(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let axis = call.integer("axis", 1);
    let axis = if axis == x.rank() as i64 {
        x.rank()
    } else {
        axis_of(axis, x.rank())?
    };
    let (outer, inner) = x.dims().split_at(axis);
    Ok(vec![x.reshape((outer.iter().product::<usize>(), inner.iter().product::<usize>()))?])
}

fn transpose(call: &Call) -> Result<Vec<Tensor>> {
    call.map(|x| match call.ints("perm") {
        Some(order) => x.permute(axes_of(&order, x.rank())?),
        None => x.permute((0..x.rank()).rev().collect::<Vec<_>>()),
    })
}

fn expand(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let asked: Vec<usize> = call
        .numbers(1)?
        .unwrap_or_default()
        .iter()
        .map(|&size| size.max(0) as usize)
        .collect();
    let shape = x.shape().broadcast_shape_binary_op(&asked.into(), "expand")?;
    Ok(vec![x.broadcast_as(shape)?])
}

fn tile(call: &Call) -> Result<Vec<Tensor>> {
    let repeats: Vec<usize> = call
        .numbers(1)?
        .unwrap_or_default()
        .iter()
        .map(|&count| count.max(0) as usize)
        .collect();
    call.map(|x| x.repeat(repeats.clone()))
}

fn concat(call: &Call) -> Result<Vec<Tensor>> {
    let first = call.input(0)?;
    let axis = axis_of(call.integer("axis", 1), first.rank())?;
    let parts = (0..call.inputs.len()).map(|index| Ok(call.alike(call.input(index)?, first)?.0));
    Ok(vec![Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, axis)?])
}

fn split(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let axis = axis_of(call.integer("axis", 0), x.rank())?;
    let count = call.node.output.len();
    let sizes = match call.numbers(1)?.or_else(|| call.ints("split")) {
        Some(sizes) => sizes.iter().map(|&size| size.max(0) as usize).collect(),
        None => {
            // The last part is smaller where the parts cannot be equal.
            let (whole, size) = (x.dim(axis)?, x.dim(axis)?.div_ceil(count));
            (0..count)
                .map(|part| size.min(whole.saturating_sub(part * size)))
                .collect::<Vec<_>>()
        }
    };
    let mut start = 0;
    let part = |size: usize| {
        let part = x.narrow(axis, start, size);
        start += size;
        part
    };
    sizes.into_iter().map(part).collect()
}

fn slice(call: &Call) -> Result<Vec<Tensor>> {
    let mut x = call.input(0)?.clone();
    let required =
        |index: usize, name: &str| -> Result<Vec<i64>> { Ok(call.numbers(index)?.or_else(|| call.ints(name)).unwrap_or_default()) };
    let (starts, ends) = (required(1, "starts")?, required(2, "ends")?);
    let axes = call.axes(3)?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = call.numbers(4)?.unwrap_or_else(|| vec![1; starts.len()]);
    if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] || steps.contains(&0) {
        bail!("its starts, ends, axes and steps do not go together");
    }
    for ((axis, step), (start, end)) in axes.into_iter().zip(steps).zip(starts.into_iter().zip(ends)) {
        let axis = axis_of(axis, x.rank())?;
        let size = x.dim(axis)? as i64;
        let counted = |place: i64| if place < 0 { place.saturating_add(size) } else { place };
        // Backwards it may end before the first element.
        let (low, high) = if step > 0 { (0, size) } else { (-1, size - 1) };
        let (start, end) = (counted(start).clamp(low, high), counted(end).clamp(low, high));
        if step == 1 {
            x = x.narrow(axis, start as usize, (end - start).max(0) as usize)?;
        } else {
            let mut chosen = Vec::new();
            let mut place = start;
            while if step > 0 { place < end } else { place > end } {
                chosen.push(place as u32);
                place = place.saturating_add(step);
            }
            x = choose(&x, chosen, axis)?;
        }
    }
    Ok(vec![x])
}

/// The given positions along an axis.
fn choose(x: &Tensor, positions: Vec<u32>, axis: usize) -> Result<Tensor> {
    let count = positions.len();
    x.contiguous()?.index_select(&Tensor::from_vec(positions, count, x.device())?, axis)
}

fn gather(call: &Call) -> Result<Vec<Tensor>> {
    let (x, indices) = (call.input(0)?, call.input(1)?);
    let axis = axis_of(call.integer("axis", 0), x.rank())?;
    let size = x.dim(axis)? as i64;
    let positions = indices
        .flatten_all()?
        .to_dtype(DType::I64)?
        .to_vec1::<i64>()?
        .into_iter()
        .map(|index| {
            let counted = if index < 0 { index + size } else { index };
            match u32::try_from(counted) {
                Ok(position) if counted < size => Ok(position),
                _ => bail!("index {index} is out of range of its {size} rows"),
            }
        });
    let rows = choose(x, positions.collect::<Result<_>>()?, axis)?;
    let shape: Vec<usize> = [&x.dims()[..axis], indices.dims(), &x.dims()[axis + 1..]].concat();
    Ok(vec![rows.reshape(shape)?])
}

fn select(call: &Call) -> Result<Vec<Tensor>> {
    let (a, b) = call.alike(call.input(1)?, call.input(2)?)?;
    let condition = call.input(0)?.to_device(a.device())?;
    let shape = a.shape().broadcast_shape_binary_op(b.shape(), "where")?;
    let shape = shape.broadcast_shape_binary_op(condition.shape(), "where")?;
    let full = |x: &Tensor| x.broadcast_as(&shape)?.contiguous();
    Ok(vec![full(&condition)?.where_cond(&full(&a)?, &full(&b)?)?])
}

fn pad(call: &Call) -> Result<Vec<Tensor>> {
    let mut x = call.input(0)?.clone();
    let pads = call.numbers(1)?.or_else(|| call.ints("pads")).unwrap_or_default();
    let axes = match call.numbers(3)? {
        Some(axes) => axes_of(&axes, x.rank())?,
        None => (0..x.rank()).collect(),
    };
    if pads.len() != 2 * axes.len() {
        bail!("its pads {pads:?} do not fit {} axes", axes.len());
    }
    let value = call.number(2)?.unwrap_or_else(|| call.float("value", 0.0));
    for (index, &axis) in axes.iter().enumerate() {
        let (before, after) = (pads[index], pads[axes.len() + index]);
        let size = x.dim(axis)? as i64;
        let places = -before..size + after;
        match call.text("mode") {
            "" | "constant" => {
                let kept = x.narrow(
                    axis,
                    (-before).max(0) as usize,
                    (size + before.min(0) + after.min(0)).max(0) as usize,
                )?;
                let border = |count: i64| {
                    let mut shape = x.dims().to_vec();
                    shape[axis] = count.max(0) as usize;
                    Tensor::full(value, shape, x.device())?.to_dtype(x.dtype())
                };
                x = Tensor::cat(&[border(before)?, kept, border(after)?], axis)?;
            }
            "edge" => x = choose(&x, places.map(|place| place.clamp(0, size - 1) as u32).collect(), axis)?,
            "reflect" => {
                let period = 2 * (size - 1).max(1);
                let mirrored = |place: i64| {
                    let place = place.rem_euclid(period);
                    place.min(period - place).min(size - 1) as u32
                };
                x = choose(&x, places.map(mirrored).collect(), axis)?;
            }
            mode => bail!("its mode is {mode}"),
        }
    }
    Ok(vec![x])
}

fn cast(call: &Call) -> Result<Vec<Tensor>> {
    let kind = DataType::try_from(call.integer("to", 0) as i32).unwrap_or_default();
    call.map(|x| match kind {
        DataType::Float | DataType::Double | DataType::Float16 | DataType::Bfloat16 => {
            x.to_dtype(call.place.dtype)?.to_device(&call.place.device)
        }
        DataType::Bool => x.ne(&x.zeros_like()?)?.to_device(&Device::Cpu),
        DataType::String | DataType::Undefined => bail!("it casts to {}", kind.as_str_name()),
        _ => x.to_dtype(DType::I64)?.to_device(&Device::Cpu),
    })
}

fn constant(call: &Call) -> Result<Vec<Tensor>> {
    let floats = |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, &call.place.device)?.to_dtype(call.place.dtype);
    Ok(vec![
        if let Some(value) = call.attribute("value").and_then(|value| value.t.as_ref()) {
            of_proto(value, call.place)?
        } else if let Some(value) = call.attribute("value_float") {
            floats(vec![value.f()], &[])?
        } else if let Some(value) = call.attribute("value_floats") {
            floats(value.floats.clone(), &[value.floats.len()])?
        } else if let Some(value) = call.attribute("value_int") {
            Tensor::from_vec(vec![value.i()], (), &Device::Cpu)?
        } else if let Some(value) = call.attribute("value_ints") {
            Tensor::from_vec(value.ints.clone(), value.ints.len(), &Device::Cpu)?
        } else {
            bail!("it is of no numbers");
        },
    ])
}

fn constant_of_shape(call: &Call) -> Result<Vec<Tensor>> {
    let shape: Vec<usize> = call
        .numbers(0)?
        .unwrap_or_default()
        .iter()
        .map(|&size| size.max(0) as usize)
        .collect();
    let value = match call.attribute("value").and_then(|value| value.t.as_ref()) {
        Some(value) => of_proto(value, call.place)?,
        None => Tensor::zeros(1, call.place.dtype, &call.place.device)?,
    };
    Ok(vec![value.flatten_all()?.narrow(0, 0, 1)?.broadcast_as(shape)?.contiguous()?])
}

fn range(call: &Call) -> Result<Vec<Tensor>> {
    let number = |index: usize| {
        call.number(index)?
            .ok_or_else(|| candle_core::Error::msg(format!("its input {index} is missing")))
    };
    let (start, limit, step) = (number(0)?, number(1)?, number(2)?);
    let count = ((limit - start) / step).ceil().max(0.0) as usize;
    let values: Vec<f64> = (0..count).map(|index| start + index as f64 * step).collect();
    let like = call.input(0)?;
    Ok(vec![
        Tensor::from_vec(values, count, &Device::Cpu)?
            .to_dtype(like.dtype())?
            .to_device(like.device())?,
    ])
}

fn shape(call: &Call) -> Result<Vec<Tensor>> {
    let dims = call.input(0)?.dims();
    let rank = dims.len() as i64;
    let counted = |place: i64| (if place < 0 { place + rank } else { place }).clamp(0, rank) as usize;
    let (start, end) = (counted(call.integer("start", 0)), counted(call.integer("end", rank)));
    let sizes: Vec<i64> = dims[start..end.max(start)].iter().map(|&size| size as i64).collect();
    let count = sizes.len();
    Ok(vec![Tensor::from_vec(sizes, count, &Device::Cpu)?])
}

fn trilu(call: &Call) -> Result<Vec<Tensor>> {
    let x = call.input(0)?;
    let (rows, columns) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
    let diagonal = call.number(1)?.unwrap_or_default() as i64;
    let upper = call.integer("upper", 1) != 0;
    let kept = (0..rows as i64).flat_map(|row| (0..columns as i64).map(move |column| column - row));
    let kept: Vec<u8> = kept
        .map(|above| u8::from(if upper { above >= diagonal } else { above <= diagonal }))
        .collect();
    let kept = Tensor::from_vec(kept, (rows, columns), x.device())?
        .broadcast_as(x.shape())?
        .contiguous()?;
    Ok(vec![kept.where_cond(&x.contiguous()?, &x.zeros_like()?)?])
}
