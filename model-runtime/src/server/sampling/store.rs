//! Where samples are written: a folder, or an object store.

use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use object_store::ObjectStoreExt as _;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::azure::{MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder};
use object_store::path::Path;
use reqwest::Url;

/// A place for objects. The stores are told apart rather than boxed as `dyn ObjectStore`: what is never called is not linked.
pub(super) enum Store {
    Folder(PathBuf),
    Amazon(AmazonS3, Path),
    Azure(MicrosoftAzure, Path),
    Google(GoogleCloudStorage, Path),
}

impl Store {
    /// Opens the place at `url`; a folder must be there. How a store is reached is said by the variables that its own tools read.
    ///
    /// # Errors
    /// In words, where it is none.
    pub(super) fn open(url: &str) -> Result<Self, String> {
        let refuse = |error: &dyn std::error::Error| format!("{url}: {error}");
        let parsed = Url::parse(url).map_err(|error| refuse(&error))?;
        if parsed.scheme() == "file" {
            let folder = parsed.to_file_path().map_err(|()| format!("{url} is no path; write file:///DIR"))?;
            return if folder.is_dir() {
                Ok(Self::Folder(folder))
            } else {
                Err(format!("{} is no folder", folder.display()))
            };
        }
        let prefix = Path::from_url_path(parsed.path()).map_err(|error| refuse(&error))?;
        plimsoll_package::registry::install_crypto_provider();
        let opened = match parsed.scheme() {
            "s3" => AmazonS3Builder::from_env()
                .with_url(url)
                .build()
                .map(|store| Self::Amazon(store, prefix)),
            "az" => MicrosoftAzureBuilder::from_env()
                .with_url(url)
                .build()
                .map(|store| Self::Azure(store, prefix)),
            "gs" => GoogleCloudStorageBuilder::from_env()
                .with_url(url)
                .build()
                .map(|store| Self::Google(store, prefix)),
            scheme => return Err(format!("{url}: {scheme} is none of s3, gs, az and file")),
        };
        opened.map_err(|error| refuse(&error))
    }

    /// Writes an object, whole or not at all.
    ///
    /// # Errors
    /// In words, where the store does not take it.
    pub(super) async fn put(&self, name: &str, content: Vec<u8>) -> Result<(), String> {
        let put = match self {
            Self::Folder(folder) => return put_file(folder.join(name), content).await,
            Self::Amazon(store, prefix) => store.put(&within(prefix, name), content.into()).await,
            Self::Azure(store, prefix) => store.put(&within(prefix, name), content.into()).await,
            Self::Google(store, prefix) => store.put(&within(prefix, name), content.into()).await,
        };
        put.map(drop).map_err(|error| crate::server::model::chain(&error))
    }
}

fn within(prefix: &Path, name: &str) -> Path {
    Path::from(format!("{prefix}/{name}"))
}

async fn put_file(path: PathBuf, content: Vec<u8>) -> Result<(), String> {
    let written = path.clone();
    let write = move || {
        let part = path.with_extension("part");
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(&part, content)?;
        fs::rename(part, path)
    };
    let result = tokio::task::spawn_blocking(write).await.map_err(|error| error.to_string())?;
    result.map_err(|error| format!("cannot write {}: {error}", written.display()))
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
        assert_eq!(refused("ftp://host/path"), "ftp://host/path: ftp is none of s3, gs, az and file");
        // How a store of Azure's is reached, its variables must say.
        assert!(refused("az://container/prefix").starts_with("az://container/prefix: "));
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
