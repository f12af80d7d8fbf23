//! What of a run's tensors counts towards a distribution (see [`plimsoll_package::drift`]): one reading for the optimiser, which records how
//! they look, and for the server, which compares.

use plimsoll_package::drift::CLASSES_MAX;
use plimsoll_package::manifest::{Datatype, TensorSpec};

use crate::engine::{Data, Tensor};

/// The input that tells tokens from padding, by the name that Hugging Face's exporters give it.
const MASK: &str = "attention_mask";

/// Which tokens of a run are no padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Texts, and tokens of each with the padding.
    shape: [usize; 2],
    kept: Vec<bool>,
}

impl Mask {
    /// The mask among a model's inputs, where it has one.
    #[must_use]
    pub fn of(specs: &[TensorSpec], inputs: &[Tensor]) -> Option<Self> {
        let (_, tensor) = specs.iter().zip(inputs).find(|(spec, _)| is_mask(spec))?;
        let shape = tensor.shape().try_into().ok()?;
        let mut kept = Vec::with_capacity(tensor.data().len());
        visit(tensor.data(), 0..tensor.data().len(), |value| kept.push(value != 0.0));
        Some(Self { shape, kept })
    }

    /// How many tokens each text has.
    pub fn lengths(&self) -> impl Iterator<Item = f64> {
        let texts = self.kept.chunks(self.shape[1].max(1));
        texts.map(|tokens| tokens.iter().filter(|kept| **kept).count() as f64)
    }

    /// How many values of a tensor belong to one token, where it has some for each of these tokens.
    fn width(&self, tensor: &Tensor) -> Option<usize> {
        let has = tensor.shape().starts_with(&self.shape) && !self.kept.is_empty();
        has.then(|| tensor.data().len() / self.kept.len())
    }
}

/// Whether an input is the mask, whose values count as [lengths](Mask::lengths).
#[must_use]
pub fn is_mask(spec: &TensorSpec) -> bool {
    let is_whole = !matches!(
        spec.datatype,
        Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64 | Datatype::Bytes
    );
    spec.name == MASK && spec.shape.len() == 2 && is_whole
}

/// How many samples a run holds: the size of the first axis.
#[must_use]
pub fn rows(inputs: &[Tensor]) -> usize {
    inputs.iter().find_map(|input| input.shape().first().copied()).unwrap_or(1)
}

/// Gives `take` about `values_max` values of a tensor at most, evenly spread; which, changes with `turn`. Padding and strings are left out.
pub fn values(tensor: &Tensor, mask: Option<&Mask>, values_max: usize, turn: usize, take: impl FnMut(f64)) {
    let count = tensor.data().len();
    let step = count.div_ceil(values_max.max(1)).max(1);
    let spread = (turn % step..count).step_by(step);
    match mask.and_then(|mask| Some((mask, mask.width(tensor)?))) {
        Some((mask, width)) => visit(tensor.data(), spread.filter(|index| mask.kept[index / width]), take),
        None => visit(tensor.data(), spread, take),
    }
}

