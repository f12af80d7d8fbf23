//! NumPy archives (`.npz`): named arrays, read within a limit.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use half::f16;
use npyz::{DType, Deserialize, NpyFile, Order};
use plimsoll_runtime::engine::{Data, Tensor};
use zip::ZipArchive;

/// Most arrays in an archive.
const ARRAYS_MAX: usize = 256;

/// Reads the arrays of the archive at `path`, of at most `bytes_max` bytes together once unpacked.
///
/// # Errors
/// In words, where the file is no such archive, holds a type without numbers, or is larger.
pub fn read(path: &Path, bytes_max: u64) -> Result<BTreeMap<String, Tensor>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|_| "it is no NumPy archive (.npz)".to_owned())?;
    if archive.len() > ARRAYS_MAX {
        return Err(format!("it holds {} arrays; at most {ARRAYS_MAX} are read", archive.len()));
    }
    let mut left = bytes_max;
    let mut arrays = BTreeMap::new();
    for index in 0..archive.len() {
        let entry = archive.by_index(index).map_err(|error| format!("it is broken: {error}"))?;
        let file_name = entry.name().map_err(|error| format!("it is broken: {error}"))?.into_owned();
        let Some(name) = file_name.strip_suffix(".npy") else { continue };
        let size = entry.size();
        left = left
            .checked_sub(size)
            .ok_or_else(|| format!("it unpacks to more than {bytes_max} bytes"))?;
        // What the directory says of the size is not to be believed.
        let tensor = array(entry.take(size), size).map_err(|why| format!("its array `{name}` {why}"))?;
        arrays.insert(name.to_owned(), tensor);
    }
    Ok(arrays)
}

fn array(reader: impl Read, bytes: u64) -> Result<Tensor, String> {
    let file = NpyFile::new(reader).map_err(|error| format!("cannot be read: {error}"))?;
    let shape: Vec<usize> = file
        .shape()
        .iter()
        .map(|&size| usize::try_from(size).unwrap_or(usize::MAX))
        .collect();
    if file.order() == Order::Fortran && shape.len() > 1 {
        return Err("is in Fortran order; save it through numpy.ascontiguousarray".into());
    }
    let count = shape.iter().try_fold(1_u64, |count, &size| count.checked_mul(size as u64));
    if count.is_none_or(|count| count > bytes) {
        return Err("says that it is larger than its file".into());
    }
    let DType::Plain(kind) = file.dtype() else {
        return Err("is of a structured type".into());
    };
    let kind = kind.to_string();
    let data: Data = match kind.trim_start_matches(['<', '>', '=', '|']) {
        "b1" => values::<bool, _>(file)?.into(),
        "u1" => values::<u8, _>(file)?.into(),
        "u2" => values::<u16, _>(file)?.into(),
        "u4" => values::<u32, _>(file)?.into(),
        "u8" => values::<u64, _>(file)?.into(),
        "i1" => values::<i8, _>(file)?.into(),
        "i2" => values::<i16, _>(file)?.into(),
        "i4" => values::<i32, _>(file)?.into(),
        "i8" => values::<i64, _>(file)?.into(),
        "f2" => values::<f16, _>(file)?.into(),
        "f4" => values::<f32, _>(file)?.into(),
        "f8" => values::<f64, _>(file)?.into(),
        _ => return Err(format!("is of type {kind}, which holds no plain numbers")),
    };
    Tensor::new(shape, data).map_err(|error| error.to_string())
}

fn values<T: Deserialize, R: Read>(file: NpyFile<R>) -> Result<Vec<T>, String> {
    file.into_vec().map_err(|error| format!("cannot be read: {error}"))
}
