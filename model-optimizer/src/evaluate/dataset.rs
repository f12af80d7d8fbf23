//! Samples: the inputs of a model with, where they are known, their labels.
//!
//! A dataset's form is told by its content, never by its name. Whatever its form, its samples lie as rows in a file (the dataset itself,
//! where its rows can be read in place), so that memory holds a batch, not the data.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use plimsoll_package::manifest::{Datatype, TensorSpec};
use plimsoll_runtime::engine::{Data, Tensor};

use crate::failure::{Failure, FailureReason, failure};

mod archive;
mod csv;
mod fit;
mod format;
mod images;
mod json_lines;
mod npz;
mod parquet;
mod rows;

use fit::Feed;

/// Most bytes of inputs that are run at once.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// Most samples that are run at once: what a model holds inside grows with them.
const BATCH_SAMPLES_MAX: usize = 32;
/// Samples drawn where there is no data.
const DRAWN: usize = 8;
/// The seed of drawn samples.
pub const DRAWN_SEED: u64 = 0x5eed;
/// The seed by which one dataset is split into two.
pub const SPLIT_SEED: u64 = 0x5911;
/// Most values that are drawn for one input.
const DRAWN_VALUES_MAX: usize = 1 << 28;
/// The fields that are labels by default.
const LABELS: [&str; 3] = ["y", "label", "labels"];

/// Samples for one model.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// One for each input of the model, in its order.
    columns: Vec<Column>,
    /// The label of each sample, or several numbers for each.
    labels: Option<Vec<f64>>,
    samples: usize,
    /// How many samples the model takes at once, where it takes no other number.
    fixed_batch: Option<usize>,
    /// The samples in use, where they are not all; sorted.
    chosen: Option<Arc<[usize]>>,
}

/// The samples of one input.
#[derive(Debug, Clone)]
struct Column {
    values: Values,
    /// Of one sample as the model is fed with it, without the axis that counts samples.
    shape: Vec<usize>,
    /// What the model takes.
    datatype: Datatype,
    feed: Feed,
}

#[derive(Debug, Clone)]
enum Values {
    Held(Data),
    /// Little-endian, one sample after another.
    Stored {
        file: Arc<File>,
        offset: u64,
        datatype: Datatype,
    },
}

/// What a sample is used for, where one dataset is given for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What techniques may look at: a quarter of the samples.
    Calibration,
    /// What the model is judged on: all other samples.
    Evaluation,
}

impl Dataset {
    /// Reads the dataset at `path` for a model with `inputs`: a NumPy archive (`.npz`), CSV with a header, Parquet, JSON lines, or an archive
    /// (`.zip`, `.tar`) of images with a `labels.csv`. Labels are the field `labels`, or by default `y`, `label` or `labels`.
    /// `bytes_max` bounds what is unpacked.
    ///
    /// # Errors
    /// In words, where it cannot be read or does not fit the model.
    pub fn read(path: &Path, inputs: &[TensorSpec], labels: Option<&str>, bytes_max: u64) -> Result<Self, String> {
        format::read(path, inputs, labels, bytes_max)
    }

    /// Of columns that hold `samples` samples each.
    fn of(columns: Vec<Column>, specs: &[TensorSpec], labels: Option<Vec<f64>>, samples: usize) -> Result<Self, String> {
        if samples == 0 {
            return Err("it holds no sample".into());
        }
        let mut fixed_batch = None;
        for (column, spec) in columns.iter().zip(specs) {
            let takes = match column.feed {
                Feed::Row => spec.shape.first().and_then(|size| usize::try_from(*size).ok()),
                Feed::Whole => Some(1),
                Feed::Repeated | Feed::Constant => None,
            };
            match (fixed_batch, takes) {
                (Some(one), Some(other)) if one != other => {
                    return Err(format!(
                        "input `{}` takes {other} samples at once and another input takes {one}; give each sample the whole shape {:?}",
                        spec.name, spec.shape
                    ));
                }
                _ => fixed_batch = fixed_batch.or(takes),
            }
        }
        if let Some(takes) = fixed_batch.filter(|takes| *takes > samples || *takes == 0) {
            return Err(format!(
                "the model takes {takes} samples at once, and it holds {samples}; add samples, or export the model with an open batch dimension"
            ));
        }
        Ok(Self {
            columns,
            labels,
            samples,
            fixed_batch,
            chosen: None,
        })
    }

