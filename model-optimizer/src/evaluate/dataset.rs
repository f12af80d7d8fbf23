//! Samples: the inputs of a model with, where they are known, their labels.

use std::collections::BTreeMap;
use std::path::Path;

use plimsoll_package::manifest::{Datatype, TensorSpec};
use plimsoll_runtime::engine::{Data, Engine, EngineError, Tensor};

use super::npz;

/// Most bytes of inputs that are run at once.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// Samples drawn where there is no data.
const DRAWN: usize = 8;
/// Size of an open dimension other than the first, where there is no data.
const DRAWN_DIMENSION: usize = 8;
/// The arrays that are labels by default.
const LABELS: [&str; 2] = ["y", "labels"];

/// Samples for one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// A tensor for each input of the model, in its order; the first axis counts samples.
    pub inputs: Vec<Tensor>,
    /// The class of each sample.
    pub labels: Option<Vec<i64>>,
    /// How many samples there are.
    pub samples: usize,
}

impl Dataset {
    /// Reads the archive at `path` for a model with `inputs`. Labels are the array `labels`, or by default `y` or `labels`.
    ///
    /// # Errors
    /// In words, where it does not fit the model.
    pub fn read(path: &Path, inputs: &[TensorSpec], labels: Option<&str>, bytes_max: u64) -> Result<Self, String> {
        Self::of(npz::read(path, bytes_max)?, inputs, labels)
    }

    fn of(mut arrays: BTreeMap<String, Tensor>, specs: &[TensorSpec], labels: Option<&str>) -> Result<Self, String> {
        let names = arrays.keys().cloned().collect::<Vec<_>>().join(", ");
        let is_input = |name: &str| specs.iter().any(|spec| spec.name == name);
        let label_array = match labels {
            Some(name) => Some(
                arrays
                    .remove(name)
                    .ok_or_else(|| format!("it holds no array `{name}` for the labels; there are {names}"))?,
            ),
            None => LABELS
                .iter()
                .find(|name| arrays.contains_key(**name) && !is_input(name))
                .and_then(|name| arrays.remove(*name)),
        };
        let mut inputs = Vec::with_capacity(specs.len());
        for spec in specs {
            let key = if arrays.contains_key(&spec.name) {
                Some(spec.name.clone())
            } else if specs.len() == 1 {
                // One input needs no name.
                if arrays.contains_key("x") {
                    Some("x".into())
                } else if arrays.len() == 1 {
                    arrays.keys().next().cloned()
                } else {
                    None
                }
            } else {
                None
            };
            let array = key.and_then(|key| arrays.remove(&key));
            let array = array.ok_or_else(|| {
                format!(
                    "it holds no array `{}` for the model's input of that name; there are {names}",
                    spec.name
                )
            })?;
            inputs.push(fitted(spec, array)?);
        }
        let samples = inputs.first().and_then(|input| input.shape().first().copied()).unwrap_or_default();
        if samples == 0 {
            return Err("it holds no sample".into());
        }
        if let Some((spec, input)) = specs.iter().zip(&inputs).find(|(_, input)| input.shape().first() != Some(&samples)) {
            return Err(format!(
                "its arrays hold different numbers of samples: {samples} and, for `{}`, {:?}",
                spec.name,
                input.shape().first()
            ));
        }
        let labels = label_array.map(|array| classes(&array, samples)).transpose()?;
        Ok(Self { inputs, labels, samples })
    }

