//! Load on a server over loopback: connections that are kept open, each with one request at a time.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::Serialize;

/// What a server did under load.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Served {
    /// Requests answered in a second.
    pub rps: f64,
    /// Median time of a request, in microseconds.
    pub p50_us: f64,
    /// The time within which 99 of 100 requests are answered, in microseconds.
    pub p99_us: f64,
    /// Requests that were not answered with 200.
    pub failed: u64,
}

/// A request that is sent again and again.
#[derive(Debug, Clone)]
pub(super) struct Request(Vec<u8>);

impl Request {
    /// `POST path` with that body and those headers, each ended by CR LF.
    pub(super) fn post(path: &str, headers: &str, body: &[u8]) -> Self {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        );
        Self([head.as_bytes(), body].concat())
    }
}

/// A connection that is kept open.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self {
            stream,
            buffer: vec![0; 64 << 10],
        })
    }

    /// Sends the request and reads the answer to its end; gives its status.
    fn send(&mut self, request: &Request) -> io::Result<u16> {
        self.stream.write_all(&request.0)?;
        let mut filled = 0;
        let (status, mut left) = loop {
            if filled == self.buffer.len() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let read = self.stream.read(&mut self.buffer[filled..])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += read;
            if let Some(end) = find(&self.buffer[..filled], b"\r\n\r\n") {
                let head = std::str::from_utf8(&self.buffer[..end]).map_err(|_| io::ErrorKind::InvalidData)?;
                let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default();
                let length = head.lines().filter_map(|line| line.split_once(": ")).find_map(|(name, value)| {
                    let wanted = name.eq_ignore_ascii_case("content-length");
                    wanted.then(|| value.parse::<usize>().ok())?
                });
                let length = length.ok_or(io::ErrorKind::InvalidData)?;
                break (status, (end + 4 + length).saturating_sub(filled));
            }
        };
        while left > 0 {
            let take = left.min(self.buffer.len());
            match self.stream.read(&mut self.buffer[..take])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => left -= read,
            }
        }
        Ok(status)
    }
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

/// Whether the server answers that request with 200.
pub(super) fn answers(address: SocketAddr, request: &Request) -> bool {
    Connection::open(address)
        .and_then(|mut connection| connection.send(request))
        .is_ok_and(|status| status == 200)
}

/// Loads a server by `connections` for that long, after a tenth of it to warm up. With `pace`, each connection sends so many requests a
/// second and no more.
///
/// # Errors
/// Where a connection cannot be opened, or breaks off more than once.
pub(super) fn load(address: SocketAddr, request: &Request, connections: usize, time: Duration, pace: Option<f64>) -> Result<Served> {
    let (measuring, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let failed = AtomicU64::new(0);
    let client = || -> io::Result<Vec<u32>> {
        let mut connection = Connection::open(address)?;
        let mut took = Vec::with_capacity(1 << 16);
        let mut next = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            if let Some(pace) = pace {
                next += Duration::from_secs_f64(1.0 / pace);
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            let begun = Instant::now();
            let status = connection.send(request)?;
            if measuring.load(Ordering::Relaxed) {
                took.push(begun.elapsed().as_micros().min(u128::from(u32::MAX)) as u32);
                if status != 200 {
                    failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(took)
    };
    let (results, seconds) = thread::scope(|scope| {
        let clients: Vec<_> = (0..connections).map(|_| scope.spawn(client)).collect();
        thread::sleep(time / 10);
        measuring.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
        let seconds = begun.elapsed().as_secs_f64();
        (clients.into_iter().map(|client| client.join()).collect::<Vec<_>>(), seconds)
    });
    let mut took = vec![];
    for result in results {
        match result {
            Ok(times) => took.extend(times?),
            Err(_) => bail!("a client panicked"),
        }
    }
    took.sort_unstable();
    let at = |share: f64| {
        took.get((took.len() as f64 * share) as usize)
            .map_or(f64::NAN, |&micros| f64::from(micros))
    };
    Ok(Served {
        rps: took.len() as f64 / seconds,
        p50_us: at(0.5),
        p99_us: at(0.99),
        failed: failed.into_inner(),
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn answers_are_counted_and_failures_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 1024];
            for answer in ["200 OK", "503 Service Unavailable"].iter().cycle() {
                if stream.read(&mut buffer).unwrap_or(0) == 0 {
                    return;
                }
                let _ = stream.write_all(format!("HTTP/1.1 {answer}\r\nContent-Length: 2\r\n\r\n{{}}").as_bytes());
            }
        });
        let request = Request::post("/", "", b"{}");
        let served = load(address, &request, 1, Duration::from_millis(100), None).unwrap();
        assert!(served.rps > 0.0 && served.failed > 0, "{served:?}");
        assert!((served.failed as f64) < served.rps * 0.1, "half of them: {served:?}");
        assert!(served.p50_us <= served.p99_us);
    }
}
