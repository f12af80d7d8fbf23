//! The entries of a `.zip` or `.tar` archive, one after another.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use zip::ZipArchive;

/// Most entries.
const ENTRIES_MAX: usize = 2_000_000;

/// The kinds of archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Zip,
    Tar,
}

/// Gives `visit` the name and the content of every file in the archive.
pub(super) fn for_each_file(
    path: &Path,
    kind: Kind,
    mut visit: impl FnMut(&str, &mut dyn Read) -> Result<(), String>,
) -> Result<(), String> {
    let file = BufReader::new(File::open(path).map_err(|error| error.to_string())?);
    let broken = |error: &dyn std::error::Error| format!("it is a broken archive: {error}");
    let too_many = || format!("it holds more than {ENTRIES_MAX} files");
    match kind {
        Kind::Zip => {
            let mut archive = ZipArchive::new(file).map_err(|error| broken(&error))?;
            if archive.len() > ENTRIES_MAX {
                return Err(too_many());
            }
            for index in 0..archive.len() {
                let mut entry = archive.by_index(index).map_err(|error| broken(&error))?;
                if entry.is_file() {
                    let name = entry.name().map_err(|error| broken(&error))?.into_owned();
                    visit(&name, &mut entry)?;
                }
            }
        }
        Kind::Tar => {
            let mut archive = tar::Archive::new(file);
            for (index, entry) in archive.entries_with_seek().map_err(|error| broken(&error))?.enumerate() {
                if index >= ENTRIES_MAX {
                    return Err(too_many());
                }
                let mut entry = entry.map_err(|error| broken(&error))?;
                if entry.header().entry_type().is_file() {
                    let name = entry.path().map_err(|error| broken(&error))?.to_string_lossy().into_owned();
                    visit(&name, &mut entry)?;
                }
            }
        }
    }
    Ok(())
}
