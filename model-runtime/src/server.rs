//! The server: loads a model, proves it, and answers the Open Inference Protocol V2 until it is told to stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SetOnce, oneshot, watch};

use crate::engine::{Device, EngineKind};

#[cfg(test)]
mod agreement;
mod authentication;
mod classification;
mod code;
mod companions;
mod drift;
mod encoding;
mod grpc;
mod http;
mod images;
mod inference;
mod listener;
pub mod log;
mod metrics;
mod model;
mod preprocessing;
pub mod pull;
pub mod quota;
mod refusal;
mod sampling;
mod scheduler;
mod shadow;
mod share;
mod signature;
mod statistics;
mod text;
mod tls;
mod trace;
#[doc(hidden)]
pub mod untrusted;
mod watched;

use authentication::Tokens;
pub use listener::{Address, AddressError};
use listener::{Listener, Threads};
use metrics::Metrics;
use model::Model;
use sampling::Sampler;
pub use sampling::Sampling;
pub use scheduler::Batching;
pub use shadow::Shadow;
use shadow::Shadowing;
use share::Share;
use statistics::Statistics;
use tls::Acceptor;
pub use tls::Tls;
pub use trace::Traces;
use trace::Tracing;

/// The server's name in the protocol.
pub const NAME: &str = env!("CARGO_PKG_NAME");
/// The server's version in the protocol.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The protocol's extensions that are there.
const EXTENSIONS: [&str; 5] = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
];

/// What to serve, where, and within which bounds.
#[derive(Debug, Clone)]
pub struct Config {
    /// A package's folder, or an ONNX file.
    pub path: PathBuf,
    /// The model's name in the protocol.
    pub name: String,
    /// The model's version in the protocol.
    pub version: String,
    /// The engine; `None` takes the one that the manifest names, and the other where that one fails.
    pub engine: Option<EngineKind>,
    /// What the model is computed on.
    pub device: Device,
    /// Address of the protocol over HTTP.
    pub http: Address,
    /// Address of the protocol over gRPC; `None` is none.
    pub grpc: Option<Address>,
    /// Address of the metrics; `None` serves them at `/metrics` of the protocol's.
    pub metrics: Option<Address>,
    /// Threads of one inference, 1 or more.
    pub threads: usize,
    /// Inferences at one time, each with an engine of its own, 1 or more.
    pub instances: usize,
    /// Which requests run together.
    pub batching: Batching,
    /// The bounds.
    pub limits: Limits,
    /// The server's identity, where the protocol is spoken over TLS. Metrics are not.
    pub tls: Option<Tls>,
    /// Another revision that answers are compared with.
    pub shadow: Option<Shadow>,
    /// Where traces go; `None` makes none.
    pub traces: Option<Traces>,
    /// Share of the requests that are logged when they are answered, 0 to 1; refused and failed ones always are.
    pub access_log: f64,
    /// Where a share of the requests is written to.
    pub sampling: Option<Sampling>,
    /// For how long what went through the server is compared with the package's reference; zero is not at all.
    pub drift_window: Duration,
    /// File of the tokens that are let in; `None` lets in everybody.
    pub tokens: Option<PathBuf>,
    /// For how long an engine may be at one batch before the server counts as stuck and liveness fails.
    pub stuck_after: Duration,
    /// How long requests are served after SIGTERM while readiness fails, so that endpoints can go first.
    pub drain_delay: Duration,
    /// Longest wait for requests in flight after that.
    pub grace: Duration,
}

/// Bounds of what clients may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest body of a request, in bytes.
    pub body_bytes_max: usize,
    /// Most inference requests taken on at one time, waiting ones included: the bound of the queue.
    pub concurrency_max: usize,
    /// Most bytes of bodies that are here at one time.
    pub memory_bytes_max: usize,
    /// Most bytes of a GPU's memory that each instance keeps for the model's weights and tensors.
    pub device_bytes_max: Option<usize>,
    /// Most open connections.
    pub connections_max: usize,
    /// Longest time of a request, from its headers to its answer.
    pub request_timeout: Duration,
    /// Longest time for a request's headers, and for a kept-alive connection to idle.
    pub header_timeout: Duration,
    /// How long a thread looks for the next request after an answer, before it sleeps.
    pub busy_poll: Duration,
}

