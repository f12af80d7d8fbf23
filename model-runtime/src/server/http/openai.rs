//! OpenAI's API of embeddings, for models that give them: `/v1/embeddings` and `/v1/models` (OpenAI, "API reference: Embeddings, Models").

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, State as Shared};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Json;
use super::infer::receive;
use crate::server::State;
use crate::server::inference::off_thread;
use crate::server::inference::{Admission, InferRequest, Options, RequestedOutput};
use crate::server::refusal::{Reason, Refusal};
use crate::server::scheduler::Client;
use crate::server::text::{Pooling, SENTENCE_EMBEDDING, Text, Tokens};
use crate::server::trace::{Method, Span, Stage};

/// Most texts of a request, as OpenAI has it.
const TEXTS_MAX: usize = 2048;

/// Texts that are handed to the engine together, at most: those of about one length, so that little is padded.
const BATCH_TEXTS_MAX: usize = 32;

/// A refusal in OpenAI's form, with the field that is at fault.
pub(super) struct Fault {
    refusal: Refusal,
    field: Option<&'static str>,
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, field: None }
    }
}

impl Fault {
    fn of(field: &'static str, text: String) -> Self {
        Self {
            refusal: Refusal::invalid(text),
            field: Some(field),
        }
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let Refusal { reason, ref text } = self.refusal;
        let (kind, code) = match reason {
            Reason::NotFound => ("invalid_request_error", Some("model_not_found")),
            Reason::Unauthenticated => ("invalid_request_error", Some("invalid_api_key")),
            Reason::Overloaded => ("rate_limit_error", Some("rate_limit_exceeded")),
            _ if reason.status().is_server_error() => ("server_error", None),
            _ => ("invalid_request_error", None),
        };
        reason.respond(json!({"error": {"message": text, "type": kind, "param": self.field, "code": code}}))
    }
}

/// The model, as OpenAI describes one.
fn description(state: &State) -> Value {
    let created = state
        .started
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    json!({"id": state.config.name, "object": "model", "created": created, "owned_by": "plimsoll"})
}

/// Lists what this API can be asked for: the model, where it gives embeddings.
pub(super) async fn models(Shared(state): Shared<Arc<State>>) -> Result<Json, Fault> {
    let model = state.model().ok_or_else(Refusal::loading)?;
    let models: Vec<Value> = model.preprocessing.embedding(None).iter().map(|_| description(&state)).collect();
    Ok(Json(json!({"object": "list", "data": models})))
}

pub(super) async fn model(Shared(state): Shared<Arc<State>>, Path(name): Path<String>) -> Result<Json, Fault> {
    check_model(&state, &name)?;
    text(&state, None)?;
    Ok(Json(description(&state)))
}

fn check_model(state: &State, name: &str) -> Result<(), Fault> {
    state.config.check_target(name, None).map_err(|refusal| Fault {
        refusal,
        field: Some("model"),
    })
}

/// How the model takes texts, where it gives embeddings of them.
fn text(state: &State, pooling: Option<Pooling>) -> Result<&Text, Fault> {
    let model = state.model().ok_or_else(Refusal::loading)?;
    let refuse = |reason: String| {
        Fault::of(
            "model",
            format!("model `{}` gives no embeddings of texts: {reason}", state.config.name),
        )
    };
    model.preprocessing.embedding(pooling).map_err(refuse)
}

/// A request's body; fields that are not here change nothing.
#[derive(Deserialize)]
struct Asked {
    model: String,
    input: Input,
    #[serde(default)]
    encoding_format: Format,
    dimensions: Option<usize>,
    // What OpenAI's API does not have: as in the parameters of the Open Inference Protocol.
    pooling: Option<Pooling>,
    normalize: Option<bool>,
    #[serde(default)]
    truncate: bool,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Float,
    Base64,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "`input` takes a text, a list of texts, a list of tokens, or a list of lists of tokens"
)]
enum Input {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ListsOfTokens(Vec<Vec<u32>>),
}

