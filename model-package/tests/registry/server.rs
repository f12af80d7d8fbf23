//! A real CNCF Distribution registry on a loopback port, in a folder of its own, ended when it is dropped.

#![allow(dead_code, reason = "each test binary that includes this uses a part of it")]

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running registry.
pub(crate) struct Server {
    process: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Server {
    /// Starts a registry that anybody may push to.
    pub(crate) fn start() -> Self {
        Self::launch(free_port(), tempfile::tempdir().unwrap(), "")
    }

    /// Starts a registry that knows one user.
    pub(crate) fn start_with_password(user: &str, password: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let hash = bcrypt::hash(password, 4).unwrap();
        fs::write(dir.path().join("htpasswd"), format!("{user}:{hash}\n")).unwrap();
        let auth = format!(
            "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
            dir.path().join("htpasswd").display()
        );
        Self::launch(free_port(), dir, &auth)
    }

    fn launch(port: u16, dir: tempfile::TempDir, auth: &str) -> Self {
        let config = dir.path().join("config.yaml");
        let storage = dir.path().join("storage");
        let text = format!(
            "version: 0.1\nlog: {{accesslog: {{disabled: true}}, level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp:\n  addr: 127.0.0.1:{port}\n{auth}",
            storage.display()
        );
        fs::write(&config, text).unwrap();
        let mut process = Command::new(binary())
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let log = fs::read_to_string(dir.path().join("log")).unwrap();
            assert!(
                process.try_wait().unwrap().is_none() && Instant::now() < deadline,
                "the registry does not start:\n{log}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { process, port, dir }
    }

    /// Ends the registry and starts it again on the same port with the same storage, after `between` ran.
    pub(crate) fn restart_after(&mut self, between: impl FnOnce()) {
        self.stop();
        between();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        let port = self.port;
        *self = Self::launch(port, dir, "");
    }

    fn stop(&mut self) {
        // An error says that it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Bytes that reached the storage's upload of any blob, counted by the newest blob data on disk.
    pub(crate) fn bytes_received(&self) -> (u64, Option<std::time::SystemTime>) {
        let blobs = self.blobs();
        let newest = blobs.iter().map(|blob| fs::metadata(blob).unwrap().modified().unwrap()).max();
        (blobs.iter().map(|blob| fs::metadata(blob).unwrap().len()).sum(), newest)
    }

    /// Changes a byte in the middle of every stored blob of more than `size` bytes.
    pub(crate) fn corrupt_blobs_larger_than(&self, size: u64) {
        let large: Vec<_> = self
            .blobs()
            .into_iter()
            .filter(|blob| fs::metadata(blob).unwrap().len() > size)
            .collect();
        assert!(!large.is_empty());
        for blob in large {
            let middle = fs::metadata(&blob).unwrap().len() / 2;
            let mut bytes = fs::read(&blob).unwrap();
            bytes[middle as usize] ^= 1;
            fs::File::create(&blob).unwrap().write_all(&bytes).unwrap();
        }
    }

    fn blobs(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.dir.path().join("storage/docker/registry/v2/blobs"), &mut found);
        found
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, found) } else { found.push(path) }
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

fn binary() -> PathBuf {
    if let Some(named) = std::env::var_os("PLIMSOLL_REGISTRY_BINARY").map(PathBuf::from) {
        assert!(
            named.is_file(),
            "PLIMSOLL_REGISTRY_BINARY names {}, which is no file",
            named.display()
        );
        return named;
    }
    let home = || std::env::home_dir().unwrap().join(".cache");
    let cluster = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(home, PathBuf::from)
        .join("plimsoll/cluster");
    // Where `cargo xtask cluster` keeps what it built, under the hash of what it is made of.
    let built = fs::read_dir(&cluster).into_iter().flatten().map(|entry| entry.unwrap().path());
    let built = built.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("registry-")));
    let newest = built
        .map(|path| path.join("registry"))
        .filter(|path| path.is_file())
        .max_by_key(|path| fs::metadata(path).unwrap().modified().unwrap());
    newest.expect(
        "these tests need a registry: run `cargo xtask cluster tool registry` once, or \
         `go install github.com/distribution/distribution/v3/cmd/registry@v3.0.0` and set PLIMSOLL_REGISTRY_BINARY to it",
    )
}
