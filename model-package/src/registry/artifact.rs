//! Reading blobs, and fetching one model or dataset out of whatever image or artifact holds it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use flate2::read::GzDecoder;
use futures::StreamExt as _;
use oci_client::Reference;
use oci_client::client::BlobResponse;
use oci_client::manifest::{OciDescriptor, OciImageManifest};
use tokio::sync::mpsc;

use super::error::{Problem, RegistryError};
use super::{Attempts, Registry, invalid, layer};
use crate::companion;
use crate::digest::{Digest, Hasher};

/// The annotation by which ORAS names the file that a layer is.
const TITLE: &str = "org.opencontainers.image.title";
/// The annotation by which ORAS marks a titled layer as a packed folder.
const PACKED_FOLDER: &str = "io.deis.oras.content.unpack";
/// Endings of file names by which the one file of interest is told from a readme beside it.
const MODEL_ENDINGS: [&str; 2] = [".onnx", ".npz"];

/// Told of the bytes done and, where it is known, of all bytes, for every piece that arrives.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<ProgressFn>>);

type ProgressFn = dyn Fn(u64, Option<u64>) + Send + Sync;

impl Progress {
    /// Calls `report` with the bytes done and all bytes.
    pub fn new(report: impl Fn(u64, Option<u64>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(report)))
    }

    /// Reports.
    pub fn report(&self, done: u64, total: Option<u64>) {
        if let Some(report) = &self.0 {
            report(done, total);
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

/// A file that was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedFile {
    /// Its name in the artifact.
    pub name: String,
    /// Of its content.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// The paths of its companions (see [`companion`](crate::companion)), which were fetched beside it.
    pub companions: Vec<&'static str>,
}

impl Registry {
    /// Fetches the one model or dataset that `reference` holds into the file `destination`, of at most `size_max` bytes.
    ///
    /// Taken are a layer that is the file itself (as ORAS pushes it, by its title) and tar archives, plain or gzipped, in OCI's or
    /// Docker's form, that hold one file, or one `.onnx` or `.npz` among others (as `crane append` and Docker make them). Where `name` is
    /// given, it is the file of that name that is fetched. With `companions`, those that the artifact holds beside the model are put beside
    /// `destination`.
    ///
    /// # Errors
    /// Where the registry cannot be reached, refuses or does not have it, where it is too large, or where no or more than one file
    /// comes into question.
    pub async fn fetch_artifact(
        &self,
        reference: &str,
        name: Option<&str>,
        companions: bool,
        destination: &Path,
        size_max: u64,
        progress: &Progress,
    ) -> Result<FetchedFile, RegistryError> {
        let image = self.authorised(reference).await?;
        let manifest = self.image_manifest(&image, reference).await?;
        match plain_file(&manifest, name).map_err(|why| invalid(reference, &why))? {
            Some((name, layer)) => {
                check_size(reference, layer, size_max)?;
                let target = destination.to_owned();
                let written = move |reader: &mut dyn Read| write_file(reader, &target, size_max);
                let (digest, size) = self.read_blob(&image, reference, layer, progress, written).await?;
                let mut fetched = FetchedFile {
                    companions: vec![],
                    name,
                    digest,
                    size,
                };
                let beside = if companions {
                    plain_companions(&manifest, &fetched.name)
                } else {
                    vec![]
                };
                for (path, layer) in beside {
                    check_size(reference, layer, companion::BYTES_MAX)?;
                    let target = beside_of(destination, path);
                    let written = move |reader: &mut dyn Read| write_file(reader, &target?, companion::BYTES_MAX);
                    self.read_blob(&image, reference, layer, &Progress::default(), written).await?;
                    fetched.companions.push(path);
                }
                Ok(fetched)
            }
            None => {
                let mut choice = Choice {
                    wanted: name.map(ToOwned::to_owned),
                    destination: destination.to_owned(),
                    size_max,
                    companions,
                    kept: vec![],
                    chosen: None,
                    seen: 0,
                };
                for layer in &manifest.layers {
                    check_size(reference, layer, size_max)?;
                    let gzipped = layer.media_type.ends_with("gzip");
                    if layer.media_type.ends_with("zstd") {
                        return Err(invalid(reference, &"its layer is compressed with zstd; push it plain or gzipped"));
                    }
                    let scan = move |reader: &mut dyn Read| choice.scan(reader, gzipped);
                    choice = self.read_blob(&image, reference, layer, progress, scan).await?;
                }
                let mut kept = std::mem::take(&mut choice.kept);
                let mut chosen = choice.decide().map_err(|why| invalid(reference, &why))?;
                let folders = companion::folders(Path::new(&chosen.name));
                for path in companion::PATHS {
                    let is_its = |(name, _): &(String, Vec<u8>)| folders.iter().any(|folder| folder.join(path) == Path::new(name));
                    let Some(index) = kept.iter().position(is_its) else { continue };
                    let (_, content) = kept.swap_remove(index);
                    let written = beside_of(destination, path).and_then(|target| std::fs::write(target, content));
                    written.map_err(|source| RegistryError::from_io(reference, &source))?;
                    chosen.companions.push(path);
                }
                Ok(chosen)
            }
        }
    }

    /// The manifest of the image, or of the one of an index that fits.
    async fn image_manifest(&self, image: &Reference, reference: &str) -> Result<OciImageManifest, RegistryError> {
        let auth = self.credentials.for_registry(image.registry());
        let mut attempts = Attempts::new(self.retries);
        loop {
            match self.client(image).pull_image_manifest(image, &auth).await {
                Ok((manifest, _)) => return Ok(manifest),
                Err(source) => pause(&mut attempts, 0, RegistryError::from_client(reference, source)).await?,
            }
        }
    }

    /// Streams a blob through `read` on a blocking thread, checks its size and digest, and returns what `read` made of it. Where the
    /// connection breaks off, the rest is asked for; `read` does not notice.
    pub(super) async fn read_blob<T: Send + 'static>(
        &self,
        image: &Reference,
        reference: &str,
        layer: &OciDescriptor,
        progress: &Progress,
        read: impl FnOnce(&mut dyn Read) -> io::Result<T> + Send + 'static,
    ) -> Result<T, RegistryError> {
        let (sender, receiver) = mpsc::channel(8);
        let reader = tokio::task::spawn_blocking(move || {
            let mut pieces = Pieces {
                receiver,
                piece: Bytes::new(),
            };
            let made = read(&mut pieces)?;
            // What follows an archive's end counts for the digest, too.
            io::copy(&mut pieces, &mut io::sink()).map(|_| made)
        });
        let mut blob = Blob::new(reference, layer);
        let mut attempts = Attempts::new(self.retries);
        let passed = loop {
            match blob.pass_on(self, image, progress, &sender).await {
                Err(error) if error.problem == Problem::Unreachable && blob.can_go_on() => {
                    if let Err(error) = pause(&mut attempts, blob.done, error).await {
                        break Err(error);
                    }
                }
                passed => break passed,
            }
        };
        if passed.is_err() {
            // What passes through an archive's reader comes out as another error, so this one is only to end it. Where the reader has
            // ended already, nobody receives it.
            let _ = sender.send(Err(io::Error::from(io::ErrorKind::ConnectionAborted))).await;
        }
        drop(sender);
        let made = reader.await.map_err(io::Error::other).flatten();
        passed?;
        made.map_err(|source| RegistryError::from_io(reference, &source))
    }
}

