//! NumPy's files: an archive of named arrays (`.npz`), or one array (`.npy`).
//!
//! Format: `numpy.lib.format`, versions 1 to 3. An array that the archive stores uncompressed is read in place, batch by batch.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

use plimsoll_package::manifest::{Datatype, TensorSpec};
use plimsoll_runtime::engine::Data;
use plimsoll_runtime::engine::tensor::element_count;
use zip::ZipArchive;

use super::fit::{self, Feed, Plan};
use super::format::{Request, too_large};
use super::rows::unnamed_file;
use super::{Column, Dataset, Values, decode, size_of_type};

/// Most arrays in an archive.
const ARRAYS_MAX: usize = 256;
/// Most bytes of an array's header; NumPy writes 128.
const HEADER_BYTES_MAX: usize = 4096;
/// Most dimensions, as in NumPy 2.
const RANK_MAX: usize = 64;

/// An array whose values lie in a file.
struct Array {
    name: String,
    shape: Vec<usize>,
    datatype: Datatype,
    file: Arc<File>,
    offset: u64,
}

/// Whether the zip archive holds arrays.
pub(super) fn is_archive(file: File) -> Result<bool, String> {
    let archive = open(file)?;
    Ok(archive.file_names().any(|name| name.is_ok_and(|name| name.ends_with(".npy"))))
}

fn open(file: File) -> Result<ZipArchive<BufReader<File>>, String> {
    ZipArchive::new(BufReader::new(file)).map_err(|error| format!("it is a broken zip archive: {error}"))
}

pub(super) fn read(request: &Request, file: File) -> Result<Dataset, String> {
    let in_place = Arc::new(file.try_clone().map_err(|error| error.to_string())?);
    let file_size = file.metadata().map_err(|error| error.to_string())?.len();
    let mut archive = open(file)?;
    if archive.len() > ARRAYS_MAX {
        return Err(format!("it holds {} arrays; at most {ARRAYS_MAX} are read", archive.len()));
    }
    let mut left = request.bytes_max;
    let mut arrays = Vec::with_capacity(archive.len());
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|error| format!("it is broken: {error}"))?;
        let file_name = entry.name().map_err(|error| format!("it is broken: {error}"))?.into_owned();
        let Some(name) = file_name.strip_suffix(".npy") else { continue };
        let size = entry.size();
        left = left.checked_sub(size).ok_or_else(|| too_large(request.bytes_max))?;
        let start = entry.data_start().filter(|_| entry.compression() == zip::CompressionMethod::Stored);
        if start.is_some_and(|start| start.checked_add(size).is_none_or(|end| end > file_size)) {
            return Err(format!("its array `{name}` is cut off"));
        }
        let array = match start {
            Some(start) => array(name, &mut entry, in_place.clone(), start, size),
            None => {
                let mut unpacked = unnamed_file(request.path)?;
                // What the directory says of the size is not to be believed.
                let length =
                    io::copy(&mut entry.take(size), &mut unpacked).map_err(|error| format!("its array `{name}` is broken: {error}"))?;
                unpacked.seek(SeekFrom::Start(0)).map_err(|error| error.to_string())?;
                let mut reader = unpacked.try_clone().map_err(|error| error.to_string())?;
                array(name, &mut reader, Arc::new(unpacked), 0, length)
            }
        };
        arrays.push(array.map_err(|why| format!("its array `{name}` {why}"))?);
    }
    of(request, arrays)
}

pub(super) fn read_single(request: &Request, mut file: File) -> Result<Dataset, String> {
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    let in_place = Arc::new(file.try_clone().map_err(|error| error.to_string())?);
    let array = array("x", &mut file, in_place, 0, size).map_err(|why| format!("its array {why}"))?;
    of(request, vec![array])
}

/// The array that begins at `start` of `file` and takes `size` bytes; `reader` stands at its beginning.
fn array(name: &str, reader: &mut impl Read, file: Arc<File>, start: u64, size: u64) -> Result<Array, String> {
    let mut head = [0; 8];
    reader.read_exact(&mut head).map_err(|error| format!("cannot be read: {error}"))?;
    if !head.starts_with(b"\x93NUMPY") {
        return Err("is no NumPy array".into());
    }
    let length_bytes = if head[6] == 1 { 2 } else { 4 };
    let mut length = [0; 4];
    reader
        .read_exact(&mut length[..length_bytes])
        .map_err(|error| format!("cannot be read: {error}"))?;
    let length = u32::from_le_bytes(length) as usize;
    if length > HEADER_BYTES_MAX {
        return Err(format!("has a header of {length} bytes; plain arrays have short ones"));
    }
    let mut header = vec![0; length];
    reader.read_exact(&mut header).map_err(|error| format!("cannot be read: {error}"))?;
    let header = String::from_utf8_lossy(&header);
    let (datatype, shape) = parse_header(&header)?;
    let begin = (head.len() + length_bytes + length) as u64;
    let bytes = element_count(&shape).and_then(|count| count.checked_mul(size_of_type(datatype)?));
    if bytes.is_none_or(|bytes| bytes as u64 > size.saturating_sub(begin)) {
        return Err("says that it is larger than its file".into());
    }
    Ok(Array {
        name: name.to_owned(),
        shape,
        datatype,
        file,
        offset: start + begin,
    })
}

