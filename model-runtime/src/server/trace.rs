//! Traces of inference requests: a span of each and of what it waits for, in the trace that its caller began (OpenTelemetry, "Trace API";
//! W3C, "Trace Context"). What is done on a request's way is to note times; spans are made of them by [`export`], in the background.

use std::collections::hash_map::RandomState;
use std::future::Future;
use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::HeaderMap;

use super::grpc;
use super::refusal::{Reason, Refusal};

mod context;
mod export;
mod proto;

pub(super) use context::Context;
use export::Exporter;
pub use export::Traces;

/// Most bytes of a refusal's text in a span.
const TEXT_BYTES_MAX: usize = 256;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Over HTTP, at this route.
    Http(&'static str),
    /// Over gRPC, of the protocol's service.
    Grpc(&'static str),
}

impl Method {
    /// The name of the span, and what the log calls it.
    pub(super) fn name(self) -> String {
        match self {
            Self::Http(route) => format!("POST {route}"),
            Self::Grpc(method) => format!("{}/{method}", grpc::SERVICE),
        }
    }

    /// The protocol's status of a request that was refused for that reason, or was not.
    pub(super) fn status(self, refused: Option<Reason>) -> u16 {
        match self {
            Self::Http(_) => refused.map_or(200, |reason| reason.status().as_u16()),
            Self::Grpc(_) => refused.map_or(0, |reason| reason.code() as u16),
        }
    }
}

/// What is done for a request, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Stage {
    /// Its body is read and decompressed.
    Receive,
    /// The body becomes tensors.
    Parse,
    /// Texts become tokens, images pixels.
    Preprocess,
    /// It waits for an engine.
    Queue,
    /// The engine computes its batch.
    Compute,
    /// The outputs become a body.
    Serialize,
}

/// A stage, and when it was.
#[derive(Debug, Clone, PartialEq)]
struct Part {
    stage: Stage,
    /// Since the request came.
    begin: Duration,
    took: Duration,
    /// Rows of the batch that was computed; 0 for all other stages.
    rows: usize,
}

/// A request while it is served.
#[derive(Debug)]
pub(super) struct Span {
    pub(super) method: Method,
    pub(super) started: Instant,
    /// What others are told who work for this request.
    pub(super) context: Option<Context>,
    /// What becomes of it, where it is traced.
    recording: Option<Recording>,
}

#[derive(Debug)]
struct Recording {
    /// The caller's span.
    parent: Option<u64>,
    parts: Mutex<Vec<Part>>,
}

/// A request that was answered and is traced.
#[derive(Debug)]
struct Record {
    method: Method,
    context: Context,
    parent: Option<u64>,
    /// When it was answered.
    ended: SystemTime,
    took: Duration,
    parts: Vec<Part>,
    failure: Option<(Reason, String)>,
}

/// Which requests are traced, and where their spans go.
pub(super) struct Tracing {
    /// Share of the requests that are traced whose caller has not decided it, 0 to 1.
    share: f64,
    ids: Ids,
    exporter: Exporter,
}

/// Identifiers that nobody guesses, for which 64 bits of keyed hashes of a counter are as good as any.
#[derive(Default)]
struct Ids {
    hasher: RandomState,
    given: AtomicU64,
}

impl Ids {
    fn next(&self) -> u64 {
        // Zero is no identifier.
        self.hasher.hash_one(self.given.fetch_add(1, Ordering::Relaxed)).max(1)
    }
}

impl Tracing {
    /// Starts the task that sends spans; needs the async runtime.
    ///
    /// # Errors
    /// In words, where there can be no client.
    pub(super) fn start(traces: &Traces, metrics: &super::metrics::Metrics) -> Result<Self, String> {
        Ok(Self {
            share: traces.share,
            ids: Ids::default(),
            exporter: Exporter::start(traces, metrics.spans.clone())?,
        })
    }

    /// Sends what is left, and waits for that at most `patience`.
    pub(super) async fn finish(&self, patience: Duration) {
        self.exporter.finish(patience).await;
    }

    /// The context of a request whose caller gave `given`, and what is recorded of it: the caller decides whether it is traced, and the share
    /// where there is none who did.
    fn begin(&self, given: Option<Context>) -> (Context, Option<Recording>) {
        let Some(given) = given else {
            let (span, low) = (self.ids.next(), self.ids.next());
            let context = Context {
                trace: u128::from(self.ids.next()) << 64 | u128::from(low),
                span,
                // 53 bits are what a float holds.
                sampled: ((low >> 11) as f64) < self.share * (1_u64 << 53) as f64,
                state: None,
            };
            let recording = context.sampled.then(|| Recording::new(None));
            return (context, recording);
        };
        if !given.sampled {
            return (given, None);
        }
        let recording = Recording::new(Some(given.span));
        let context = Context {
            span: self.ids.next(),
            ..given
        };
        (context, Some(recording))
    }
}

