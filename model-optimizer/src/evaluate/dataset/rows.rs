//! Samples that come one after another, laid down as rows of a file.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::Arc;

use plimsoll_package::manifest::{Datatype, TensorSpec};
use plimsoll_runtime::engine::Data;

use super::fit::{self, Feed, Plan};
use super::format::{Request, too_large};
use super::{Column, Dataset, Values, encode};

/// What one field of a sample holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Numbers in row-major order.
    Numbers { shape: Vec<usize>, values: Vec<f64> },
    /// Texts in row-major order.
    Texts { shape: Vec<usize>, values: Vec<Vec<u8>> },
}

impl Value {
    pub(super) fn number(value: f64) -> Self {
        Self::Numbers {
            shape: vec![],
            values: vec![value],
        }
    }

    pub(super) fn text(value: Vec<u8>) -> Self {
        Self::Texts {
            shape: vec![],
            values: vec![value],
        }
    }
}

/// Takes samples one after another.
pub(super) struct Rows<'a> {
    request: &'a Request<'a>,
    plan: Plan,
    columns: Vec<RowColumn>,
    labels: Vec<f64>,
    label_width: usize,
    samples: usize,
    bytes: u64,
}

struct RowColumn {
    /// Known from the first sample.
    fitted: Option<(Feed, Vec<usize>)>,
    given: Vec<usize>,
    kept: Kept,
}

enum Kept {
    Numbers(BufWriter<File>),
    Texts(Vec<Vec<u8>>),
}

impl<'a> Rows<'a> {
    /// For samples with the fields `names`, each called a `what`.
    pub(super) fn of(request: &'a Request<'a>, names: &[&str], what: &str) -> Result<Self, String> {
        let plan = Plan::of(names, request.specs, request.labels, true, what)?;
        let column = |spec: &TensorSpec| -> Result<RowColumn, String> {
            let kept = if spec.datatype == Datatype::Bytes {
                Kept::Texts(vec![])
            } else {
                Kept::Numbers(BufWriter::new(unnamed_file(request.path)?))
            };
            Ok(RowColumn {
                fitted: None,
                given: vec![],
                kept,
            })
        };
        Ok(Self {
            columns: request.specs.iter().map(column).collect::<Result<_, _>>()?,
            request,
            plan,
            labels: vec![],
            label_width: 0,
            samples: 0,
            bytes: 0,
        })
    }

    /// The indices of the fields that are read.
    pub(super) fn used(&self) -> impl Iterator<Item = usize> {
        self.plan.inputs.iter().flatten().copied().chain(self.plan.labels)
    }

    /// Takes one sample; `fields` are asked for by their index.
    pub(super) fn push<'v>(&mut self, field: impl Fn(usize) -> Option<&'v Value>) -> Result<(), String> {
        let row = self.samples + 1;
        for ((column, spec), fields) in self.columns.iter_mut().zip(self.request.specs).zip(&self.plan.inputs) {
            let values = fields.iter().map(|index| field(*index)).collect::<Option<Vec<_>>>();
            let values = values.ok_or_else(|| format!("sample {row} has no value for `{}`", spec.name))?;
            self.bytes += column.push(spec, &values, row)?;
        }
        if let Some(index) = self.plan.labels {
            let numbers = match field(index) {
                Some(Value::Numbers { values, .. }) => values,
                Some(Value::Texts { values, .. }) => {
                    let text = values
                        .first()
                        .map(|text| String::from_utf8_lossy(text).into_owned())
                        .unwrap_or_default();
                    return Err(format!(
                        "the label of sample {row} is `{text}`; write the number of the class, or the value"
                    ));
                }
                None => return Err(format!("sample {row} has no label")),
            };
            if self.samples == 0 {
                self.label_width = numbers.len();
            }
            if numbers.len() != self.label_width || numbers.is_empty() {
                return Err(format!(
                    "sample {row} has {} labels and the first sample has {}",
                    numbers.len(),
                    self.label_width
                ));
            }
            self.labels.extend(numbers);
            self.bytes += 8 * numbers.len() as u64;
        }
        self.samples = row;
        if self.bytes > self.request.bytes_max {
            return Err(too_large(self.request.bytes_max));
        }
        Ok(())
    }

    /// All samples that were taken.
    pub(super) fn finish(self) -> Result<Dataset, String> {
        let mut columns = Vec::with_capacity(self.columns.len());
        for (column, spec) in self.columns.into_iter().zip(self.request.specs) {
            let Some((feed, shape)) = column.fitted else {
                return Err("it holds no sample".into());
            };
            let values = match column.kept {
                Kept::Texts(texts) => Values::Held(Data::Bytes(texts)),
                Kept::Numbers(file) => Values::Stored {
                    file: Arc::new(file.into_inner().map_err(|error| error.to_string())?),
                    offset: 0,
                    datatype: spec.datatype,
                },
            };
            columns.push(Column {
                values,
                shape,
                datatype: spec.datatype,
                feed,
            });
        }
        Dataset::of(columns, self.request.specs, self.plan.labels.map(|_| self.labels), self.samples)
    }
}

