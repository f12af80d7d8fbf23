//! JSON lines: one object a sample, `{"input": [[...]], "y": 3}`.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};

use serde_json::{Map, Value as Json};

use super::Dataset;
use super::format::{Request, too_large};
use super::rows::{Rows, Value};

/// Most bytes of one line.
const LINE_BYTES_MAX: u64 = 256 << 20;
/// Most dimensions of a nested list.
const RANK_MAX: usize = 16;

pub(super) fn read(request: &Request, file: File) -> Result<Dataset, String> {
    let mut reader = BufReader::new(file);
    let (mut line, mut number, mut left) = (Vec::new(), 0_u64, request.bytes_max);
    let mut rows: Option<(Rows, Vec<String>)> = None;
    loop {
        line.clear();
        let limit = LINE_BYTES_MAX.min(left.saturating_add(1));
        let read = reader
            .by_ref()
            .take(limit)
            .read_until(b'\n', &mut line)
            .map_err(|error| error.to_string())? as u64;
        if read == 0 {
            break;
        }
        number += 1;
        left = left.checked_sub(read).ok_or_else(|| too_large(request.bytes_max))?;
        if read == LINE_BYTES_MAX && line.last() != Some(&b'\n') {
            return Err(format!("line {number} has more than {LINE_BYTES_MAX} bytes"));
        }
        let text = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line).trim_ascii();
        if text.is_empty() {
            continue;
        }
        let object: Map<String, Json> =
            serde_json::from_slice(text).map_err(|error| format!("line {number} is no JSON object: {error}"))?;
        let (rows, names) = match &mut rows {
            Some(rows) => rows,
            none => {
                let names: Vec<String> = object.keys().cloned().collect();
                let known: Vec<&str> = names.iter().map(String::as_str).collect();
                none.insert((Rows::of(request, &known, "field")?, names))
            }
        };
        let mut values: Vec<Option<Value>> = vec![None; names.len()];
        for index in rows.used() {
            if let Some(json) = object.get(&names[index]) {
                let why = |why| format!("line {number}: field `{}` {why}", names[index]);
                values[index] = Some(value(json).map_err(why)?);
            }
        }
        rows.push(|index| values[index].as_ref())
            .map_err(|why| format!("line {number}: {why}"))?;
    }
    match rows {
        Some((rows, _)) => rows.finish(),
        None => Err("it holds no sample".into()),
    }
}

/// A number, a text, or lists of them of one shape.
fn value(json: &Json) -> Result<Value, String> {
    let mut shape = Vec::new();
    let mut leaf = json;
    while let Json::Array(items) = leaf {
        shape.push(items.len());
        if shape.len() > RANK_MAX {
            return Err(format!("is nested more than {RANK_MAX} deep"));
        }
        match items.first() {
            Some(first) => leaf = first,
            None => return Err("holds an empty list".into()),
        }
    }
    if leaf.is_string() {
        let mut values = Vec::new();
        flatten(json, &shape, &mut |leaf| {
            values.push(leaf.as_str()?.as_bytes().to_vec());
            Some(())
        })?;
        return Ok(Value::Texts { shape, values });
    }
    let mut values = Vec::new();
    flatten(json, &shape, &mut |leaf| {
        values.push(match leaf {
            Json::Bool(truth) => f64::from(u8::from(*truth)),
            leaf => leaf.as_f64()?,
        });
        Some(())
    })?;
    Ok(Value::Numbers { shape, values })
}

fn flatten(json: &Json, shape: &[usize], take: &mut impl FnMut(&Json) -> Option<()>) -> Result<(), String> {
    match (json, shape.split_first()) {
        (Json::Array(items), Some((size, rest))) if items.len() == *size => items.iter().try_for_each(|item| flatten(item, rest, take)),
        (Json::Array(_), _) | (_, Some(_)) => Err("holds lists of different lengths".into()),
        (leaf, None) => take(leaf).ok_or_else(|| format!("holds {leaf} where its first value is of another kind")),
    }
}
