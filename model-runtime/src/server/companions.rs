//! The files beside a model that say what its inputs and outputs mean (see [`plimsoll_package::companion`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use plimsoll_package::companion::{BYTES_MAX, PATHS, folders};
use plimsoll_package::manifest::Manifest;
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Most classes that have names.
const LABELS_MAX: usize = 1 << 20;

/// A companion that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {source}", path = path.display())]
pub struct CompanionError {
    path: PathBuf,
    source: io::Error,
}

/// The contents of the companions that are there, by their paths.
#[derive(Debug, Default)]
pub(super) struct Companions(BTreeMap<&'static str, Vec<u8>>);

impl Companions {
    /// Reads the companions of the model at `path`: of a package those that its manifest lists, and so vouches for.
    ///
    /// # Errors
    /// [`CompanionError`] for one that is there and cannot be read, or is larger than any should be.
    pub(super) fn read(path: &Path, manifest: Option<&Manifest>) -> Result<Self, CompanionError> {
        let mut found = BTreeMap::new();
        let folders = folders(path);
        let folders = if manifest.is_some() { &folders[..1] } else { &folders[..] };
        for name in PATHS {
            if manifest.is_some_and(|manifest| !manifest.files.contains_key(name)) {
                continue;
            }
            for folder in folders {
                let path = folder.join(name);
                match read_bounded(&path) {
                    Ok(content) => {
                        found.insert(name, content);
                        break;
                    }
                    Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                    Err(source) => return Err(CompanionError { path, source }),
                }
            }
        }
        Ok(Self(found))
    }

    /// The content of one of them.
    pub(super) fn get(&self, path: &str) -> Option<&[u8]> {
        self.0.get(path).map(Vec::as_slice)
    }

    /// One of them, as JSON.
    ///
    /// # Errors
    /// In words that begin with its path, where it is not what it should be.
    pub(super) fn json<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, String> {
        let parse = |content| serde_json::from_slice(content).map_err(|error| format!("{path}: {error}"));
        self.get(path).map(parse).transpose()
    }

    /// The names of the classes by their indices: the lines of `labels.txt`, or else `id2label` of `config.json`.
    ///
    /// # Errors
    /// In words that begin with the file's path.
    pub(super) fn labels(&self) -> Result<Vec<String>, String> {
        #[derive(Deserialize)]
        struct Config {
            #[serde(default)]
            id2label: BTreeMap<String, String>,
        }
        if let Some(lines) = self.get("labels.txt") {
            let lines = str::from_utf8(lines).map_err(|_| "labels.txt: it is not UTF-8".to_owned())?;
            return Ok(lines.lines().map(|line| line.trim().to_owned()).collect());
        }
        let Some(config) = self.json::<Config>("config.json")? else {
            return Ok(vec![]);
        };
        let mut labels = vec![];
        for (id, label) in config.id2label {
            let index = id.parse::<usize>().ok().filter(|&index| index < LABELS_MAX);
            let index = index.ok_or_else(|| format!("config.json: id2label has `{id}`, which is no index of a class"))?;
            if index >= labels.len() {
                labels.resize(index + 1, String::new());
            }
            labels[index] = label;
        }
        Ok(labels)
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = vec![];
    File::open(path)?.take(BYTES_MAX + 1).read_to_end(&mut content)?;
    if content.len() as u64 > BYTES_MAX {
        return Err(io::Error::other(format!("it has more than {BYTES_MAX} bytes")));
    }
    Ok(content)
}

#[cfg(test)]
impl<const N: usize> From<[(&'static str, &str); N]> for Companions {
    fn from(files: [(&'static str, &str); N]) -> Self {
        Self(
            files
                .into_iter()
                .map(|(path, content)| (path, content.as_bytes().to_vec()))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_come_from_lines_or_from_the_configuration() {
        let labels = |files: Companions| files.labels();
        assert_eq!(labels(Companions::default()), Ok(vec![]));
        let configuration = r#"{"id2label": {"0": "cat", "10": "owl", "1": "dog"}}"#;
        let named = labels([("config.json", configuration)].into()).unwrap();
        assert_eq!(
            (named.len(), &*named[0], &*named[1], &*named[9], &*named[10]),
            (11, "cat", "dog", "", "owl")
        );
        let both = [("config.json", configuration), ("labels.txt", "tench\r\ngoldfish\n")];
        assert_eq!(labels(both.into()), Ok(vec!["tench".into(), "goldfish".into()]));
        assert_eq!(labels([("config.json", r#"{"hidden_size": 3}"#)].into()), Ok(vec![]));
        let text = labels([("config.json", r#"{"id2label": {"first": "cat"}}"#)].into()).unwrap_err();
        assert_eq!(text, "config.json: id2label has `first`, which is no index of a class");
    }

    #[test]
    fn companions_of_a_file_lie_beside_it_and_those_of_a_package_are_in_its_manifest() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("onnx")).unwrap();
        std::fs::create_dir_all(dir.path().join("1_Pooling")).unwrap();
        std::fs::write(dir.path().join("1_Pooling/config.json"), "{}").unwrap();
        std::fs::write(dir.path().join("onnx/config.json"), "near").unwrap();
        std::fs::write(dir.path().join("config.json"), "far").unwrap();
        let found = Companions::read(&dir.path().join("onnx/model.onnx"), None).unwrap();
        assert_eq!(found.get("config.json"), Some(&b"near"[..]));
        assert_eq!(found.get("1_Pooling/config.json"), Some(&b"{}"[..]));
        assert_eq!(found.get("tokenizer.json"), None);
    }
}
