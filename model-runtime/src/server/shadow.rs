//! Shadow comparison: a share of the requests is sent to another revision as well, and its answers are compared with ours. The caller waits
//! for none of it, and never hears of it.

use std::time::{Duration, Instant};

use plimsoll_package::manifest::Datatype;
use reqwest::Client;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;

use super::metrics::Metrics;
use super::share::Share;
use super::trace::Context;
use crate::engine::{Data, Tensor};

/// Most copies that wait to be sent; what comes beyond is dropped and counted.
const WAITING_MAX: usize = 64;

/// Most copies in flight.
const IN_FLIGHT_MAX: usize = 4;

/// Longest wait for the other's answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Most bytes of an answer.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Whom to compare with.
#[derive(Debug, Clone, PartialEq)]
pub struct Shadow {
    /// The other's `/v2/models/NAME`, by `http://` or `https://`.
    pub url: String,
    /// Share of the requests that is sent there, 0 to 1.
    pub share: f64,
    /// Largest difference that counts as agreement, relative to the largest absolute value of our output.
    pub tolerance: f64,
}

/// What came of a comparison: a label of the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
pub(super) enum Comparison {
    /// All outputs agree.
    Agreed,
    /// One does not, or has another shape or type, or is missing.
    Differed,
    /// The other did not answer, or not with outputs.
    Failed,
    /// Too many copies waited.
    Dropped,
}

/// A request, and what was answered.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) inputs: Vec<(String, Tensor)>,
    pub(super) outputs: Vec<(String, Tensor)>,
    /// The trace that the request belongs to.
    pub(super) context: Option<Context>,
}

/// Sends copies in the background.
pub(super) struct Shadowing {
    sender: mpsc::Sender<Copy>,
    share: Share,
}

impl Shadowing {
    /// Starts the tasks that send copies; needs the async runtime.
    ///
    /// # Errors
    /// In words, where there can be no client.
    pub(super) fn start(shadow: &Shadow, metrics: &Metrics) -> Result<Self, String> {
        plimsoll_package::registry::install_crypto_provider();
        let client = Client::builder().timeout(TIMEOUT).build().map_err(|error| error.to_string())?;
        let url = format!("{}/infer", shadow.url.trim_end_matches('/'));
        let (sender, receiver) = mpsc::channel::<Copy>(WAITING_MAX);
        let receiver = std::sync::Arc::new(tokio::sync::Mutex::new(receiver));
        for _ in 0..IN_FLIGHT_MAX {
            let (client, url, receiver, metrics, tolerance) = (
                client.clone(),
                url.clone(),
                std::sync::Arc::clone(&receiver),
                metrics.shadow.clone(),
                shadow.tolerance,
            );
            tokio::spawn(async move {
                loop {
                    let copy = receiver.lock().await.recv().await;
                    let Some(copy) = copy else { return };
                    let begun = Instant::now();
                    let (comparison, difference) = match ask(&client, &url, &copy.inputs, copy.context.as_ref()).await {
                        Ok(outputs) => {
                            let difference = difference(&copy.outputs, &outputs);
                            // Not `difference > tolerance`, which a NaN would pass.
                            let agreed = difference <= tolerance;
                            (if agreed { Comparison::Agreed } else { Comparison::Differed }, Some(difference))
                        }
                        Err(reason) => {
                            tracing::debug!(reason, "the shadow did not answer");
                            (Comparison::Failed, None)
                        }
                    };
                    metrics.compared(comparison, difference, begun.elapsed());
                }
            });
        }
        Ok(Self {
            sender,
            share: Share::new(shadow.share),
        })
    }

    /// Whether a copy of this request is to be sent.
    pub(super) fn wants(&self) -> bool {
        self.share.takes()
    }

    /// Sends a copy, where there is room.
    pub(super) fn send(&self, copy: Copy, metrics: &Metrics) {
        if self.sender.try_send(copy).is_err() {
            metrics.shadow.compared(Comparison::Dropped, None, Duration::ZERO);
        }
    }
}

