//! Unstructured pruning by magnitude.

use bytes::Bytes;
use plimsoll_package::recipe::PruneScope;
use plimsoll_runtime::onnx::{ModelProto, TensorProto, mapping, weights};
use rayon::prelude::*;

use super::{NotFinite, nothing_to_prune, selection};
use crate::compress::{Change, Setting, Technique};
use crate::failure::{Failure, FailureReason, failure};
use crate::graph::serialize::spilled;
use crate::graph::weight::{self, ProductWeight};

/// Most weights that are ranked together with torch's choice among equal ones: that choice follows from moving every weight about, which
/// takes 8 bytes a weight.
pub const TORCH_TIES_MAX: usize = 1 << 24;

/// Values that one thread works through at a time.
const CHUNK: usize = 1 << 18;

/// The bits of a magnitude, which are in the order of the magnitudes themselves; infinity and NaN are the largest.
const MAGNITUDE_BITS: u32 = 0x7fff_ffff;
const INFINITY_BITS: u32 = 0x7f80_0000;

/// Values that are looked at to learn about where the threshold is; of fewer than [`SAMPLED_MIN`] all are.
const SAMPLE: usize = 1 << 16;
const SAMPLED_MIN: usize = 1 << 20;
/// Standard deviations of the threshold's rank in the sample on either side of it that are taken to hold it.
const MARGIN: f64 = 6.0;
/// The part of the sample that may lie around the threshold for the values there to be few.
const FEW: usize = 8;
/// Values that are compared at once, before any of them is looked at alone.
const BLOCK: usize = 16;

/// The digits of a magnitude, most significant first: by how much each is shifted, and how many bits it has.
const DIGITS: [(u32, u32); 3] = [(20, 11), (10, 10), (0, 10)];

/// Unstructured pruning by magnitude.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// The share of weights that become zero, `0.0..=1.0`.
    pub amount: f64,
    /// What weights are ranked within.
    pub scope: PruneScope,
}

impl Technique for Magnitude {
    fn apply(&self, model: &mut ModelProto, _: &Setting) -> Result<Change, Failure> {
        let mut found = model.graph.as_mut().map(weight::of_products).unwrap_or_default();
        if found.is_empty() {
            return Err(nothing_to_prune());
        }
        found.iter_mut().try_for_each(|weight| to_raw(weight.tensor))?;
        match self.scope {
            PruneScope::Global => prune_together(&mut found, self.amount)?,
            PruneScope::PerLayer => found
                .iter_mut()
                .try_for_each(|weight| prune_together(std::slice::from_mut(weight), self.amount))?,
        }
        Ok(Change {
            changed: found.iter().map(|weight| weight.tensor.name().to_owned()).collect(),
            ..Change::default()
        })
    }
}

/// Moves the values of a tensor of floats to its raw bytes, whichever field they lie in.
pub(super) fn to_raw(tensor: &mut TensorProto) -> Result<(), Failure> {
    let unreadable = |why: String| failure(FailureReason::UnreadableModel, why);
    if tensor.raw_data().is_empty() {
        let values = weights::floats(tensor).map_err(|error| unreadable(error.to_string()))?;
        tensor.float_data = Vec::new();
        tensor.raw_data = Some(values.iter().flat_map(|value| value.to_le_bytes()).collect());
    }
    let shape = weights::shape(tensor).map_err(|error| unreadable(error.to_string()))?;
    let bytes = shape.iter().try_fold(4_usize, |bytes, &size| bytes.checked_mul(size));
    if bytes == Some(tensor.raw_data().len()) {
        Ok(())
    } else {
        Err(unreadable(format!(
            "tensor `{}` does not hold as many values as its shape says",
            tensor.name()
        )))
    }
}

fn prune_together(together: &mut [ProductWeight], amount: f64) -> Result<(), Failure> {
    let slices: Vec<&[[u8; 4]]> = together.iter().map(|weight| weight.tensor.raw_data().as_chunks::<4>().0).collect();
    let Some(cut) = Cut::of(&slices, amount, key_of_bytes).map_err(|NotFinite| not_finite(together))? else {
        return Ok(());
    };
    let mut offset = 0;
    for weight in together {
        let data = weight.tensor.raw_data.take().unwrap_or_default();
        let length = data.len() / 4;
        weight.tensor.raw_data = Some(cut.apply_to_bytes(data, offset));
        offset += length;
    }
    Ok(())
}

