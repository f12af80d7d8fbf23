//! Credentials, as Kubernetes mounts a Secret: one file a key.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;

use super::error::{Problem, RegistryError};

/// Who we are to a registry or an HTTP server.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    /// Nobody in particular.
    #[default]
    Anonymous,
    /// A user with a password.
    Basic {
        /// The user.
        username: String,
        /// The password.
        password: String,
    },
    /// A bearer token.
    Token(String),
    /// A user with a password for each registry, from a `.dockerconfigjson`.
    PerRegistry(BTreeMap<String, (String, String)>),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic",
            Self::Token(_) => "Token",
            Self::PerRegistry(_) => "PerRegistry",
        })
    }
}

impl Credentials {
    /// Reads the folder `dir`: `.dockerconfigjson`, or `username` and `password`, or `token`. A folder that is missing or holds
    /// none of them means [`Credentials::Anonymous`].
    ///
    /// # Errors
    /// Where a file cannot be read, or `.dockerconfigjson` does not parse.
    pub fn read(dir: &Path) -> Result<Self, RegistryError> {
        let read = |name: &str| match fs::read_to_string(dir.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(RegistryError::new(
                &dir.join(name).display().to_string(),
                Problem::Disk,
                error.to_string(),
            )),
        };
        if let Some(json) = read(".dockerconfigjson")? {
            let invalid = || RegistryError::new(&dir.display().to_string(), Problem::Invalid, ".dockerconfigjson is not valid");
            return Self::from_docker_config(&json).ok_or_else(invalid);
        }
        // An editor's or `echo`'s last newline is part of no password.
        let trimmed = |text: String| text.trim_end_matches(['\r', '\n']).to_owned();
        if let (Some(username), Some(password)) = (read("username")?, read("password")?) {
            return Ok(Self::Basic {
                username: trimmed(username),
                password: trimmed(password),
            });
        }
        Ok(read("token")?.map_or(Self::Anonymous, |token| Self::Token(trimmed(token))))
    }

    fn from_docker_config(json: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Config {
            #[serde(default)]
            auths: BTreeMap<String, Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            username: String,
            #[serde(default)]
            password: String,
            #[serde(default)]
            auth: String,
        }
        let config: Config = serde_json::from_str(json).ok()?;
        let entries = config.auths.into_iter().map(|(registry, entry)| {
            let pair = if entry.auth.is_empty() {
                (entry.username, entry.password)
            } else {
                let decoded = String::from_utf8(STANDARD.decode(entry.auth.trim()).ok()?).ok()?;
                let (username, password) = decoded.split_once(':')?;
                (username.to_owned(), password.to_owned())
            };
            Some((registry_host(&registry).to_owned(), pair))
        });
        entries.collect::<Option<_>>().map(Self::PerRegistry)
    }

    /// What is said to `registry` (`HOST[:PORT]`).
    #[must_use]
    pub fn for_registry(&self, registry: &str) -> RegistryAuth {
        match self {
            Self::Anonymous => RegistryAuth::Anonymous,
            Self::Basic { username, password } => RegistryAuth::Basic(username.clone(), password.clone()),
            Self::Token(token) => RegistryAuth::Bearer(token.clone()),
            Self::PerRegistry(registries) => registries
                .get(registry_host(registry))
                .map_or(RegistryAuth::Anonymous, |(username, password)| {
                    RegistryAuth::Basic(username.clone(), password.clone())
                }),
        }
    }
}

/// The host of a key of `.dockerconfigjson`, which may be a URL; Docker's own registry goes by several names.
fn registry_host(key: &str) -> &str {
    let host = key
        .trim_start_matches("https://")
        .trim_start_matches("http://")
        .split('/')
        .next()
        .unwrap_or(key);
    if matches!(host, "index.docker.io" | "registry-1.docker.io") {
        "docker.io"
    } else {
        host
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_docker_config_names_each_registry_its_user() {
        let dir = tempfile::tempdir().unwrap();
        let json =
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"bWU6c2U6Y3JldA=="},"r.example:5000":{"username":"a","password":"b"}}}"#;
        fs::write(dir.path().join(".dockerconfigjson"), json).unwrap();
        let credentials = Credentials::read(dir.path()).unwrap();
        assert_eq!(
            credentials.for_registry("docker.io"),
            RegistryAuth::Basic("me".into(), "se:cret".into())
        );
        assert_eq!(
            credentials.for_registry("r.example:5000"),
            RegistryAuth::Basic("a".into(), "b".into())
        );
        assert_eq!(credentials.for_registry("other.example"), RegistryAuth::Anonymous);
    }

    #[test]
    fn a_secret_of_user_and_password_or_of_a_token_is_read_without_its_newline() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Credentials::read(&dir.path().join("absent")).unwrap(), Credentials::Anonymous);
        fs::write(dir.path().join("token"), "t0k\n").unwrap();
        assert_eq!(Credentials::read(dir.path()).unwrap(), Credentials::Token("t0k".into()));
        fs::write(dir.path().join("username"), "u\n").unwrap();
        fs::write(dir.path().join("password"), "p\r\n").unwrap();
        assert_eq!(
            Credentials::read(dir.path()).unwrap(),
            Credentials::Basic {
                username: "u".into(),
                password: "p".into()
            }
        );
    }

    #[test]
    fn a_broken_docker_config_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".dockerconfigjson"), "{\"auths\":{\"r\":{\"auth\":\"!!\"}}}").unwrap();
        assert!(Credentials::read(dir.path()).is_err());
    }
}