/// Why the server stops without having been told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: Address,
        /// Why.
        source: std::io::Error,
    },
    /// A certificate, key or token cannot be read.
    #[error("{0}")]
    Secret(String),
    /// The other revision cannot be asked.
    #[error("cannot compare with another revision: {0}")]
    Shadow(String),
    /// Traces cannot be sent.
    #[error("cannot send traces: {0}")]
    Traces(String),
    /// Samples cannot be written.
    #[error("cannot sample requests: {0}")]
    Sampling(String),
    /// The threads that serve connections cannot be started.
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
    /// The signal handler cannot be installed.
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
    /// No engine serves the model.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// The thread that loads the model died.
    #[error("loading the model was broken off")]
    Loading,
}

/// What the handlers share.
pub(crate) struct State {
    config: Config,
    /// When the server started.
    started: std::time::SystemTime,
    metrics: Metrics,
    model: SetOnce<Model>,
    draining: AtomicBool,
    statistics: Statistics,
    tokens: Option<Tokens>,
    shadowing: Option<Shadowing>,
    sampler: Option<Sampler>,
    tracing: Option<Tracing>,
    /// Which answered requests are logged.
    access: Share,
    /// One permit for each request that may be here.
    slots: Arc<Semaphore>,
    /// Permits for the bodies' memory, in units of [`inference::memory_units`].
    memory: Arc<Semaphore>,
}

impl State {
    /// Needs the async runtime.
    fn new(config: Config, tokens: Option<Tokens>) -> Result<Self, ServeError> {
        let memory = inference::memory_units(config.limits.memory_bytes_max.max(config.limits.body_bytes_max));
        let metrics = Metrics::of(config.device);
        let tracing = config.traces.as_ref().map(|traces| Tracing::start(traces, &metrics)).transpose();
        let shadowing = config.shadow.as_ref().map(|shadow| Shadowing::start(shadow, &metrics)).transpose();
        let start = |sampling| Sampler::start(sampling, &config.name, &config.version, &metrics.samples);
        let sampler = config.sampling.as_ref().map(start).transpose();
        Ok(Self {
            sampler: sampler.map_err(ServeError::Sampling)?,
            shadowing: shadowing.map_err(ServeError::Shadow)?,
            tracing: tracing.map_err(ServeError::Traces)?,
            metrics,
            started: std::time::SystemTime::now(),
            model: SetOnce::new(),
            draining: AtomicBool::new(false),
            statistics: Statistics::default(),
            tokens,
            access: Share::new(config.access_log),
            slots: Arc::new(Semaphore::new(config.limits.concurrency_max)),
            memory: Arc::new(Semaphore::new(memory as usize)),
            config,
        })
    }