/// The other's outputs, asked for with tensors as bytes.
async fn ask(client: &Client, url: &str, inputs: &[(String, Tensor)], context: Option<&Context>) -> Result<Vec<(String, Tensor)>, String> {
    let mut bytes = vec![];
    let mut described = vec![];
    for (name, tensor) in inputs {
        let size = tensor.data().byte_count();
        tensor.data().write_bytes(&mut bytes);
        described.push(json!({
            "name": name, "datatype": tensor.datatype(), "shape": tensor.shape(), "parameters": {"binary_data_size": size},
        }));
    }
    let mut body = json!({"inputs": described, "parameters": {"binary_data_output": true}})
        .to_string()
        .into_bytes();
    let length = body.len();
    body.append(&mut bytes);
    let headers = context.into_iter().flat_map(Context::headers).collect();
    let request = client.post(url).headers(headers);
    let request = request.header("inference-header-content-length", length).body(body);
    let mut answer = request.send().await.map_err(|error| error.to_string())?;
    if !answer.status().is_success() {
        return Err(format!("status {}", answer.status()));
    }
    let length = answer.headers().get("inference-header-content-length");
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    let mut body = vec![];
    while let Some(part) = answer.chunk().await.map_err(|error| error.to_string())? {
        if body.len() + part.len() > ANSWER_BYTES_MAX {
            return Err(format!("more than {ANSWER_BYTES_MAX} bytes"));
        }
        body.extend_from_slice(&part);
    }
    read(&body, length)
}

/// Reads an answer whose tensors come as bytes.
fn read(body: &[u8], json_length: Option<usize>) -> Result<Vec<(String, Tensor)>, String> {
    #[derive(Deserialize)]
    struct Answer {
        outputs: Vec<Output>,
    }
    #[derive(Deserialize)]
    struct Output {
        name: String,
        datatype: Datatype,
        shape: Vec<usize>,
        parameters: Parameters,
    }
    #[derive(Deserialize)]
    struct Parameters {
        binary_data_size: usize,
    }
    let length = json_length.ok_or("no tensors as bytes")?;
    let (json, mut bytes) = body.split_at_checked(length).ok_or("a body that is too short")?;
    let answer: Answer = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let output = |output: Output| {
        let (own, rest) = bytes
            .split_at_checked(output.parameters.binary_data_size)
            .ok_or("a body that is too short")?;
        bytes = rest;
        let data = Data::from_bytes(output.datatype, &output.shape, own).map_err(|error| error.to_string())?;
        let tensor = Tensor::new(output.shape, data).map_err(|error| error.to_string())?;
        Ok((output.name, tensor))
    };
    answer.outputs.into_iter().map(output).collect()
}

/// Largest difference of any output, relative to the largest absolute value of ours; infinite where one is missing, has another shape or
/// type, or differs in a string.
fn difference(ours: &[(String, Tensor)], theirs: &[(String, Tensor)]) -> f64 {
    let of = |(name, ours): &(String, Tensor)| {
        let Some((_, theirs)) = theirs.iter().find(|(other, _)| other == name) else {
            return f64::INFINITY;
        };
        if theirs.shape() != ours.shape() || theirs.datatype() != ours.datatype() {
            return f64::INFINITY;
        }
        match ours.data().to_f64() {
            Some(values) => crate::engine::probe::difference(theirs, &values),
            None if ours == theirs => 0.0,
            None => f64::INFINITY,
        }
    };
    ours.iter().map(of).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_in_kind_differs_infinitely() {
        let tensor = |values: &[f32]| Tensor::new(vec![values.len()], values.to_vec()).unwrap();
        let ours = [("y".to_owned(), tensor(&[1.0, -4.0]))];
        let theirs = |name: &str, tensor| [(name.to_owned(), tensor)];
        assert_eq!(difference(&ours, &ours), 0.0);
        assert_eq!(difference(&ours, &theirs("y", tensor(&[1.0, -3.0]))), 0.25);
        assert_eq!(difference(&ours, &theirs("y", tensor(&[1.0]))), f64::INFINITY);
        assert_eq!(difference(&ours, &theirs("z", tensor(&[1.0, -4.0]))), f64::INFINITY);
        assert_eq!(difference(&ours, &theirs("y", tensor(&[1.0, f32::NAN]))), f64::INFINITY);
        let whole = Tensor::new(vec![2], vec![1_i32, -4]).unwrap();
        assert_eq!(difference(&ours, &theirs("y", whole)), f64::INFINITY);
    }

    #[test]
    fn a_broken_answer_is_an_error() {
        let json = br#"{"outputs":[{"name":"y","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}"#;
        let body = [&json[..], &1.5_f32.to_le_bytes()].concat();
        let read_back = read(&body, Some(json.len())).unwrap();
        assert_eq!(read_back, [("y".to_owned(), Tensor::new(vec![1], vec![1.5_f32]).unwrap())]);
        for (body, length) in [
            (&body[..body.len() - 1], Some(json.len())),
            (&body, None),
            (&body, Some(1000)),
            (b"{}", Some(2)),
        ] {
            assert!(read(body, length).is_err());
        }
    }
}
