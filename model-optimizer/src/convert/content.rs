//! What a file that is not ONNX is instead, by its first bytes: whoever named it by mistake wants to read that.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use crate::failure::{Failure, FailureReason, disk, failure};

/// Bytes that are looked at.
const HEAD_BYTES: usize = 4096;

/// Refuses a file that begins as that of another format does.
pub(super) fn check_is_onnx(uri: &str, path: &Path) -> Result<(), Failure> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    let file = File::open(path).map_err(disk("read", path))?;
    file.take(HEAD_BYTES as u64).read_to_end(&mut head).map_err(disk("read", path))?;
    match recognise(&head) {
        None => Ok(()),
        Some(Other::Model(name)) => Err(failure(
            FailureReason::Unsupported,
            format!("{uri} is {name}; this version reads ONNX alone, so export the model to ONNX and name that file"),
        )),
        Some(Other::NoModel(name)) => Err(failure(
            FailureReason::UnreadableModel,
            format!("{uri} is {name}, not a model; check what lies at that address"),
        )),
    }
}

#[derive(Debug, PartialEq)]
enum Other {
    Model(&'static str),
    NoModel(&'static str),
}

fn recognise(head: &[u8]) -> Option<Other> {
    let text = String::from_utf8_lossy(&head[..head.len().min(256)])
        .trim_start()
        .to_ascii_lowercase();
    let contains = |needle: &[u8]| head.windows(needle.len()).any(|window| window == needle);
    Some(match head {
        [] => Other::NoModel("empty"),
        [b'P', b'K', 3, 4, ..] if contains(b"model.weights.h5") || contains(b"config.json") => Other::Model("a Keras model (.keras)"),
        [b'P', b'K', 3, 4, ..] if contains(b".npy") => Other::NoModel("a NumPy archive (.npz)"),
        [b'P', b'K', 3, 4, ..] if contains(b"data.pkl") || contains(b"/code/") => Other::Model("a PyTorch model (a zip archive)"),
        [b'P', b'K', 3, 4, ..] => Other::NoModel("a zip archive"),
        [0x80, 2..=5, ..] => Other::Model("a Python pickle (PyTorch or scikit-learn)"),
        [0x89, b'H', b'D', b'F', b'\r', b'\n', 0x1a, b'\n', ..] => Other::Model("an HDF5 file (Keras)"),
        [_, _, _, _, b'T', b'F', b'L', b'3', ..] => Other::Model("a TensorFlow Lite model"),
        [b'G', b'G', b'U', b'F', ..] => Other::Model("a GGUF model"),
        [_, _, _, _, _, 0, 0, 0, b'{', b'"', ..] => Other::Model("a safetensors file"),
        [0x1f, 0x8b, ..] => Other::NoModel("a gzip archive"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Other::NoModel("a zstd archive"),
        _ if head.get(257..262) == Some(b"ustar") => Other::NoModel("a tar archive"),
        _ if text.starts_with("<!doctype html") || text.starts_with("<html") => Other::NoModel("a web page"),
        _ if text.starts_with("<?xml") => Other::NoModel("an XML document"),
        _ if text.starts_with('{') || text.starts_with("[{") => Other::NoModel("a JSON document"),
        _ if text.starts_with("version https://git-lfs") => Other::NoModel("a Git LFS pointer"),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formats_that_people_name_by_mistake_are_told_apart() {
        assert_eq!(recognise(b"  <!DOCTYPE html><title>404"), Some(Other::NoModel("a web page")));
        assert_eq!(
            recognise(b"PK\x03\x04 archive/data.pkl"),
            Some(Other::Model("a PyTorch model (a zip archive)"))
        );
        assert_eq!(
            recognise(b"\x80\x02}q\x00"),
            Some(Other::Model("a Python pickle (PyTorch or scikit-learn)"))
        );
        assert_eq!(recognise(b"\x1c\0\0\0TFL3"), Some(Other::Model("a TensorFlow Lite model")));
        assert_eq!(
            recognise(b"\x40\0\0\0\0\0\0\0{\"__metadata__\""),
            Some(Other::Model("a safetensors file"))
        );
        assert_eq!(recognise(b""), Some(Other::NoModel("empty")));
        assert_eq!(
            recognise(b"version https://git-lfs.github.com/spec/v1"),
            Some(Other::NoModel("a Git LFS pointer"))
        );
        // An ONNX file begins with its IR version.
        assert_eq!(recognise(b"\x08\x08\x12\x07pytorch"), None);
    }
}
