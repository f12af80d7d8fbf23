//! Where samples are written: a folder.

use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use reqwest::Url;

/// A place for objects.
pub(super) struct Store(PathBuf);

impl Store {
    /// Opens the folder at `url`; it must be there.
    ///
    /// # Errors
    /// In words, where it is none.
    pub(super) fn open(url: &str) -> Result<Self, String> {
        let parsed = Url::parse(url).map_err(|error| format!("{url}: {error}"))?;
        let folder = Some(parsed)
            .filter(|url| url.scheme() == "file")
            .and_then(|url| url.to_file_path().ok());
        let folder = folder.ok_or_else(|| format!("{url} is no folder; write file:///DIR"))?;
        if folder.is_dir() {
            Ok(Self(folder))
        } else {
            Err(format!("{} is no folder", folder.display()))
        }
    }

    /// Writes an object, whole or not at all.
    ///
    /// # Errors
    /// In words, where the folder does not take it.
    pub(super) async fn put(&self, name: &str, content: Vec<u8>) -> Result<(), String> {
        let path = self.0.join(name);
        let write = move || {
            let part = path.with_extension("part");
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(&part, content)?;
            fs::rename(part, path)
        };
        let written = tokio::task::spawn_blocking(write).await.map_err(|error| error.to_string())?;
        written.map_err(|error| format!("cannot write {name} to {}: {error}", self.0.display()))
    }
}

/// The name of an object: one of the model's, by its time, its writer and the objects that the writer wrote before.
pub(super) fn name(model: &str, version: &str, time: SystemTime, number: u64) -> String {
    let milliseconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    // The pod's name, where there is one.
    let writer = std::env::var("HOSTNAME").unwrap_or_else(|_| std::process::id().to_string());
    let plain = |text: &str| -> String {
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
        text.chars().map(|letter| if is_plain(letter) { letter } else { '_' }).collect()
    };
    let [model, version, writer] = [model, version, &writer].map(plain);
    // Neither `..` nor an empty one leads elsewhere.
    format!("model={model}/version={version}/{milliseconds}-{writer}-{number}.jsonl")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_none_is_told() {
        let refused = |url: &str| Store::open(url).err().unwrap();
        assert!(refused("file:///no/such/folder").contains("/no/such/folder is no folder"));
        assert!(refused("ftp://host/path").contains("ftp://host/path"));
        assert!(refused("nothing").contains("nothing"));
    }

    #[test]
    fn an_object_is_named_within_its_models_folder() {
        let time = UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_123);
        let name = name("../a b", "..", time, 7);
        assert!(
            name.starts_with("model=.._a_b/version=../1700000000123-") && name.ends_with("-7.jsonl"),
            "{name}"
        );
    }
}