fn not_finite(weights: &[ProductWeight]) -> Failure {
    let is_finite = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes).is_finite();
    let bad = weights
        .iter()
        .find(|weight| !weight.tensor.raw_data().as_chunks::<4>().0.iter().all(is_finite));
    super::not_finite(bad.map_or("", |weight| weight.tensor.name()))
}

/// Zeroes the `amount` share of weights of smallest magnitude, ranked over all `tensors` together.
///
/// `amount` is a ratio, `0.0..=1.0`; as in `torch.nn.utils.prune.global_unstructured` with `L1Unstructured`, the number of zeros is
/// `amount` times the number of weights, rounded half to even. The mask is torch's bit for bit, given the tensors in the same order:
/// magnitudes that are equal are told apart as `torch.topk` does on a CPU under Linux. Beyond [`TORCH_TIES_MAX`] weights ranked
/// together, of the weights of exactly the threshold's magnitude the earlier ones stay; all others are treated as torch does.
///
/// # Errors
/// [`NotFinite`] where a weight is NaN or infinite; the tensors are then untouched.
///
/// Han et al. 2015, "Learning both Weights and Connections", section 3.
pub fn prune_magnitude(tensors: &mut [&mut [f32]], amount: f64) -> Result<(), NotFinite> {
    let slices: Vec<&[f32]> = tensors.iter().map(|tensor| &**tensor).collect();
    let Some(cut) = Cut::of(&slices, amount, key_of)? else {
        return Ok(());
    };
    let mut offset = 0;
    for tensor in tensors {
        cut.apply(tensor, None, offset, key_of, 0.0);
        offset += tensor.len();
    }
    Ok(())
}

/// Which values go, of tensors that are ranked together.
struct Cut {
    /// The largest magnitude that goes, as bits; all smaller ones go.
    threshold: u32,
    ties: Ties,
}

/// Which of the values of exactly the threshold's magnitude go. Positions count through all tensors.
enum Ties {
    All,
    /// Those from this position on.
    From(usize),
    /// Those at these positions, ascending.
    At(Vec<u32>),
}

impl Cut {
    /// Of the `amount` share; `None` where it is no weight at all.
    fn of<T: Copy + Sync>(tensors: &[&[T]], amount: f64, key: impl Fn(T) -> u32 + Copy + Sync) -> Result<Option<Self>, NotFinite> {
        let chunks: Vec<&[T]> = tensors.iter().flat_map(|tensor| tensor.chunks(CHUNK)).collect();
        let length: usize = tensors.iter().map(|tensor| tensor.len()).sum();
        let count = ((amount * length as f64).round_ties_even() as usize).min(length);
        let sampled = if length < SAMPLED_MIN || count == 0 {
            None
        } else {
            Place::by_sample(&chunks, key, length, count - 1)?
        };
        let Place {
            threshold,
            rank,
            tied,
            by_chunk,
        } = match sampled {
            Some(place) => place,
            None => match Place::by_digits(&chunks, key, count)? {
                Some(place) => place,
                None => return Ok(None),
            },
        };
        // So many of the tied ones go; a zero is a zero, whether it goes or stays.
        let going = rank + 1;
        let ties = if going == tied || threshold == 0 {
            Ties::All
        } else if length <= TORCH_TIES_MAX {
            let keys = || tensors.iter().flat_map(|tensor| tensor.iter().map(|value| key(*value)));
            let mut gone = selection::smallest(keys(), count);
            gone.par_sort_unstable();
            let mut gone = gone.into_iter().peekable();
            let tied = keys().zip(0_u32..).filter_map(|(key, position)| {
                let goes = gone.next_if_eq(&position).is_some();
                (goes && key == threshold).then_some(position)
            });
            Ties::At(tied.collect())
        } else {
            let by_chunk = by_chunk.unwrap_or_else(|| count_ties(&chunks, key, threshold));
            Ties::From(nth_tie(&chunks, key, threshold, tied - going, &by_chunk))
        };
        Ok(Some(Self { threshold, ties }))
    }

