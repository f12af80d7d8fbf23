//! The layers of a package's image: tar archives that are made and read as streams, the same bytes for the same files. A layer of weights is
//! compressed (RFC 1952) where a sample of it says that this pays, as it does where many weights are zero.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek as _, SeekFrom};
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use futures::Stream;
use oci_client::errors::OciDistributionError;
use oci_client::manifest::{IMAGE_LAYER_GZIP_MEDIA_TYPE, IMAGE_LAYER_MEDIA_TYPE};
use tokio::sync::mpsc;

use super::packing::{Packer, Packing};
use crate::digest::{Digest, Hasher};

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

/// Share of a layer that compression must save.
const SAVING_MIN: f64 = 0.1;
/// Pieces of a file that are compressed to see whether it pays, spread evenly over it, and the bytes of each.
const SAMPLED_PIECES: u64 = 16;
const SAMPLED_BYTES: u64 = 64 << 10;

/// A layer that is yet to be sent.
pub(super) struct Layer {
    content: Content,
    /// Of what is sent.
    pub(super) digest: Digest,
    /// Of what is sent, in bytes.
    pub(super) size: u64,
    /// Of the archive, uncompressed.
    pub(super) diff_id: Digest,
}

enum Content {
    /// The files of a plain archive.
    Plain(Vec<Entry>),
    /// The compressed archive.
    Packed(File),
}

#[derive(Clone)]
struct Entry {
    file: PathBuf,
    name: String,
    size: u64,
}

/// The layers of the package in `dir`: the JSON and text files and pages in one, all others in further ones, each sorted by name.
pub(super) fn plan(dir: &Path) -> io::Result<Vec<Layer>> {
    let mut entries = Vec::new();
    collect(dir, "", &mut entries)?;
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let describes = |entry: &Entry| [".json", ".html", ".txt"].iter().any(|ending| entry.name.ends_with(ending));
    let (described, weights): (Vec<_>, Vec<_>) = entries.into_iter().partition(describes);
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
    let mut layers = Vec::with_capacity(groups.len() + 1);
    for group in groups {
        let largest = group.iter().max_by_key(|entry| entry.size);
        let packing = largest.map_or(Ok(None), |entry| best_packing(&entry.file))?;
        layers.push(match packing {
            Some((packing, _)) => Layer::packed(group, packing, dir)?,
            None => Layer::plain(group)?,
        });
    }
    // Last, as what changes most often; layers before it keep their order.
    if !described.is_empty() {
        layers.push(Layer::plain(described)?);
    }
    Ok(layers)
}

/// About how many bytes of the layer the file at `path` takes when it is pulled: its own, or, where compression pays, fewer, by a sample of
/// 1 MiB.
///
/// # Errors
/// Where the file cannot be read.
pub fn layer_size(path: &Path) -> io::Result<u64> {
    let size = fs::metadata(path)?.len();
    Ok(match best_packing(path)? {
        Some((_, share)) => (size as f64 * share).ceil() as u64,
        None => size,
    })
}

