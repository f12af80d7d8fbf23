//! The command line as it is written, and what it resolves to.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use plimsoll_package::units;
use plimsoll_runtime::engine::{Device, EngineKind};
use plimsoll_runtime::server::{Address, AddressError, Batching, Config, Limits, Sampling, Shadow, Tls, log, quota};

mod traces;

/// Serves an optimised model over the Open Inference Protocol V2.
#[derive(Parser)]
#[command(name = "plimsoll-runtime", version, disable_help_subcommand = true)]
pub(crate) struct Flags {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// How log lines on standard error are written.
    #[arg(long, global = true, value_enum, default_value = "json")]
    pub(crate) log_format: log::Format,

    /// What is logged: error, warn, info, debug (every inference) or trace.
    #[arg(long, global = true, default_value = "info")]
    pub(crate) log_level: String,

    /// File for the reason of a failure, in one line; by default Kubernetes' /dev/termination-log where there is one.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) termination_log: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Serves a package's folder or an ONNX file until SIGTERM.
    Serve(Box<Serve>),
    /// Pulls a package from an OCI registry into a folder.
    Pull(Pull),
}

#[derive(Args)]
pub(crate) struct Serve {
    /// A package's folder (its digests and its probe are checked first), or a .onnx file.
    path: PathBuf,

    /// The model's name in the protocol; by default the file's name without its ending, or `model` for a folder.
    #[arg(long)]
    name: Option<String>,

    /// The model's version in the protocol.
    #[arg(long, default_value = "1")]
    model_version: String,

    /// What runs the model. `auto` takes the engine that the package names and the other where that one fails; ONNX Runtime is loaded
    /// from the library that ORT_DYLIB_PATH names.
    #[arg(long, value_enum, default_value = "auto")]
    engine: Engine,

    /// What the model is computed on: cpu, cuda:NUMBER, tensorrt:NUMBER or openvino (the processor with OpenVINO's kernels). All but cpu need
    /// ONNX Runtime's library with that provider, and are never replaced by another.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", env = "PLIMSOLL_DEVICE")]
    device: Device,

    /// Address of the protocol over HTTP/1.1 and HTTP/2: IP:PORT, or unix:PATH for a socket in the file system.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    http: Address,

    /// Address of the protocol over gRPC: IP:PORT, unix:PATH, or none.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8081")]
    grpc: Optional,

    /// Address of the metrics; without it they are at /metrics of the protocol's.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<Address>,

    /// Threads of one inference; by default the CPU quota of the control group, divided by the instances.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Inferences at one time, each with a copy of the model.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256), default_value_t = 1)]
    instances: u16,

    /// Most rows that run together, of all requests of one batch; 1 runs each request by itself. Requests are only joined where they wait
    /// anyway, where the model's rows are independent of each other, and where batches have measured faster.
    #[arg(long, value_name = "ROWS", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    max_batch: u16,

    /// Most bytes of inputs that run together.
    #[arg(long, value_name = "SIZE", default_value = "64Mi", value_parser = size)]
    max_batch_bytes: u64,

    /// How many milliseconds a request may wait for others to join it while an engine is free; 0 waits for none.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=60_000))]
    max_delay_ms: u32,

    /// Largest body of a request; a larger one is answered with 413.
    #[arg(long, value_name = "SIZE", default_value = "64Mi", value_parser = size)]
    max_body: u64,

    /// Most inference requests taken on at one time, waiting ones included; more are answered with 429.
    #[arg(long, value_name = "REQUESTS", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    max_concurrency: u16,

    /// Most bytes of request bodies that are here at one time; what comes beyond is answered with 429.
    #[arg(long, value_name = "SIZE", default_value = "256Mi", value_parser = size)]
    max_memory: u64,

    /// Most of a GPU's memory that each instance keeps for the model's weights and tensors, where other pods share the GPU; what its
    /// libraries take comes on top. A request that needs more fails.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_device_memory: Option<u64>,

    /// Most open connections; more wait to be accepted.
    #[arg(long, value_name = "CONNECTIONS", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(1..))]
    max_connections: u16,

    /// Longest time from a request's headers to its answer; then 408 where the body is missing, 504 where the answer is.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    request_timeout: Duration,