    /// Writes `zero` where a value goes; `offset` is the position of the first of `values`. Where there is a `source`, its values are
    /// taken to `values` first.
    fn apply<T: Copy + Send + Sync>(&self, values: &mut [T], source: Option<&[T]>, offset: usize, key: impl Fn(T) -> u32 + Sync, zero: T) {
        values.par_chunks_mut(CHUNK).enumerate().for_each(|(index, chunk)| {
            let (start, length) = (offset + index * CHUNK, chunk.len());
            if let Some(source) = source {
                let source = &source[index * CHUNK..][..length];
                chunk.copy_from_slice(source);
                mapping::release(source);
            }
            // From here on ties go.
            let ties_from = match self.ties {
                Ties::All => 0,
                Ties::From(position) => position.clamp(start, start + length) - start,
                Ties::At(_) => length,
            };
            let (before, after) = chunk.split_at_mut(ties_from);
            for (values, limit) in [(before, self.threshold), (after, self.threshold + 1)] {
                for value in values {
                    *value = if key(*value) < limit { zero } else { *value };
                }
            }
            if let Ties::At(positions) = &self.ties {
                let range = |end: usize| positions.partition_point(|&position| (position as usize) < end);
                for &position in &positions[range(start)..range(start + length)] {
                    chunk[position as usize - start] = zero;
                }
            }
        });
    }

    /// The same on the bytes of floats; they are changed in place where nothing else holds them.
    fn apply_to_bytes(&self, data: Bytes, offset: usize) -> Bytes {
        match data.try_into_mut() {
            Ok(mut owned) => {
                self.apply(owned.as_chunks_mut::<4>().0, None, offset, key_of_bytes, [0; 4]);
                owned.freeze()
            }
            Err(shared) => {
                let mut pruned = vec![0; shared.len()];
                self.apply(
                    pruned.as_chunks_mut::<4>().0,
                    Some(shared.as_chunks::<4>().0),
                    offset,
                    key_of_bytes,
                    [0; 4],
                );
                spilled(pruned)
            }
        }
    }
}

/// Where the threshold lies among all magnitudes.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    threshold: u32,
    /// How many of the threshold's own magnitude come before it.
    rank: usize,
    /// How many have the threshold's own magnitude.
    tied: usize,
    /// The same of each chunk, where that is known.
    by_chunk: Option<Vec<usize>>,
}

impl Place {
    /// Of the last of the `count` smallest, digit by digit; `None` where that is none.
    fn by_digits<T: Copy + Sync>(chunks: &[&[T]], key: impl Fn(T) -> u32 + Copy + Sync, count: usize) -> Result<Option<Self>, NotFinite> {
        let mut place = Self {
            threshold: 0,
            rank: count.saturating_sub(1),
            tied: 0,
            by_chunk: None,
        };
        for (round, (shift, bits)) in DIGITS.into_iter().enumerate() {
            // The rank counts within those that agree with the threshold so far.
            let counts = histogram(chunks, key, place.threshold, shift, bits);
            if round == 0 && counts[(INFINITY_BITS >> shift) as usize..].iter().any(|count| *count > 0) {
                return Err(NotFinite);
            }
            if count == 0 {
                return Ok(None);
            }
            let mut digit = 0;
            while counts[digit] <= place.rank {
                place.rank -= counts[digit];
                digit += 1;
            }
            place.threshold |= (digit as u32) << shift;
            place.tied = counts[digit];
        }
        Ok(Some(place))
    }

