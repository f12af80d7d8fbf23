//! How the fields of a dataset and their shapes fit the inputs of a model.

use plimsoll_package::manifest::{Datatype, TensorSpec};

use super::LABELS;

/// How a sample becomes an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Feed {
    /// Samples are rows of the input's first axis.
    Row,
    /// A sample is the whole input, so that the model is run on one at a time.
    Whole,
    /// One row holds for every sample.
    Repeated,
    /// One tensor holds for every run, however many samples it has.
    Constant,
}

/// Which fields of a record feed which inputs, and which are labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// For each input the indices of its fields.
    pub(super) inputs: Vec<Vec<usize>>,
    /// The index of the labels' field.
    pub(super) labels: Option<usize>,
}

impl Plan {
    /// Finds the inputs among the fields `names`: by their own name, as `NAME_0`, `NAME_1`, ..., and of a model with one input as `x` or,
    /// where `several`, as all fields in their order; otherwise as the only one. `what` is what a field is called (`array`, `column`).
    pub(super) fn of(names: &[&str], specs: &[TensorSpec], labels: Option<&str>, several: bool, what: &str) -> Result<Self, String> {
        let find = |name: &str| names.iter().position(|found| *found == name);
        let there = || {
            let (few, rest) = names.split_at(names.len().min(16));
            let more = if rest.is_empty() {
                String::new()
            } else {
                format!(" and {} more", rest.len())
            };
            format!("there are {}{more}", few.join(", "))
        };
        let is_input = |name: &str| specs.iter().any(|spec| spec.name == name);
        let labels = match labels {
            Some(name) => {
                let found = find(name);
                Some(found.ok_or_else(|| format!("it holds no {what} `{name}` for the labels; {}", there()))?)
            }
            None => LABELS.iter().filter(|name| !is_input(name)).find_map(|name| find(name)),
        };
        let fields = |spec: &TensorSpec| -> Option<Vec<usize>> {
            if let Some(index) = find(&spec.name).filter(|index| Some(*index) != labels) {
                return Some(vec![index]);
            }
            let numbered: Vec<usize> = (0..names.len())
                .map_while(|index| find(&format!("{}_{index}", spec.name)))
                .collect();
            if !numbered.is_empty() {
                return Some(numbered);
            }
            if specs.len() > 1 {
                return None;
            }
            // One input needs no name.
            if let Some(index) = find("x").filter(|index| Some(*index) != labels) {
                return Some(vec![index]);
            }
            let others: Vec<usize> = (0..names.len()).filter(|index| Some(*index) != labels).collect();
            (others.len() == 1 || several && !others.is_empty()).then_some(others)
        };
        let found = specs.iter().map(|spec| {
            fields(spec).ok_or_else(|| format!("it holds no {what} `{}` for the model's input of that name; {}", spec.name, there()))
        });
        Ok(Self {
            inputs: found.collect::<Result<_, _>>()?,
            labels,
        })
    }
}

/// How a sample of shape `given` feeds `spec`, and the shape that it then has: the given one, the same without a leading batch dimension
/// of 1, or, of a flat list of numbers, whichever the input takes.
pub(super) fn sample(spec: &TensorSpec, given: &[usize]) -> Result<(Feed, Vec<usize>), String> {
    let fits = |given: &[usize], expected: &[i64]| {
        given.len() == expected.len()
            && given
                .iter()
                .zip(expected)
                .all(|(&given, &expected)| expected < 0 || usize::try_from(expected) == Ok(given))
    };
    let Some((first, rest)) = spec.shape.split_first() else {
        return if given.iter().product::<usize>() == 1 {
            Ok((Feed::Whole, vec![]))
        } else {
            Err(unfit(spec, given))
        };
    };
    if fits(given, rest) {
        return Ok((Feed::Row, given.to_vec()));
    }
    if fits(given, &spec.shape) {
        return Ok(if given[0] == 1 && *first <= 1 {
            (Feed::Row, given[1..].to_vec())
        } else {
            (Feed::Whole, given.to_vec())
        });
    }
    if given.len() <= 1 {
        let count = given.iter().product::<usize>();
        let known: usize = rest.iter().filter_map(|size| usize::try_from(*size).ok()).product();
        let open = rest.iter().filter(|size| **size < 0).count();
        if open == 0 && known == count || open == 1 && known > 0 && count % known == 0 {
            let shape = rest
                .iter()
                .map(|size| usize::try_from(*size).unwrap_or(count / known.max(1)))
                .collect();
            return Ok((Feed::Row, shape));
        }
    }
    Err(unfit(spec, given))
}

fn unfit(spec: &TensorSpec, given: &[usize]) -> String {
    format!(
        "a sample for `{}` has shape {given:?}, the model takes {:?} (-1 is any size; the first axis counts samples)",
        spec.name, spec.shape
    )
}

/// Whether values of type `given` become an input's without loss of meaning.
pub(super) fn check_type(spec: &TensorSpec, given: Datatype) -> Result<(), String> {
    let is_float = |kind| matches!(kind, Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
    let is_text = |kind| kind == Datatype::Bytes;
    if is_text(given) == is_text(spec.datatype) && (!is_float(given) || is_float(spec.datatype)) {
        return Ok(());
    }
    Err(format!(
        "the values for `{}` are of type {given}, the model takes {}",
        spec.name, spec.datatype
    ))
}