/// The type and shape that an array's header states: `{'descr': '<f4', 'fortran_order': False, 'shape': (450, 64), }`.
fn parse_header(header: &str) -> Result<(Datatype, Vec<usize>), String> {
    let after = |key: &str| {
        let (_, rest) = header.split_once(&format!("'{key}':"))?;
        Some(rest.trim_start())
    };
    let unreadable = || "has a header that cannot be read".to_owned();
    let descr = after("descr").ok_or_else(unreadable)?;
    let Some(kind) = descr.strip_prefix('\'').and_then(|rest| Some(rest.split_once('\'')?.0)) else {
        return Err("is of a structured type".into());
    };
    let datatype = match kind.trim_start_matches(['<', '=', '|']) {
        "b1" => Datatype::Bool,
        "u1" => Datatype::Uint8,
        "u2" => Datatype::Uint16,
        "u4" => Datatype::Uint32,
        "u8" => Datatype::Uint64,
        "i1" => Datatype::Int8,
        "i2" => Datatype::Int16,
        "i4" => Datatype::Int32,
        "i8" => Datatype::Int64,
        "f2" => Datatype::Fp16,
        "f4" => Datatype::Fp32,
        "f8" => Datatype::Fp64,
        big if big.starts_with('>') => return Err("is big-endian; save it as array.astype(array.dtype.newbyteorder('<'))".into()),
        _ => return Err(format!("is of type {kind}, which holds no plain numbers")),
    };
    let (shape, _) = after("shape")
        .and_then(|rest| rest.strip_prefix('(')?.split_once(')'))
        .ok_or_else(unreadable)?;
    let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty());
    let shape = sizes.map(str::parse).collect::<Result<Vec<usize>, _>>().map_err(|_| unreadable())?;
    if shape.len() > RANK_MAX {
        return Err(format!("has {} dimensions; at most {RANK_MAX} are read", shape.len()));
    }
    if after("fortran_order").ok_or_else(unreadable)?.starts_with("True") && shape.len() > 1 {
        return Err("is in Fortran order; save it through numpy.ascontiguousarray".into());
    }
    Ok((datatype, shape))
}

impl Array {
    /// The values of a range of samples.
    fn values(&self, samples: Range<usize>) -> Result<Vec<f64>, String> {
        use std::os::unix::fs::FileExt as _;
        let row = self.shape.iter().skip(1).product::<usize>() * size_of_type(self.datatype).unwrap_or_default();
        let mut bytes = vec![0; row * samples.len()];
        let place = self.offset + (row * samples.start) as u64;
        self.file
            .read_exact_at(&mut bytes, place)
            .map_err(|error| format!("its array `{}` cannot be read: {error}", self.name))?;
        Ok(decode(self.datatype, &bytes).to_f64().unwrap_or_default())
    }
}

fn of(request: &Request, arrays: Vec<Array>) -> Result<Dataset, String> {
    let names: Vec<&str> = arrays.iter().map(|array| array.name.as_str()).collect();
    let plan = Plan::of(&names, request.specs, request.labels, false, "array")?;
    let mut samples: Option<(usize, &str)> = None;
    let mut columns = Vec::with_capacity(request.specs.len());
    for (spec, fields) in request.specs.iter().zip(&plan.inputs) {
        let [index] = fields[..] else {
            return Err(format!("it holds several arrays for `{}`; put them into one", spec.name));
        };
        let array = &arrays[index];
        fit::check_type(spec, array.datatype)?;
        let (feed, shape) = match array.shape.split_first() {
            None => {
                columns.push(constant(spec, array.values(0..1)?[0])?);
                continue;
            }
            Some((&count, row)) => {
                match samples {
                    Some((expected, first)) if expected != count => {
                        return Err(format!(
                            "its arrays hold different numbers of samples: `{first}` {expected} and `{}` {count}",
                            array.name
                        ));
                    }
                    _ => samples = Some((count, &array.name)),
                }
                fit::sample(spec, row)?
            }
        };
        columns.push(Column {
            values: Values::Stored {
                file: array.file.clone(),
                offset: array.offset,
                datatype: array.datatype,
            },
            shape,
            datatype: spec.datatype,
            feed,
        });
    }
    let (samples, _) = samples.ok_or("it holds one value for every input, and no sample")?;
    let labels = plan.labels.map(|index| labels(&arrays[index], samples)).transpose()?;
    Dataset::of(columns, request.specs, labels, samples)
}

/// One value that holds for every sample, as many times as the input takes it.
fn constant(spec: &TensorSpec, value: f64) -> Result<Column, String> {
    let (feed, sizes) = match spec.shape.split_first() {
        Some((..0, rest)) => (Feed::Repeated, rest),
        _ => (Feed::Constant, &spec.shape[..]),
    };
    let shape: Vec<usize> = sizes.iter().map(|size| usize::try_from(*size).unwrap_or(1)).collect();
    let count = element_count(&shape).filter(|count| *count <= super::DRAWN_VALUES_MAX);
    let count = count.ok_or_else(|| format!("input `{}` is too large for one value to fill", spec.name))?;
    Ok(Column {
        values: Values::Held(Data::from_f64(spec.datatype, &vec![value; count])),
        shape,
        datatype: spec.datatype,
        feed,
    })
}

fn labels(array: &Array, samples: usize) -> Result<Vec<f64>, String> {
    if array.shape.first() != Some(&samples) {
        return Err(format!(
            "the labels have shape {:?}; write one label, or row of labels, for each of the {samples} samples",
            array.shape
        ));
    }
    array.values(0..samples)
}
