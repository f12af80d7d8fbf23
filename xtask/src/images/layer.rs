//! A layer: a tar archive that depends on its entries alone, and not on when, where or by whom it was written.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// The user and group that every image runs as.
pub(crate) const USER_ID: u64 = 65532;

enum Entry {
    Folder { mode: u32, owner: u64 },
    File { mode: u32, contents: Vec<u8> },
    Link { target: String },
}

/// The entries of a layer by path, relative to the root and without a leading slash.
#[derive(Default)]
pub(crate) struct Layer {
    entries: BTreeMap<String, Entry>,
}

/// A layer as it stands in an image.
pub(crate) struct Blob {
    /// The gzip stream.
    pub(crate) bytes: Vec<u8>,
    /// `sha256:...` of the gzip stream.
    pub(crate) digest: String,
    /// `sha256:...` of the tar archive in it.
    pub(crate) diff_id: String,
    /// Size of the tar archive, in bytes.
    pub(crate) unpacked_bytes: u64,
}

impl Layer {
    /// Adds a folder of root's, or of the image's user where `owned` is set.
    pub(crate) fn folder(&mut self, path: &str, mode: u32, owned: bool) {
        self.parents(path);
        self.entries.insert(
            path.to_owned(),
            Entry::Folder {
                mode,
                owner: if owned { USER_ID } else { 0 },
            },
        );
    }

    /// Adds a file of root's.
    pub(crate) fn file(&mut self, path: &str, mode: u32, contents: impl Into<Vec<u8>>) {
        self.parents(path);
        self.entries.insert(
            path.to_owned(),
            Entry::File {
                mode,
                contents: contents.into(),
            },
        );
    }

    /// Adds the contents of `source` as a file of root's; links are followed.
    ///
    /// # Errors
    /// Where `source` cannot be read.
    pub(crate) fn copy(&mut self, source: &Path, path: &str, mode: u32) -> Result<()> {
        let contents = std::fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        self.file(path, mode, contents);
        Ok(())
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entries.insert(path.to_owned(), Entry::Link { target: target.to_owned() });
    }

    fn parents(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            self.entries
                .entry(path[..end].to_owned())
                .or_insert(Entry::Folder { mode: 0o755, owner: 0 });
        }
    }

    /// A digest of what the layer holds, cheaper than packing it.
    pub(crate) fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (path, entry) in &self.entries {
            match entry {
                Entry::Folder { mode, owner } => hash.update(format!("folder {path:?} {mode} {owner}\n")),
                Entry::File { mode, contents } => {
                    hash.update(format!("file {path:?} {mode} {}\n", contents.len()));
                    hash.update(contents);
                }
                Entry::Link { target } => hash.update(format!("link {path:?} {target:?}\n")),
            }
        }
        hex::encode(hash.finalize())
    }

    /// Packs the layer. Equal entries give equal bytes.
    ///
    /// # Errors
    /// Where a path is longer than tar's format holds.
    pub(crate) fn pack(&self) -> Result<Blob> {
        let mut archive = Builder::new(Vec::new());
        for (path, entry) in &self.entries {
            let mut header = Header::new_gnu();
            header.set_mtime(0);
            header.set_gid(0);
            header.set_uid(0);
            header.set_size(0);
            let mut data: &[u8] = &[];
            match entry {
                Entry::Folder { mode, owner } => {
                    header.set_entry_type(EntryType::Directory);
                    header.set_mode(*mode);
                    header.set_uid(*owner);
                    header.set_gid(*owner);
                }
                Entry::File { mode, contents } => {
                    header.set_entry_type(EntryType::Regular);
                    header.set_mode(*mode);
                    header.set_size(contents.len() as u64);
                    data = contents;
                }
                Entry::Link { target } => {
                    header.set_entry_type(EntryType::Symlink);
                    header.set_mode(0o777);
                    header.set_link_name(target)?;
                }
            }
            archive
                .append_data(&mut header, path, data)
                .with_context(|| format!("cannot pack {path}"))?;
        }
        let archive = archive.into_inner()?;
        let mut compressor = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(6));
        compressor.write_all(&archive)?;
        let bytes = compressor.finish()?;
        Ok(Blob {
            digest: digest(&bytes),
            diff_id: digest(&archive),
            unpacked_bytes: archive.len() as u64,
            bytes,
        })
    }
}

/// The digest of `bytes` as registries write it.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_additions_does_not_matter() {
        let mut one = Layer::default();
        one.file("usr/bin/tool", 0o755, "tool");
        one.folder("tmp", 0o1777, false);
        one.link("lib", "usr/lib");
        let mut other = Layer::default();
        other.link("lib", "usr/lib");
        other.folder("tmp", 0o1777, false);
        other.file("usr/bin/tool", 0o755, "tool");
        assert_eq!(one.pack().unwrap().digest, other.pack().unwrap().digest);
        assert_eq!(one.fingerprint(), other.fingerprint());
    }

    #[test]
    fn a_changed_mode_or_byte_changes_the_digest() {
        let packed = |mode, contents: &str| {
            let mut layer = Layer::default();
            layer.file("usr/bin/tool", mode, contents);
            (layer.fingerprint(), layer.pack().unwrap().digest)
        };
        let base = packed(0o755, "tool");
        for changed in [packed(0o644, "tool"), packed(0o755, "fool")] {
            assert_ne!(base.0, changed.0);
            assert_ne!(base.1, changed.1);
        }
    }

    #[test]
    fn entries_have_parents_before_them_and_neither_times_nor_names_of_users() {
        let mut layer = Layer::default();
        layer.file("usr/bin/tool", 0o755, "tool");
        layer.folder("var/lib/registry", 0o750, true);
        let blob = layer.pack().unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&blob.bytes[..]));
        let mut paths = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!(header.mtime().unwrap(), 0);
            assert_eq!(header.username_bytes().unwrap_or_default(), b"");
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            let owner = if path == "var/lib/registry" { USER_ID } else { 0 };
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (owner, owner), "{path}");
            paths.push(path);
        }
        assert_eq!(paths, ["usr", "usr/bin", "usr/bin/tool", "var", "var/lib", "var/lib/registry"]);
    }
}
