//! What operators make of constants, by ONNX's operator reference.

use plimsoll_runtime::engine::tensor::element_count;
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{AttributeProto, NodeProto};

use super::attribute;
use super::constant::{Constant, little_endian, width};
use crate::graph::shape::{axis_of, permutation};

/// Operators that [`evaluate`] knows.
pub(super) const KNOWN: [&str; 15] = [
    "Add",
    "Cast",
    "Concat",
    "ConstantOfShape",
    "Div",
    "Expand",
    "Flatten",
    "Gather",
    "Mul",
    "Reshape",
    "Slice",
    "Squeeze",
    "Sub",
    "Transpose",
    "Unsqueeze",
];

/// The first output of `node` for `inputs`, of which optional ones may be missing; `None` where it takes more than `bytes_max`, is not
/// defined, or is of a type that is not computed here. Axes and ranges that older versions keep in attributes are read there.
pub(super) fn evaluate(node: &NodeProto, inputs: &[Option<Constant>], bytes_max: usize) -> Option<Constant> {
    let input = |index: usize| inputs.get(index).and_then(Option::as_ref);
    let data = input(0)?;
    let numbers = |index: usize, name: &str| match input(index) {
        Some(constant) => constant.integers(),
        None => attribute(node, name).map(|attribute| attribute.ints.clone()),
    };
    let axis = |default: i64, rank: usize| axis_of(attribute(node, "axis").map_or(default, AttributeProto::i), rank).ok();
    let fits = |shape: &[usize], width: usize| element_count(shape)?.checked_mul(width).filter(|bytes| *bytes <= bytes_max);
    match node.op_type() {
        "Add" | "Sub" | "Mul" | "Div" => arithmetic(node.op_type(), data, input(1)?, fits),
        "Cast" => {
            let kind = DataType::try_from(i32::try_from(attribute(node, "to")?.i()).ok()?).ok()?;
            fits(&data.shape, width(kind)?)?;
            cast(data, kind)
        }
        "Concat" => {
            let axis = axis_of(attribute(node, "axis")?.i(), data.shape.len()).ok()?;
            let parts: Vec<&Constant> = inputs.iter().map(Option::as_ref).collect::<Option<_>>()?;
            concatenation(&parts, axis, fits)
        }
        "ConstantOfShape" => {
            let shape = sizes(&data.integers()?)?;
            let value = match attribute(node, "value") {
                Some(value) => Constant::of(value.t.as_ref()?).filter(|value| value.count() == 1)?,
                None => Constant::made(DataType::Float, vec![1], vec![0; 4]),
            };
            let count = fits(&shape, value.width())? / value.width();
            Some(Constant::made(value.kind, shape, value.bytes.repeat(count)))
        }
        "Expand" => {
            let shape = broadcast(&data.shape, &sizes(&input(1)?.integers()?)?)?;
            fits(&shape, data.width())?;
            let strides = broadcast_strides(&data.shape, &shape);
            Some(moved(data, shape, &strides, 0))
        }
        "Flatten" => {
            let at = attribute(node, "axis").map_or(1, AttributeProto::i);
            let rank = data.shape.len();
            let at = usize::try_from(if at < 0 { at.checked_add(rank as i64)? } else { at })
                .ok()
                .filter(|at| *at <= rank)?;
            reshaped(data, vec![element_count(&data.shape[..at])?, element_count(&data.shape[at..])?])
        }
        "Gather" => {
            let indices = input(1)?;
            gathered(data, indices, axis(0, data.shape.len())?, fits)
        }
        "Reshape" => {
            let zero_is_zero = attribute(node, "allowzero").is_some_and(|attribute| attribute.i() != 0);
            let wanted = numbers(1, "shape")?;
            reshaped(data, resolved(&data.shape, &wanted, zero_is_zero)?)
        }
        "Slice" => {
            let (starts, ends) = (numbers(1, "starts")?, numbers(2, "ends")?);
            let axes = match (input(3).is_some(), numbers(3, "axes")) {
                (_, Some(axes)) => axes,
                (true, None) => return None,
                (false, None) => (0..starts.len() as i64).collect(),
            };
            let steps = match input(4) {
                Some(steps) => steps.integers()?,
                None => vec![1; starts.len()],
            };
            sliced(data, &starts, &ends, &axes, &steps, fits)
        }
        "Squeeze" => {
            let rank = data.shape.len();
            let dropped: Vec<usize> = match (input(1).is_some(), numbers(1, "axes")) {
                (_, Some(axes)) => axes.iter().map(|axis| axis_of(*axis, rank).ok()).collect::<Option<_>>()?,
                (true, None) => return None,
                (false, None) => (0..rank).filter(|axis| data.shape[*axis] == 1).collect(),
            };
            if dropped.iter().any(|axis| data.shape[*axis] != 1) {
                return None;
            }
            let kept = (0..rank).filter(|axis| !dropped.contains(axis)).map(|axis| data.shape[axis]);
            reshaped(data, kept.collect())
        }
        "Transpose" => {
            let order = permutation(node, data.shape.len()).ok()?;
            if (0..order.len()).any(|axis| !order.contains(&axis)) {
                return None;
            }
            fits(&data.shape, data.width())?;
            let strides = strides(&data.shape);
            let shape = order.iter().map(|axis| data.shape[*axis]).collect();
            Some(moved(data, shape, &order.iter().map(|axis| strides[*axis]).collect::<Vec<_>>(), 0))
        }
        "Unsqueeze" => {
            let axes = numbers(1, "axes")?;
            let rank = data.shape.len().checked_add(axes.len())?;
            let new: Vec<usize> = axes.iter().map(|axis| axis_of(*axis, rank).ok()).collect::<Option<_>>()?;
            let mut rest = data.shape.iter().copied();
            let shape: Option<Vec<usize>> = (0..rank)
                .map(|axis| if new.contains(&axis) { Some(1) } else { rest.next() })
                .collect();
            reshaped(data, shape?)
        }
        _ => None,
    }
}

