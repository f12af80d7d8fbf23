//! Files beside a model that say how texts and images become its inputs and what its outputs mean. They are Hugging Face's and
//! sentence-transformers' own, and go into the package as they are.

use std::path::{Path, PathBuf};

/// Their paths, relative to the model's folder.
pub const PATHS: [&str; 11] = [
    "1_Pooling/config.json",
    "added_tokens.json",
    "config.json",
    "config_sentence_transformers.json",
    "labels.txt",
    "modules.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Most bytes of one of them; the largest tokenizers of the field have about 35 MB.
pub const BYTES_MAX: u64 = 64 << 20;

/// The folder in which exporters put ONNX files below the model's other files.
const ONNX_FOLDER: &str = "onnx";

/// The folders, the nearest first, that may hold the companions of the model at `path`: its own, and the one above a folder called `onnx`.
#[must_use]
pub fn folders(path: &Path) -> Vec<PathBuf> {
    let own = path.parent().unwrap_or(Path::new(""));
    let above = own.parent().filter(|_| own.file_name().is_some_and(|name| name == ONNX_FOLDER));
    std::iter::once(own).chain(above).map(Path::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_lie_beside_a_model_or_above_its_onnx_folder() {
        let folders = |path| folders(Path::new(path));
        assert_eq!(folders("a/model.onnx"), [PathBuf::from("a")]);
        assert_eq!(folders("a/onnx/model.onnx"), [PathBuf::from("a/onnx"), PathBuf::from("a")]);
        assert_eq!(folders("onnx/model.onnx"), [PathBuf::from("onnx"), PathBuf::new()]);
        assert_eq!(folders("model.onnx"), [PathBuf::new()]);
    }

    #[test]
    fn the_paths_are_in_order_and_each_is_there_once() {
        assert!(PATHS.is_sorted_by(|a, b| a < b));
    }
}
