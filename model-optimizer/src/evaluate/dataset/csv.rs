//! CSV (RFC 4180) with a header: one sample a line.

use std::fs::File;
use std::io::{BufReader, Read as _};

use super::Dataset;
use super::format::{Request, too_large};
use super::rows::{Rows, Value};
use plimsoll_package::manifest::Datatype;

/// Most columns.
const COLUMNS_MAX: usize = 1 << 20;

pub(super) fn read(request: &Request, file: File) -> Result<Dataset, String> {
    // One more than the limit, so that reaching it shows.
    let limited = BufReader::new(file.take(request.bytes_max.saturating_add(1)));
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(limited);
    let header = reader.headers().map_err(|error| broken(&error))?.clone();
    let names: Vec<&str> = header.iter().map(|name| name.trim_start_matches('\u{feff}')).collect();
    if names.len() > COLUMNS_MAX {
        return Err(format!("it has {} columns; at most {COLUMNS_MAX} are read", names.len()));
    }
    if names.iter().all(|name| name.parse::<f64>().is_ok()) {
        return Err("its first line holds numbers; the first line of a CSV file names the columns".into());
    }
    let mut rows = Rows::of(request, &names, "column")?;
    let takes_text = request.specs.iter().any(|spec| spec.datatype == Datatype::Bytes);
    let mut used: Vec<usize> = rows.used().collect();
    used.sort_unstable();
    used.dedup();
    let mut values: Vec<Option<Value>> = vec![None; names.len()];
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(|error| broken(&error))? {
        if reader.position().byte() > request.bytes_max {
            return Err(too_large(request.bytes_max));
        }
        let line = record.position().map_or(0, csv::Position::line);
        for index in &used {
            let text = record.get(*index).unwrap_or_default();
            values[*index] = match text.parse::<f64>() {
                Ok(number) => Some(Value::number(number)),
                Err(_) if takes_text => Some(Value::text(text.as_bytes().to_vec())),
                Err(_) => {
                    return Err(format!(
                        "line {line} holds `{text}` in column `{}`, which is no number",
                        names[*index]
                    ));
                }
            };
        }
        rows.push(|index| values[index].as_ref())
            .map_err(|why| format!("line {line}: {why}"))?;
    }
    rows.finish()
}

fn broken(error: &csv::Error) -> String {
    format!("it is no CSV: {error}")
}
