//! Fidelity: how close the outputs of the optimised model are to the original's, as a whole and slice by slice.

use plimsoll_package::manifest::Datatype;
use plimsoll_package::report::{OutputFidelity, SliceFidelity};
use plimsoll_runtime::engine::Tensor;

/// Most slices along an axis.
const SLICES_MAX: usize = 4096;
/// Fewest values of a slice; fewer say nothing about it.
const SLICE_VALUES_MIN: u64 = 8;
/// Least root mean square of a slice that carries signal, relative to the whole output's. A detector's scores are at most 1 beside boxes of
/// hundreds of pixels, and few of them are far from 0: about 1e-5.
const SIGNAL_MIN: f64 = 1e-6;
/// Most slices that a report shows, the worst first.
const SLICES_SHOWN: usize = 8;

/// Sums over pairs of values before and after.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    count: u64,
    product: f64,
    before: f64,
    after: f64,
    noise: f64,
    largest: f64,
}

impl Sums {
    fn add(&mut self, before: f64, after: f64) {
        self.count += 1;
        // An infinity on both sides (a mask in the logits) is agreement and no number to reckon with.
        if before == after && !before.is_finite() {
            return;
        }
        let error = (after - before).abs();
        self.product += before * after;
        self.before += before * before;
        self.after += after * after;
        self.noise += error * error;
        self.largest = if error.is_nan() { f64::INFINITY } else { self.largest.max(error) };
    }

    /// Cosine similarity: 1 where both are all zero, 0 where one of them is or a value is not finite.
    fn cosine(&self) -> f64 {
        let lengths = self.before.sqrt() * self.after.sqrt();
        if !self.noise.is_finite() {
            0.0
        } else if self.noise == 0.0 {
            1.0
        } else if lengths > 0.0 {
            (self.product / lengths).clamp(-1.0, 1.0)
        } else {
            0.0
        }
    }

    fn sqnr_db(&self) -> Option<f64> {
        let is_number = self.noise > 0.0 && self.noise.is_finite() && self.before > 0.0;
        is_number.then(|| 10.0 * (self.before / self.noise).log10())
    }
}

/// Compares one output of two models, batch by batch.
///
/// Cosine similarity is taken over all samples together. The signal to quantisation noise ratio is
/// `10 log10(sum(before^2) / sum((after - before)^2))` dB. Slices are the columns of an output of two dimensions; of one with more, the
/// indices of its second axis and those of its last: a detector's boxes and scores lie along either, by its exporter. Axes of more than
/// 4096 have no slices.
#[derive(Debug, Clone)]
pub struct Comparison {
    name: String,
    whole: Sums,
    /// The sums of each slice, by axis.
    axes: Vec<(usize, Vec<Sums>)>,
    rows: u64,
    rows_agreed: u64,
    /// Whether shapes differ, so that nothing agrees.
    broken: bool,
}

