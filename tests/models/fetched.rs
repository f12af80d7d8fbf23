//! Files that `cargo xtask models` fetches, for the tests of every crate that reads them.

use std::path::PathBuf;

/// A real model or its samples, from the user's cache or the folder in `PLIMSOLL_MODELS`.
pub(crate) fn real_model(name: &str) -> PathBuf {
    let cache = || {
        let home = || std::env::home_dir().unwrap().join(".cache");
        std::env::var_os("XDG_CACHE_HOME")
            .map_or_else(home, PathBuf::from)
            .join("plimsoll/models")
    };
    let path = std::env::var_os("PLIMSOLL_MODELS").map_or_else(cache, PathBuf::from).join(name);
    assert!(path.is_file(), "{} is missing: run `cargo xtask models`", path.display());
    path
}
