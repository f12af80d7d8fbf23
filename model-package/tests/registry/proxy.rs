//! A proxy before a registry that cuts connections off.

#![allow(dead_code, reason = "each test binary that includes this uses a part of it")]

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Passes on what two sides of a connection say, and drops connections half-way. It ends with the test's process.
pub(crate) struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    /// Bytes of answers after which the next connections are dropped, in their order; those after them are not.
    cuts: Mutex<VecDeque<u64>>,
    /// Whether requests for a range reach the registry as such, or as requests for the whole.
    ranges: bool,
    ranged: AtomicUsize,
    answered: AtomicU64,
}

impl Proxy {
    /// Before the registry at `host` (`127.0.0.1:PORT`).
    pub(crate) fn start(host: &str, cuts: &[u64], ranges: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            cuts: Mutex::new(cuts.iter().copied().collect()),
            ranges,
            ranged: AtomicUsize::new(0),
            answered: AtomicU64::new(0),
        });
        let (behind, state) = (host.to_owned(), Arc::clone(&shared));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server, shared) = (client.unwrap(), TcpStream::connect(&behind).unwrap(), Arc::clone(&state));
                std::thread::spawn(move || shared.relay(client, server));
            }
        });
        Self { port, shared }
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// How many requests asked for a range.
    pub(crate) fn ranged(&self) -> usize {
        self.shared.ranged.load(Ordering::SeqCst)
    }

    /// Bytes of all answers, headers among them, that went to clients.
    pub(crate) fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn relay(self: Arc<Self>, client: TcpStream, server: TcpStream) {
        let (mut requests, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let shared = Arc::clone(&self);
        std::thread::spawn(move || {
            let mut buffer = [0; 64 << 10];
            // Headers of a request come in one piece from the client that is tested.
            while let Ok(length @ 1..) = requests.read(&mut buffer) {
                shared.look_at(&mut buffer[..length]);
                if to_server.write_all(&buffer[..length]).is_err() {
                    break;
                }
            }
            // The client has gone, so the registry need not answer.
            let _ = to_server.shutdown(Shutdown::Both);
        });
        let (mut answers, mut to_client) = (server, client);
        let mut buffer = [0; 16 << 10];
        // Of a connection that nothing large comes over, the cut is for the next one.
        let mut left = None;
        let mut passed = 0;
        while let Ok(length @ 1..) = answers.read(&mut buffer) {
            passed += length as u64;
            if left.is_none() && passed > SMALL_BYTES {
                left = Some(self.cuts.lock().unwrap().pop_front().unwrap_or(u64::MAX));
            }
            let allowed = left.map_or(length, |left| length.min(usize::try_from(left).unwrap_or(usize::MAX)));
            self.answered.fetch_add(allowed as u64, Ordering::SeqCst);
            if to_client.write_all(&buffer[..allowed]).is_err() || allowed < length {
                break;
            }
            left = left.map(|left| left - allowed as u64);
        }
        // Either side may have gone already.
        let _ = to_client.shutdown(Shutdown::Both);
        let _ = answers.shutdown(Shutdown::Both);
    }

    fn look_at(&self, request: &mut [u8]) {
        const HEADER: &[u8] = b"\r\nrange: ";
        if let Some(start) = request.windows(HEADER.len()).position(|window| window.eq_ignore_ascii_case(HEADER)) {
            self.ranged.fetch_add(1, Ordering::SeqCst);
            if !self.ranges {
                // A header that means nothing.
                request[start + 2..start + 7].copy_from_slice(b"x-ran");
            }
        }
    }
}

/// Manifests and refusals are smaller.
const SMALL_BYTES: u64 = 16 << 10;