impl Comparison {
    /// Of the output called `name`.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            whole: Sums::default(),
            axes: vec![],
            rows: 0,
            rows_agreed: 0,
            broken: false,
        }
    }

    /// Takes the outputs of a batch; strings are not compared.
    pub fn add(&mut self, before: &Tensor, after: &Tensor) {
        if before.shape() != after.shape() {
            self.broken = true;
            return;
        }
        let is_float = matches!(before.datatype(), Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
        match (before.as_f32(), after.as_f32()) {
            (Some(one), Some(other)) => self.add_values(before.shape(), one, other, is_float),
            _ => {
                if let (Some(one), Some(other)) = (before.data().to_f64(), after.data().to_f64()) {
                    self.add_values(before.shape(), &one, &other, is_float);
                }
            }
        }
    }

    fn add_values<T: Copy + Into<f64> + PartialOrd>(&mut self, shape: &[usize], before: &[T], after: &[T], is_float: bool) {
        for (before, after) in before.iter().zip(after) {
            self.whole.add((*before).into(), (*after).into());
        }
        let axes: Vec<usize> = match shape.len() {
            0 | 1 => vec![],
            2 => vec![1],
            rank => vec![1, rank - 1],
        };
        for axis in axes.into_iter().filter(|axis| (2..=SLICES_MAX).contains(&shape[*axis])) {
            let size = shape[axis];
            let known = self.axes.iter().position(|(known, sums)| *known == axis && sums.len() == size);
            let known = known.unwrap_or_else(|| {
                self.axes.push((axis, vec![Sums::default(); size]));
                self.axes.len() - 1
            });
            let sums = &mut self.axes[known].1;
            // The values of one slice that lie together.
            let inner: usize = shape[axis + 1..].iter().product();
            let pairs = before
                .chunks_exact(size * inner.max(1))
                .zip(after.chunks_exact(size * inner.max(1)));
            for (before, after) in pairs {
                for (slice, sums) in sums.iter_mut().enumerate() {
                    let values = slice * inner..(slice + 1) * inner;
                    for (before, after) in before[values.clone()].iter().zip(&after[values]) {
                        sums.add((*before).into(), (*after).into());
                    }
                }
            }
        }
        let width = if is_float { shape.last().copied().unwrap_or(1) } else { 1 };
        if is_float && width < 2 {
            return;
        }
        for (before, after) in before.chunks_exact(width).zip(after.chunks_exact(width)) {
            self.rows += 1;
            let agreed = if is_float {
                largest(before) == largest(after)
            } else {
                before == after
            };
            self.rows_agreed += u64::from(agreed);
        }
    }

    /// What was compared; `None` of strings.
    #[must_use]
    pub fn finish(self) -> Option<OutputFidelity> {
        if self.whole.count == 0 && !self.broken {
            return None;
        }
        let signal_min = SIGNAL_MIN * SIGNAL_MIN * self.whole.before / self.whole.count.max(1) as f64;
        let (mut slices, mut silent) = (Vec::new(), 0);
        for (axis, sums) in &self.axes {
            for (index, sums) in sums.iter().enumerate().filter(|(_, sums)| sums.count >= SLICE_VALUES_MIN) {
                let energy = sums.before / sums.count as f64;
                if energy == 0.0 || energy < signal_min {
                    silent += 1;
                    continue;
                }
                slices.push(SliceFidelity {
                    axis: *axis as u64,
                    index: index as u64,
                    cosine: sums.cosine(),
                    sqnr_db: sums.sqnr_db(),
                });
            }
        }
        slices.sort_by(|a, b| a.cosine.total_cmp(&b.cosine));
        let count = slices.len() as u64;
        slices.truncate(SLICES_SHOWN);
        Some(OutputFidelity {
            name: self.name,
            cosine: if self.broken { 0.0 } else { self.whole.cosine() },
            sqnr_db: self.whole.sqnr_db(),
            // JSON has no infinity.
            max_abs_error: if self.broken { f64::MAX } else { self.whole.largest.min(f64::MAX) },
            agreement: (self.rows > 0).then(|| self.rows_agreed as f64 / self.rows as f64),
            slices: count,
            silent_slices: silent,
            worst_slices: slices,
        })
    }
}