    /// Of one tensor for each input, whose first axis counts samples.
    ///
    /// # Errors
    /// In words, where a tensor does not fit its input or the tensors differ in their number of samples.
    pub fn of_tensors(tensors: Vec<Tensor>, specs: &[TensorSpec], labels: Option<Vec<f64>>) -> Result<Self, String> {
        let samples = tensors
            .first()
            .and_then(|tensor| tensor.shape().first().copied())
            .unwrap_or_default();
        let mut columns = Vec::with_capacity(tensors.len());
        for (spec, tensor) in specs.iter().zip(tensors) {
            if tensor.shape().first() != Some(&samples) {
                return Err(format!("the tensor for `{}` does not hold {samples} samples", spec.name));
            }
            let (feed, shape) = fit::sample(spec, &tensor.shape()[1..])?;
            fit::check_type(spec, tensor.datatype())?;
            columns.push(Column {
                values: Values::Held(tensor.into_data()),
                shape,
                datatype: spec.datatype,
                feed,
            });
        }
        Self::of(columns, specs, labels, samples)
    }

    /// Eight samples drawn from the signature, floats from the standard normal distribution, integers 0 and 1, by a fixed seed; a model of a
    /// larger fixed batch gets one batch. `open_dimension` is the size of an open dimension other than the first. Where `whole`, no axis
    /// counts samples: each of them is all inputs in full, an open first dimension being 1. `None` where that is larger than memory, or
    /// the inputs' first axes contradict each other.
    #[must_use]
    pub fn drawn(specs: &[TensorSpec], open_dimension: usize, whole: bool) -> Option<Self> {
        let mut random = Random(DRAWN_SEED);
        let largest_batch = specs.iter().filter_map(|spec| usize::try_from(*spec.shape.first()?).ok()).max();
        let samples = if whole { DRAWN } else { largest_batch.unwrap_or(1).max(DRAWN) };
        let mut columns = Vec::with_capacity(specs.len());
        for spec in specs {
            let size = |(axis, &size): (usize, &i64)| usize::try_from(size).unwrap_or(if axis == 0 { 1 } else { open_dimension });
            let mut shape: Vec<usize> = spec.shape.iter().enumerate().map(size).collect();
            let feed = if whole {
                Feed::Whole
            } else if shape.is_empty() {
                Feed::Constant
            } else {
                shape.remove(0);
                Feed::Row
            };
            let count = shape.iter().try_fold(samples, |count, &size| count.checked_mul(size));
            let count = count.filter(|count| *count <= DRAWN_VALUES_MAX)?;
            let float = matches!(spec.datatype, Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
            let values: Vec<f64> = (0..count)
                .map(|_| if float { random.normal() } else { (random.uniform() * 2.0).floor() })
                .collect();
            columns.push(Column {
                values: Values::Held(Data::from_f64(spec.datatype, &values)),
                shape,
                datatype: spec.datatype,
                feed,
            });
        }
        Self::of(columns, specs, None, samples).ok()
    }

    /// Drawn samples in every form that a model may take them, the likeliest first: an open dimension that is no batch may have to be of a
    /// certain size, 1 being the likeliest, and the first axis may count no samples.
    pub fn drawn_forms(specs: &[TensorSpec]) -> impl Iterator<Item = Self> {
        let forms = [(8, false), (1, false), (8, true), (1, true)];
        forms
            .into_iter()
            .filter_map(|(open_dimension, whole)| Self::drawn(specs, open_dimension, whole))
    }

    /// How many samples there are.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.chosen.as_ref().map_or(self.samples, |chosen| chosen.len())
    }

    /// The labels, sample after sample, the same number of them for each.
    #[must_use]
    pub fn labels(&self) -> Option<&[f64]> {
        self.labels.as_deref()
    }

    /// The ranges of samples that are run at once: as many as the model takes where that is fixed (a last, incomplete batch is left out),
    /// otherwise at most 32 samples and 8 MiB.
    pub fn batches(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        self.batches_from(0, BATCH_SAMPLES_MAX)
    }

    /// The same from sample `start` on, of at most `samples_max` samples unless the model takes a fixed number.
    pub fn batches_from(&self, start: usize, samples_max: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let bytes: usize = self.columns.iter().map(Column::sample_bytes).sum();
        let size = self
            .fixed_batch
            .unwrap_or_else(|| (BATCH_BYTES_MAX / bytes.max(1)).clamp(1, BATCH_SAMPLES_MAX.min(samples_max)));
        let samples = self.samples();
        let last = if self.fixed_batch.is_some() {
            samples / size * size
        } else {
            samples
        };
        (start..last).step_by(size).map(move |start| start..(start + size).min(last))
    }

