//! Files: `pvc://CLAIM/PATH` below the folder of mounted claims, and paths on a laptop.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use plimsoll_package::companion;
use plimsoll_package::digest::{Digest, Hasher};

use super::{Content, Limits, too_large};
use crate::failure::{Failure, FailureReason, disk, failure};

/// Bytes copied at a time.
const PIECE_BYTES: usize = 1 << 20;
/// Most files of a folder.
const FILES_MAX: usize = 2_000_000;

/// Makes a tar archive of a folder of data (pictures with their labels): the same bytes for the same files.
fn pack(what: &str, folder: &Path, destination: &Path, size_max: u64) -> Result<Content, Failure> {
    let shown = folder.display().to_string();
    let unreadable = |error: io::Error| failure(FailureReason::SourceRefused, format!("cannot read the {what} {shown}: {error}"));
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let kind = entry.file_type().map_err(unreadable)?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
        if files.len() > FILES_MAX {
            let message = format!("the {what} {shown} holds more than {FILES_MAX} files");
            return Err(failure(FailureReason::SourceTooLarge, message));
        }
    }
    files.sort_unstable();
    let mut archive = tar::Builder::new(io::BufWriter::new(File::create(destination).map_err(disk("write", destination))?));
    archive.mode(tar::HeaderMode::Deterministic);
    let mut size = 0;
    for path in &files {
        size += fs::metadata(path).map_err(unreadable)?.len();
        if size > size_max {
            return Err(too_large(what, &shown, None, size_max));
        }
        let name = path.strip_prefix(folder).unwrap_or(path);
        archive.append_path_with_name(path, name).map_err(unreadable)?;
    }
    archive
        .into_inner()
        .and_then(|file| file.into_inner().map_err(io::IntoInnerError::into_error))
        .map_err(disk("write", destination))?;
    let packed = File::open(destination).map_err(disk("read", destination))?;
    Ok(Content {
        size: packed.metadata().map_err(disk("read", destination))?.len(),
        digest: Digest::of_reader(packed).map_err(disk("read", destination))?,
    })
}

/// Gives the file at `path` the name `destination`, too, where the file system can: nothing here writes to it.
pub(super) fn link(path: &Path, destination: &Path) -> io::Result<bool> {
    let identity = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    if identity(destination).is_some_and(|known| identity(path) == Some(known)) {
        return Ok(true);
    }
    // What an earlier attempt left may be such a link, too, and must not be written through.
    match fs::remove_file(destination) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Of a link it is the file that gets another name.
    Ok(path.canonicalize().and_then(|file| fs::hard_link(file, destination)).is_ok())
}

/// Copies the file at `path`, or links to it; of data a folder, too, as an archive.
pub(super) fn copy(what: &str, path: &Path, destination: &Path, size_max: u64) -> Result<Content, Failure> {
    let shown = path.display().to_string();
    let unreadable = |error: &io::Error| failure(FailureReason::SourceRefused, format!("cannot read the {what} {shown}: {error}"));
    let metadata = fs::metadata(path).map_err(|error| unreadable(&error))?;
    if metadata.is_dir() && what != "model" {
        return pack(what, path, destination, size_max);
    }
    if !metadata.is_file() {
        return Err(failure(
            FailureReason::SourceRefused,
            format!("the {what} {shown} is not a file; name the file itself"),
        ));
    }
    if metadata.len() > size_max {
        return Err(too_large(what, &shown, Some(metadata.len()), size_max));
    }
    let mut source = File::open(path).map_err(|error| unreadable(&error))?;
    let mut target = match link(path, destination).map_err(disk("write", destination))? {
        true => None,
        false => Some(File::create(destination).map_err(disk("write", destination))?),
    };
    let (mut hasher, mut size, mut piece) = (Hasher::default(), 0, vec![0; PIECE_BYTES]);
    loop {
        let length = source.read(&mut piece).map_err(|error| unreadable(&error))?;
        if length == 0 {
            return Ok(Content {
                digest: hasher.finish(),
                size,
            });
        }
        size += length as u64;
        if size > size_max {
            return Err(too_large(what, &shown, None, size_max));
        }
        hasher.update(&piece[..length]);
        if let Some(target) = &mut target {
            target.write_all(&piece[..length]).map_err(disk("write", destination))?;
        }
    }
}

/// Refuses `data` that is a link out of the folder of the `model`, and out of the folder that the model is a link into itself: whoever made
/// the model must not choose what else of this machine is read.
pub(super) fn check_beside(what: &str, model: &Path, data: &Path) -> Result<(), Failure> {
    // What is missing is said when it is read.
    let Ok(resolved) = data.canonicalize() else { return Ok(()) };
    let folder = |folder: PathBuf| if folder.as_os_str().is_empty() { ".".into() } else { folder };
    let own = companion::folders(model).into_iter().map(|own| folder(own).canonicalize());
    let linked = model
        .canonicalize()
        .map(|model| model.parent().unwrap_or(Path::new("/")).to_owned());
    let folders = own.chain([linked]);
    if folders.flatten().any(|folder| resolved.starts_with(folder)) {
        return Ok(());
    }
    let message = format!(
        "the {what} {} is a link that leaves the model's folder; put the file itself beside the model",
        data.display()
    );
    Err(failure(FailureReason::SourceRefused, message))
}

/// Copies the companions of the model at `path` beside `destination`.
pub(super) fn copy_companions(path: &Path, destination: &Path, size_max: u64) -> Result<(), Failure> {
    let what = "file beside the model";
    for name in companion::PATHS {
        let found = companion::folders(path)
            .into_iter()
            .map(|folder| folder.join(name))
            .find(|file| file.is_file());
        let Some(file) = found else { continue };
        check_beside(what, path, &file)?;
        let target = destination.with_file_name(name);
        crate::step::make_folder_of(&target)?;
        copy(what, &file, &target, companion::BYTES_MAX.min(size_max))?;
    }
    Ok(())
}

/// Copies `CLAIM/PATH`. Links are followed only inside of the claim: a volume's content is not ours, the container's files are.
pub(super) fn copy_from_claim(what: &str, claim_and_path: &str, limits: &Limits, destination: &Path) -> Result<Content, Failure> {
    let path = path_of_claim(what, claim_and_path, limits)?;
    copy(what, &path, destination, limits.size_max)
}

/// The path of `CLAIM/PATH`, its links followed.
pub(super) fn path_of_claim(what: &str, claim_and_path: &str, limits: &Limits) -> Result<PathBuf, Failure> {
    let uri = format!("pvc://{claim_and_path}");
    let relative = Path::new(claim_and_path);
    let mut parts = relative.components();
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    let (Some(claim), Some(_), true) = (parts.next(), parts.next(), plain) else {
        return Err(failure(
            FailureReason::InvalidInputs,
            format!("{uri} does not name a file; write pvc://CLAIM/PATH"),
        ));
    };
    let claim = limits.claims.join(claim);
    let missing = |error: io::Error| failure(FailureReason::SourceRefused, format!("cannot read the {what} {uri}: {error}"));
    let root = claim.canonicalize().map_err(missing)?;
    let path = limits.claims.join(relative).canonicalize().map_err(missing)?;
    if !path.starts_with(&root) {
        return Err(failure(
            FailureReason::SourceRefused,
            format!("the {what} {uri} is a link that leaves its volume"),
        ));
    }
    Ok(path)
}