    /// Longest time for a request's headers to arrive, and for a kept-alive connection to idle.
    #[arg(long, value_name = "DURATION", default_value = "75s", value_parser = duration)]
    header_timeout: Duration,

    /// How many microseconds the thread that answered looks for the next request before it sleeps, 0 to 1000; by default 100, and 0 where there
    /// is only one processor. Where a client asks again that soon, it waits less; where none does, looks become rare.
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u32).range(..=1000))]
    busy_poll_us: Option<u32>,

    /// Longest time of one batch in the engine, after which liveness fails so that Kubernetes restarts the container.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    stuck_after: Duration,

    /// File of the server's certificate and those that lead to its root, in PEM; the protocol is then spoken over TLS. It is read anew when
    /// it changes. Metrics and an address of their own stay plain.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,

    /// File of the certificate's private key, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,

    /// File of roots, in PEM, that clients' certificates must lead to (mutual TLS).
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_client_roots: Option<PathBuf>,

    /// File of bearer tokens, one a line; who sends none of them gets 401 for all but health and readiness. It is read anew when it changes.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Another revision that a share of the requests is sent to as well: http(s)://HOST/v2/models/NAME. Its answers are compared with ours,
    /// in metrics alone; the caller neither waits for them nor sees them.
    #[arg(long, value_name = "URL", value_parser = url)]
    shadow: Option<String>,

    /// Share of the requests that is sent there, 0% to 100%.
    #[arg(long, value_name = "PERCENT", default_value = "5%", value_parser = share, requires = "shadow")]
    shadow_share: f64,

    /// Largest difference that counts as agreement, relative to the largest absolute value of an output.
    #[arg(long, value_name = "PERCENT", default_value = "1%", value_parser = share, requires = "shadow")]
    shadow_tolerance: f64,

    #[command(flatten)]
    traces: traces::Flags,

    /// Share of the answered requests that are logged at level info, 0% to 100%; refused and failed ones always are.
    #[arg(long, value_name = "PERCENT", default_value = "0%", value_parser = share)]
    access_log: f64,

    /// Where a share of the requests is written, with what was answered, as JSON lines that the optimiser reads as evaluation data:
    /// s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, or file:///DIR. Stores are reached as the variables AWS_..., GOOGLE_...
    /// and AZURE_... say. What cannot be written in time is dropped and counted; no request waits for it.
    #[arg(long, value_name = "URL", value_parser = place)]
    sample_to: Option<String>,

    /// Share of the requests that is written there, 0% to 100%.
    #[arg(long, value_name = "PERCENT", default_value = "1%", value_parser = share, requires = "sample_to")]
    sample_share: f64,

    /// An input or output whose values are not written, or `id` for the request's; may be given several times.
    #[arg(long, value_name = "NAME", requires = "sample_to")]
    sample_redact: Vec<String>,

    /// For how long what goes through the server counts towards its drift from what the package records, 1s to 24h; 0 for no drift.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = drift_window)]
    drift_window: Duration,

    /// How long requests are served after SIGTERM, while readiness fails already.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = duration)]
    drain_delay: Duration,

    /// Longest wait for requests in flight after the drain delay.
    #[arg(long, value_name = "DURATION", default_value = "25s", value_parser = duration)]
    grace: Duration,
}

#[derive(Args)]
pub(crate) struct Pull {
    /// The package: HOST/REPOSITORY:TAG or HOST/REPOSITORY@DIGEST.
    pub(crate) reference: String,

    /// The folder that it goes to.
    pub(crate) dir: PathBuf,

    /// Speak plain HTTP with the registry.
    #[arg(long)]
    pub(crate) plain_http: bool,

    /// Folder with .dockerconfigjson, or username and password, or token.
    #[arg(long, value_name = "DIR")]
    pub(crate) credentials: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Engine {
    Auto,
    Tract,
    #[value(name = "onnxruntime")]
    OnnxRuntime,
}

/// An address, or that there is none.
#[derive(Clone)]
struct Optional(Option<Address>);

impl FromStr for Optional {
    type Err = AddressError;

