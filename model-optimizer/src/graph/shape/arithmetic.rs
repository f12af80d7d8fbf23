//! Integers that are computed from shapes.

use plimsoll_runtime::onnx::{AttributeProto, NodeProto};

use super::{Dim, INTEGERS_MAX, Integer, Shapes, integers_of};
use crate::graph::attribute;

impl Shapes {
    /// The elements of the node's first output, where they are integers that follow from shapes and constants.
    pub(super) fn arithmetic(&self, node: &NodeProto) -> Option<Vec<Integer>> {
        let input = |index: usize| self.integers(node.input.get(index)?);
        let shape = |index: usize| self.get(node.input.get(index)?);
        let values = match node.op_type() {
            "Shape" => {
                let dims = shape(0)?;
                let range = self.shape_range(node, dims.len());
                dims.get(range)?.iter().map(Integer::from).collect()
            }
            "Size" => vec![Integer::from(&Dim::product(shape(0)?)?)],
            "Constant" => constant(node)?,
            "Cast" | "Identity" | "Squeeze" | "Unsqueeze" | "Reshape" => input(0)?.to_vec(),
            "Concat" => {
                let parts: Option<Vec<&[Integer]>> = (0..node.input.len()).map(input).collect();
                parts?.concat()
            }
            "Gather" => {
                let (data, indices) = (input(0)?, self.numbers(node.input.get(1)?)?);
                let at = |index: i64| {
                    let index = if index < 0 { index + data.len() as i64 } else { index };
                    data.get(usize::try_from(index).ok()?).cloned()
                };
                indices.into_iter().map(at).collect::<Option<_>>()?
            }
            "Slice" => {
                let data = input(0)?;
                let [range] = self.slices(node, 1)?.try_into().ok()?;
                let (start, end, step) = range.resolve(data.len())?;
                data.get(start..end)?.iter().step_by(step).cloned().collect()
            }
            "ConstantOfShape" => {
                let length: usize = match self.numbers(node.input.first()?)?.as_slice() {
                    [] => 1,
                    [length] => usize::try_from(*length).ok()?,
                    _ => return None,
                };
                let value = attribute(node, "value").and_then(|value| value.t.as_ref());
                let value = integers_of(value?)?;
                (length <= INTEGERS_MAX).then(|| vec![Integer::Known(value.first().copied().unwrap_or_default()); length])?
            }
            "Range" => {
                let number = |index: usize| self.numbers(node.input.get(index)?)?.first().copied();
                let (start, limit, delta) = (number(0)?, number(1)?, number(2)?);
                let range = |delta: usize| {
                    (start..limit)
                        .step_by(delta)
                        .take(INTEGERS_MAX + 1)
                        .map(Integer::Known)
                        .collect::<Vec<_>>()
                };
                range(usize::try_from(delta).ok().filter(|delta| *delta > 0)?)
            }
            "ReduceProd" => {
                let dims = input(0)?.iter().map(dim).collect::<Option<Vec<_>>>()?;
                vec![Integer::from(&Dim::product(&dims)?)]
            }
            "Where" => {
                let (condition, yes, no) = (input(0)?, input(1)?, input(2)?);
                let length = condition.len().max(yes.len()).max(no.len());
                let choose = |index: usize| match element(condition, index)? {
                    Integer::Known(0) => element(no, index),
                    Integer::Known(_) => element(yes, index),
                    _ => Some(Integer::Unknown),
                };
                (0..length).map(choose).collect::<Option<_>>()?
            }
            "Add" | "Sub" | "Mul" | "Div" | "Min" | "Max" | "Equal" | "Mod" => {
                let (a, b) = (input(0)?, input(1)?);
                let length = if a.is_empty() || b.is_empty() { 0 } else { a.len().max(b.len()) };
                (0..length)
                    .map(|index| Some(calculate(node.op_type(), element(a, index)?, element(b, index)?)))
                    .collect::<Option<_>>()?
            }
            _ => return None,
        };
        (values.len() <= INTEGERS_MAX).then_some(values)
    }

    /// The axes that a `Shape` gives.
    pub(super) fn shape_range(&self, node: &NodeProto, rank: usize) -> std::ops::Range<usize> {
        let bound = |name: &str, default: usize| {
            attribute(node, name).map_or(default, |value| {
                let value = if value.i() < 0 { value.i() + rank as i64 } else { value.i() };
                usize::try_from(value).unwrap_or(0).min(rank)
            })
        };
        let (start, end) = (bound("start", 0), bound("end", rank));
        start..end.max(start)
    }
}

fn constant(node: &NodeProto) -> Option<Vec<Integer>> {
    let values = if let Some(tensor) = attribute(node, "value").and_then(|value| value.t.as_ref()) {
        if tensor.dims.len() > 1 {
            return None;
        }
        integers_of(tensor)?
    } else if let Some(values) = attribute(node, "value_ints") {
        values.ints.clone()
    } else {
        vec![attribute(node, "value_int").map(AttributeProto::i)?]
    };
    Some(values.into_iter().map(Integer::Known).collect())
}

/// Of one element alone every index is that element.
fn element(values: &[Integer], index: usize) -> Option<Integer> {
    values.get(if values.len() == 1 { 0 } else { index }).cloned()
}

fn dim(integer: &Integer) -> Option<Dim> {
    match integer {
        Integer::Known(number) => usize::try_from(*number).ok().map(Dim::of),
        Integer::Size(dim) => Some(dim.clone()),
        Integer::Unknown => None,
    }
}

fn calculate(op_type: &str, a: Integer, b: Integer) -> Integer {
    if let (Integer::Known(a), Integer::Known(b)) = (&a, &b) {
        let (a, b) = (*a, *b);
        let value = match op_type {
            "Add" => a.checked_add(b),
            "Sub" => a.checked_sub(b),
            "Mul" => a.checked_mul(b),
            "Div" => a.checked_div(b),
            "Mod" => a.checked_rem_euclid(b).filter(|_| a >= 0 && b > 0),
            "Min" => Some(a.min(b)),
            "Max" => Some(a.max(b)),
            _ => Some(i64::from(a == b)),
        };
        return value.map_or(Integer::Unknown, Integer::Known);
    }
    let result = match (op_type, dim(&a), dim(&b)) {
        ("Mul", Some(a), Some(b)) => a.times(&b),
        ("Div", Some(a), Some(b)) => a.divided_by(&b),
        _ => None,
    };
    if let Some(result) = result {
        return Integer::from(&result);
    }
    match (op_type, &a, &b) {
        ("Add" | "Sub", other, Integer::Known(0)) | ("Add", Integer::Known(0), other) => other.clone(),
        ("Equal", Integer::Size(a), Integer::Size(b)) if a == b => Integer::Known(1),
        // A size is never negative.
        ("Equal", Integer::Size(_), Integer::Known(number)) | ("Equal", Integer::Known(number), Integer::Size(_)) if *number < 0 => {
            Integer::Known(0)
        }
        _ => Integer::Unknown,
    }
}