    /// The samples of `range`, as one batch: a tensor for each input of the model.
    ///
    /// # Errors
    /// [`FailureReason::Internal`] where the disk does not give them, or there are not so many.
    pub fn batch(&self, range: Range<usize>) -> Result<Vec<Tensor>, Failure> {
        match &self.chosen {
            Some(_) => self.gather(&range.collect::<Vec<_>>()),
            None => self.tensors(std::slice::from_ref(&range), range.len()),
        }
    }

    /// The samples of those indices, in their order, as one batch.
    ///
    /// # Errors
    /// As [`batch`](Self::batch).
    pub fn gather(&self, indices: &[usize]) -> Result<Vec<Tensor>, Failure> {
        let place = |index: &usize| match &self.chosen {
            Some(chosen) => chosen.get(*index).copied().unwrap_or(usize::MAX),
            None => *index,
        };
        let places: Vec<usize> = indices.iter().map(place).collect();
        // Neighbours are read together.
        let runs: Vec<Range<usize>> = places
            .chunk_by(|one, next| one.checked_add(1) == Some(*next))
            .map(|run| run[0]..run[0].saturating_add(run.len()))
            .collect();
        self.tensors(&runs, indices.len())
    }

    fn tensors(&self, runs: &[Range<usize>], samples: usize) -> Result<Vec<Tensor>, Failure> {
        let unreadable = |why: String| {
            failure(
                FailureReason::Internal,
                format!("cannot read samples {runs:?} of the dataset: {why}"),
            )
        };
        if samples == 0 || runs.iter().any(|run| run.end > self.samples) {
            return Err(unreadable(format!("it holds {}", self.samples)));
        }
        self.columns
            .iter()
            .map(|column| column.tensor(runs, samples).map_err(unreadable))
            .collect()
    }

    /// One sample, or as many as a model of a fixed batch takes.
    ///
    /// # Errors
    /// As [`batch`](Self::batch).
    pub fn first(&self) -> Result<Vec<Tensor>, Failure> {
        self.batch(0..self.fixed_batch.unwrap_or(1))
    }

    /// The samples of one part; the two parts of a dataset share none. `seed` decides which sample falls into which.
    ///
    /// # Errors
    /// In words, where there are too few samples for two parts.
    pub fn split(self, part: Part, seed: u64) -> Result<Self, String> {
        let count = self.samples();
        let calibration = (count / 4).max(self.fixed_batch.unwrap_or(1));
        if count - calibration.min(count) < self.fixed_batch.unwrap_or(1) {
            return Err(format!(
                "it holds {count} samples, too few to calibrate on some and judge on others; name two datasets"
            ));
        }
        let mut order = shuffled(count, seed);
        let judged = order.split_off(calibration);
        Ok(self.choose(match part {
            Part::Calibration => order,
            Part::Evaluation => judged,
        }))
    }

    /// At most `samples_max` of the samples, but as many as the model takes at once; `seed` decides which.
    #[must_use]
    pub fn subset(self, samples_max: usize, seed: u64) -> Self {
        let mut order = shuffled(self.samples(), seed);
        order.truncate(samples_max.max(self.fixed_batch.unwrap_or(1)));
        self.choose(order)
    }

    /// The samples of these indices.
    fn choose(mut self, mut chosen: Vec<usize>) -> Self {
        chosen.sort_unstable();
        let count = self.samples();
        self.labels = self.labels.map(|labels| {
            let width = labels.len() / count;
            chosen
                .iter()
                .flat_map(|sample| &labels[sample * width..][..width])
                .copied()
                .collect()
        });
        if let Some(before) = &self.chosen {
            chosen.iter_mut().for_each(|sample| *sample = before[*sample]);
        }
        self.chosen = Some(chosen.into());
        self
    }
}

/// The numbers below `count`, shuffled (Fisher and Yates).
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let mut random = Random(seed);
    for last in (1..count).rev() {
        order.swap(last, (random.uniform() * (last + 1) as f64) as usize);
    }
    order
}

impl Column {
    fn sample_values(&self) -> usize {
        self.shape.iter().product()
    }

    fn sample_bytes(&self) -> usize {
        // What a string takes is known when it is read.
        self.sample_values() * size_of_type(self.datatype).unwrap_or(64)
    }