    /// Of the one of that `rank` among `length` values, in one pass: a sample tells between which two magnitudes it lies, and the few values
    /// between these are sorted. `None` where the sample misleads, or so many are equal that there are not few.
    ///
    /// Floyd and Rivest 1975, "Expected Time Bounds for Selection".
    fn by_sample<T: Copy + Sync>(
        chunks: &[&[T]],
        key: impl Fn(T) -> u32 + Copy + Sync,
        length: usize,
        rank: usize,
    ) -> Result<Option<Self>, NotFinite> {
        let stride = length / SAMPLE;
        let mut sample: Vec<u32> = chunks
            .par_iter()
            .flat_map_iter(|chunk| {
                let keys: Vec<u32> = chunk.iter().step_by(stride).map(|value| key(*value)).collect();
                mapping::release(chunk);
                keys
            })
            .collect();
        sample.par_sort_unstable();
        let share = rank as f64 / length as f64;
        let (middle, deviation) = (share * sample.len() as f64, (share * (1.0 - share) * sample.len() as f64).sqrt());
        let (first, last) = (middle - MARGIN * deviation - 1.0, middle + MARGIN * deviation + 1.0);
        // Beyond the ends of the sample there may be more.
        let low = if first <= 0.0 { 0 } else { sample[first as usize] };
        let high = sample.get(last as usize).copied().unwrap_or(MAGNITUDE_BITS);
        let between = sample.partition_point(|key| *key <= high) - sample.partition_point(|key| *key < low);
        if between > sample.len() / FEW {
            return Ok(None);
        }
        let near: Vec<Near> = chunks.par_iter().map(|chunk| Near::of(chunk, key, low, high)).collect();
        if near.iter().any(|near| near.largest >= INFINITY_BITS) {
            return Err(NotFinite);
        }
        let below: usize = near.iter().map(|near| near.below).sum();
        let mut within: Vec<u32> = near.iter().flat_map(|near| near.within.iter().copied()).collect();
        let Some(rank) = rank.checked_sub(below).filter(|rank| *rank < within.len()) else {
            return Ok(None);
        };
        let (before, threshold, after) = within.select_nth_unstable(rank);
        let threshold = *threshold;
        let equal = |keys: &[u32]| keys.iter().filter(|key| **key == threshold).count();
        let equal_before = equal(before);
        Ok(Some(Self {
            threshold,
            rank: equal_before,
            tied: equal_before + 1 + equal(after),
            by_chunk: Some(near.iter().map(|near| equal(&near.within)).collect()),
        }))
    }
}

/// The keys of a chunk as they lie around two bounds.
struct Near {
    /// How many are below the lower one.
    below: usize,
    /// Those that are neither below the lower nor above the higher one.
    within: Vec<u32>,
    largest: u32,
}

impl Near {
    fn of<T: Copy>(chunk: &[T], key: impl Fn(T) -> u32, low: u32, high: u32) -> Self {
        let mut near = Self {
            below: 0,
            within: Vec::new(),
            largest: 0,
        };
        for block in chunk.chunks(BLOCK) {
            // Signed, for that is how processors compare several at once, and no key has the highest bit.
            let (mut below, mut above, mut largest) = (0_i32, 0_i32, 0_i32);
            for value in block {
                let key = key(*value).cast_signed();
                below += i32::from(key < low.cast_signed());
                above += i32::from(key > high.cast_signed());
                largest = largest.max(key);
            }
            near.below += below as usize;
            near.largest = near.largest.max(largest.cast_unsigned());
            if (below + above) as usize != block.len() {
                let keys = block.iter().map(|value| key(*value));
                near.within.extend(keys.filter(|key| (low..=high).contains(key)));
            }
        }
        mapping::release(chunk);
        near
    }
}

fn key_of(value: f32) -> u32 {
    value.to_bits() & MAGNITUDE_BITS
}

fn key_of_bytes(bytes: [u8; 4]) -> u32 {
    u32::from_le_bytes(bytes) & MAGNITUDE_BITS
}

/// How many of the keys that agree with `prefix` above the digit have each value of the digit, which is shifted by `shift` and has `bits`
/// bits.
fn histogram<T: Copy + Sync>(chunks: &[&[T]], key: impl Fn(T) -> u32 + Sync, prefix: u32, shift: u32, bits: u32) -> Vec<usize> {
    let above = shift + bits;
    let counts = chunks.par_iter().map(|chunk| {
        let mut counts = vec![0_usize; 1 << bits];
        for value in *chunk {
            let key = key(*value);
            if key >> above == prefix >> above {
                counts[(key >> shift) as usize & ((1 << bits) - 1)] += 1;
            }
        }
        mapping::release(chunk);
        counts
    });
    counts.reduce(
        || vec![0; 1 << bits],
        |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        },
    )
}

/// How many values of each chunk have exactly the threshold's magnitude.
fn count_ties<T: Copy + Sync>(chunks: &[&[T]], key: impl Fn(T) -> u32 + Sync, threshold: u32) -> Vec<usize> {
    let count = |chunk: &&[T]| {
        let count = chunk.iter().filter(|value| key(**value) == threshold).count();
        mapping::release(chunk);
        count
    };
    chunks.par_iter().map(count).collect()
}