/// Waits before the next attempt.
///
/// # Errors
/// With `error`, where it does not pass or there is no further attempt.
async fn pause(attempts: &mut Attempts, done: u64, error: RegistryError) -> Result<(), RegistryError> {
    if !error.is_transient() {
        return Err(error);
    }
    let delay = attempts.next_delay(done).ok_or(error)?;
    tokio::time::sleep(delay).await;
    Ok(())
}

/// A blob on its way, over as many connections as it takes.
struct Blob<'a> {
    reference: &'a str,
    layer: &'a OciDescriptor,
    /// In bytes.
    size: u64,
    /// What it must be; absent where it is of another kind than SHA-256, which the client checks over one connection alone.
    digest: Option<Digest>,
    hasher: Hasher,
    /// Bytes that were passed on.
    done: u64,
}

impl<'a> Blob<'a> {
    fn new(reference: &'a str, layer: &'a OciDescriptor) -> Self {
        Self {
            reference,
            layer,
            size: u64::try_from(layer.size).unwrap_or_default(),
            digest: layer.digest.parse().ok(),
            hasher: Hasher::default(),
            done: 0,
        }
    }

    /// Whether what came over one connection can be checked together with what comes over the next.
    fn can_go_on(&self) -> bool {
        self.digest.is_some() || self.done == 0
    }

