//! The shapes of operators' outputs, by ONNX's operator reference.

use plimsoll_runtime::onnx::{AttributeProto, NodeProto, weights};

use super::{Dim, Integer, Shapes};
use crate::graph::attribute;

/// Operators whose first output has the shape of their first input.
const SAME: [&str; 68] = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BatchNormalization",
    "BitwiseNot",
    "Cast",
    "CastLike",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "CumSum",
    "DequantizeLinear",
    "Dropout",
    "DynamicQuantizeLinear",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "GroupNormalization",
    "HardSigmoid",
    "HardSwish",
    "Hardmax",
    "Identity",
    "InstanceNormalization",
    "IsInf",
    "IsNaN",
    "LRN",
    "LayerNormalization",
    "LeakyRelu",
    "Log",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "Mish",
    "Neg",
    "Not",
    "QuantizeLinear",
    "RMSNormalization",
    "Reciprocal",
    "Relu",
    "Round",
    "ScatterElements",
    "ScatterND",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softmax",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Trilu",
    "SimplifiedLayerNormalization",
    "ReverseSequence",
    "Bernoulli",
];

/// Operators whose output has the shape that their inputs have together.
const BROADCAST: [&str; 24] = [
    "Add",
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
];

/// Whether the operator works element by element, its inputs broadcast against each other.
pub(crate) fn is_broadcasting(op_type: &str) -> bool {
    BROADCAST.contains(&op_type)
}

/// A range along an axis, of a `Slice`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    pub axis: usize,
    start: i64,
    end: i64,
    step: i64,
}

impl Range {
    /// The first index, the one behind the last, and the step, for an axis of that size; `None` for a backward range.
    pub(crate) fn resolve(self, size: usize) -> Option<(usize, usize, usize)> {
        let step = usize::try_from(self.step).ok().filter(|step| *step > 0)?;
        let clamp = |bound: i64| {
            let bound = if bound < 0 { bound.saturating_add(size as i64) } else { bound };
            usize::try_from(bound).unwrap_or(0).min(size)
        };
        let (start, end) = (clamp(self.start), clamp(self.end));
        Some((start, end.max(start), step))
    }

    /// Whether it is the whole axis, of whatever size.
    pub(crate) fn is_whole(self) -> bool {
        self.start == 0 && self.end >= i64::from(i32::MAX) && self.step == 1
    }
}

fn ints<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    attribute(node, name).map(|attribute| attribute.ints.as_slice())
}

fn int(node: &NodeProto, name: &str, default: i64) -> i64 {
    attribute(node, name).map_or(default, AttributeProto::i)
}

/// An axis counted from the front.
pub(crate) fn axis_of(axis: i64, rank: usize) -> Result<usize, String> {
    let counted = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(counted)
        .ok()
        .filter(|axis| *axis < rank)
        .ok_or_else(|| format!("it works along axis {axis} of a value of {rank} axes"))
}

/// The numbers of one window operator for each spatial axis.
struct Window {
    kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    /// Before and after.
    pads: Vec<(i64, i64)>,
    auto_pad: String,
}

impl Window {
    fn of(node: &NodeProto, kernel: Vec<usize>) -> Result<Self, String> {
        let rank = kernel.len();
        let sizes = |name: &str| match ints(node, name) {
            Some(values) if values.len() == rank => values
                .iter()
                .map(|value| usize::try_from(*value).ok().filter(|value| *value > 0))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| format!("its {name} are not positive")),
            Some(_) => Err(format!("its {name} are not as many as its spatial axes")),
            None => Ok(vec![1; rank]),
        };
        let pads = match ints(node, "pads") {
            Some(pads) if pads.len() == 2 * rank => (0..rank).map(|axis| (pads[axis], pads[axis + rank])).collect(),
            Some(_) => return Err("its pads are not two for each spatial axis".into()),
            None => vec![(0, 0); rank],
        };
        let (strides, dilations) = (sizes("strides")?, sizes("dilations")?);
        let auto_pad = attribute(node, "auto_pad").map_or_else(|| "NOTSET".into(), |value| String::from_utf8_lossy(value.s()).into_owned());
        Ok(Self {
            kernel,
            strides,
            dilations,
            pads,
            auto_pad,
        })
    }

    fn output(&self, axis: usize, input: &Dim, round_up: bool, fresh: impl FnOnce() -> Dim) -> Dim {
        let (stride, reach) = (
            self.strides[axis] as i64,
            (self.dilations[axis] * (self.kernel[axis].max(1) - 1)) as i64,
        );
        let same = self.auto_pad.starts_with("SAME");
        let (before, after) = if self.auto_pad == "NOTSET" { self.pads[axis] } else { (0, 0) };
        if stride == 1 && (same || before + after == reach) {
            return input.clone();
        }
        let Some(size) = input.size() else { return fresh() };
        let size = size as i64;
        let count = if same {
            (size + stride - 1) / stride
        } else {
            let span = size + before + after - reach - 1;
            let count = if round_up {
                span.div_euclid(stride) + i64::from(span.rem_euclid(stride) > 0)
            } else {
                span.div_euclid(stride)
            } + 1;
            // A window that begins behind the input and its padding before is none.
            if round_up && (count - 1) * stride >= size + before {
                count - 1
            } else {
                count
            }
        };
        Dim::of(usize::try_from(count).unwrap_or(0))
    }
}