/// How many classes a tensor tells apart, where it may be a classifier's output: floats, a row for each sample, at most [`CLASSES_MAX`] in it.
#[must_use]
pub fn class_count(tensor: &Tensor) -> Option<usize> {
    let is_float = matches!(tensor.datatype(), Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
    match tensor.shape() {
        [_, classes] if is_float && (2..=CLASSES_MAX).contains(classes) => Some(*classes),
        _ => None,
    }
}

/// Gives `take` the class of each row, that of its largest value, the first one of equals. Of more than about `values_max` values, rows are left
/// out, evenly spread.
pub fn classes(tensor: &Tensor, values_max: usize, turn: usize, mut take: impl FnMut(usize)) {
    let Some(classes) = class_count(tensor) else { return };
    let rows = tensor.data().len() / classes;
    let step = rows.div_ceil((values_max / classes).max(1)).max(1);
    for row in (turn % step..rows).step_by(step) {
        let (mut best, mut largest, mut index) = (0, f64::NEG_INFINITY, 0);
        visit(tensor.data(), row * classes..(row + 1) * classes, |value| {
            if value > largest {
                (best, largest) = (index, value);
            }
            index += 1;
        });
        take(best);
    }
}

/// Gives `take` the values of those indices; none of strings.
fn visit(data: &Data, indices: impl Iterator<Item = usize>, mut take: impl FnMut(f64)) {
    macro_rules! each {
        ($values:ident, $number:expr) => {
            indices.for_each(|index| take($number($values[index])))
        };
    }
    match data {
        Data::Bool(values) => each!(values, |value: bool| f64::from(u8::from(value))),
        Data::Uint8(values) => each!(values, f64::from),
        Data::Uint16(values) => each!(values, f64::from),
        Data::Uint32(values) => each!(values, f64::from),
        Data::Uint64(values) => each!(values, |value: u64| value as f64),
        Data::Int8(values) => each!(values, f64::from),
        Data::Int16(values) => each!(values, f64::from),
        Data::Int32(values) => each!(values, f64::from),
        Data::Int64(values) => each!(values, |value: i64| value as f64),
        Data::Fp16(values) => each!(values, f64::from),
        Data::Bf16(values) => each!(values, f64::from),
        Data::Fp32(values) => each!(values, f64::from),
        Data::Fp64(values) => each!(values, |value: f64| value),
        Data::Bytes(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], data: impl Into<Data>) -> Tensor {
        Tensor::new(shape.to_vec(), data).unwrap()
    }

    fn seen(tensor: &Tensor, mask: Option<&Mask>, values_max: usize, turn: usize) -> Vec<f64> {
        let mut seen = vec![];
        values(tensor, mask, values_max, turn, |value| seen.push(value));
        seen
    }

    #[test]
    fn values_are_spread_evenly_and_every_one_has_its_turn() {
        let ten = tensor(&[10], (0..10_u8).collect::<Vec<_>>());
        assert_eq!(seen(&ten, None, 10, 3).len(), 10);
        assert_eq!(seen(&ten, None, 5, 0), [0.0, 2.0, 4.0, 6.0, 8.0]);
        let mut all: Vec<f64> = (0..4).flat_map(|turn| seen(&ten, None, 3, turn)).collect();
        all.sort_by(f64::total_cmp);
        assert_eq!(all, (0..10).map(f64::from).collect::<Vec<_>>());
        assert!(seen(&tensor(&[0, 3], Vec::<f32>::new()), None, 5, 1).is_empty());
        assert!(seen(&tensor(&[1], vec![b"text".to_vec()]), None, 5, 0).is_empty());
    }

    #[test]
    fn padding_counts_for_nothing() {
        let spec = |name: &str, datatype| TensorSpec {
            name: name.into(),
            datatype,
            shape: vec![-1, -1],
        };
        let ids = tensor(&[2, 3], vec![7_i64, 8, 9, 5, 0, 0]);
        let ones = tensor(&[2, 3], vec![1_i64, 1, 1, 1, 0, 0]);
        let specs = [spec("input_ids", Datatype::Int64), spec(MASK, Datatype::Int64)];
        let mask = Mask::of(&specs, &[ids.clone(), ones.clone()]).unwrap();
        assert_eq!(mask.lengths().collect::<Vec<_>>(), [3.0, 1.0]);
        assert_eq!(seen(&ids, Some(&mask), 100, 0), [7.0, 8.0, 9.0, 5.0]);
        let hidden = tensor(&[2, 3, 2], (0..12).map(|value| value as f32).collect::<Vec<_>>());
        assert_eq!(seen(&hidden, Some(&mask), 100, 0), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        let pooled = tensor(&[2, 2], vec![1.0_f32, 2.0, 3.0, 4.0]);
        assert_eq!(seen(&pooled, Some(&mask), 100, 0).len(), 4);
        assert_eq!(Mask::of(&specs[..1], std::slice::from_ref(&ids)), None);
        assert_eq!(Mask::of(&[spec(MASK, Datatype::Fp32)], &[ids]), None);
        let empty = tensor(&[2, 0], Vec::<i64>::new());
        let mask = Mask::of(&specs[1..], std::slice::from_ref(&empty)).unwrap();
        assert!(seen(&empty, Some(&mask), 100, 0).is_empty());
    }

    #[test]
    fn the_class_of_a_row_is_that_of_its_largest_value() {
        let found = |tensor: &Tensor, values_max, turn| {
            let mut found = vec![];
            classes(tensor, values_max, turn, |class| found.push(class));
            found
        };
        let scores = tensor(
            &[4, 3],
            vec![0.1_f32, 0.9, 0.2, 5.0, 5.0, 1.0, -3.0, -2.0, -1.0, f32::NAN, 0.0, f32::NAN],
        );
        assert_eq!(found(&scores, 100, 0), [1, 0, 2, 1]);
        assert_eq!(found(&scores, 6, 1), [0, 1]);
        assert_eq!(class_count(&tensor(&[4, 1], vec![0.0_f32; 4])), None);
        assert_eq!(class_count(&tensor(&[4, 2], vec![0_i64; 8])), None);
        assert_eq!(class_count(&tensor(&[1, 1000], vec![0.0_f32; 1000])), None);
    }
}
