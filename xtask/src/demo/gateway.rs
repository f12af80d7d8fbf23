//! The way to the cluster's API and, through it, to its Services: `kubectl proxy` on a port of its own.
//!
//! It works on every cluster that kubectl works on: no node port, load balancer or route is needed, and a rollout does not break it.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::target::Target;

/// Longest time from a request to the end of its answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of an answer.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// What keeps a program while somebody holds the other end of its standard input, and ends it then: a process that is killed has no chance
/// to end its children, but its pipes close. A signal that all of a terminal's processes get must not end the shell first. The program's output
/// must end with the program, so the shell gives its own away.
const KEEPER: &str = r#""$@" & child=$!; trap '' HUP INT TERM; exec >/dev/null; read -r _; kill "$child" 2>/dev/null; wait"#;

/// A running `kubectl proxy`; it ends with this, and with this process however that ends.
pub(super) struct Gateway {
    keeper: Child,
    client: Client,
}

impl Gateway {
    /// Starts it.
    ///
    /// # Errors
    /// Where kubectl does not start or does not say its port.
    pub(super) fn open(target: &Target) -> Result<Self> {
        let mut command = target.kubectl()?;
        command.args(["proxy", "--address=127.0.0.1", "--port=0"]);
        let mut keeper = kept(&command)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start `kubectl proxy`")?;
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().context("stdout is piped")?).read_line(&mut line)?;
        let Some((_, address)) = line.trim().rsplit_once(' ') else {
            end(&mut keeper);
            bail!("`kubectl proxy` ended at once; what it said stands above");
        };
        let bounded = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(REQUEST_TIMEOUT))
            .build();
        let endless = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_recv_response(Some(REQUEST_TIMEOUT))
            .build();
        let client = Client {
            base: format!("http://{address}"),
            bounded: bounded.into(),
            endless: endless.into(),
        };
        Ok(Self { keeper, client })
    }

    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        end(&mut self.keeper);
    }
}

/// `command` with a keeper before it.
fn kept(command: &Command) -> Command {
    let mut keeper = Command::new("sh");
    keeper
        .args(["-c", KEEPER, "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => keeper.env(name, value),
            None => keeper.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        keeper.current_dir(folder);
    }
    keeper.stdin(Stdio::piped());
    keeper
}

/// Ends what the keeper keeps, and the keeper.
fn end(keeper: &mut Child) {
    drop(keeper.stdin.take());
    // It may have ended by itself; then there is nothing to do.
    let _ = keeper.wait();
}

/// An HTTP client; clones share connections.
#[derive(Clone)]
pub(super) struct Client {
    base: String,
    bounded: ureq::Agent,
    endless: ureq::Agent,
}

/// An answer.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) location: Option<String>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// The answer, unless it says that the request failed.
    ///
    /// # Errors
    /// With the first words of the body.
    pub(super) fn expect_success(self) -> Result<Self> {
        if (200..300).contains(&self.status) {
            return Ok(self);
        }
        let words: String = String::from_utf8_lossy(&self.body).chars().take(300).collect();
        bail!("status {}: {}", self.status, words.trim())
    }
}

impl Client {
    /// A client of a server on this machine.
    pub(super) fn of(address: &str) -> Self {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(REQUEST_TIMEOUT))
            .build()
            .into();
        Self {
            base: format!("http://{address}"),
            bounded: agent.clone(),
            endless: agent,
        }
    }

    /// Sends a request without a body.
    ///
    /// # Errors
    /// Where no answer comes; whatever status it has is no error.
    pub(super) fn get(&self, path: &str, accept: &str) -> Result<Answer> {
        answer(
            path,
            self.bounded.get(format!("{}{path}", self.base)).header("accept", accept).call(),
        )
    }

    /// Sends `body`.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(super) fn post(&self, path: &str, content_type: &str, body: &[u8]) -> Result<Answer> {
        answer(
            path,
            self.bounded
                .post(format!("{}{path}", self.base))
                .header("content-type", content_type)
                .send(body),
        )
    }

    /// Puts `body`.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(super) fn put(&self, path: &str, content_type: &str, body: &[u8]) -> Result<Answer> {
        answer(
            path,
            self.bounded
                .put(format!("{}{path}", self.base))
                .header("content-type", content_type)
                .send(body),
        )
    }

    /// Watches a collection of the API; once this returns, no change is missed. The reader gives one event a line, as
    /// [`WatchEvent`](https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes) in JSON.
    ///
    /// # Errors
    /// Where the API refuses.
    pub(super) fn watch(&self, collection: &str) -> Result<impl Iterator<Item = Value> + Send + use<>> {
        let response = self
            .endless
            .get(format!("{}{collection}", self.base))
            .call()
            .with_context(|| format!("cannot watch {collection}"))?;
        if response.status() != 200 {
            bail!("cannot watch {collection}: status {}", response.status());
        }
        let reader: Box<dyn Read + Send> = Box::new(response.into_body().into_with_config().limit(u64::MAX).reader());
        let lines = BufReader::new(reader).lines();
        Ok(lines.map_while(Result::ok).map_while(|line| serde_json::from_str(&line).ok()))
    }
}

fn answer(path: &str, response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Answer> {
    let mut response = response.with_context(|| format!("no answer to {path}"))?;
    let location = response
        .headers()
        .get("location")
        .and_then(|location| location.to_str().ok())
        .map(str::to_owned);
    let body = response
        .body_mut()
        .with_config()
        .limit(ANSWER_BYTES_MAX)
        .read_to_vec()
        .with_context(|| format!("the answer to {path} broke off"))?;
    Ok(Answer {
        status: response.status().as_u16(),
        location,
        body,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Starts a program that says its process id and lives on, below a keeper.
    fn start() -> (Child, u32) {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$; exec sleep 600"]).env("ANY", "thing");
        let mut keeper = kept(&command).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (keeper, line.trim().parse().unwrap())
    }

    fn runs(process: u32) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        !status.is_empty() && !status.contains("State:\tZ")
    }

    #[test]
    fn what_is_kept_ends_with_the_gateway() {
        let (mut keeper, process) = start();
        assert!(runs(process));
        end(&mut keeper);
        assert!(!runs(process));
    }

    #[test]
    fn what_is_kept_ends_when_the_process_that_started_it_is_killed() {
        // The pipe closes as the kernel closes it for a process that is killed.
        let (mut keeper, process) = start();
        drop(keeper.stdin.take());
        let begun = Instant::now();
        while runs(process) {
            assert!(begun.elapsed() < Duration::from_secs(20), "it lives on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn what_ends_at_once_is_noticed() {
        let mut keeper = kept(&Command::new("false")).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "");
        end(&mut keeper);
    }
}
