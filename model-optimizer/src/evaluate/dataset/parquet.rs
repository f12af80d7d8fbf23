//! Parquet: one row a sample; lists are vectors.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::basic::Compression;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::ColumnPath;

use super::Dataset;
use super::format::{Request, too_large};
use super::rows::{Rows, Value};

/// Most columns.
const COLUMNS_MAX: usize = 1 << 16;
/// Most dimensions of a nested list.
const RANK_MAX: usize = 16;

pub(super) fn read(request: &Request, file: File) -> Result<Dataset, String> {
    // The crate panics on some broken files.
    let read = catch_unwind(AssertUnwindSafe(|| read_rows(request, file)));
    read.unwrap_or_else(|_| Err("it is a broken Parquet file".into()))
}

fn read_rows(request: &Request, file: File) -> Result<Dataset, String> {
    let broken = |error: parquet::errors::ParquetError| format!("it is a broken Parquet file: {error}");
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let metadata = reader.metadata();
    let size: u64 = metadata
        .row_groups()
        .iter()
        .map(|group| group.total_byte_size().max(0) as u64)
        .sum();
    if size > request.bytes_max {
        return Err(too_large(request.bytes_max));
    }
    let mut columns = metadata.row_groups().iter().flat_map(|group| group.columns());
    if let Some(why) = columns.find_map(|column| unread(column.compression(), column.column_path())) {
        return Err(why);
    }
    let fields = metadata.file_metadata().schema().get_fields();
    if fields.len() > COLUMNS_MAX {
        return Err(format!("it has {} columns; at most {COLUMNS_MAX} are read", fields.len()));
    }
    let names: Vec<String> = fields.iter().map(|field| field.name().to_owned()).collect();
    let known: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut rows = Rows::of(request, &known, "column")?;
    let mut used: Vec<usize> = rows.used().collect();
    used.sort_unstable();
    used.dedup();
    let mut values: Vec<Option<Value>> = vec![None; names.len()];
    for (index, row) in reader.get_row_iter(None).map_err(broken)?.enumerate() {
        let row = row.map_err(broken)?;
        let place = |name: &str, why: String| format!("row {}: column `{name}` {why}", index + 1);
        for (field, (name, value)) in row.get_column_iter().enumerate() {
            if used.binary_search(&field).is_ok() {
                values[field] = Some(field_value(value).map_err(|why| place(name, why))?);
            }
        }
        rows.push(|index| values[index].as_ref())
            .map_err(|why| format!("row {}: {why}", index + 1))?;
    }
    rows.finish()
}

/// In words, where a column is compressed by what is not read.
fn unread(compression: Compression, column: &ColumnPath) -> Option<String> {
    let name = match compression {
        // The one reader of it that the crate knows is in C.
        Compression::ZSTD(_) => "ZSTD",
        Compression::LZO => "LZO",
        _ => return None,
    };
    Some(format!(
        "its column `{}` is compressed by {name}, which is not read; write it with SNAPPY, GZIP, LZ4_RAW, BROTLI or uncompressed",
        column.string()
    ))
}

fn field_value(field: &Field) -> Result<Value, String> {
    let mut shape = Vec::new();
    let mut leaf = field;
    while let Field::ListInternal(list) = leaf {
        shape.push(list.len());
        if shape.len() > RANK_MAX {
            return Err(format!("is nested more than {RANK_MAX} deep"));
        }
        leaf = list.elements().first().ok_or("holds an empty list")?;
    }
    if matches!(leaf, Field::Str(_) | Field::Bytes(_)) {
        let mut values = Vec::new();
        flatten(field, &shape, &mut |leaf| {
            values.push(match leaf {
                Field::Str(text) => text.clone().into_bytes(),
                Field::Bytes(bytes) => bytes.data().to_vec(),
                _ => return None,
            });
            Some(())
        })?;
        return Ok(Value::Texts { shape, values });
    }
    let mut values = Vec::new();
    flatten(field, &shape, &mut |leaf| {
        values.push(number(leaf)?);
        Some(())
    })?;
    Ok(Value::Numbers { shape, values })
}

fn flatten(field: &Field, shape: &[usize], take: &mut impl FnMut(&Field) -> Option<()>) -> Result<(), String> {
    match (field, shape.split_first()) {
        (Field::ListInternal(list), Some((size, rest))) if list.len() == *size => {
            list.elements().iter().try_for_each(|item| flatten(item, rest, take))
        }
        (Field::ListInternal(_), _) | (_, Some(_)) => Err("holds lists of different lengths".into()),
        (leaf, None) => take(leaf).ok_or_else(|| format!("holds {leaf}, which is neither a number nor a text like its first value")),
    }
}

fn number(field: &Field) -> Option<f64> {
    Some(match field {
        Field::Bool(value) => f64::from(u8::from(*value)),
        Field::Byte(value) => f64::from(*value),
        Field::Short(value) => f64::from(*value),
        Field::Int(value) => f64::from(*value),
        Field::Long(value) => *value as f64,
        Field::UByte(value) => f64::from(*value),
        Field::UShort(value) => f64::from(*value),
        Field::UInt(value) => f64::from(*value),
        Field::ULong(value) => *value as f64,
        Field::Float16(value) => value.to_f64(),
        Field::Float(value) => f64::from(*value),
        Field::Double(value) => *value,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_otherwise_is_refused_by_its_name() {
        let column = ColumnPath::from("image.list.element");
        for (compression, name) in [(Compression::ZSTD(Default::default()), "ZSTD"), (Compression::LZO, "LZO")] {
            let why = unread(compression, &column).unwrap();
            assert!(
                why.starts_with(&format!("its column `image.list.element` is compressed by {name}, ")),
                "{why}"
            );
        }
        assert_eq!(unread(Compression::LZ4_RAW, &column), None);
    }
}
