//! The layers of a package's image: tar archives that are made and read as streams, the same bytes for the same files.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use futures::Stream;
use oci_client::errors::OciDistributionError;
use tokio::sync::mpsc;

use crate::digest::Digest;

/// Most bytes of files in one layer, so that layers pull in parallel; a larger file has a layer of its own.
pub const LAYER_BYTES_MAX: u64 = 1 << 30;
/// The folder of the image that holds the package.
const FOLDER: &str = "model";
/// Most files in a package.
const FILES_MAX: usize = 10_000;
/// Bytes read at a time.
const PIECE_BYTES: usize = 256 << 10;
/// A tar archive is a sequence of blocks of this size (POSIX.1-1988 ustar).
const BLOCK_BYTES: u64 = 512;

/// A layer that is yet to be sent.
pub(super) struct Layer {
    entries: Vec<Entry>,
    /// Of the archive.
    pub(super) digest: Digest,
    /// Of the archive, in bytes.
    pub(super) size: u64,
}

#[derive(Clone)]
struct Entry {
    file: PathBuf,
    name: String,
    size: u64,
}

/// The layers of the package in `dir`: the JSON files in one, all others in further ones, each sorted by name.
pub(super) fn plan(dir: &Path) -> io::Result<Vec<Layer>> {
    let mut entries = Vec::new();
    collect(dir, "", &mut entries)?;
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let (described, weights): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| entry.name.ends_with(".json"));
    let mut groups: Vec<Vec<Entry>> = Vec::new();
    let mut filled = u64::MAX;
    for entry in weights {
        if filled.saturating_add(entry.size) > LAYER_BYTES_MAX {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += entry.size;
        groups.last_mut().expect("a group was pushed for the first entry").push(entry);
    }
    // Last, as what changes most often; layers before it keep their order.
    groups.push(described);
    groups.into_iter().filter(|group| !group.is_empty()).map(Layer::new).collect()
}

fn collect(dir: &Path, prefix: &str, entries: &mut Vec<Entry>) -> io::Result<()> {
    for found in fs::read_dir(dir)? {
        let found = found?;
        let name = found
            .file_name()
            .into_string()
            .map_err(|name| invalid(format!("the file name {} is not UTF-8", name.display())))?;
        let name = format!("{prefix}{name}");
        let kind = found.file_type()?;
        if kind.is_dir() {
            collect(&found.path(), &format!("{name}/"), entries)?;
        } else if kind.is_file() {
            entries.push(Entry {
                file: found.path(),
                name,
                size: found.metadata()?.len(),
            });
        } else {
            return Err(invalid(format!("{} is neither a file nor a folder", found.path().display())));
        }
    }
    Ok(())
}

impl Layer {
    fn new(entries: Vec<Entry>) -> io::Result<Self> {
        let mut counted = Counted {
            inner: Archive::new(&entries)?,
            count: 0,
        };
        let digest = Digest::of_reader(&mut counted)?;
        Ok(Self {
            entries,
            digest,
            size: counted.count,
        })
    }

    /// The archive's bytes; files are opened as their turn comes.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<Bytes, OciDistributionError>> + Send + 'static {
        let (sender, receiver) = mpsc::channel(4);
        tokio::task::spawn_blocking(move || {
            let mut archive = match Archive::new(&self.entries) {
                Ok(archive) => archive,
                Err(error) => return drop(sender.blocking_send(Err(error.into()))),
            };
            loop {
                let mut piece = vec![0; PIECE_BYTES];
                let read = archive.read(&mut piece).map_err(OciDistributionError::from);
                let done = !matches!(read, Ok(1..));
                let piece = match read {
                    Ok(0) => return,
                    Ok(length) => {
                        piece.truncate(length);
                        Ok(Bytes::from(piece))
                    }
                    Err(error) => Err(error),
                };
                // Nobody listens any more once the request failed.
                if sender.blocking_send(piece).is_err() || done {
                    return;
                }
            }
        });
        futures::stream::unfold(receiver, async |mut receiver| receiver.recv().await.map(|piece| (piece, receiver)))
    }
}

/// A tar archive of files that are read when their turn comes; times, owners and modes are fixed.
struct Archive(VecDeque<Part>);

enum Part {
    Bytes(Cursor<Vec<u8>>),
    Unopened(PathBuf, u64),
    Open(PathBuf, io::Take<File>),
}

impl Archive {
    fn new(entries: &[Entry]) -> io::Result<Self> {
        let mut parts = VecDeque::new();
        parts.push_back(Part::Bytes(Cursor::new(header(
            &format!("{FOLDER}/"),
            0,
            tar::EntryType::Directory,
            0o755,
        )?)));
        for entry in entries {
            let name = format!("{FOLDER}/{}", entry.name);
            parts.push_back(Part::Bytes(Cursor::new(header(&name, entry.size, tar::EntryType::Regular, 0o644)?)));
            parts.push_back(Part::Unopened(entry.file.clone(), entry.size));
            let padding = entry.size.next_multiple_of(BLOCK_BYTES) - entry.size;
            parts.push_back(Part::Bytes(Cursor::new(vec![0; padding as usize])));
        }
        // Two empty blocks end an archive.
        parts.push_back(Part::Bytes(Cursor::new(vec![0; 2 * BLOCK_BYTES as usize])));
        Ok(Self(parts))
    }
}

