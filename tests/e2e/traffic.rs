//! Clients of a model: one inference, and a loop of them that counts what fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

/// A connection that is new for each request, as most clients of a Service have, or kept.
fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(10)))
        .http_status_as_error(false)
        .build()
        .into()
}

/// A digit that looks like a seven to the model: a bar on top and a diagonal.
fn picture() -> Vec<f32> {
    let rows = [
        "00000000", "06666660", "00000060", "00000600", "00006000", "00060000", "00600000", "00000000",
    ];
    rows.iter()
        .flat_map(|row| row.bytes())
        .map(|ink| f32::from(ink - b'0') / 6.0)
        .collect()
}

/// Asks the model at `address` about one picture and returns the logits.
pub(crate) fn infer(address: &str, model: &str) -> Result<Vec<f64>, String> {
    infer_with(&agent(), address, model)
}

fn infer_with(agent: &ureq::Agent, address: &str, model: &str) -> Result<Vec<f64>, String> {
    let outputs = ask_with(
        agent,
        address,
        model,
        &json!([{ "name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": picture() }]),
    )?;
    let logits: Vec<f64> = outputs[0]["data"]
        .as_array()
        .ok_or("no data")?
        .iter()
        .filter_map(Value::as_f64)
        .collect();
    if logits.len() == 10 && outputs[0]["shape"] == json!([1, 10]) {
        Ok(logits)
    } else {
        Err(format!("not ten logits: {outputs}"))
    }
}

/// Asks the model at `address` about `inputs`, and returns its outputs.
pub(crate) fn ask(address: &str, model: &str, inputs: &Value) -> Result<Value, String> {
    ask_with(&agent(), address, model, inputs)
}

fn ask_with(agent: &ureq::Agent, address: &str, model: &str, inputs: &Value) -> Result<Value, String> {
    let mut response = agent
        .post(format!("{address}/v2/models/{model}/infer"))
        .send_json(json!({ "inputs": inputs }))
        .map_err(|error| error.to_string())?;
    let status = response.status();
    let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
    let mut answer: Value = serde_json::from_str(&text).map_err(|error| format!("{status}: `{text}` is no JSON: {error}"))?;
    if status != 200 {
        return Err(format!("{status}: {answer}"));
    }
    Ok(answer["outputs"].take())
}

/// GET of a path, as status and JSON.
pub(crate) fn get(url: &str) -> (u16, Value) {
    let mut response = agent().get(url).call().unwrap_or_else(|error| panic!("GET {url}: {error}"));
    (response.status().as_u16(), response.body_mut().read_json().unwrap_or(Value::Null))
}

/// GET of a path as a user with a password, or as nobody.
pub(crate) fn get_as(user: Option<(&str, &str)>, url: &str) -> (u16, Value) {
    use base64::Engine as _;
    let mut request = agent().get(url);
    if let Some((user, password)) = user {
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        request = request.header("Authorization", format!("Basic {login}"));
    }
    let mut response = request.call().unwrap_or_else(|error| panic!("GET {url}: {error}"));
    (response.status().as_u16(), response.body_mut().read_json().unwrap_or(Value::Null))
}

/// POST of JSON, as status and JSON.
pub(crate) fn post(url: &str, body: &Value) -> (u16, Value) {
    let mut response = agent()
        .post(url)
        .send_json(body)
        .unwrap_or_else(|error| panic!("POST {url}: {error}"));
    (response.status().as_u16(), response.body_mut().read_json().unwrap_or(Value::Null))
}

/// POST of bytes of that type, as `curl --data-binary @FILE` sends them, as status and JSON.
pub(crate) fn send(url: &str, kind: &str, body: &[u8]) -> (u16, Value) {
    let request = agent().post(url).header("content-type", kind);
    let mut response = request.send(body).unwrap_or_else(|error| panic!("POST {url}: {error}"));
    (response.status().as_u16(), response.body_mut().read_json().unwrap_or(Value::Null))
}

/// Clients that ask in a loop until they are stopped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    /// Starts two clients that keep their connections and two that do not.
    pub(crate) fn start(address: &str, model: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let clients = (0..4)
            .map(|client| {
                let (stop, answered, address, model) = (stop.clone(), answered.clone(), address.to_owned(), model.to_owned());
                std::thread::spawn(move || {
                    let kept = agent();
                    let mut failures = vec![];
                    while !stop.load(Ordering::Relaxed) {
                        let answer = if client % 2 == 0 {
                            infer_with(&kept, &address, &model)
                        } else {
                            infer(&address, &model)
                        };
                        match answer {
                            Ok(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
                            Err(error) => failures.push(error),
                        }
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    failures
                })
            })
            .collect();
        Self { stop, answered, clients }
    }

    /// Requests that were answered so far.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Stops the clients; panics where any request failed or none was answered.
    pub(crate) fn expect_no_failure(self) {
        self.stop.store(true, Ordering::Relaxed);
        let failures: Vec<String> = self
            .clients
            .into_iter()
            .flat_map(|client| client.join().expect("a client"))
            .collect();
        let answered = self.answered.load(Ordering::Relaxed);
        assert!(
            failures.is_empty(),
            "{} of {} requests failed, the first with: {}",
            failures.len(),
            answered + failures.len() as u64,
            failures[0]
        );
        assert!(answered > 100, "only {answered} requests were answered");
    }
}