    /// The model, once it is proven; it stays while the server drains.
    fn model(&self) -> Option<&Model> {
        self.model.get()
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Waits until the model is proven, for at most [`READINESS_WAIT`].
    async fn settle(&self) {
        let _ = tokio::time::timeout(READINESS_WAIT, self.model.wait()).await;
    }

    /// Whether the engines come back from what they do.
    fn is_live(&self) -> bool {
        self.model()
            .is_none_or(|model| model.scheduler.busy_for() < self.config.stuck_after)
    }

    /// How the model stands, in the words of Triton's "Model Repository Extension", and why.
    fn standing(&self) -> (&'static str, &'static str) {
        match self.model() {
            Some(_) => ("READY", ""),
            None => ("LOADING", "the model is loading"),
        }
    }

    /// Whether new traffic should come.
    fn is_ready(&self) -> bool {
        self.model().is_some() && !self.is_draining()
    }
}

/// Longest wait of a readiness probe for a model that is still loading. The kubelet probes as soon as the container runs, and then once a
/// second: a probe that waits is answered when the model is proven, one that is refused costs that second. It ends before the probe's own
/// timeout of two seconds.
const READINESS_WAIT: Duration = Duration::from_millis(1500);

/// Threads that serve connections; inference has its own.
const CONNECTION_THREADS: usize = 2;

/// Longest wait for the last traces to arrive, when all else has ended.
const TRACES_WAIT: Duration = Duration::from_secs(3);

/// Serves until SIGTERM or SIGINT, then drains: readiness fails at once, requests are served for `drain_delay` more, then the listener
/// closes and requests in flight finish within `grace`.
///
/// The address is listened on at once, so that liveness answers while the model loads.
///
/// # Errors
/// [`ServeError`] where an address is taken or no engine serves the model; a fault of a request never ends the server.
pub async fn serve(config: Config) -> Result<(), ServeError> {
    let started = Instant::now();
    let mut signals = signals().map_err(ServeError::Signals)?;
    let tokens = config.tokens.clone().map(Tokens::new).transpose().map_err(ServeError::Secret)?;
    let tls = config.tls.clone().map(Acceptor::new).transpose().map_err(ServeError::Secret)?;
    let http = Listener::bind(&config.http).await?;
    let grpc = bind(config.grpc.as_ref()).await?;
    let scrape = bind(config.metrics.as_ref()).await?;
    let (grpc_address, metrics_address) = (grpc.as_ref().map(Listener::address), scrape.as_ref().map(Listener::address));
    tracing::info!(http = http.address(), grpc = grpc_address, metrics = metrics_address, "listening");

    let threads = Arc::new(Threads::start(CONNECTION_THREADS).map_err(ServeError::Threads)?);
    let (stop, stopped) = watch::channel(false);
    let state = Arc::new(State::new(config, tokens)?);
    let separate = scrape.is_some();
    let scraping = scrape.map(|scrape| {
        let router = http::metrics_router(Arc::clone(&state));
        tokio::spawn(listener::serve(
            scrape,
            Arc::clone(&threads),
            None,
            Arc::new(router),
            state.config.limits.clone(),
            Duration::ZERO,
            stopped.clone(),
        ))
    });
    let (ready, readiness) = watch::channel(false);
    let over_grpc = grpc::router(Arc::clone(&state), readiness, stopped.clone());
    let over_http = http::protocol(&state, !separate);
    let mut serving = tokio::task::JoinSet::new();
    let tls = tls.map(Arc::new);
    let (limits, grace) = (state.config.limits.clone(), state.config.grace);
    if let Some(grpc) = grpc {
        let (threads, tls, stopped) = (Arc::clone(&threads), tls.clone(), stopped.clone());
        serving.spawn(listener::serve(
            grpc,
            threads,
            tls,
            Arc::new(over_grpc),
            limits.clone(),
            grace,
            stopped,
        ));
    }
    serving.spawn(listener::serve(http, threads, tls, Arc::new(over_http), limits, grace, stopped));

    let loaded = load(&state.config);
    tokio::select! {
        _ = signals.recv() => {}
        model = loaded => {
            let model = model.map_err(|_| ServeError::Loading)??;
            let checked = state.config.sampling.as_ref().map(|sampling| sampling.check(model.inputs(), model.outputs()));
            checked.transpose().map_err(ServeError::Sampling)?;
            // Served first, announced then.
            let seconds = started.elapsed().as_secs_f64();
            let engine = model.kind();
            state.metrics.loaded(&model, &state.config, seconds);
            // Loaded once, so this cannot be the second time.
            let _ = state.model.set(model);
            ready.send_replace(true);
            tracing::info!(model = state.config.name, %engine, seconds, "ready");
            signals.recv().await;
        }
    }
    state.draining.store(true, Ordering::Relaxed);
    state.metrics.ready.set(0);
    ready.send_replace(false);
    tracing::info!(delay_s = state.config.drain_delay.as_secs_f64(), "draining");
    if state.model().is_some() {
        tokio::time::sleep(state.config.drain_delay).await;
    }
    let _ = stop.send(true);
    match serving.join_all().await.into_iter().sum() {
        0 => tracing::info!("stopped"),
        open => tracing::warn!(connections = open, "stopped with requests in flight"),
    }
    if let Some(tracing) = &state.tracing {
        tracing.finish(TRACES_WAIT).await;
    }
    if let Some(sampler) = &state.sampler {
        sampler.end().await;
    }
    if let Some(scraping) = scraping {
        let _ = scraping.await;
    }
    Ok(())
}

async fn bind(address: Option<&Address>) -> Result<Option<Listener>, ServeError> {
    match address {
        Some(address) => Listener::bind(address).await.map(Some),
        None => Ok(None),
    }
}

fn load(config: &Config) -> oneshot::Receiver<Result<Model, model::ModelError>> {
    let (sender, receiver) = oneshot::channel();
    let config = config.clone();
    std::thread::spawn(move || {
        let loaded = Model::load(&config);
        code::release();
        // Where the server was stopped meanwhile, nobody takes the model.
        let _ = sender.send(loaded);
    });
    receiver
}

/// SIGTERM and SIGINT, as one stream.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

fn signals() -> std::io::Result<Signals> {
    use tokio::signal::unix::{SignalKind, signal};
    Ok(Signals {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
    })
}

impl Signals {
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