fn header(name: &str, size: u64, kind: tar::EntryType, mode: u32) -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name)?;
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    Ok(header.as_bytes().to_vec())
}

impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(part) = self.0.front_mut() {
            let read = match part {
                Part::Bytes(bytes) => bytes.read(buffer)?,
                Part::Unopened(path, size) => {
                    let file = File::open(&*path)?.take(*size);
                    *part = Part::Open(std::mem::take(path), file);
                    continue;
                }
                Part::Open(path, file) => match file.read(buffer)? {
                    0 if file.limit() > 0 => return Err(invalid(format!("{} became shorter while it was sent", path.display()))),
                    read => read,
                },
            };
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            self.0.pop_front();
        }
        Ok(0)
    }
}

struct Counted<R> {
    inner: R,
    count: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count += read as u64;
        Ok(read)
    }
}

/// Writes the files of a package's archive under `target`, without their leading `model/`.
pub(super) fn unpack(reader: &mut dyn Read, target: &Path) -> io::Result<()> {
    for (count, entry) in tar::Archive::new(reader).entries()?.enumerate() {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        if count >= FILES_MAX {
            return Err(invalid(format!("the package holds more than {FILES_MAX} files")));
        }
        let inside = path
            .strip_prefix(FOLDER)
            .ok()
            .filter(|inside| inside.components().all(|part| matches!(part, Component::Normal(_))));
        let Some(inside) = inside else {
            return Err(invalid(format!(
                "the package holds `{}`, which is not inside of {FOLDER}/",
                path.display()
            )));
        };
        match entry.header().entry_type() {
            tar::EntryType::Directory => {}
            tar::EntryType::Regular if inside != Path::new("") => {
                let file = target.join(inside);
                fs::create_dir_all(file.parent().unwrap_or(target))?;
                io::copy(&mut entry, &mut File::create(file)?)?;
            }
            _ => {
                return Err(invalid(format!(
                    "the package holds `{}`, which is neither a file nor a folder",
                    path.display()
                )));
            }
        }
    }
    Ok(())
}

/// Moves everything in `from` into its parent `to`, over what is there.
pub(super) fn move_up(from: &Path, to: &Path) -> io::Result<()> {
    for found in fs::read_dir(from)? {
        let found = found?;
        let target = to.join(found.file_name());
        if target.is_dir() {
            fs::remove_dir_all(&target)?;
        }
        fs::rename(found.path(), target)?;
    }
    Ok(())
}

pub(super) fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive_of(path: &str, kind: tar::EntryType) -> Vec<u8> {
        let mut bytes = header("x", 0, kind, 0o644).unwrap();
        // By hand: the library refuses to write such a path.
        let mut raw = tar::Header::new_ustar();
        raw.as_mut_bytes().copy_from_slice(&bytes);
        raw.as_mut_bytes()[..100].fill(0);
        raw.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        raw.set_cksum();
        bytes.copy_from_slice(raw.as_bytes());
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    #[test]
    fn nothing_is_written_outside_of_the_target() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["model/../../escape", "/etc/escape", "other/escape", "escape"] {
            let error = unpack(&mut archive_of(path, tar::EntryType::Regular).as_slice(), dir.path()).unwrap_err();
            assert!(error.to_string().contains("not inside of model/"), "{path}: {error}");
        }
        for kind in [
            tar::EntryType::Symlink,
            tar::EntryType::Link,
            tar::EntryType::Char,
            tar::EntryType::Fifo,
        ] {
            let error = unpack(&mut archive_of("model/link", kind).as_slice(), dir.path()).unwrap_err();
            assert!(error.to_string().contains("neither a file nor a folder"), "{error}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_package_comes_out_of_its_layers_as_it_went_in() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("weights")).unwrap();
        for (name, length) in [
            ("model.onnx", 1_000_000),
            ("weights/a.bin", 512),
            ("manifest.json", 7),
            ("empty.txt", 0),
        ] {
            fs::write(dir.path().join(name), vec![7_u8; length]).unwrap();
        }
        let layers = plan(dir.path()).unwrap();
        assert_eq!(layers.len(), 2);
        let out = tempfile::tempdir().unwrap();
        for layer in &layers {
            let mut bytes = Vec::new();
            Archive::new(&layer.entries).unwrap().read_to_end(&mut bytes).unwrap();
            assert_eq!((Digest::of(&bytes), bytes.len() as u64), (layer.digest.clone(), layer.size));
            unpack(&mut bytes.as_slice(), out.path()).unwrap();
        }
        for name in ["model.onnx", "weights/a.bin", "manifest.json", "empty.txt"] {
            assert_eq!(
                fs::read(dir.path().join(name)).unwrap(),
                fs::read(out.path().join(name)).unwrap(),
                "{name}"
            );
        }
    }
}