    fn tensor(&self, runs: &[Range<usize>], samples: usize) -> Result<Tensor, String> {
        let width = self.sample_values();
        let data = match (&self.values, self.feed) {
            (Values::Held(data), Feed::Constant) => rows(data, std::slice::from_ref(&(0..width))),
            (Values::Held(data), Feed::Repeated) => rows(data, &vec![0..width; samples]),
            (Values::Held(data), _) => {
                let spans: Vec<Range<usize>> = runs.iter().map(|run| run.start * width..run.end * width).collect();
                rows(data, &spans)
            }
            (Values::Stored { file, offset, datatype }, _) => {
                let size = width * size_of_type(*datatype).unwrap_or_default();
                let mut bytes = vec![0; size * runs.iter().map(Range::len).sum::<usize>()];
                let mut filled = 0;
                for run in runs {
                    let length = size * run.len();
                    let place = offset + (run.start * size) as u64;
                    file.read_exact_at(&mut bytes[filled..filled + length], place)
                        .map_err(|error| error.to_string())?;
                    filled += length;
                }
                decode(*datatype, &bytes)
            }
        };
        let data = if data.datatype() == self.datatype {
            data
        } else {
            Data::from_f64(self.datatype, &data.to_f64().unwrap_or_default())
        };
        let shape = match self.feed {
            Feed::Row | Feed::Repeated => std::iter::once(samples).chain(self.shape.iter().copied()).collect(),
            Feed::Whole | Feed::Constant => self.shape.clone(),
        };
        Tensor::new(shape, data).map_err(|error| error.to_string())
    }
}

/// The values of `spans`, one after another.
fn rows(data: &Data, spans: &[Range<usize>]) -> Data {
    macro_rules! rows {
        ($($name:ident),*) => {
            match data { $(Data::$name(values) => Data::$name(spans.iter().flat_map(|span| values[span.clone()].iter().cloned()).collect())),* }
        };
    }
    rows!(
        Bool, Uint8, Uint16, Uint32, Uint64, Int8, Int16, Int32, Int64, Fp16, Bf16, Fp32, Fp64, Bytes
    )
}

/// The bytes of one value; `None` for strings.
fn size_of_type(datatype: Datatype) -> Option<usize> {
    Some(match datatype {
        Datatype::Bool | Datatype::Uint8 | Datatype::Int8 => 1,
        Datatype::Uint16 | Datatype::Int16 | Datatype::Fp16 | Datatype::Bf16 => 2,
        Datatype::Uint32 | Datatype::Int32 | Datatype::Fp32 => 4,
        Datatype::Uint64 | Datatype::Int64 | Datatype::Fp64 => 8,
        Datatype::Bytes => return None,
    })
}

/// Little-endian values.
fn decode(datatype: Datatype, bytes: &[u8]) -> Data {
    macro_rules! decode {
        ($type:ty) => {{
            let (values, _) = bytes.as_chunks::<{ size_of::<$type>() }>();
            values
                .iter()
                .map(|value| <$type>::from_le_bytes(*value))
                .collect::<Vec<$type>>()
                .into()
        }};
    }
    match datatype {
        Datatype::Bool => Data::Bool(bytes.iter().map(|byte| *byte != 0).collect()),
        Datatype::Uint8 => Data::Uint8(bytes.to_vec()),
        Datatype::Uint16 => decode!(u16),
        Datatype::Uint32 => decode!(u32),
        Datatype::Uint64 => decode!(u64),
        Datatype::Int8 => decode!(i8),
        Datatype::Int16 => decode!(i16),
        Datatype::Int32 => decode!(i32),
        Datatype::Int64 => decode!(i64),
        Datatype::Fp16 => decode!(f16),
        Datatype::Bf16 => decode!(bf16),
        Datatype::Fp32 => decode!(f32),
        Datatype::Fp64 => decode!(f64),
        Datatype::Bytes => Data::Bytes(vec![]),
    }
}

/// The values as little-endian bytes; nothing of strings.
fn encode(data: &Data) -> Vec<u8> {
    macro_rules! encode {
        ($values:expr) => {
            $values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
    }
    match data {
        Data::Bool(values) => values.iter().map(|&value| u8::from(value)).collect(),
        Data::Uint8(values) => values.clone(),
        Data::Uint16(values) => encode!(values),
        Data::Uint32(values) => encode!(values),
        Data::Uint64(values) => encode!(values),
        Data::Int8(values) => encode!(values),
        Data::Int16(values) => encode!(values),
        Data::Int32(values) => encode!(values),
        Data::Int64(values) => encode!(values),
        Data::Fp16(values) => encode!(values),
        Data::Bf16(values) => encode!(values),
        Data::Fp32(values) => encode!(values),
        Data::Fp64(values) => encode!(values),
        Data::Bytes(_) => vec![],
    }
}

/// Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators": SplitMix64.
struct Random(u64);

impl Random {
    /// A number in `0.0..1.0`.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Box and Muller 1958: a number of the standard normal distribution.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests;