/// The packing that leaves least of a file, and the share of its bytes that it leaves, by a sample; `None` where none pays.
fn best_packing(path: &Path) -> io::Result<Option<(Packing, f64)>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let pieces = size.div_ceil(SAMPLED_BYTES).min(SAMPLED_PIECES);
    let mut read = 0;
    let mut packed = Packing::ALL.map(|packing| (packing, 0));
    for piece in 0..pieces {
        let start = (size - size.min(SAMPLED_BYTES)) * piece / (pieces - 1).max(1);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        (&mut file).take(SAMPLED_BYTES).read_to_end(&mut bytes)?;
        for (packing, packed) in &mut packed {
            *packed += io::copy(&mut Packer::new(&bytes[..], *packing), &mut io::sink())?;
        }
        read += bytes.len();
    }
    let best = packed.into_iter().min_by_key(|(_, packed)| *packed);
    let best = best.map(|(packing, packed)| (packing, packed as f64 / read.max(1) as f64));
    Ok(best.filter(|(_, share)| read > 0 && *share <= 1.0 - SAVING_MIN))
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
    fn plain(entries: Vec<Entry>) -> io::Result<Self> {
        let mut counted = Counted {
            inner: Archive::new(&entries)?,
            count: 0,
        };
        let digest = Digest::of_reader(&mut counted)?;
        Ok(Self {
            content: Content::Plain(entries),
            diff_id: digest.clone(),
            digest,
            size: counted.count,
        })
    }

    /// The compressed archive lies in `dir`, without a name.
    fn packed(entries: Vec<Entry>, packing: Packing, dir: &Path) -> io::Result<Self> {
        let mut hashed = Hashed {
            inner: Archive::new(&entries)?,
            hasher: Hasher::default(),
        };
        let mut file = tempfile::tempfile_in(dir)?;
        let size = io::copy(&mut Packer::new(&mut hashed, packing), &mut file)?;
        file.seek(SeekFrom::Start(0))?;
        let digest = Digest::of_reader(&mut file)?;
        file.seek(SeekFrom::Start(0))?;
        Ok(Self {
            content: Content::Packed(file),
            digest,
            size,
            diff_id: hashed.hasher.finish(),
        })
    }

    /// The layer's media type (OCI Image Format Specification, "Layer").
    pub(super) fn media_type(&self) -> &'static str {
        match self.content {
            Content::Plain(_) => IMAGE_LAYER_MEDIA_TYPE,
            Content::Packed(_) => IMAGE_LAYER_GZIP_MEDIA_TYPE,
        }
    }

    /// The bytes to send; files are opened as their turn comes.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<Bytes, OciDistributionError>> + Send + 'static {
        let (sender, receiver) = mpsc::channel(4);
        tokio::task::spawn_blocking(move || {
            let opened: io::Result<Box<dyn Read>> = match self.content {
                Content::Plain(entries) => Archive::new(&entries).map(|archive| Box::new(archive) as _),
                Content::Packed(file) => Ok(Box::new(file)),
            };
            let mut archive = match opened {
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

struct Hashed<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
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
            ("report.html", 9),
            ("empty.txt", 0),
        ] {
            fs::write(dir.path().join(name), noise(length)).unwrap();
        }
        let layers = plan(dir.path()).unwrap();
        assert_eq!(layers.len(), 2);
        let Content::Plain(described) = &layers[1].content else {
            panic!("it is not packed")
        };
        let names: Vec<&str> = described.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(
            names,
            ["empty.txt", "manifest.json", "report.html"],
            "what describes the model lies apart from the weights"
        );
        let out = tempfile::tempdir().unwrap();
        for layer in &layers {
            let mut bytes = Vec::new();
            match &layer.content {
                Content::Plain(entries) => Archive::new(entries).unwrap().read_to_end(&mut bytes).unwrap(),
                Content::Packed(_) => panic!("random bytes do not pay"),
            };
            assert_eq!((Digest::of(&bytes), bytes.len() as u64), (layer.digest.clone(), layer.size));
            unpack(&mut bytes.as_slice(), out.path()).unwrap();
        }
        for name in ["model.onnx", "weights/a.bin", "manifest.json", "report.html", "empty.txt"] {
            assert_eq!(
                fs::read(dir.path().join(name)).unwrap(),
                fs::read(out.path().join(name)).unwrap(),
                "{name}"
            );
        }
    }

    /// Bytes that do not compress (xorshift).
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..length).map(next).collect()
    }

    #[test]
    fn a_layer_of_many_zeros_is_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let half_zero: Vec<u8> = noise(3_000_000)
            .chunks(64)
            .enumerate()
            .flat_map(|(index, piece)| if index % 2 == 0 { piece.to_vec() } else { vec![0; piece.len()] })
            .collect();
        let file = dir.path().join("model.onnx");
        fs::write(&file, &half_zero).unwrap();
        let layers = plan(dir.path()).unwrap();
        let layer = &layers[0];
        assert_eq!(layer.media_type(), IMAGE_LAYER_GZIP_MEDIA_TYPE);
        assert!((1_500_000..2_100_000).contains(&layer.size), "{}", layer.size);
        let estimated = layer_size(&file).unwrap();
        assert!(estimated.abs_diff(layer.size) < layer.size / 20, "{estimated} for {}", layer.size);
        let Content::Packed(file) = &layer.content else {
            panic!("it is packed")
        };
        let mut archive = Vec::new();
        flate2::read::GzDecoder::new(file).read_to_end(&mut archive).unwrap();
        assert_eq!(Digest::of(&archive), layer.diff_id);
        let out = tempfile::tempdir().unwrap();
        unpack(&mut archive.as_slice(), out.path()).unwrap();
        assert_eq!(fs::read(out.path().join("model.onnx")).unwrap(), half_zero);
        assert_eq!(
            plan(dir.path()).unwrap()[0].digest,
            layer.digest,
            "the same bytes for the same files"
        );
    }
}