impl Input {
    fn len(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::ListsOfTokens(lists) => lists.len(),
        }
    }

    /// The tokens of each text.
    fn tokens(self, text: &Text, truncate: bool) -> Result<Vec<Tokens>, String> {
        let tokenizer = &text.tokenizer;
        let number = |(index, tokens): (usize, Result<Tokens, String>)| tokens.map_err(|reason| format!("input {index}: {reason}"));
        match self {
            Self::Text(text) => tokenizer.tokenize(&text, None, truncate).map(|tokens| vec![tokens]),
            Self::Tokens(ids) => tokenizer.take(ids).map(|tokens| vec![tokens]),
            Self::Texts(texts) => {
                let tokens = texts.iter().map(|text| tokenizer.tokenize(text, None, truncate));
                tokens.enumerate().map(number).collect()
            }
            Self::ListsOfTokens(lists) => {
                let tokens = lists.into_iter().map(|ids| tokenizer.take(ids));
                tokens.enumerate().map(number).collect()
            }
        }
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    object: &'static str,
    data: Vec<Embedding<'a>>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Embedding<'a> {
    object: &'static str,
    index: usize,
    embedding: Values<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Values<'a> {
    Float(&'a [f32]),
    /// Of the little-endian bytes.
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

pub(super) async fn embeddings(
    Shared(state): Shared<Arc<State>>,
    Extension(client): Extension<Client>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let started = Instant::now();
    let span = state.begin(Method::Http("/v1/embeddings"), &headers, started);
    let answer = embed(&state, client, &headers, body, started, &span).await;
    let refusal = answer.as_ref().err().map(|fault| &fault.refusal);
    state.answered(span, refusal);
    answer.unwrap_or_else(IntoResponse::into_response)
}

async fn embed(
    state: &Arc<State>,
    client: Client,
    headers: &HeaderMap,
    body: Body,
    started: Instant,
    span: &Span,
) -> Result<Response, Fault> {
    let received = span.within(Stage::Receive, receive(state, headers, body, started));
    let (body, admission) = received.await?;
    let parse = off_thread(body.len(), move || serde_json::from_slice::<Asked>(&body));
    let parsed = span.within(Stage::Parse, parse).await?;
    let asked = parsed.map_err(|error| Refusal::invalid(format!("the body is not a request for embeddings: {error}")))?;
    check_model(state, &asked.model)?;
    text(state, asked.pooling)?;
    let count = asked.input.len();
    if !(1..=TEXTS_MAX).contains(&count) {
        return Err(Fault::of(
            "input",
            format!("`input` holds {count} texts, it takes 1 to {TEXTS_MAX}"),
        ));
    }
    let (input, pooling, normalize, truncate) = (asked.input, asked.pooling, asked.normalize, asked.truncate);
    let tokenizing = Arc::clone(state);
    let tokenize = move || {
        input
            .tokens(text(&tokenizing, pooling)?, truncate)
            .map_err(|reason| Fault::of("input", reason))
    };
    let tokens = span.within(Stage::Preprocess, off_thread(usize::MAX, tokenize)).await??;
    let total: usize = tokens.iter().map(Tokens::count).sum();
    state.metrics.tokens.inc_by(total as u64);

    let options = Options {
        // Without that of the files, which are for texts and not for tokens.
        pooling: pooling.or(Some(text(state, pooling)?.embedding.pooling)),
        normalize: normalize.or(Some(text(state, pooling)?.embedding.normalize)),
        ..Options::default()
    };
    let rows = run(state, &admission, client, &tokens, options, span).await?;
    let width = rows.first().map_or(0, Vec::len);
    if let Some(dimensions) = asked.dimensions.filter(|&dimensions| dimensions != width) {
        let text = format!("`dimensions` is {dimensions}, the model's embeddings have {width}");
        return Err(Fault::of("dimensions", text));
    }
    let format = asked.encoding_format;
    let name = state.config.name.clone();
    let write = move || {
        let bytes = |row: &[f32]| row.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let data = rows.iter().enumerate().map(|(index, row)| Embedding {
            object: "embedding",
            index,
            embedding: match format {
                Format::Float => Values::Float(row),
                Format::Base64 => Values::Base64(STANDARD.encode(bytes(row))),
            },
        });
        let answer = Answer {
            object: "list",
            data: data.collect(),
            model: &name,
            usage: Usage {
                prompt_tokens: total,
                total_tokens: total,
            },
        };
        serde_json::to_vec(&answer)
    };
    let write = off_thread(count * width * size_of::<f32>(), write);
    let body = span.within(Stage::Serialize, write).await?;
    let body = body.map_err(|error| Refusal::new(Reason::Internal, error.to_string()))?;
    Ok(([(axum::http::header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// The embedding of each of the texts: those of about one length together, in as many batches as it takes.
async fn run(
    state: &Arc<State>,
    admission: &Admission,
    client: Client,
    tokens: &[Tokens],
    options: Options,
    span: &Span,
) -> Result<Vec<Vec<f32>>, Fault> {
    let tokenizer = &text(state, options.pooling)?.tokenizer;
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    order.sort_by_key(|&index| tokens[index].count());
    // Where the model cannot tell padding from tokens, there may be none.
    let together = |a: &usize, b: &usize| tokenizer.pads() || tokens[*a].count() == tokens[*b].count();
    let batches: Vec<&[usize]> = order.chunk_by(together).flat_map(|alike| alike.chunks(BATCH_TEXTS_MAX)).collect();
    let run = |indices: &[usize]| {
        let texts: Vec<&Tokens> = indices.iter().map(|&index| &tokens[index]).collect();
        let request = InferRequest {
            inputs: tokenizer.batch(&texts).inputs,
            outputs: vec![RequestedOutput {
                name: SENTENCE_EMBEDDING.to_owned(),
                ..RequestedOutput::default()
            }],
            options,
            ..InferRequest::default()
        };
        admission.infer(request, client, span)
    };
    let answers = futures::future::try_join_all(batches.iter().map(|indices| run(indices))).await?;
    let mut rows = vec![vec![]; tokens.len()];
    let wrong = || Refusal::new(Reason::Internal, "the model gave no embedding for each text");
    for (indices, outputs) in batches.into_iter().zip(answers) {
        let embeddings = outputs.first().map(|output| &output.tensor).ok_or_else(wrong)?;
        let values: Vec<f32> = match embeddings.as_f32() {
            Some(values) => values.to_vec(),
            None => embeddings
                .data()
                .to_f64()
                .ok_or_else(wrong)?
                .into_iter()
                .map(|value| value as f32)
                .collect(),
        };
        if embeddings.shape().first() != Some(&indices.len()) || values.is_empty() {
            return Err(wrong().into());
        }
        let width = values.len() / indices.len();
        for (&index, row) in indices.iter().zip(values.chunks(width)) {
            rows[index] = row.to_vec();
        }
    }
    Ok(rows)
}