    /// Samples drawn from the signature: floats from the standard normal distribution, integers 0 and 1, by a fixed seed.
    #[must_use]
    pub fn drawn(specs: &[TensorSpec], open_dimension: Option<usize>) -> Option<Self> {
        let mut state = 0x5eed_u64;
        let mut inputs = Vec::with_capacity(specs.len());
        let mut samples = DRAWN;
        for spec in specs {
            let size = |(axis, &size): (usize, &i64)| {
                usize::try_from(size).unwrap_or(if axis == 0 {
                    DRAWN
                } else {
                    open_dimension.unwrap_or(DRAWN_DIMENSION)
                })
            };
            let shape: Vec<usize> = spec.shape.iter().enumerate().map(size).collect();
            samples = shape.first().copied().unwrap_or(1);
            let count: usize = shape.iter().product();
            let float = matches!(spec.datatype, Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
            let values: Vec<f64> = (0..count)
                .map(|_| {
                    if float {
                        normal(&mut state)
                    } else {
                        (uniform(&mut state) * 2.0).floor()
                    }
                })
                .collect();
            inputs.push(Tensor::new(shape, Data::from_f64(spec.datatype, &values)).ok()?);
        }
        Some(Self {
            inputs,
            labels: None,
            samples,
        })
    }

    /// The samples of `range`, as one batch.
    ///
    /// # Panics
    /// Where there are not so many samples.
    #[must_use]
    pub fn batch(&self, range: std::ops::Range<usize>) -> Vec<Tensor> {
        self.inputs.iter().map(|input| rows(input, range.clone())).collect()
    }

    /// How many samples `engine` takes at once: the size of its first axis where that is fixed, otherwise as many as fit into 8 MiB.
    #[must_use]
    pub fn batch_size(&self, engine: &dyn Engine) -> usize {
        let fixed = engine
            .inputs()
            .iter()
            .filter_map(|spec| spec.shape.first())
            .find_map(|&size| usize::try_from(size).ok());
        let bytes: usize = self.inputs.iter().map(|input| input.data().len() * 8).sum();
        fixed
            .unwrap_or_else(|| (BATCH_BYTES_MAX / (bytes / self.samples).max(1)).clamp(1, self.samples))
            .max(1)
    }

    /// Runs every sample and puts the outputs of all batches together; of a model with a fixed batch the last, incomplete one is left out.
    ///
    /// # Errors
    /// Whatever the engine fails with.
    pub fn run(&self, engine: &dyn Engine, mut progress: impl FnMut(usize)) -> Result<Outputs, EngineError> {
        let size = self.batch_size(engine);
        let fixed = engine.inputs().iter().any(|spec| spec.shape.first().is_some_and(|size| *size >= 0));
        let mut outputs = Outputs {
            values: vec![Vec::new(); engine.outputs().len()],
            samples: 0,
            integers: vec![false; engine.outputs().len()],
        };
        let mut start = 0;
        while start < self.samples {
            let end = (start + size).min(self.samples);
            if fixed && end - start < size {
                break;
            }
            for (index, output) in engine.run(&self.batch(start..end))?.into_iter().enumerate() {
                outputs.integers[index] = !matches!(output.datatype(), Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
                outputs.values[index].extend(output.data().to_f64().unwrap_or_default());
            }
            start = end;
            outputs.samples = end;
            progress(end);
        }
        Ok(outputs)
    }
}

/// The outputs of a model for many samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Outputs {
    /// The values of each output, sample after sample; empty for strings.
    pub values: Vec<Vec<f64>>,
    /// Whether each output is of integers.
    pub integers: Vec<bool>,
    /// How many samples there are.
    pub samples: usize,
}

fn rows(tensor: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let count = tensor.shape()[0];
    let row = tensor.data().len() / count;
    let span = range.start * row..range.end * row;
    let data: Data = match tensor.data() {
        Data::Bool(values) => values[span].to_vec().into(),
        Data::Uint8(values) => values[span].to_vec().into(),
        Data::Uint16(values) => values[span].to_vec().into(),
        Data::Uint32(values) => values[span].to_vec().into(),
        Data::Uint64(values) => values[span].to_vec().into(),
        Data::Int8(values) => values[span].to_vec().into(),
        Data::Int16(values) => values[span].to_vec().into(),
        Data::Int32(values) => values[span].to_vec().into(),
        Data::Int64(values) => values[span].to_vec().into(),
        Data::Fp16(values) => values[span].to_vec().into(),
        Data::Bf16(values) => values[span].to_vec().into(),
        Data::Fp32(values) => values[span].to_vec().into(),
        Data::Fp64(values) => values[span].to_vec().into(),
        Data::Bytes(values) => values[span].to_vec().into(),
    };
    let shape = std::iter::once(range.len()).chain(tensor.shape()[1..].iter().copied()).collect();
    Tensor::new(shape, data).expect("whole rows of a tensor fill the shape of as many rows")
}

fn fitted(spec: &TensorSpec, array: Tensor) -> Result<Tensor, String> {
    let name = &spec.name;
    let fits = array.shape().len() == spec.shape.len()
        && array
            .shape()
            .iter()
            .zip(&spec.shape)
            .skip(1)
            .all(|(&given, &expected)| expected < 0 || usize::try_from(expected) == Ok(given));
    if spec.shape.is_empty() || !fits {
        return Err(format!(
            "the array for `{name}` has shape {:?}, the model takes {:?} (-1 is any size; the first axis counts samples)",
            array.shape(),
            spec.shape
        ));
    }
    if array.datatype() == spec.datatype {
        return Ok(array);
    }
    let is_float = |kind| matches!(kind, Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
    let convertible =
        (is_float(array.datatype()) == is_float(spec.datatype) || is_float(spec.datatype)) && spec.datatype != Datatype::Bytes;
    match array.data().to_f64().filter(|_| convertible) {
        Some(values) => {
            let converted = Data::from_f64(spec.datatype, &values);
            Tensor::new(array.shape().to_vec(), converted).map_err(|error| error.to_string())
        }
        None => Err(format!(
            "the array for `{name}` is of type {}, the model takes {}",
            array.datatype(),
            spec.datatype
        )),
    }
}

fn classes(array: &Tensor, samples: usize) -> Result<Vec<i64>, String> {
    let column = match array.shape() {
        [count] | [count, 1] => *count == samples,
        _ => false,
    };
    if !column {
        return Err(format!(
            "the labels have shape {:?}; write one class number for each of the {samples} samples",
            array.shape()
        ));
    }
    let values = array.data().to_f64().unwrap_or_default();
    if values.iter().any(|value| value.fract() != 0.0) {
        return Err("the labels are no whole numbers, so they name no classes".into());
    }
    Ok(values.into_iter().map(|value| value as i64).collect())
}

/// Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators": SplitMix64; a number in `0.0..1.0`.
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Box and Muller 1958: a number of the standard normal distribution.
fn normal(state: &mut u64) -> f64 {
    let radius = (-2.0 * (1.0 - uniform(state)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(state)).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, datatype: Datatype, shape: &[i64]) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            datatype,
            shape: shape.to_vec(),
        }
    }

