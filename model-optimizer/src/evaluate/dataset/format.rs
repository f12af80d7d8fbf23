//! Which form a dataset has, by its first bytes.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use plimsoll_package::manifest::TensorSpec;

use super::{Dataset, archive, csv, images, json_lines, npz, parquet};

/// Bytes that tell the form: a tar archive's mark ends at 262 (POSIX.1-1988 ustar).
const HEAD_BYTES: usize = 512;

/// What a reader is told.
pub(super) struct Request<'a> {
    pub(super) path: &'a Path,
    pub(super) specs: &'a [TensorSpec],
    pub(super) labels: Option<&'a str>,
    /// Most bytes once unpacked.
    pub(super) bytes_max: u64,
}

/// That a dataset is larger than the limit.
pub(super) fn too_large(bytes_max: u64) -> String {
    format!("it unpacks to more than {bytes_max} bytes")
}

pub(super) fn read(path: &Path, specs: &[TensorSpec], labels: Option<&str>, bytes_max: u64) -> Result<Dataset, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut head = [0; HEAD_BYTES];
    let mut length = 0;
    while let Ok(read @ 1..) = file.read_at(&mut head[length..], length as u64) {
        length += read;
    }
    let head = &head[..length];
    let request = Request {
        path,
        specs,
        labels,
        bytes_max,
    };
    if head.is_empty() {
        return Err("it is empty".into());
    }
    if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
        return if npz::is_archive(file.try_clone().map_err(|error| error.to_string())?)? {
            npz::read(&request, file)
        } else {
            images::read(&request, archive::Kind::Zip)
        };
    }
    if head.starts_with(b"\x93NUMPY") {
        return npz::read_single(&request, file);
    }
    if head.starts_with(b"PAR1") {
        return parquet::read(&request, file);
    }
    if head.get(257..262) == Some(b"ustar") {
        return images::read(&request, archive::Kind::Tar);
    }
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    if text.starts_with(b"{") {
        return json_lines::read(&request, file);
    }
    // A character may be cut at the end of the head.
    let is_text = std::str::from_utf8(head).map_or_else(|error| error.error_len().is_none(), |_| true) && !head.contains(&0);
    if is_text {
        return csv::read(&request, file);
    }
    Err("it is of no known form; give a NumPy archive (.npz), CSV, Parquet, JSON lines, or a .zip or .tar of images with labels.csv".into())
}