fn largest<T: PartialOrd>(values: &[T]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(shape: &[usize], before: &[f32], after: &[f32]) -> OutputFidelity {
        let tensor = |values: &[f32]| Tensor::new(shape.to_vec(), values.to_vec()).unwrap();
        let mut comparison = Comparison::new("y");
        comparison.add(&tensor(before), &tensor(after));
        comparison.finish().unwrap()
    }

    #[test]
    fn equal_outputs_are_of_full_fidelity_even_where_all_is_zero() {
        let same = compare(&[2], &[1.0, f32::NEG_INFINITY], &[1.0, f32::NEG_INFINITY]);
        assert_eq!((same.cosine, same.sqnr_db, same.max_abs_error), (1.0, None, 0.0));
        assert_eq!(compare(&[1], &[0.0], &[0.0]).cosine, 1.0);
    }

    #[test]
    fn noise_is_measured_in_decibels() {
        let noisy = compare(&[2], &[3.0, 4.0], &[3.0, 4.5]);
        assert!((noisy.sqnr_db.unwrap() - 20.0).abs() < 1e-9);
        assert!((noisy.cosine - 27.0 / (5.0 * 29.25_f64.sqrt())).abs() < 1e-12);
        assert_eq!(noisy.max_abs_error, 0.5);
    }

    #[test]
    fn what_is_not_finite_has_no_fidelity() {
        assert_eq!(compare(&[2], &[1.0, 2.0], &[1.0, f32::NAN]).cosine, 0.0);
        assert!((compare(&[2], &[1.0, 2.0], &[-1.0, -2.0]).cosine + 1.0).abs() < 1e-12);
        let mut other_shape = Comparison::new("y");
        let tensor = |count: usize| Tensor::new(vec![count], vec![1.0_f32; count]).unwrap();
        other_shape.add(&tensor(2), &tensor(1));
        assert_eq!(other_shape.finish().unwrap().cosine, 0.0);
    }

    #[test]
    fn agreement_is_of_the_largest_value_of_each_row() {
        let rows = compare(&[2, 2], &[0.1, 0.9, 0.8, 0.2], &[0.2, 0.8, 0.4, 0.6]);
        assert_eq!(rows.agreement, Some(0.5));
        assert_eq!(compare(&[2, 1], &[0.1, 0.9], &[0.2, 0.8]).agreement, None);
    }

    /// Boxes of hundreds of pixels and scores of which few are not near 0, as a detector gives them.
    fn detector(channels_last: bool) -> (Vec<usize>, Vec<f32>, Vec<f32>) {
        let (channels, places) = (6, 100);
        let value = |channel: usize, place: usize| match channel {
            0..4 => 320.0 + place as f32,
            4 if place == 7 => 0.9,
            4 => 0.001,
            _ => 0.0,
        };
        let shape = if channels_last {
            vec![1, places, channels]
        } else {
            vec![1, channels, places]
        };
        let at = |index: usize| {
            if channels_last {
                (index % channels, index / channels)
            } else {
                (index / places, index % places)
            }
        };
        let before: Vec<f32> = (0..channels * places).map(|index| value(at(index).0, at(index).1)).collect();
        let dead = before
            .iter()
            .enumerate()
            .map(|(index, value)| if at(index).0 >= 4 { 0.0 } else { *value });
        (shape, before.clone(), dead.collect())
    }

    #[test]
    fn dead_scores_show_beside_healthy_boxes() {
        for channels_last in [false, true] {
            let (shape, before, dead) = detector(channels_last);
            let fidelity = compare(&shape, &before, &dead);
            assert!(fidelity.cosine > 0.999_99, "the average hides it: {}", fidelity.cosine);
            let worst = &fidelity.worst_slices[0];
            assert_eq!((worst.axis, worst.index, worst.cosine), (if channels_last { 2 } else { 1 }, 4, 0.0));
            // The second class occurs nowhere.
            assert_eq!(fidelity.silent_slices, 1);
            assert_eq!(compare(&shape, &before, &before).worst_slices[0].cosine, 1.0);
        }
    }

    #[test]
    fn slices_go_on_from_batch_to_batch() {
        let mut comparison = Comparison::new("y");
        for _ in 0..4 {
            let before = Tensor::new(vec![2, 2], vec![1.0_f32, 2.0, 3.0, 4.0]).unwrap();
            let after = Tensor::new(vec![2, 2], vec![1.0_f32, 0.0, 3.0, 0.0]).unwrap();
            comparison.add(&before, &after);
        }
        let fidelity = comparison.finish().unwrap();
        assert_eq!(fidelity.slices, 2);
        assert_eq!((fidelity.worst_slices[0].index, fidelity.worst_slices[0].cosine), (1, 0.0));
    }
}