    /// Asks for what is missing and passes it on, to the end.
    async fn pass_on(
        &mut self,
        registry: &Registry,
        image: &Reference,
        progress: &Progress,
        receiver: &mpsc::Sender<io::Result<Bytes>>,
    ) -> Result<(), RegistryError> {
        if self.done > 0 && self.done == self.size {
            // The connection broke off after the last byte.
            return self.check();
        }
        let client = registry.client(image);
        let failed = |source| RegistryError::from_client(self.reference, source);
        // A registry that knows no ranges (RFC 9110, section 14.2) sends all again, of which the beginning is known.
        let (mut pieces, mut known) = if self.done == 0 {
            (client.pull_blob_stream(image, self.layer).await.map_err(failed)?.stream, 0)
        } else {
            match client
                .pull_blob_stream_partial(image, self.layer, self.done, None)
                .await
                .map_err(failed)?
            {
                BlobResponse::Partial(rest) => (rest.stream, 0),
                BlobResponse::Full(all) => (all.stream, self.done),
            }
        };
        while self.done < self.size {
            let Some(piece) = pieces.next().await else {
                let message = format!("layer {} broke off after {} of {} bytes", self.layer.digest, self.done, self.size);
                return Err(RegistryError::new(self.reference, Problem::Unreachable, message));
            };
            let mut piece = piece.map_err(|error| RegistryError::from_io(self.reference, &error))?;
            let skipped = known.min(piece.len() as u64);
            known -= skipped;
            let piece = piece.split_off(skipped as usize);
            self.take(&piece)?;
            progress.report(self.done, Some(self.size));
            if receiver.send(Ok(piece)).await.is_err() {
                // The reader failed, and says why.
                return Ok(());
            }
        }
        // The client's own check comes with the end, as does what there should not be.
        while let Some(piece) = pieces.next().await {
            self.take(&piece.map_err(|error| RegistryError::from_io(self.reference, &error))?)?;
        }
        self.check()
    }

    fn check(&mut self) -> Result<(), RegistryError> {
        let received = std::mem::take(&mut self.hasher).finish();
        match &self.digest {
            Some(digest) if *digest != received => {
                let message = format!("layer {digest} has the digest {received}");
                Err(RegistryError::new(self.reference, Problem::DigestMismatch, message))
            }
            _ => Ok(()),
        }
    }

    fn take(&mut self, piece: &[u8]) -> Result<(), RegistryError> {
        self.done += piece.len() as u64;
        if self.done > self.size {
            let message = format!("layer {} is longer than its manifest says", self.layer.digest);
            return Err(RegistryError::new(self.reference, Problem::Invalid, message));
        }
        self.hasher.update(piece);
        Ok(())
    }
}

/// The pieces of a stream, read on a blocking thread.
struct Pieces {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.piece.len());
        buffer[..length].copy_from_slice(&self.piece.split_to(length));
        Ok(length)
    }
}

/// The layer that is a file itself, with its name; `None` where layers are archives.
fn plain_file<'a>(manifest: &'a OciImageManifest, wanted: Option<&str>) -> Result<Option<(String, &'a OciDescriptor)>, String> {
    let title = |layer: &OciDescriptor| {
        let annotations = layer.annotations.as_ref()?;
        let packed = annotations.get(PACKED_FOLDER).is_some_and(|packed| packed == "true");
        annotations.get(TITLE).filter(|_| !packed).cloned()
    };
    let titled: Vec<_> = manifest.layers.iter().filter_map(|layer| Some((title(layer)?, layer))).collect();
    if titled.is_empty() {
        return match manifest.layers.as_slice() {
            [] => Err("it has no layers".into()),
            [layer] if !layer.media_type.contains("tar") => Ok(Some((layer.digest.clone(), layer))),
            _ => Ok(None),
        };
    }
    let names = titled.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    let only = titled.len() == 1;
    let mut candidates = titled
        .into_iter()
        .filter(|(name, _)| wanted.map_or(only || is_model(name), |wanted| name == wanted));
    match (candidates.next(), candidates.next()) {
        (Some(candidate), None) => Ok(Some(candidate)),
        (None, _) if wanted.is_some() => Err(format!("it holds no file `{}` ({names})", wanted.unwrap_or_default())),
        _ => Err(format!("it holds several files ({names}); push the one that is meant by itself")),
    }
}

/// The layers that are companions of the file `model`, with their paths.
fn plain_companions<'a>(manifest: &'a OciImageManifest, model: &str) -> Vec<(&'static str, &'a OciDescriptor)> {
    let titled = |title: &Path| {
        manifest.layers.iter().find(|layer| {
            let annotations = layer.annotations.as_ref();
            annotations
                .and_then(|annotations| annotations.get(TITLE))
                .is_some_and(|known| Path::new(known) == title)
        })
    };
    let folders = companion::folders(Path::new(model));
    let find = |path: &&'static str| Some((*path, folders.iter().find_map(|folder| titled(&folder.join(path)))?));
    companion::PATHS.iter().filter_map(find).collect()
}

/// Where the companion `path` of the file `destination` goes; its folder is made.
fn beside_of(destination: &Path, path: &str) -> io::Result<PathBuf> {
    let target = destination.with_file_name(path);
    std::fs::create_dir_all(target.parent().unwrap_or(&target))?;
    Ok(target)
}

/// Whether the archive's entry `path` is the file `name`, in whatever folder.
fn is_named(path: &str, name: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|folder| folder.is_empty() || folder.ends_with('/'))
}