impl Recording {
    fn new(parent: Option<u64>) -> Self {
        Self {
            parent,
            parts: Mutex::new(Vec::with_capacity(6)),
        }
    }
}

impl Span {
    /// A request that came with those headers at `started`. Without tracing its context is the caller's.
    pub(super) fn begin(tracing: Option<&Tracing>, method: Method, headers: &HeaderMap, started: Instant) -> Self {
        let given = Context::of(headers);
        let (context, recording) = match tracing {
            None => (given, None),
            Some(tracing) => {
                let (context, recording) = tracing.begin(given);
                (Some(context), recording)
            }
        };
        Self {
            method,
            started,
            context,
            recording,
        }
    }

    /// What `work` gives; the time that it takes is that of the stage.
    pub(super) async fn within<T>(&self, stage: Stage, work: impl Future<Output = T>) -> T {
        let begun = self.recording.is_some().then(Instant::now);
        let done = work.await;
        if let Some(begun) = begun {
            self.note(stage, begun, begun.elapsed(), 0);
        }
        done
    }

    /// Notes a stage that began at `begun`.
    pub(super) fn note(&self, stage: Stage, begun: Instant, took: Duration, rows: usize) {
        if let Some(recording) = &self.recording {
            let part = Part {
                stage,
                begin: begun.saturating_duration_since(self.started),
                took,
                rows,
            };
            recording.parts.lock().unwrap_or_else(PoisonError::into_inner).push(part);
        }
    }

    /// The request is answered; what is recorded of it goes its way.
    pub(super) fn end(self, tracing: Option<&Tracing>, refusal: Option<&Refusal>) {
        let (Some(tracing), Some(context), Some(recording)) = (tracing, self.context, self.recording) else {
            return;
        };
        let text = |text: &str| text[..text.floor_char_boundary(TEXT_BYTES_MAX)].to_owned();
        tracing.exporter.send(Record {
            method: self.method,
            context,
            parent: recording.parent,
            ended: SystemTime::now(),
            took: self.started.elapsed(),
            parts: recording.parts.into_inner().unwrap_or_else(PoisonError::into_inner),
            failure: refusal.map(|refusal| (refusal.reason, text(&refusal.text))),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracing(share: f64) -> Tracing {
        Tracing {
            share,
            ids: Ids::default(),
            exporter: Exporter::stuck(),
        }
    }

    fn given(sampled: bool) -> Context {
        Context {
            trace: 7,
            span: 8,
            sampled,
            state: None,
        }
    }

    #[test]
    fn the_caller_decides_and_the_share_where_there_is_none() {
        for share in [0.0, 1.0] {
            let (context, recording) = tracing(share).begin(Some(given(true)));
            assert_eq!((context.trace, context.sampled), (7, true));
            assert_ne!(context.span, 8, "our own span");
            assert_eq!(recording.unwrap().parent, Some(8));
            let (context, recording) = tracing(share).begin(Some(given(false)));
            assert_eq!(context, given(false));
            assert!(recording.is_none());
        }
        for (share, expected) in [(0.0, 0..1), (1.0, 1000..1001), (0.25, 180..320)] {
            let tracing = tracing(share);
            let begun: Vec<_> = (0..1000).map(|_| tracing.begin(None)).collect();
            let traced = begun.iter().filter(|(_, recording)| recording.is_some()).count();
            assert!(expected.contains(&traced), "{traced} of 1000 with a share of {share}");
            assert!(begun.iter().all(|(context, recording)| context.sampled == recording.is_some()));
            let distinct: std::collections::HashSet<u128> = begun.iter().map(|(context, _)| context.trace).collect();
            assert_eq!(distinct.len(), 1000);
        }
    }

    #[test]
    fn without_tracing_the_callers_context_is_passed_on() {
        let headers = HeaderMap::from_iter(given(true).headers());
        let span = Span::begin(None, Method::Grpc("ModelInfer"), &headers, Instant::now());
        assert_eq!(span.context, Some(given(true)));
        span.note(Stage::Parse, Instant::now(), Duration::ZERO, 0);
        assert!(span.recording.is_none());
        assert_eq!(Span::begin(None, span.method, &HeaderMap::new(), Instant::now()).context, None);
    }

    #[tokio::test]
    async fn stages_are_noted_since_the_request_came() {
        let tracing = tracing(1.0);
        let started = Instant::now() - Duration::from_millis(20);
        let span = Span::begin(Some(&tracing), Method::Http("/"), &HeaderMap::new(), started);
        assert_eq!(span.within(Stage::Parse, async { 5 }).await, 5);
        let recording = span.recording.as_ref().unwrap();
        let parts = recording.parts.lock().unwrap().clone();
        assert_eq!(parts.len(), 1);
        assert_eq!((parts[0].stage, parts[0].rows), (Stage::Parse, 0));
        assert!(parts[0].begin >= Duration::from_millis(20) && parts[0].took < Duration::from_secs(1));
    }
}
