//! Connections: accepted within a bound, with a limit on slow headers, and finished before the server stops.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::response::Response;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use super::scheduler::Client;
use super::tls::Acceptor;
use super::{Limits, ServeError};
use busy::{BusyPoll, Lookout};
pub(super) use threads::Threads;
use threads::Watched;

mod busy;
mod threads;

/// Longest pause after a failure to accept, for example for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Most bytes of a request's headers.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// Most requests at one time on one connection of HTTP/2.
const STREAMS_MAX: u32 = 256;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A socket in the file system, written `unix:PATH`.
    Unix(PathBuf),
}

/// What is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither IP:PORT nor unix:PATH")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(written: &str) -> Result<Self, AddressError> {
        let refuse = || AddressError(written.to_owned());
        match written.strip_prefix("unix:") {
            Some("") => Err(refuse()),
            // As `unix://PATH` is written elsewhere.
            Some(path) => Ok(Self::Unix(path.strip_prefix("//").unwrap_or(path).into())),
            None => written.parse().map(Self::Tcp).map_err(|_| refuse()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket that is listened on.
pub(super) enum Listener {
    Tcp(TcpListener),
    /// Its file goes with it.
    Unix(UnixListener, SocketFile),
}

/// The file of a Unix socket; removed when dropped.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What answers requests.
pub(super) trait Serve: Send + Sync {
    /// Answers a request of `client`.
    fn serve(&self, client: Client, request: Request<Incoming>) -> BoxFuture<'static, Response>;
}

impl Serve for Router {
    fn serve(&self, client: Client, mut request: Request<Incoming>) -> BoxFuture<'static, Response> {
        request.extensions_mut().insert(client);
        let answer = TowerToHyperService::new(self.clone()).call(request);
        answer
            .map(|answer| answer.unwrap_or_else(|never: Infallible| match never {}))
            .boxed()
    }
}

/// A connection, whichever way it came.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection that no thread has yet.
enum Accepted {
    Tcp(std::net::TcpStream, IpAddr),
    Unix(std::os::unix::net::UnixStream),
}

impl Accepted {
    fn client(&self) -> Client {
        match self {
            Self::Tcp(_, peer) => Client(Some(*peer)),
            Self::Unix(_) => Client(None),
        }
    }

    /// The connection, its events those of this thread.
    fn open(self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(stream, _) => {
                // Answers are written whole, so waiting to fill a packet only delays them.
                stream.set_nodelay(true)?;
                Box::new(TcpStream::from_std(stream)?)
            }
            Self::Unix(stream) => Box::new(UnixStream::from_std(stream)?),
        })
    }
}

impl Listener {
    pub(super) async fn bind(address: &Address) -> Result<Self, ServeError> {
        let bound = match address {
            Address::Tcp(socket) => TcpListener::bind(socket).await.map(Self::Tcp),
            Address::Unix(path) => bind_unix(path).map(|listener| Self::Unix(listener, SocketFile(path.clone()))),
        };
        bound.map_err(|source| ServeError::Listen {
            address: address.clone(),
            source,
        })
    }

    /// The address, with the port that the system chose where 0 was asked for.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(|address| address.to_string()).unwrap_or_default(),
            Self::Unix(_, file) => Address::Unix(file.0.clone()).to_string(),
        }
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok(Accepted::Tcp(stream.into_std()?, peer.ip()))
            }
            Self::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0.into_std()?)),
        }
    }
}

/// Takes the place of a socket that nobody listens on any more, as after a crash, and of nothing else.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

/// Serves connections until `stopped`, each on one of the threads; returns how many were still open after `grace`.
pub(super) async fn serve(
    listener: Listener,
    threads: Arc<Threads>,
    tls: Option<Arc<Acceptor>>,
    serving: Arc<dyn Serve>,
    limits: Limits,
    grace: Duration,
    mut stopped: watch::Receiver<bool>,
) -> usize {
    let connections = Arc::new(Semaphore::new(limits.connections_max));
    let graceful = GracefulShutdown::new();
    let header_timeout = limits.header_timeout;
    let polling = BusyPoll::new(limits.busy_poll);
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(HEADER_BYTES_MAX);
    http.http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_BYTES_MAX as u32)
        // A peer that is gone without a word is noticed, and one that idles is not.
        .keep_alive_interval(limits.header_timeout);
    let start = |accepted: Accepted, permit| {
        let client = accepted.client();
        let (serving, lookout) = (Arc::clone(&serving), Arc::new(polling.lookout()));
        let looking = Arc::clone(&lookout);
        let service = service_fn(move |request| {
            looking.asked();
            let looking = Arc::clone(&looking);
            serving.serve(client, request).map(move |answer| {
                looking.answered(Instant::now());
                Ok::<_, Infallible>(answer)
            })
        });
        let (http, watcher) = (http.clone(), graceful.watcher());
        let acceptor = tls.as_ref().map(|tls| tls.current());
        threads.spawn(async move {
            let serve = async {
                let stream = accepted.open()?;
                let stream: Box<dyn Stream> = match acceptor {
                    None => stream,
                    Some(acceptor) => Box::new(tokio::time::timeout(header_timeout, acceptor.accept(stream)).await??),
                };
                serve_connection(&http, watcher, stream, service, lookout).await
            };
            if let Err(error) = serve.await {
                tracing::debug!(%error, "a connection failed");
            }
            drop(permit);
        });
    };
    loop {
        let accept = async {
            // The permit first: beyond the bound, clients wait in the listener's backlog.
            let permit = Arc::clone(&connections).acquire_owned().await.ok();
            (listener.accept().await, permit)
        };
        tokio::select! {
            (accepted, permit) = accept => match accepted {
                Ok(accepted) => start(accepted, permit),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            _ = stopped.changed() => break,
        }
    }
    // Those that the kernel has already taken on for us would be reset when the listener closes.
    while let Ok(accepted) = tokio::time::timeout(Duration::from_millis(1), listener.accept()).await {
        let Ok(accepted) = accepted else { break };
        start(accepted, None);
    }
    drop(listener);
    let open = graceful.count();
    match tokio::time::timeout(grace, graceful.shutdown()).await {
        Ok(()) => 0,
        Err(_) => open,
    }
}

/// Serves a connection to its end.
async fn serve_connection<S>(
    http: &auto::Builder<TokioExecutor>,
    watcher: Watcher,
    stream: Box<dyn Stream>,
    service: S,
    lookout: Arc<Lookout>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
where
    S: Service<Request<Incoming>, Response = Response, Error = Infallible> + Send + 'static,
    S::Future: Send,
{
    let connection = http.serve_connection(TokioIo::new(stream), service).into_owned();
    Watched::new(watcher.watch(connection), lookout).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for written in ["127.0.0.1:8080", "[::1]:80", "unix:/run/model.sock"] {
            assert_eq!(written.parse::<Address>().unwrap().to_string(), written);
        }
        assert_eq!("unix:///run/a".parse::<Address>(), Ok(Address::Unix("/run/a".into())));
        for written in ["localhost", "unix:", "8080"] {
            let text = written.parse::<Address>().unwrap_err().to_string();
            assert_eq!(text, format!("`{written}` is neither IP:PORT nor unix:PATH"));
        }
    }
}
