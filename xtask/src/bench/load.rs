//! Load on a server over loopback: connections that are kept open, each with one request at a time, all driven by one thread, so that the
//! client takes as little as may be of the processors that it shares with the server.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{Timespec, epoll};
use serde::Serialize;

pub(super) mod grpc;

/// For how long a client with one connection looks for an answer before it sleeps: what it takes to wake up is not the server's.
const LOOK: Duration = Duration::from_micros(200);

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a server did under load.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Served {
    /// Requests answered in a second.
    pub rps: f64,
    /// Median time of a request, in microseconds.
    pub p50_us: f64,
    /// The time within which 99 of 100 requests are answered, in microseconds.
    pub p99_us: f64,
    /// Requests that were not answered with success.
    pub failed: u64,
}

/// A request that is sent again and again.
#[derive(Debug, Clone)]
pub(super) enum Request {
    /// Over HTTP/1.1, as it is sent.
    Http(Vec<u8>),
    /// A call of gRPC.
    Grpc(grpc::Call),
}

impl Request {
    /// `POST path` with that body and those headers, each ended by CR LF.
    pub(super) fn post(path: &str, headers: &str, body: &[u8]) -> Self {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        );
        Self::Http([head.as_bytes(), body].concat())
    }
}

/// What is read of an answer.
trait Answer {
    /// Takes bytes of it. When it is whole, gives whether it is a success.
    fn read(&mut self, stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Option<bool>>;
}

/// An answer of HTTP/1.1 with `Content-Length`.
#[derive(Default)]
struct Http {
    head: Vec<u8>,
    /// Once its head is read: its status, and bytes of the body that are still to come.
    body: Option<(u16, usize)>,
}

impl Answer for Http {
    fn read(&mut self, _: &mut TcpStream, bytes: &[u8]) -> io::Result<Option<bool>> {
        let (status, left) = match self.body {
            Some((status, left)) => (status, left.saturating_sub(bytes.len())),
            None => {
                self.head.extend_from_slice(bytes);
                let Some(end) = find(&self.head, b"\r\n\r\n") else {
                    return Ok(None);
                };
                let (status, length) = status_and_length(&self.head[..end]).ok_or(io::ErrorKind::InvalidData)?;
                (status, (end + 4 + length).saturating_sub(self.head.len()))
            }
        };
        if left > 0 {
            self.body = Some((status, left));
            return Ok(None);
        }
        self.head.clear();
        self.body = None;
        Ok(Some(status == 200))
    }
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

fn status_and_length(head: &[u8]) -> Option<(u16, usize)> {
    let head = std::str::from_utf8(head).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let mut headers = head.lines().filter_map(|line| line.split_once(": "));
    let (_, length) = headers.find(|(name, _)| name.eq_ignore_ascii_case("content-length"))?;
    Some((status, length.parse().ok()?))
}

/// A connection that is kept open.
struct Connection<'a> {
    stream: TcpStream,
    request: &'a Request,
    answer: Box<dyn Answer>,
    /// When its request was sent; `None` while it has none.
    sent: Option<Instant>,
    /// When its next request is due, where there is a pace.
    due: Instant,
    /// Of HTTP/2: the stream of the next call.
    next_stream: u32,
}

impl<'a> Connection<'a> {
    fn open(address: SocketAddr, request: &'a Request) -> io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let answer: Box<dyn Answer> = match request {
            Request::Http(_) => Box::<Http>::default(),
            Request::Grpc(_) => {
                stream.write_all(&grpc::preface())?;
                Box::<grpc::Frames>::default()
            }
        };
        Ok(Self {
            stream,
            request,
            answer,
            sent: None,
            due: Instant::now(),
            next_stream: 1,
        })
    }

    fn send(&mut self) -> io::Result<()> {
        self.sent = Some(Instant::now());
        match self.request {
            Request::Http(bytes) => self.stream.write_all(bytes),
            Request::Grpc(call) => {
                self.next_stream += 2;
                self.stream.write_all(&call.on_stream(self.next_stream - 2))
            }
        }
    }

    /// Reads once; when the answer is whole, gives whether it is a success, and what it took.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(bool, Duration)>> {
        let read = self.stream.read(buffer)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let whole = self.answer.read(&mut self.stream, &buffer[..read])?;
        Ok(whole.zip(self.sent.map(|sent| sent.elapsed())).inspect(|_| self.sent = None))
    }
}

/// Whether the server answers that request with success.
pub(super) fn answers(address: SocketAddr, request: &Request) -> bool {
    let ask = || -> io::Result<bool> {
        let mut connection = Connection::open(address, request)?;
        connection.send()?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            if let Some((success, _)) = connection.receive(&mut buffer)? {
                return Ok(success);
            }
        }
    };
    ask().unwrap_or(false)
}