/// The position of the tie that `before` ties come before; `counts` are those of each chunk.
fn nth_tie<T: Copy>(chunks: &[&[T]], key: impl Fn(T) -> u32, threshold: u32, before: usize, counts: &[usize]) -> usize {
    let (mut start, mut before) = (0, before);
    for (chunk, count) in chunks.iter().zip(counts) {
        if *count > before {
            let ties = chunk.iter().enumerate().filter(|(_, value)| key(**value) == threshold);
            return start + ties.map(|(position, _)| position).nth(before).unwrap_or_default();
        }
        before -= count;
        start += chunk.len();
    }
    start
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_smallest_go_whichever_tensor_they_are_in() {
        let (mut a, mut b) = ([3.0, -0.5, 2.0], [-4.0, 0.1]);
        prune_magnitude(&mut [&mut a, &mut b], 0.4).unwrap();
        assert_eq!((a, b), ([3.0, 0.0, 2.0], [-4.0, 0.0]));
    }

    #[test]
    fn the_number_is_rounded_half_to_even_as_python_does() {
        for (amount, zeros) in [(0.1, 0), (0.3, 2), (0.5, 2), (1.0, 5)] {
            let mut weights = [1.0, 2.0, 3.0, 4.0, 5.0];
            prune_magnitude(&mut [&mut weights], amount).unwrap();
            assert_eq!(weights.iter().filter(|weight| **weight == 0.0).count(), zeros, "{amount}");
        }
    }

    #[test]
    fn a_weight_that_is_not_finite_leaves_all_untouched() {
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let mut weights = [1.0, bad, 0.5];
            assert_eq!(prune_magnitude(&mut [&mut weights], 0.9), Err(NotFinite));
            assert_eq!((weights[0], weights[2]), (1.0, 0.5));
        }
    }

    /// The weights of `tests/parity/torch_prune.py`, full of equal magnitudes.
    fn weights(seed: u32, length: usize, levels: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let level = (state >> 16) % levels + 1;
            level as f32 / 8.0 * if state & 0x8000 == 0 { 1.0 } else { -1.0 }
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn the_mask_is_that_of_torch_also_where_magnitudes_are_equal() {
        let cases: serde_json::Value = serde_json::from_str(include_str!("../../../tests/parity/torch_prune.json")).unwrap();
        let cases = cases.as_array().unwrap();
        assert!(cases.len() >= 50);
        for case in cases {
            let number = |name: &str| case[name].as_u64().unwrap();
            let lengths: Vec<usize> = case["lengths"]
                .as_array()
                .unwrap()
                .iter()
                .map(|length| length.as_u64().unwrap() as usize)
                .collect();
            let mut all = weights(number("seed") as u32, lengths.iter().sum(), number("levels") as u32);
            match case["order"].as_str().unwrap() {
                "ascending" => all.sort_by(|a, b| a.abs().total_cmp(&b.abs())),
                "descending" => all.sort_by(|a, b| b.abs().total_cmp(&a.abs())),
                _ => {}
            }
            let mut rest = all.as_mut_slice();
            let mut tensors = Vec::new();
            for &length in &lengths {
                let (tensor, after) = rest.split_at_mut(length);
                tensors.push(tensor);
                rest = after;
            }
            prune_magnitude(&mut tensors, case["amount"].as_f64().unwrap()).unwrap();
            let mask: String = all
                .chunks(4)
                .map(|nibble| {
                    let bits = nibble
                        .iter()
                        .enumerate()
                        .map(|(bit, value)| u32::from(*value != 0.0) << bit)
                        .sum::<u32>();
                    char::from_digit(bits, 16).unwrap()
                })
                .collect();
            assert_eq!(mask, case["kept"].as_str().unwrap(), "{case}");
        }
    }

    fn cut_values(values: &mut [f32], cut: &Cut) {
        cut.apply(values, None, 0, key_of, 0.0);
    }

    #[test]
    fn beyond_the_limit_of_torchs_ties_the_earlier_stay() {
        let mut values = vec![1.0_f32; 3 * CHUNK];
        let chunks: Vec<&[f32]> = values.chunks(CHUNK).collect();
        let counts = count_ties(&chunks, key_of, key_of(1.0));
        let first = nth_tie(&chunks, key_of, key_of(1.0), 2 * CHUNK - 5, &counts);
        assert_eq!(first, 2 * CHUNK - 5);
        let cut = Cut {
            threshold: key_of(1.0),
            ties: Ties::From(first),
        };
        cut_values(&mut values, &cut);
        assert!(values[..first].iter().all(|value| *value == 1.0) && values[first..].iter().all(|value| *value == 0.0));
    }

    #[test]
    fn a_sample_finds_the_same_threshold_as_all_digits_do() {
        let length = 3 * SAMPLE + 7;
        let normal = |seed| {
            let values = weights(seed, 12 * length, 1 << 15);
            values
                .chunks_exact(12)
                .map(|twelve| twelve.iter().sum::<f32>())
                .collect::<Vec<f32>>()
        };
        let mut sorted = normal(3);
        sorted.sort_by(f32::total_cmp);
        // Of eight levels each is an eighth of all: too many to be sorted.
        for (values, is_few) in [
            (normal(1), true),
            (weights(2, length, 200), true),
            (sorted, true),
            (weights(4, length, 4), false),
        ] {
            let chunks: Vec<&[f32]> = values.chunks(CHUNK / 64).collect();
            for share in [0.0, 0.001, 0.3, 0.5, 0.99, 1.0] {
                let rank = ((share * length as f64) as usize).min(length - 1);
                let expected = Place::by_digits(&chunks, key_of, rank + 1).unwrap().unwrap();
                let by_chunk = Some(count_ties(&chunks, key_of, expected.threshold));
                let expected = is_few.then_some(Place { by_chunk, ..expected });
                assert_eq!(Place::by_sample(&chunks, key_of, length, rank).unwrap(), expected, "{share}");
            }
        }
        let mut bad = normal(5);
        bad[length / 2] = f32::NAN;
        assert_eq!(Place::by_sample(&[&bad], key_of, length, 10), Err(NotFinite));
    }

    #[test]
    fn a_sample_that_misleads_is_not_trusted() {
        let length = 2 * SAMPLE;
        // Every second value is looked at, and the others are larger.
        let values: Vec<f32> = (0..length).map(|index| (index % 2 * length + index + 1) as f32).collect();
        assert_eq!(Place::by_sample(&[&values], key_of, length, length / 4 * 3), Ok(None));
        let mut pruned = values.repeat(SAMPLED_MIN / length);
        prune_magnitude(&mut [&mut pruned], 0.75).unwrap();
        assert_eq!(pruned.iter().filter(|value| **value == 0.0).count(), pruned.len() / 4 * 3);
    }

    #[test]
    fn bytes_that_something_else_holds_stay_as_they_are() {
        let bytes: Bytes = [1.0_f32, -3.0, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        let cut = Cut {
            threshold: key_of(2.0),
            ties: Ties::All,
        };
        let pruned = cut.apply_to_bytes(bytes.clone(), 0);
        assert_eq!(bytes[..4], 1.0_f32.to_le_bytes());
        assert_eq!(pruned[..], [[0; 4], (-3.0_f32).to_le_bytes(), [0; 4]].concat());
        drop(bytes);
    }

    proptest! {
        #[test]
        fn exactly_the_share_goes_and_no_kept_weight_is_smaller_than_a_pruned_one(
            weights in proptest::collection::vec(prop_oneof![-10.0_f32..10.0, Just(1.0), Just(-1.0)], 1..300),
            amount in 0.0_f64..=1.0,
            split in 0_usize..300,
        ) {
            let mut pruned = weights.clone();
            let (first, second) = pruned.split_at_mut(split.min(weights.len()));
            prune_magnitude(&mut [first, second], amount).unwrap();
            let count = (amount * weights.len() as f64).round_ties_even() as usize;
            let gone: Vec<f32> = weights.iter().zip(&pruned).filter(|(_, after)| **after == 0.0).map(|(before, _)| before.abs()).collect();
            let kept: Vec<f32> = pruned.iter().filter(|weight| **weight != 0.0).map(|weight| weight.abs()).collect();
            prop_assert!(gone.len() >= count && gone.len() <= count.max(weights.iter().filter(|weight| **weight == 0.0).count()));
            let largest_gone = gone.iter().copied().fold(0.0, f32::max);
            prop_assert!(kept.iter().all(|kept| *kept >= largest_gone));
            prop_assert!(weights.iter().zip(&pruned).all(|(before, after)| *after == 0.0 || before == after));
        }
    }
}
