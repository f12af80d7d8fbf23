//! Sends spans to a collector, once a second, over HTTP in protobuf (OpenTelemetry, "OTLP Specification", OTLP/HTTP). No request waits for
//! it: what there is no room for is dropped and counted.

use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prost::Message as _;
use reqwest::{Client, StatusCode};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::proto::{
    ERROR, ExportTraceServiceRequest, ExportTraceServiceResponse, InstrumentationScope, KeyValue, Kind, Resource, ResourceSpans,
    ScopeSpans, Span, Status,
};
use super::{Ids, Method, Record};
use crate::server::metrics::SpanLabels;
use crate::server::refusal::Reason;

use crate::server::{NAME, VERSION};

/// Most requests whose spans wait to be sent.
const WAITING_MAX: usize = 4096;

/// Most requests whose spans are sent together.
const BATCH_MAX: usize = 256;

/// How often what waits is sent.
const PAUSE: Duration = Duration::from_secs(1);

/// Longest wait for the collector.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Times that a batch is sent, where the collector says that it may be sent again.
const TRIES: u32 = 3;

/// Most bytes of an answer that are read.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Where traces go, and which there are.
#[derive(Debug, Clone, PartialEq)]
pub struct Traces {
    /// The collector's address for traces, by `http://` or `https://`.
    pub url: String,
    /// Headers of what is sent there: name and value.
    pub headers: Vec<(String, String)>,
    /// The name of this service.
    pub service: String,
    /// More attributes of it: name and value.
    pub attributes: Vec<(String, String)>,
    /// Share of the requests that are traced whose caller has not decided it, 0 to 1.
    pub share: f64,
}

/// Counts spans by what came of them.
type Counts = Family<SpanLabels, Counter>;

/// Takes what is to be sent.
pub(super) struct Exporter {
    sender: mpsc::Sender<Record>,
    spans: Counts,
    /// Tells the task to send the rest and end; it answers by ending.
    finish: Mutex<Option<oneshot::Sender<oneshot::Sender<()>>>>,
}

/// The task that sends.
struct Task {
    receiver: mpsc::Receiver<Record>,
    client: Client,
    url: String,
    resource: Resource,
    ids: Ids,
    spans: Counts,
    /// Whether what was sent last did not arrive.
    failing: bool,
}

impl Exporter {
    pub(super) fn start(traces: &Traces, spans: Counts) -> Result<Self, String> {
        plimsoll_package::registry::install_crypto_provider();
        let header = |(name, value): &(String, String)| {
            let name = name
                .parse::<reqwest::header::HeaderName>()
                .map_err(|error| format!("header `{name}`: {error}"))?;
            let mut value = value
                .parse::<reqwest::header::HeaderValue>()
                .map_err(|error| format!("header `{name}`: {error}"))?;
            value.set_sensitive(true);
            Ok((name, value))
        };
        let headers = traces.headers.iter().map(header).collect::<Result<_, String>>()?;
        let client = Client::builder().timeout(TIMEOUT).default_headers(headers).build();
        let own = [("service.name", &*traces.service), ("service.version", VERSION)];
        let own = own.map(|(key, value)| KeyValue::string(key, value));
        let others = traces.attributes.iter().map(|(key, value)| KeyValue::string(key, value));
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let (finish, finished) = oneshot::channel();
        let task = Task {
            receiver,
            client: client.map_err(|error| error.to_string())?,
            url: traces.url.clone(),
            resource: Resource {
                attributes: own.into_iter().chain(others).collect(),
            },
            ids: Ids::default(),
            spans: spans.clone(),
            failing: false,
        };
        tokio::spawn(task.run(finished));
        Ok(Self {
            sender,
            spans,
            finish: Mutex::new(Some(finish)),
        })
    }

    /// Sends a request's spans, where there is room.
    pub(super) fn send(&self, record: Record) {
        if let Err(mpsc::error::TrySendError::Full(record) | mpsc::error::TrySendError::Closed(record)) = self.sender.try_send(record) {
            count(&self.spans, "dropped", 1 + record.parts.len());
        }
    }

    pub(super) async fn finish(&self, patience: Duration) {
        let finish = self.finish.lock().ok().and_then(|mut finish| finish.take());
        let (done, end) = oneshot::channel();
        if finish.is_some_and(|finish| finish.send(done).is_ok()) {
            let _ = timeout(patience, end).await;
        }
    }

    /// One that sends nothing.
    #[cfg(test)]
    pub(super) fn stuck() -> Self {
        Self {
            sender: mpsc::channel(1).0,
            spans: Counts::default(),
            finish: Mutex::new(None),
        }
    }
}

fn count(spans: &Counts, result: &'static str, more: usize) {
    spans.get_or_create(&SpanLabels { result }).inc_by(more as u64);
}

impl Task {
    async fn run(mut self, mut finished: oneshot::Receiver<oneshot::Sender<()>>) {
        let mut tick = interval(PAUSE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let finish = tokio::select! {
                _ = tick.tick() => None,
                finish = &mut finished => Some(finish),
            };
            while let Some(spans) = self.next_batch() {
                // Nobody waits for another try when the server stops.
                let tries = if finish.is_some() { 1 } else { TRIES };
                self.send(spans, tries).await;
            }
            match finish {
                None => {}
                // It is told by being dropped that all is sent.
                Some(_done) => return,
            }
        }
    }

    /// The spans of requests that wait; `None` where none does.
    fn next_batch(&mut self) -> Option<Vec<Span>> {
        let mut spans = vec![];
        for _ in 0..BATCH_MAX {
            let Ok(record) = self.receiver.try_recv() else { break };
            spans_of(record, &self.ids, &mut spans);
        }
        (!spans.is_empty()).then_some(spans)
    }