fn sizes(values: &[i64]) -> Option<Vec<usize>> {
    values.iter().map(|size| usize::try_from(*size).ok()).collect()
}

/// The same elements in another shape.
fn reshaped(data: &Constant, shape: Vec<usize>) -> Option<Constant> {
    (element_count(&shape)? == data.count()).then(|| Constant { shape, ..data.clone() })
}

/// The shape that a `Reshape` asks for: 0 copies a size, -1 is what is left.
fn resolved(shape: &[usize], wanted: &[i64], zero_is_zero: bool) -> Option<Vec<usize>> {
    let mut open = None;
    let mut sizes = Vec::with_capacity(wanted.len());
    for (axis, &size) in wanted.iter().enumerate() {
        sizes.push(match size {
            -1 if open.is_none() => {
                open = Some(axis);
                1
            }
            0 if !zero_is_zero => *shape.get(axis)?,
            size => usize::try_from(size).ok()?,
        });
    }
    if let Some(axis) = open {
        let (count, known) = (element_count(shape)?, element_count(&sizes)?);
        if known == 0 || !count.is_multiple_of(known) {
            return None;
        }
        sizes[axis] = count / known;
    }
    Some(sizes)
}

/// How many elements lie between neighbours along each axis.
fn strides(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1_isize; shape.len()];
    if shape.contains(&0) {
        return strides;
    }
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis] as isize;
    }
    strides
}

/// The elements that lie `strides` apart along the axes of `shape`, from the one at `start` on.
fn moved(data: &Constant, shape: Vec<usize>, strides: &[isize], start: usize) -> Constant {
    let width = data.width();
    let count: usize = shape.iter().product();
    let mut bytes = Vec::with_capacity(count * width);
    let mut index = vec![0; shape.len()];
    let mut place = start as isize;
    for _ in 0..count {
        bytes.extend_from_slice(&data.bytes[place as usize * width..][..width]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            place += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            place -= strides[axis] * shape[axis] as isize;
            index[axis] = 0;
        }
    }
    Constant::made(data.kind, shape, bytes)
}

/// The shape that two shapes have together.
fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let size = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |axis| shape[axis]);
    (0..rank)
        .map(|axis| match (size(a, axis), size(b, axis)) {
            (a, b) if a == b => Some(a),
            (1, size) | (size, 1) => Some(size),
            _ => None,
        })
        .collect()
}