impl Shapes {
    fn shape(&self, node: &NodeProto, index: usize) -> Result<Vec<Dim>, String> {
        let name = node.input.get(index).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| format!("it has no input {index}"))?;
        self.get(name).map(<[Dim]>::to_vec).ok_or_else(|| self.refusal(name))
    }

    fn numbers_of(&self, node: &NodeProto, index: usize) -> Option<Vec<i64>> {
        self.numbers(node.input.get(index).filter(|name| !name.is_empty())?)
    }

    /// Numbers that are an attribute in old versions and an input in new ones; `None` where there are none.
    pub(crate) fn setting(&self, node: &NodeProto, name: &str, index: usize) -> Result<Option<Vec<i64>>, String> {
        if let Some(values) = ints(node, name) {
            return Ok(Some(values.to_vec()));
        }
        match node.input.get(index).filter(|input| !input.is_empty()) {
            None => Ok(None),
            Some(_) => match self.numbers_of(node, index) {
                Some(numbers) => Ok(Some(numbers)),
                None => Err(format!("its {name} are computed from more than shapes")),
            },
        }
    }

    /// The ranges of a `Slice` of a value of `rank` axes; `None` where they are not known.
    pub(crate) fn slices(&self, node: &NodeProto, rank: usize) -> Option<Vec<Range>> {
        let starts = self.setting(node, "starts", 1).ok()??;
        let ends = self.setting(node, "ends", 2).ok()??;
        let axes = self
            .setting(node, "axes", 3)
            .ok()?
            .unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = self.numbers_of(node, 4).unwrap_or_else(|| vec![1; starts.len()]);
        if node
            .input
            .get(4)
            .is_some_and(|name| !name.is_empty() && self.numbers(name).is_none())
        {
            return None;
        }
        (0..starts.len())
            .map(|index| {
                Some(Range {
                    axis: axis_of(*axes.get(index)?, rank).ok()?,
                    start: starts[index],
                    end: *ends.get(index)?,
                    step: *steps.get(index)?,
                })
            })
            .collect()
    }

    /// The shape that several values have together, aligned at their last axes.
    fn broadcast(&mut self, shapes: &[Vec<Dim>]) -> Vec<Dim> {
        let rank = shapes.iter().map(Vec::len).max().unwrap_or(0);
        let one = Dim::of(1);
        (0..rank)
            .map(|axis| {
                let mut result = one.clone();
                for shape in shapes {
                    let Some(dim) = (axis + shape.len()).checked_sub(rank).map(|axis| &shape[axis]) else {
                        continue;
                    };
                    result = match (result.size(), dim.size()) {
                        (Some(1), _) => dim.clone(),
                        (_, Some(1)) => result,
                        (Some(_), _) => result,
                        (None, Some(_)) => dim.clone(),
                        (None, None) if result == *dim => result,
                        (None, None) => self.fresh(),
                    };
                }
                result
            })
            .collect()
    }

    /// The shape that a `Reshape`, `Expand` or `ConstantOfShape` is told, element by element.
    fn told(&mut self, node: &NodeProto, index: usize) -> Result<Vec<Integer>, String> {
        let name = node.input.get(index).cloned().unwrap_or_default();
        if let Some(integers) = self.integers(&name) {
            return Ok(integers.to_vec());
        }
        let length = match self.get(&name) {
            Some([length]) => length.size(),
            _ => None,
        };
        match length {
            Some(length) => Ok(vec![Integer::Unknown; length]),
            None => Err(format!("the shape that it is told (`{name}`) depends on more than shapes")),
        }
    }

    #[allow(clippy::too_many_lines)]
    pub(super) fn infer(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        let op_type = node.op_type();
        if SAME.contains(&op_type) {
            let shape = self.shape(node, 0)?;
            let same = matches!(op_type, "Dropout");
            return Ok(if same { vec![shape.clone(), shape] } else { vec![shape] });
        }
        if BROADCAST.contains(&op_type) {
            let shapes: Vec<_> = (0..node.input.len())
                .map(|index| self.shape(node, index))
                .collect::<Result<_, _>>()?;
            return Ok(vec![self.broadcast(&shapes)]);
        }
        if op_type.starts_with("Reduce") {
            return self.reduce(node);
        }
        let one = |shape: Vec<Dim>| Ok(vec![shape]);
        match op_type {
            "Conv" | "ConvInteger" | "QLinearConv" => {
                let (input, weight) = (
                    self.shape(node, 0)?,
                    self.shape(node, if op_type == "QLinearConv" { 3 } else { 1 })?,
                );
                self.convolution(node, &input, &weight)
            }
            "ConvTranspose" => self.transposed_convolution(node),
            "MaxPool" | "AveragePool" | "LpPool" => self.pooling(node),
            "GlobalAveragePool" | "GlobalMaxPool" | "GlobalLpPool" => {
                let input = self.shape(node, 0)?;
                one(input
                    .iter()
                    .enumerate()
                    .map(|(axis, dim)| if axis < 2 { dim.clone() } else { Dim::of(1) })
                    .collect())
            }
            "Gemm" => {
                let (a, b) = (self.shape(node, 0)?, self.shape(node, 1)?);
                if a.len() != 2 || b.len() != 2 {
                    return Err("its operands are no matrices".into());
                }
                let (rows, columns) = (usize::from(int(node, "transA", 0) != 0), usize::from(int(node, "transB", 0) == 0));
                one(vec![a[rows].clone(), b[columns].clone()])
            }
            "MatMul" | "MatMulInteger" => self.product(node),
            "Reshape" => {
                let input = self.shape(node, 0)?;
                let told = self.told(node, 1)?;
                one(self.reshape(&input, &told, int(node, "allowzero", 0) != 0)?)
            }
            "Flatten" => {
                let input = self.shape(node, 0)?;
                let axis = int(node, "axis", 1);
                let axis = if axis == input.len() as i64 {
                    input.len()
                } else {
                    axis_of(axis, input.len().max(1))?
                };
                let half = |dims: &[Dim]| Dim::product(dims).ok_or("it is too large");
                one(vec![half(&input[..axis])?, half(&input[axis..])?])
            }
            "Transpose" => {
                let input = self.shape(node, 0)?;
                let order = permutation(node, input.len())?;
                one(order.into_iter().map(|axis| input[axis].clone()).collect())
            }
            "Squeeze" => {
                let input = self.shape(node, 0)?;
                let axes = match self.setting(node, "axes", 1)? {
                    Some(axes) => axes
                        .into_iter()
                        .map(|axis| axis_of(axis, input.len()))
                        .collect::<Result<Vec<_>, _>>()?,
                    None if input.iter().all(|dim| dim.size().is_some()) => {
                        (0..input.len()).filter(|axis| input[*axis].size() == Some(1)).collect()
                    }
                    None => return Err("which axes it drops is known when it runs alone".into()),
                };
                one((0..input.len())
                    .filter(|axis| !axes.contains(axis))
                    .map(|axis| input[axis].clone())
                    .collect())
            }
            "Unsqueeze" => {
                let input = self.shape(node, 0)?;
                let axes = self.setting(node, "axes", 1)?.ok_or("it has no axes")?;
                let rank = input.len() + axes.len();
                let axes = axes.into_iter().map(|axis| axis_of(axis, rank)).collect::<Result<Vec<_>, _>>()?;
                let mut rest = input.into_iter();
                let dim = |axis: usize| if axes.contains(&axis) { Some(Dim::of(1)) } else { rest.next() };
                one((0..rank).map(dim).collect::<Option<_>>().ok_or("it names an axis twice")?)
            }
            "Concat" => self.concatenation(node),
            "Split" => self.split(node),
            "Slice" => {
                let mut shape = self.shape(node, 0)?;
                match self.slices(node, shape.len()) {
                    Some(ranges) => {
                        for range in ranges.into_iter().filter(|range| !range.is_whole()) {
                            let resolved = shape[range.axis].size().and_then(|size| range.resolve(size));
                            shape[range.axis] = match resolved {
                                Some((start, end, step)) => Dim::of((end - start).div_ceil(step)),
                                None => self.fresh(),
                            };
                        }
                    }
                    None => {
                        let axes = self.setting(node, "axes", 3).ok().flatten();
                        let axes = axes.map(|axes| {
                            axes.into_iter()
                                .map(|axis| axis_of(axis, shape.len()))
                                .collect::<Result<Vec<_>, _>>()
                        });
                        let axes = axes.unwrap_or_else(|| Ok((0..shape.len()).collect()))?;
                        for axis in axes {
                            shape[axis] = self.fresh();
                        }
                    }
                }
                one(shape)
            }
            "Gather" => {
                let (data, indices) = (self.shape(node, 0)?, self.shape(node, 1)?);
                let axis = axis_of(int(node, "axis", 0), data.len())?;
                one([&data[..axis], &indices, &data[axis + 1..]].concat())
            }
            "GatherElements" => one(self.shape(node, 1)?),
            "GatherND" if int(node, "batch_dims", 0) == 0 => {
                let (data, indices) = (self.shape(node, 0)?, self.shape(node, 1)?);
                let (depth, outer) = indices.split_last().ok_or("its indices have no axis")?;
                let depth = depth
                    .size()
                    .filter(|depth| *depth <= data.len())
                    .ok_or("its indices are of unknown depth")?;
                one([outer, &data[depth..]].concat())
            }
            "Expand" => {
                let input = self.shape(node, 0)?;
                let told = self.told(node, 1)?;
                let told = told.iter().map(|integer| self.dim_of(integer)).collect();
                one(self.broadcast(&[input, told]))
            }
            "ConstantOfShape" => {
                let told = self.told(node, 0)?;
                one(told.iter().map(|integer| self.dim_of(integer)).collect())
            }
            "Tile" => {
                let input = self.shape(node, 0)?;
                let repeats = self.numbers_of(node, 1);
                let tiled = |(axis, dim): (usize, &Dim)| {
                    let repeat = repeats.as_ref().and_then(|repeats| usize::try_from(*repeats.get(axis)?).ok());
                    repeat
                        .and_then(|repeat| dim.times(&Dim::of(repeat)))
                        .unwrap_or_else(|| self.fresh())
                };
                one(input.iter().enumerate().map(tiled).collect())
            }
            "Pad" => {
                let input = self.shape(node, 0)?;
                let pads = self.padding(node, input.len());
                let padded = |(axis, dim): (usize, &Dim)| match pads.as_ref().map(|pads| pads[axis]) {
                    Some((0, 0)) => dim.clone(),
                    Some((before, after)) if dim.size().is_some() => {
                        let size = dim.size().unwrap_or_default() as i64 + before + after;
                        Dim::of(usize::try_from(size).unwrap_or(0))
                    }
                    _ => self.fresh(),
                };
                one(input.iter().enumerate().map(padded).collect())
            }
            "Resize" | "Upsample" => self.resize(node),
            "Shape" => {
                let rank = self.shape(node, 0)?.len();
                one(vec![Dim::of(self.shape_range(node, rank).len())])
            }
            "Size" => one(vec![]),
            "Constant" => {
                let value = attribute(node, "value").and_then(|value| value.t.as_ref());
                match value {
                    Some(tensor) => one(weights::shape(tensor)
                        .map_err(|error| error.to_string())?
                        .into_iter()
                        .map(Dim::of)
                        .collect()),
                    None if attribute(node, "value_int").or(attribute(node, "value_float")).is_some() => one(vec![]),
                    None => {
                        let length = ints(node, "value_ints").map(<[i64]>::len);
                        let length = length.or_else(|| attribute(node, "value_floats").map(|values| values.floats.len()));
                        one(vec![Dim::of(length.ok_or("it is no tensor of numbers")?)])
                    }
                }
            }
            "Range" => {
                let length = self.arithmetic(node).map(|values| Dim::of(values.len()));
                one(vec![length.unwrap_or_else(|| self.fresh())])
            }
            "ArgMax" | "ArgMin" => {
                let input = self.shape(node, 0)?;
                let axis = axis_of(int(node, "axis", 0), input.len())?;
                one(reduced(&input, &[axis], int(node, "keepdims", 1) != 0))
            }
            "TopK" => {
                let mut shape = self.shape(node, 0)?;
                let axis = axis_of(int(node, "axis", -1), shape.len())?;
                let count = self.numbers_of(node, 1).and_then(|count| usize::try_from(*count.first()?).ok());
                shape[axis] = count.map_or_else(|| self.fresh(), Dim::of);
                Ok(vec![shape.clone(), shape])
            }
            "DepthToSpace" | "SpaceToDepth" => {
                let shape = self.shape(node, 0)?;
                let block = usize::try_from(int(node, "blocksize", 1))
                    .ok()
                    .filter(|block| *block > 0)
                    .ok_or("it has no blocksize")?;
                let [batch, channels, spatial @ ..] = &shape[..] else {
                    return Err("its input has no channels".into());
                };
                let (block, area) = (Dim::of(block), Dim::of(block.pow(2)));
                let to_space = op_type == "DepthToSpace";
                let scale = |dim: &Dim, by: &Dim, up: bool| if up { dim.times(by) } else { dim.divided_by(by) };
                let channels = scale(channels, &area, !to_space).ok_or("its channels do not fit its blocks")?;
                let mut result = vec![batch.clone(), channels];
                for dim in spatial {
                    result.push(scale(dim, &block, to_space).unwrap_or_else(|| self.fresh()));
                }
                one(result)
            }
            "LSTM" | "GRU" | "RNN" => {
                let (input, recurrence) = (self.shape(node, 0)?, self.shape(node, 2)?);
                if input.len() != 3 || recurrence.len() != 3 || int(node, "layout", 0) != 0 {
                    return Err("its operands do not lie as time, batch, features".into());
                }
                let (directions, hidden) = (&recurrence[0], &recurrence[2]);
                let state = [directions, &input[1], hidden].map(Dim::clone).to_vec();
                let all = [&input[0], directions, &input[1], hidden].map(Dim::clone).to_vec();
                Ok(vec![all, state.clone(), state])
            }
            _ => Err("the operator is not one whose shape is inferred".into()),
        }
    }

    fn dim_of(&mut self, integer: &Integer) -> Dim {
        match integer {
            Integer::Known(number) => usize::try_from(*number).map_or_else(|_| self.fresh(), Dim::of),
            Integer::Size(dim) => dim.clone(),
            Integer::Unknown => self.fresh(),
        }
    }

    fn convolution(&mut self, node: &NodeProto, input: &[Dim], weight: &[Dim]) -> Result<Vec<Vec<Dim>>, String> {
        if input.len() != weight.len() || input.len() < 3 {
            return Err("its weight and input do not have the same spatial axes".into());
        }
        let kernel = weight[2..]
            .iter()
            .map(Dim::size)
            .collect::<Option<Vec<_>>>()
            .ok_or("its kernel is of unknown size")?;
        let window = Window::of(node, kernel)?;
        let mut shape = vec![input[0].clone(), weight[0].clone()];
        for (axis, dim) in input[2..].iter().enumerate() {
            shape.push(window.output(axis, dim, false, || self.fresh()));
        }
        Ok(vec![shape])
    }

    fn transposed_convolution(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        let (input, weight) = (self.shape(node, 0)?, self.shape(node, 1)?);
        if input.len() != weight.len() || input.len() < 3 {
            return Err("its weight and input do not have the same spatial axes".into());
        }
        let kernel = weight[2..]
            .iter()
            .map(Dim::size)
            .collect::<Option<Vec<_>>>()
            .ok_or("its kernel is of unknown size")?;
        let window = Window::of(node, kernel)?;
        let groups = usize::try_from(int(node, "group", 1)).unwrap_or(1);
        let channels = weight[1].times(&Dim::of(groups)).ok_or("it has too many channels")?;
        let mut shape = vec![input[0].clone(), channels];
        for (axis, dim) in input[2..].iter().enumerate() {
            let stride = window.strides[axis] as i64;
            let extra = ints(node, "output_padding")
                .and_then(|values| values.get(axis))
                .copied()
                .unwrap_or(0);
            let reach = (window.dilations[axis] * (window.kernel[axis].max(1) - 1)) as i64;
            let told = ints(node, "output_shape").and_then(|values| values.get(values.len().checked_sub(input.len() - 2)? + axis));
            let size = match (told, dim.size().map(|size| size as i64)) {
                (Some(told), _) => Some(*told),
                (None, Some(size)) if window.auto_pad.starts_with("SAME") => Some(size * stride),
                (None, Some(size)) => Some(stride * (size - 1) + extra + reach + 1 - window.pads[axis].0 - window.pads[axis].1),
                (None, None) => None,
            };
            shape.push(size.map_or_else(|| self.fresh(), |size| Dim::of(usize::try_from(size).unwrap_or(0))));
        }
        Ok(vec![shape])
    }

    fn pooling(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        let input = self.shape(node, 0)?;
        let kernel = ints(node, "kernel_shape").unwrap_or_default();
        if input.len() != kernel.len() + 2 {
            return Err("its kernel does not have the input's spatial axes".into());
        }
        let kernel = kernel.iter().map(|size| usize::try_from(*size).unwrap_or(1)).collect();
        let window = Window::of(node, kernel)?;
        let mut shape = input[..2].to_vec();
        for (axis, dim) in input[2..].iter().enumerate() {
            shape.push(window.output(axis, dim, int(node, "ceil_mode", 0) != 0, || self.fresh()));
        }
        Ok(vec![shape.clone(), shape])
    }

    fn product(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        let (a, b) = (self.shape(node, 0)?, self.shape(node, 1)?);
        if a.is_empty() || b.is_empty() {
            return Err("an operand is a single number".into());
        }
        let (rows, batch_a) = if a.len() == 1 {
            (None, vec![])
        } else {
            (Some(a[a.len() - 2].clone()), a[..a.len() - 2].to_vec())
        };
        let (columns, batch_b) = if b.len() == 1 {
            (None, vec![])
        } else {
            (b.last().cloned(), b[..b.len() - 2].to_vec())
        };
        let mut shape = self.broadcast(&[batch_a, batch_b]);
        shape.extend(rows.into_iter().chain(columns));
        Ok(vec![shape])
    }

    fn reshape(&mut self, input: &[Dim], told: &[Integer], zero_is_zero: bool) -> Result<Vec<Dim>, String> {
        let mut open = None;
        let mut shape = Vec::with_capacity(told.len());
        for (axis, integer) in told.iter().enumerate() {
            shape.push(match integer {
                Integer::Known(0) if !zero_is_zero => input.get(axis).cloned().ok_or("it copies an axis that its input does not have")?,
                Integer::Known(-1) | Integer::Unknown if open.is_none() => {
                    open = Some(axis);
                    Dim::of(1)
                }
                other => self.dim_of(other),
            });
        }
        if let Some(axis) = open {
            let rest = Dim::product(&shape);
            let quotient = Dim::product(input).zip(rest).and_then(|(all, rest)| all.divided_by(&rest));
            shape[axis] = quotient.unwrap_or_else(|| self.fresh());
        }
        Ok(shape)
    }

    fn concatenation(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        let shapes: Vec<_> = (0..node.input.len())
            .map(|index| self.shape(node, index))
            .collect::<Result<_, _>>()?;
        let first = shapes.first().ok_or("it has no input")?;
        let axis = axis_of(int(node, "axis", 0), first.len())?;
        if shapes.iter().any(|shape| shape.len() != first.len()) {
            return Err("its inputs have different numbers of axes".into());
        }
        let mut shape = first.clone();
        for (index, dim) in shape.iter_mut().enumerate() {
            // A number says more than a symbol.
            if index != axis
                && let Some(known) = shapes.iter().map(|shape| &shape[index]).find(|dim| dim.size().is_some())
            {
                dim.clone_from(known);
            }
        }
        let sum = shapes.iter().try_fold(0_usize, |sum, shape| sum.checked_add(shape[axis].size()?));
        shape[axis] = sum.map_or_else(|| self.fresh(), Dim::of);
        Ok(vec![shape])
    }

    fn split(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        let input = self.shape(node, 0)?;
        let axis = axis_of(int(node, "axis", 0), input.len())?;
        let parts = node.output.len();
        let sizes = match self.setting(node, "split", 1)? {
            Some(sizes) => sizes
                .into_iter()
                .map(|size| usize::try_from(size).map(Dim::of).map_err(|_| "its sizes are negative"))
                .collect::<Result<Vec<_>, _>>()?,
            None => match input[axis].size() {
                Some(size) => {
                    let part = size.div_ceil(parts.max(1));
                    (0..parts)
                        .map(|index| Dim::of(part.min(size.saturating_sub(index * part))))
                        .collect()
                }
                None => (0..parts)
                    .map(|_| input[axis].divided_by(&Dim::of(parts)).unwrap_or_else(|| self.fresh()))
                    .collect(),
            },
        };
        let shape = |size: &Dim| {
            let mut shape = input.clone();
            shape[axis].clone_from(size);
            shape
        };
        Ok(sizes.iter().map(shape).collect())
    }

    fn reduce(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        let input = self.shape(node, 0)?;
        let axes = self.reduced_axes(node, input.len())?;
        Ok(vec![reduced(&input, &axes, int(node, "keepdims", 1) != 0)])
    }

    /// The axes that a reduction of a value of `rank` axes sums over.
    pub(crate) fn reduced_axes(&self, node: &NodeProto, rank: usize) -> Result<Vec<usize>, String> {
        match self.setting(node, "axes", 1)?.filter(|axes| !axes.is_empty()) {
            Some(axes) => axes.into_iter().map(|axis| axis_of(axis, rank)).collect(),
            None if int(node, "noop_with_empty_axes", 0) != 0 => Ok(vec![]),
            None => Ok((0..rank).collect()),
        }
    }

    /// Before and after each of `rank` axes; `None` where it is not known.
    pub(crate) fn padding(&self, node: &NodeProto, rank: usize) -> Option<Vec<(i64, i64)>> {
        let pads = self.setting(node, "pads", 1).ok()??;
        let axes: Vec<usize> = match self.setting(node, "axes", 3).ok()? {
            Some(axes) => axes.into_iter().map(|axis| axis_of(axis, rank)).collect::<Result<_, _>>().ok()?,
            None => (0..rank).collect(),
        };
        let mut padding = vec![(0, 0); rank];
        for (index, axis) in axes.iter().enumerate() {
            padding[*axis] = (*pads.get(index)?, *pads.get(index + axes.len())?);
        }
        Some(padding)
    }

    fn resize(&mut self, node: &NodeProto) -> Result<Vec<Vec<Dim>>, String> {
        let input = self.shape(node, 0)?;
        let given = |index: usize| node.input.get(index).is_some_and(|name| !name.is_empty());
        if attribute(node, "axes").is_some() {
            return Err("it resizes some of its axes alone".into());
        }
        if given(3) {
            let told = self.told(node, 3)?;
            if told.len() != input.len() {
                return Err("its sizes are not one for each axis".into());
            }
            return Ok(vec![told.iter().map(|integer| self.dim_of(integer)).collect()]);
        }
        let scales = [2, 1]
            .into_iter()
            .find_map(|index| self.floats.get(node.input.get(index)?))
            .cloned();
        let scales = scales.or_else(|| attribute(node, "scales").map(|scales| scales.floats.clone()));
        let scales = scales
            .filter(|scales| scales.len() == input.len())
            .ok_or("its scales are not known")?;
        let scaled = |(dim, scale): (&Dim, f32)| match dim.size() {
            _ if scale == 1.0 => dim.clone(),
            Some(size) => Dim::of((size as f32 * scale).floor() as usize),
            None => self.fresh(),
        };
        Ok(vec![input.iter().zip(scales).map(scaled).collect()])
    }
}

fn reduced(input: &[Dim], axes: &[usize], keep: bool) -> Vec<Dim> {
    let dim = |(axis, dim): (usize, &Dim)| match axes.contains(&axis) {
        true if keep => Some(Dim::of(1)),
        true => None,
        false => Some(dim.clone()),
    };
    input.iter().enumerate().filter_map(dim).collect()
}

/// Which axis of a `Transpose`'s input each of its output's axes is.
pub(crate) fn permutation(node: &NodeProto, rank: usize) -> Result<Vec<usize>, String> {
    match ints(node, "perm") {
        Some(order) if order.len() == rank => order.iter().map(|axis| axis_of(*axis, rank)).collect(),
        Some(_) => Err("its order does not name every axis".into()),
        None => Ok((0..rank).rev().collect()),
    }
}