impl RowColumn {
    /// Takes the fields of one sample; returns their bytes.
    fn push(&mut self, spec: &TensorSpec, fields: &[&Value], row: usize) -> Result<u64, String> {
        let count = |value: &Value| match value {
            Value::Numbers { values, .. } => values.len(),
            Value::Texts { values, .. } => values.len(),
        };
        let given = match fields {
            [Value::Numbers { shape, .. } | Value::Texts { shape, .. }] => shape.clone(),
            several => vec![several.iter().map(|value| count(value)).sum()],
        };
        if self.fitted.is_none() {
            self.fitted = Some(fit::sample(spec, &given)?);
            self.given = given;
        } else if given != self.given {
            return Err(format!(
                "sample {row} has shape {given:?} for `{}` and the first sample has {:?}; pad them to one shape",
                spec.name, self.given
            ));
        }
        let mut bytes = 0;
        for value in fields {
            match (&mut self.kept, value) {
                (Kept::Numbers(file), Value::Numbers { values, .. }) => {
                    let encoded = encode(&converted(spec, values, row)?);
                    bytes += encoded.len() as u64;
                    file.write_all(&encoded)
                        .map_err(|error| format!("cannot lay down its samples: {error}"))?;
                }
                (Kept::Texts(texts), Value::Texts { values, .. }) => {
                    bytes += values
                        .iter()
                        .map(|text| text.len() as u64 + size_of::<Vec<u8>>() as u64)
                        .sum::<u64>();
                    texts.extend(values.iter().cloned());
                }
                (Kept::Texts(texts), Value::Numbers { values, .. }) => {
                    bytes += 32 * values.len() as u64;
                    texts.extend(values.iter().map(|value| value.to_string().into_bytes()));
                }
                (Kept::Numbers(_), Value::Texts { values, .. }) => {
                    let text = values
                        .first()
                        .map(|text| String::from_utf8_lossy(text).into_owned())
                        .unwrap_or_default();
                    return Err(format!(
                        "sample {row} holds the text `{text}` for `{}`, which takes {}",
                        spec.name, spec.datatype
                    ));
                }
            }
        }
        Ok(bytes)
    }
}

/// The numbers as the input takes them; integers take whole ones within their range alone.
fn converted(spec: &TensorSpec, values: &[f64], row: usize) -> Result<Data, String> {
    let data = Data::from_f64(spec.datatype, values);
    let is_float = matches!(spec.datatype, Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64);
    if !is_float
        && let Some(back) = data.to_f64()
        && let Some((given, _)) = values.iter().zip(&back).find(|(given, back)| given != back)
    {
        return Err(format!(
            "sample {row} holds {given} for `{}`, which takes {}",
            spec.name, spec.datatype
        ));
    }
    Ok(data)
}

/// A file beside `path` that goes away with its last reader.
pub(super) fn unnamed_file(path: &Path) -> Result<File, String> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    tempfile::tempfile_in(folder).map_err(|error| format!("cannot lay down its samples in {}: {error}", folder.display()))
}