/// The strides by which a tensor of shape `from` is read as one of shape `to`.
fn broadcast_strides(from: &[usize], to: &[usize]) -> Vec<isize> {
    let own = strides(from);
    let missing = to.len() - from.len();
    (0..to.len())
        .map(|axis| match axis.checked_sub(missing) {
            Some(axis) if from[axis] != 1 => own[axis],
            _ => 0,
        })
        .collect()
}

fn arithmetic(op_type: &str, a: &Constant, b: &Constant, fits: impl Fn(&[usize], usize) -> Option<usize>) -> Option<Constant> {
    if a.kind != b.kind {
        return None;
    }
    let shape = broadcast(&a.shape, &b.shape)?;
    fits(&shape, a.width())?;
    let spread = |constant: &Constant| moved(constant, shape.clone(), &broadcast_strides(&constant.shape, &shape), 0);
    let (a, b) = (spread(a), spread(b));
    macro_rules! calculated {
        ($type:ty, $add:expr, $sub:expr, $mul:expr, $div:expr) => {{
            let operation: fn($type, $type) -> Option<$type> = match op_type {
                "Add" => $add,
                "Sub" => $sub,
                "Mul" => $mul,
                _ => $div,
            };
            let (a, b) = (a.words(<$type>::from_le_bytes), b.words(<$type>::from_le_bytes));
            let values: Option<Vec<$type>> = a.into_iter().zip(b).map(|(a, b)| operation(a, b)).collect();
            little_endian(&values?, |value| value.to_le_bytes())
        }};
    }
    let bytes = match a.kind {
        DataType::Float => calculated!(f32, |a, b| Some(a + b), |a, b| Some(a - b), |a, b| Some(a * b), |a, b| Some(a / b)),
        DataType::Double => calculated!(f64, |a, b| Some(a + b), |a, b| Some(a - b), |a, b| Some(a * b), |a, b| Some(a / b)),
        // Where an integer overflows or is divided by zero, engines differ.
        DataType::Int32 => calculated!(i32, i32::checked_add, i32::checked_sub, i32::checked_mul, i32::checked_div),
        DataType::Int64 => calculated!(i64, i64::checked_add, i64::checked_sub, i64::checked_mul, i64::checked_div),
        _ => return None,
    };
    Some(Constant::made(a.kind, shape, bytes))
}

/// A number that is being cast.
#[derive(Clone, Copy)]
enum Number {
    Integer(i64),
    Float(f64),
}

impl Number {
    /// Engines differ in what they make of numbers outside of the range.
    fn integer(self) -> Option<i64> {
        match self {
            Self::Integer(value) => Some(value),
            Self::Float(value) => (value.abs() < (1_u64 << 53) as f64).then_some(value as i64),
        }
    }
}

fn cast(data: &Constant, kind: DataType) -> Option<Constant> {
    if data.kind == kind {
        return Some(data.clone());
    }
    let numbers: Vec<Number> = match data.kind {
        DataType::Bool | DataType::Uint8 => data.words(|[byte]| Number::Integer(i64::from(byte))),
        DataType::Int32 => data.words(|word| Number::Integer(i64::from(i32::from_le_bytes(word)))),
        DataType::Int64 => data.words(|word| Number::Integer(i64::from_le_bytes(word))),
        DataType::Float => data.words(|word| Number::Float(f64::from(f32::from_le_bytes(word)))),
        DataType::Double => data.words(|word| Number::Float(f64::from_le_bytes(word))),
        _ => return None,
    };
    let bytes = match kind {
        DataType::Bool => numbers
            .into_iter()
            .map(|number| match number {
                Number::Integer(value) => u8::from(value != 0),
                Number::Float(value) => u8::from(value != 0.0),
            })
            .collect(),
        DataType::Int32 => {
            let values = numbers.into_iter().map(|number| i32::try_from(number.integer()?).ok());
            little_endian(&values.collect::<Option<Vec<_>>>()?, i32::to_le_bytes)
        }
        DataType::Int64 => {
            let values: Option<Vec<i64>> = numbers.into_iter().map(Number::integer).collect();
            little_endian(&values?, i64::to_le_bytes)
        }
        DataType::Float => {
            let value = |number| match number {
                Number::Integer(value) => value as f32,
                Number::Float(value) => value as f32,
            };
            little_endian(&numbers.into_iter().map(value).collect::<Vec<_>>(), f32::to_le_bytes)
        }
        DataType::Double => {
            let value = |number| match number {
                Number::Integer(value) => value as f64,
                Number::Float(value) => value,
            };
            little_endian(&numbers.into_iter().map(value).collect::<Vec<_>>(), f64::to_le_bytes)
        }
        _ => return None,
    };
    Some(Constant::made(kind, data.shape.clone(), bytes))
}