/// Loads a server by `connections` for that long, after a tenth of it to warm up. With `pace`, each connection sends so many requests a
/// second and no more.
///
/// # Errors
/// Where a connection cannot be opened, or breaks off.
pub(super) fn load(address: SocketAddr, request: &Request, connections: usize, time: Duration, pace: Option<f64>) -> Result<Served> {
    let (took, failed, seconds) = drive(address, request, connections, time, pace).context("the server broke a connection off")?;
    let mut took: Vec<u32> = took;
    took.sort_unstable();
    let at = |share: f64| {
        took.get((took.len() as f64 * share) as usize)
            .map_or(f64::NAN, |&nanos| f64::from(nanos) / 1e3)
    };
    Ok(Served {
        rps: took.len() as f64 / seconds,
        p50_us: at(0.5),
        p99_us: at(0.99),
        failed,
    })
}

/// What each request took in nanoseconds, at most 4 s, how many failed, and the seconds that it took in all.
fn drive(
    address: SocketAddr,
    request: &Request,
    connections: usize,
    time: Duration,
    pace: Option<f64>,
) -> io::Result<(Vec<u32>, u64, f64)> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut open: Vec<Connection<'_>> = (0..connections)
        .map(|_| Connection::open(address, request))
        .collect::<io::Result<_>>()?;
    let interval = pace.map(|pace| Duration::from_secs_f64(1.0 / pace));
    let start = Instant::now();
    for (index, connection) in open.iter_mut().enumerate() {
        epoll::add(
            &poll,
            &connection.stream,
            epoll::EventData::new_u64(index as u64),
            epoll::EventFlags::IN,
        )?;
        // Evenly in time, where there is a pace.
        connection.due = start + interval.unwrap_or_default().mul_f64(index as f64 / connections as f64);
    }
    let measured_from = start + time / 10;
    let end = measured_from + time;
    let (mut took, mut failed) = (Vec::with_capacity(1 << 20), 0);
    let mut buffer = vec![0; 256 << 10];
    let mut events = Vec::with_capacity(connections);
    loop {
        let now = Instant::now();
        if now >= end {
            break;
        }
        let mut wake = end;
        for connection in open.iter_mut().filter(|connection| connection.sent.is_none()) {
            if connection.due <= now {
                connection.send()?;
                connection.due += interval.unwrap_or_default();
            } else {
                wake = wake.min(connection.due);
            }
        }
        events.clear();
        let look = Instant::now() + LOOK;
        while connections == 1 && events.is_empty() && Instant::now() < look {
            epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), Some(&Timespec::default()))?;
        }
        if events.is_empty() {
            let timeout = Timespec::try_from(wake.saturating_duration_since(Instant::now())).map_err(io::Error::other)?;
            epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), Some(&timeout))?;
        }
        for event in &events {
            let connection = &mut open[event.data.u64() as usize];
            let Some((success, time)) = connection.receive(&mut buffer)? else {
                continue;
            };
            if Instant::now() >= measured_from {
                took.push(u32::try_from(time.as_nanos()).unwrap_or(u32::MAX));
                failed += u64::from(!success);
            }
            if interval.is_none() {
                connection.send()?;
            }
        }
    }
    Ok((took, failed, measured_from.elapsed().as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

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
        let (took, failed, seconds) = drive(address, &request, 1, Duration::from_millis(100), None).unwrap();
        assert!(
            took.len() as u64 / 2 <= failed && failed <= took.len() as u64 / 2 + 1,
            "half of {}: {failed}",
            took.len()
        );
        assert!(failed > 0 && seconds >= 0.1);
    }

    #[test]
    fn a_pace_is_not_exceeded() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let count = count.clone();
                thread::spawn(move || {
                    let mut buffer = [0; 1024];
                    while stream.read(&mut buffer).is_ok_and(|read| read > 0) {
                        count.fetch_add(1, Ordering::SeqCst);
                        // In parts, as answers may come.
                        for part in ["HTTP/1.1 200 OK\r\ncontent-le", "ngth: 4\r\n\r\n12", "34"] {
                            let _ = stream.write_all(part.as_bytes());
                        }
                    }
                });
            }
        });
        let request = Request::post("/", "", b"{}");
        let began = Instant::now();
        let served = load(address, &request, 4, Duration::from_millis(500), Some(25.0)).unwrap();
        let due = 4.0 * (1.0 + 25.0 * began.elapsed().as_secs_f64());
        let asked = asked.load(Ordering::SeqCst);
        assert!((4.0..=due).contains(&(asked as f64)), "{asked} requests of {due} due: {served:?}");
        assert_eq!(served.failed, 0);
    }
}