    async fn send(&mut self, spans: Vec<Span>, tries: u32) {
        let sent = spans.len();
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans {
                    scope: Some(InstrumentationScope {
                        name: NAME.to_owned(),
                        version: VERSION.to_owned(),
                    }),
                    spans,
                }],
            }],
        };
        let body = bytes::Bytes::from(request.encode_to_vec());
        let mut result = self.post(body.clone()).await;
        for again in 1..tries {
            if !matches!(result, Err(Failure::Passing(_))) {
                break;
            }
            sleep(PAUSE * 2_u32.pow(again - 1)).await;
            result = self.post(body.clone()).await;
        }
        match result {
            Ok(rejected) => {
                let rejected = rejected.min(sent);
                count(&self.spans, "rejected", rejected);
                count(&self.spans, "exported", sent - rejected);
                if std::mem::take(&mut self.failing) {
                    tracing::info!("traces arrive again");
                }
            }
            Err(Failure::Passing(reason) | Failure::Lasting(reason)) => {
                count(&self.spans, "failed", sent);
                // Told once, and not with every batch.
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(url = self.url, reason, "traces do not arrive");
                }
            }
        }
    }

    /// How many of the spans were rejected.
    async fn post(&self, body: bytes::Bytes) -> Result<usize, Failure> {
        let request = self
            .client
            .post(&self.url)
            .header("content-type", "application/x-protobuf")
            .body(body);
        let mut answer = request
            .send()
            .await
            .map_err(|error| Failure::Passing(crate::server::model::chain(&error)))?;
        match answer.status() {
            status if status.is_success() => {}
            // "Failures", as far as they are passing.
            status @ (StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT) => {
                return Err(Failure::Passing(format!("status {status}")));
            }
            status => return Err(Failure::Lasting(format!("status {status}"))),
        }
        let mut body = vec![];
        while let Ok(Some(part)) = answer.chunk().await {
            if body.len() + part.len() > ANSWER_BYTES_MAX {
                break;
            }
            body.extend_from_slice(&part);
        }
        let told = ExportTraceServiceResponse::decode(&*body)
            .ok()
            .and_then(|answer| answer.partial_success);
        let Some(told) = told else { return Ok(0) };
        if !told.error_message.is_empty() {
            tracing::debug!(reason = told.error_message, "the collector says of traces");
        }
        Ok(usize::try_from(told.rejected_spans).unwrap_or(0))
    }
}

/// Why spans did not arrive.
enum Failure {
    /// They may be sent again.
    Passing(String),
    Lasting(String),
}

/// Adds the spans of a request: its own, and one of each stage.
fn spans_of(record: Record, ids: &Ids, spans: &mut Vec<Span>) {
    let started = record.ended - record.took;
    let trace_id = record.context.trace.to_be_bytes().to_vec();
    let span_id = record.context.span.to_be_bytes().to_vec();
    let state = record
        .context
        .state
        .as_ref()
        .and_then(|state| state.to_str().ok())
        .unwrap_or_default();
    let span = |own: Vec<u8>, parent: Vec<u8>, begin: SystemTime, took: Duration| Span {
        trace_id: trace_id.clone(),
        span_id: own,
        parent_span_id: parent,
        trace_state: state.to_owned(),
        start_time_unix_nano: nanos(begin),
        end_time_unix_nano: nanos(begin + took),
        // That of W3C's: sampled.
        flags: 1,
        ..Span::default()
    };
    let parent = record.parent.map_or_else(Vec::new, |parent| parent.to_be_bytes().to_vec());
    let mut attributes = attributes(record.method, record.failure.as_ref().map(|(reason, _)| *reason));
    let status = record.failure.map(|(reason, text)| {
        attributes.push(KeyValue::string("error.type", <&str>::from(reason)));
        Status {
            // A client's mistake is no error of the server's.
            code: if reason.is_the_servers() { ERROR } else { 0 },
            message: text,
        }
    });
    spans.push(Span {
        name: record.method.name(),
        kind: Kind::Server as i32,
        attributes,
        status: status.filter(|status| status.code == ERROR),
        ..span(span_id.clone(), parent, started, record.took)
    });
    for part in record.parts {
        spans.push(Span {
            name: <&str>::from(part.stage).to_owned(),
            kind: Kind::Internal as i32,
            attributes: (part.rows > 0)
                .then(|| KeyValue::int("plimsoll.batch.rows", part.rows as i64))
                .into_iter()
                .collect(),
            ..span(ids.next().to_be_bytes().to_vec(), span_id.clone(), started + part.begin, part.took)
        });
    }
}

/// Nanoseconds since 1970, as far as 64 bits hold them.
fn nanos(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// What the semantic conventions name of a call (OpenTelemetry, "Semantic conventions for HTTP spans", "for gRPC").
fn attributes(method: Method, refused: Option<Reason>) -> Vec<KeyValue> {
    let status = i64::from(method.status(refused));
    match method {
        Method::Http(route) => vec![
            KeyValue::string("http.request.method", "POST"),
            KeyValue::string("http.route", route),
            KeyValue::int("http.response.status_code", status),
        ],
        Method::Grpc(method) => vec![
            KeyValue::string("rpc.system", "grpc"),
            KeyValue::string("rpc.service", crate::server::grpc::SERVICE),
            KeyValue::string("rpc.method", method),
            KeyValue::int("rpc.grpc.status_code", status),
        ],
    }
}