fn concatenation(parts: &[&Constant], axis: usize, fits: impl Fn(&[usize], usize) -> Option<usize>) -> Option<Constant> {
    let first = parts.first()?;
    let mut shape = first.shape.clone();
    shape[axis] = 0;
    for part in parts {
        let same = |other: usize| other == axis || part.shape[other] == first.shape[other];
        if part.kind != first.kind || part.shape.len() != first.shape.len() || !(0..shape.len()).all(same) {
            return None;
        }
        shape[axis] = shape[axis].checked_add(part.shape[axis])?;
    }
    let mut bytes = Vec::with_capacity(fits(&shape, first.width())?);
    let run = |part: &Constant| part.shape[axis..].iter().product::<usize>() * first.width();
    for outer in 0..shape[..axis].iter().product() {
        for part in parts {
            bytes.extend_from_slice(&part.bytes[outer * run(part)..][..run(part)]);
        }
    }
    Some(Constant::made(first.kind, shape, bytes))
}

fn gathered(data: &Constant, indices: &Constant, axis: usize, fits: impl Fn(&[usize], usize) -> Option<usize>) -> Option<Constant> {
    let size = data.shape[axis];
    let at = |index: i64| {
        let index = if index < 0 { index.checked_add(size as i64)? } else { index };
        usize::try_from(index).ok().filter(|index| *index < size)
    };
    let shape = [&data.shape[..axis], &indices.shape, &data.shape[axis + 1..]].concat();
    let mut bytes = Vec::with_capacity(fits(&shape, data.width())?);
    let chosen: Vec<usize> = indices.integers()?.into_iter().map(at).collect::<Option<_>>()?;
    let run = data.shape[axis + 1..].iter().product::<usize>() * data.width();
    for outer in 0..data.shape[..axis].iter().product() {
        for index in &chosen {
            bytes.extend_from_slice(&data.bytes[(outer * size + index) * run..][..run]);
        }
    }
    Some(Constant::made(data.kind, shape, bytes))
}

fn sliced(
    data: &Constant,
    starts: &[i64],
    ends: &[i64],
    axes: &[i64],
    steps: &[i64],
    fits: impl Fn(&[usize], usize) -> Option<usize>,
) -> Option<Constant> {
    if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
        return None;
    }
    let mut shape = data.shape.clone();
    let mut apart = strides(&shape);
    let mut first = 0;
    let mut seen = vec![false; shape.len()];
    for (((start, end), axis), step) in starts.iter().zip(ends).zip(axes).zip(steps) {
        let axis = axis_of(*axis, shape.len()).ok()?;
        if std::mem::replace(&mut seen[axis], true) || *step == 0 {
            return None;
        }
        let size = data.shape[axis] as i64;
        // A step backwards may end before the first element.
        let (low, high) = if *step > 0 { (0, size) } else { (-1, size - 1) };
        let bound = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
        let start = bound(*start).clamp(low.max(0).min(high), high);
        let end = bound(*end).clamp(low, high);
        let span = if *step > 0 { end - start } else { start - end };
        let count = usize::try_from(span)
            .ok()
            .map_or(0, |span| span.div_ceil(usize::try_from(step.unsigned_abs()).unwrap_or(usize::MAX)));
        shape[axis] = count;
        if count > 0 {
            first += start as usize * apart[axis] as usize;
        }
        // Of one element the step is not taken.
        apart[axis] = if count > 1 { apart[axis] * isize::try_from(*step).ok()? } else { 0 };
    }
    fits(&shape, data.width())?;
    Some(moved(data, shape, &apart, first))
}