    fn arrays(entries: Vec<(&str, Tensor)>) -> BTreeMap<String, Tensor> {
        entries.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
    }

    fn floats(shape: &[usize]) -> Tensor {
        Tensor::new(shape.to_vec(), vec![0.5_f32; shape.iter().product()]).unwrap()
    }

    #[test]
    fn one_input_needs_no_name_and_labels_are_found() {
        let image = [spec("image", Datatype::Fp32, &[-1, 2])];
        let labels = || Tensor::new(vec![3], vec![1_i64, 0, 2]).unwrap();
        for name in ["image", "x", "pixels"] {
            let dataset = Dataset::of(arrays(vec![(name, floats(&[3, 2])), ("y", labels())]), &image, None).unwrap();
            assert_eq!((dataset.samples, dataset.labels), (3, Some(vec![1, 0, 2])), "{name}");
        }
        let named = arrays(vec![("image", floats(&[3, 2])), ("target", labels())]);
        assert_eq!(Dataset::of(named, &image, Some("target")).unwrap().labels, Some(vec![1, 0, 2]));
    }

    #[test]
    fn data_that_does_not_fit_is_refused_with_what_it_should_be() {
        let image = [spec("image", Datatype::Int32, &[-1, 2])];
        let refusal = |entries, labels| Dataset::of(arrays(entries), &image, labels).unwrap_err();
        assert!(refusal(vec![("image", floats(&[3, 4]))], None).contains("has shape [3, 4], the model takes [-1, 2]"));
        assert!(refusal(vec![("image", floats(&[3, 2]))], None).contains("is of type FP32, the model takes INT32"));
        assert!(refusal(vec![("a", floats(&[3, 2])), ("b", floats(&[3, 2]))], None).contains("no array `image`"));
        assert!(refusal(vec![("image", floats(&[3, 2]))], Some("z")).contains("no array `z`"));
        let empty = Tensor::new(vec![0, 2], Vec::<i32>::new()).unwrap();
        assert!(refusal(vec![("image", empty)], None).contains("no sample"));
    }

    #[test]
    fn drawn_samples_are_the_same_every_time() {
        let specs = [spec("a", Datatype::Fp32, &[-1, -1, 3]), spec("b", Datatype::Int64, &[-1, 4])];
        let drawn = Dataset::drawn(&specs, None).unwrap();
        assert_eq!(drawn, Dataset::drawn(&specs, None).unwrap());
        assert_eq!(drawn.inputs[0].shape(), [8, 8, 3]);
        assert!(
            drawn.inputs[1]
                .data()
                .to_f64()
                .unwrap()
                .iter()
                .all(|value| [0.0, 1.0].contains(value))
        );
    }
}