    fn from_str(written: &str) -> Result<Self, AddressError> {
        match written {
            "none" => Ok(Self(None)),
            address => address.parse().map(Some).map(Self),
        }
    }
}

fn size(written: &str) -> Result<u64, units::UnitError> {
    written.parse::<units::Size>()?.value()
}

fn url(written: &str) -> Result<String, String> {
    match written.strip_prefix("http://").or_else(|| written.strip_prefix("https://")) {
        Some(rest) if !rest.is_empty() => Ok(written.to_owned()),
        _ => Err("write http://HOST/v2/models/NAME or https://...".to_owned()),
    }
}

fn place(written: &str) -> Result<String, String> {
    let is_known = ["s3://", "gs://", "az://", "file:///"].iter().any(|scheme| {
        let rest = written.strip_prefix(scheme);
        rest.is_some_and(|rest| !rest.is_empty())
    });
    if is_known {
        Ok(written.to_owned())
    } else {
        Err("write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///DIR".to_owned())
    }
}

/// A percentage of 0 to 100 as a share of 0 to 1.
fn share(written: &str) -> Result<f64, units::UnitError> {
    written.parse::<units::Percentage>()?.value()
}

fn bytes(size: u64) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}

fn duration(written: &str) -> Result<Duration, units::UnitError> {
    // `0` needs no unit.
    if written == "0" {
        Ok(Duration::ZERO)
    } else {
        written.parse::<units::Duration>()?.value()
    }
}

/// Whoever has one processor alone would keep the client from it.
fn busy_poll() -> Duration {
    Duration::from_micros(if quota::processors() > 1 { 100 } else { 0 })
}

/// None, or as long as there is something to see and it is still news.
fn drift_window(written: &str) -> Result<Duration, String> {
    let window = duration(written).map_err(|error| error.to_string())?;
    let range = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
    if window.is_zero() || range.contains(&window) {
        Ok(window)
    } else {
        Err("write 1s to 24h, or 0 for no drift".to_owned())
    }
}

impl Serve {
    pub(crate) fn resolve(self) -> Config {
        let instances = usize::from(self.instances);
        let stem = |path: &Path| {
            path.file_stem()
                .map_or_else(|| "model".into(), |stem| stem.to_string_lossy().into_owned())
        };
        let name = self
            .name
            .unwrap_or_else(|| if self.path.is_dir() { "model".into() } else { stem(&self.path) });
        Config {
            name,
            version: self.model_version,
            engine: match self.engine {
                Engine::Auto => None,
                Engine::Tract => Some(EngineKind::Tract),
                Engine::OnnxRuntime => Some(EngineKind::OnnxRuntime),
            },
            device: self.device,
            http: self.http,
            grpc: self.grpc.0,
            metrics: self.metrics,
            threads: self.threads.map_or_else(|| (quota::processors() / instances).max(1), usize::from),
            instances,
            tls: self.tls_certificate.zip(self.tls_key).map(|(certificate, key)| Tls {
                certificate,
                key,
                client_roots: self.tls_client_roots,
            }),
            tokens: self.token_file,
            shadow: self.shadow.map(|url| Shadow {
                url,
                share: self.shadow_share,
                tolerance: self.shadow_tolerance,
            }),
            traces: self.traces.resolve(),
            access_log: self.access_log,
            batching: Batching {
                rows_max: usize::from(self.max_batch),
                bytes_max: bytes(self.max_batch_bytes),
                delay: Duration::from_millis(self.max_delay_ms.into()),
            },
            sampling: self.sample_to.map(|to| Sampling {
                to,
                share: self.sample_share,
                redact: self.sample_redact,
            }),
            drift_window: self.drift_window,
            stuck_after: self.stuck_after,
            limits: Limits {
                memory_bytes_max: bytes(self.max_memory),
                body_bytes_max: bytes(self.max_body),
                concurrency_max: usize::from(self.max_concurrency),
                connections_max: usize::from(self.max_connections),
                device_bytes_max: self.max_device_memory.map(bytes),
                request_timeout: self.request_timeout,
                header_timeout: self.header_timeout,
                busy_poll: self
                    .busy_poll_us
                    .map_or_else(busy_poll, |micros| Duration::from_micros(micros.into())),
            },
            drain_delay: self.drain_delay,
            grace: self.grace,
            path: self.path,
        }
    }
}
