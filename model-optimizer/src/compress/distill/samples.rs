//! The training data: which samples come when, as both the teacher and the model in training take them.

use candle_core::Device;
use plimsoll_package::manifest::Datatype;
use plimsoll_runtime::engine::Tensor;

use super::forward::Place;
use crate::evaluate::dataset::Dataset;
use crate::failure::{Failure, FailureReason, failure};

/// The seed of every order of samples.
pub(super) const SEED: u64 = 2015;

/// A batch.
pub(super) struct Batch {
    /// For an engine.
    pub(super) given: Vec<Tensor>,
    /// The same for candle: floats on the device that trains, all else as integers in main memory.
    pub(super) tensors: Vec<candle_core::Tensor>,
}

/// The samples of those indices, in their order.
pub(super) fn batch(samples: &Dataset, indices: &[usize], place: &Place) -> Result<Batch, Failure> {
    let unfit = |why: String| {
        failure(
            FailureReason::InvalidDataset,
            format!("the training data cannot be trained on: {why}"),
        )
    };
    let given = samples.gather(indices)?;
    let tensors = given
        .iter()
        .map(|tensor| to_candle(tensor, place).map_err(unfit))
        .collect::<Result<_, _>>()?;
    Ok(Batch { given, tensors })
}

fn to_candle(tensor: &Tensor, place: &Place) -> Result<candle_core::Tensor, String> {
    let values = tensor.data().to_f64().ok_or("an input holds strings")?;
    let shape = tensor.shape();
    let made = match tensor.datatype() {
        Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64 => candle_core::Tensor::from_slice(&values, shape, &Device::Cpu)
            .and_then(|floats| floats.to_dtype(place.dtype)?.to_device(&place.device)),
        Datatype::Bool => {
            let flags: Vec<u8> = values.iter().map(|value| u8::from(*value != 0.0)).collect();
            candle_core::Tensor::from_vec(flags, shape, &Device::Cpu)
        }
        _ => {
            let integers: Vec<i64> = values.iter().map(|value| *value as i64).collect();
            candle_core::Tensor::from_vec(integers, shape, &Device::Cpu)
        }
    };
    made.map_err(|error| error.to_string())
}

/// Puts `indices` in the order that `seed` gives (Fisher and Yates, with the numbers of Steele, Lea and Flood's SplitMix64).
pub(super) fn shuffle(indices: &mut [usize], seed: u64) {
    let mut state = seed;
    for last in (1..indices.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        indices.swap(last, (mixed % (last as u64 + 1)) as usize);
    }
}

/// The samples to train on and those that are held out: a tenth, but whole batches of `unit`, and at least one. Where there are not
/// two batches, both are all samples.
pub(super) fn split(count: usize, unit: usize) -> (Vec<usize>, Vec<usize>) {
    let mut order: Vec<usize> = (0..count).collect();
    shuffle(&mut order, SEED);
    if count < 2 * unit {
        order.truncate(count / unit * unit);
        return (order.clone(), order);
    }
    let held_out = (count / 10 / unit).max(1) * unit;
    let training = order.split_off(held_out);
    (training, order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_is_held_out_and_no_sample_is_in_both() {
        let (training, held_out) = split(105, 1);
        assert_eq!((training.len(), held_out.len()), (95, 10));
        let mut all = [training, held_out].concat();
        assert_ne!(all, (0..105).collect::<Vec<_>>(), "they are in no order");
        all.sort_unstable();
        assert_eq!(all, (0..105).collect::<Vec<_>>());
        // Of a model that takes four at once, four are held out.
        let (training, held_out) = split(19, 4);
        assert_eq!((training.len(), held_out.len()), (15, 4));
        assert_eq!(split(1, 1), (vec![0], vec![0]));
        assert_eq!(split(3, 4), (vec![], vec![]));
    }

    #[test]
    fn the_same_seed_gives_the_same_order() {
        let order = |seed| {
            let mut order: Vec<usize> = (0..50).collect();
            shuffle(&mut order, seed);
            order
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }
}