fn is_model(name: &str) -> bool {
    MODEL_ENDINGS.iter().any(|ending| name.ends_with(ending))
}

fn check_size(reference: &str, layer: &OciDescriptor, size_max: u64) -> Result<(), RegistryError> {
    let size = u64::try_from(layer.size).map_err(|_| invalid(reference, &"a layer has a negative size"))?;
    // An archive's headers and padding are not its file's.
    let slack = if layer.media_type.contains("tar") { 64 << 10 } else { 0 };
    if size > size_max + slack {
        return Err(RegistryError::new(
            reference,
            Problem::TooLarge,
            format!("it has {size} bytes, the limit is {size_max}"),
        ));
    }
    Ok(())
}

fn write_file(reader: &mut dyn Read, destination: &Path, size_max: u64) -> io::Result<(Digest, u64)> {
    let mut file = File::create(destination)?;
    let mut hasher = Hasher::default();
    let mut piece = vec![0; 256 << 10];
    let mut size = 0;
    loop {
        let length = reader.read(&mut piece)?;
        if length == 0 {
            return Ok((hasher.finish(), size));
        }
        size += length as u64;
        if size > size_max {
            return Err(too_large(size_max));
        }
        hasher.update(&piece[..length]);
        file.write_all(&piece[..length])?;
    }
}

fn too_large(size_max: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::FileTooLarge,
        format!("it unpacks to more than the limit of {size_max} bytes"),
    )
}

/// Which of the files that pass by is the one that is meant.
struct Choice {
    wanted: Option<String>,
    destination: PathBuf,
    size_max: u64,
    /// Whether companions are wanted.
    companions: bool,
    /// The files that may be companions of the one that is chosen in the end, by their paths in the archive.
    kept: Vec<(String, Vec<u8>)>,
    chosen: Option<FetchedFile>,
    seen: usize,
}

impl Choice {
    fn scan(mut self, reader: &mut dyn Read, gzipped: bool) -> io::Result<Self> {
        let mut unpacked: Box<dyn Read + '_> = if gzipped {
            Box::new(GzDecoder::new(reader))
        } else {
            Box::new(reader)
        };
        // Twice the limit leaves room for what lies beside the model, and none for a bomb.
        let mut bounded = Bounded {
            inner: &mut unpacked,
            left: self.size_max.saturating_mul(2).saturating_add(64 << 10),
            size_max: self.size_max,
        };
        for entry in tar::Archive::new(&mut bounded).entries()? {
            let mut entry = entry?;
            if entry.header().entry_type() != tar::EntryType::Regular {
                continue;
            }
            let name = entry.path()?.to_string_lossy().into_owned();
            self.seen += 1;
            if self.companions && companion::PATHS.iter().any(|path| is_named(&name, path)) {
                let held: u64 = self.kept.iter().map(|(_, content)| content.len() as u64).sum();
                if held + entry.size() > companion::BYTES_MAX {
                    let bytes_max = companion::BYTES_MAX;
                    return Err(layer::invalid(format!(
                        "{name} and what lies beside other models have more than {bytes_max} bytes"
                    )));
                }
                let mut content = vec![];
                entry.read_to_end(&mut content)?;
                // A later layer's file takes the place of an earlier one's.
                self.kept.retain(|(kept, _)| *kept != name);
                self.kept.push((name, content));
                continue;
            }
            match &self.chosen {
                _ if self.wanted.as_ref().is_some_and(|wanted| !is_named(&name, wanted)) => continue,
                Some(chosen) if is_model(&chosen.name) && is_model(&name) => {
                    return Err(layer::invalid(format!(
                        "it holds several models ({}, {name}); push the one that is meant by itself",
                        chosen.name
                    )));
                }
                Some(_) if !is_model(&name) => continue,
                _ => {}
            }
            let (digest, size) = write_file(&mut entry, &self.destination, self.size_max)?;
            self.chosen = Some(FetchedFile {
                companions: vec![],
                name,
                digest,
                size,
            });
        }
        Ok(self)
    }

    fn decide(self) -> Result<FetchedFile, String> {
        match self.chosen {
            None if self.wanted.is_some() => Err(format!("its layers hold no file `{}`", self.wanted.unwrap_or_default())),
            None => Err("its layers hold no file".into()),
            Some(chosen) if self.wanted.is_none() && self.seen > 1 && !is_model(&chosen.name) => {
                Err(format!("it holds {} files and none ends in .onnx or .npz", self.seen))
            }
            Some(chosen) => Ok(chosen),
        }
    }
}

struct Bounded<'a> {
    inner: &'a mut dyn Read,
    left: u64,
    size_max: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| too_large(self.size_max))?;
        Ok(read)
    }
}
