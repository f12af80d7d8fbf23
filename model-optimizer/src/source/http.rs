//! `https://`, and `http://` to hosts that are allowed: a download that streams to disk and takes up where it broke off.

use std::path::Path;
use std::time::Duration;

use plimsoll_package::digest::Hasher;
use plimsoll_package::registry::{Attempts, Credentials, install_crypto_provider, trusted_roots};
use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, LAST_MODIFIED, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, StatusCode, Url};
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;

use super::{Content, Limits, too_large};
use crate::failure::{Failure, FailureReason, chain, disk, failure, internal, of_source};
use crate::progress::Activity;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest silence of a server in the middle of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
const REDIRECTS_MAX: usize = 5;

/// Downloads `uri`.
pub(super) async fn download(
    what: &str,
    uri: &str,
    credentials: Credentials,
    limits: &Limits,
    destination: &Path,
    activity: &Activity,
) -> Result<Content, Failure> {
    let url: Url = uri
        .parse()
        .map_err(|error| failure(FailureReason::InvalidInputs, format!("{uri} is not a URL: {error}")))?;
    if url.scheme() == "http" && !allows_plain_http(&url, &limits.plain_http_hosts) {
        let host = host_and_port(&url);
        let advice = format!("use https://, or have the operator allow plain HTTP to {host} (plainHttpHosts)");
        return Err(failure(
            FailureReason::SourceRefused,
            format!("the {what} {uri} would come over plain HTTP, which anybody on the way can change; {advice}"),
        ));
    }
    let client = client(what, limits)?;
    let file = File::create(destination).await.map_err(disk("write", destination))?;
    let mut download = Download {
        what,
        url,
        client,
        credentials,
        size_max: limits.size_max,
        destination,
        file,
        hasher: Hasher::default(),
        done: 0,
        validator: None,
        activity,
    };
    let mut attempts = Attempts::new(limits.retries);
    loop {
        match download.attempt().await {
            Ok(()) => break,
            Err(Broken::For(failure)) => return Err(failure),
            Err(Broken::Off(why)) => {
                let Some(delay) = attempts.next_delay(download.done) else {
                    return Err(failure(
                        FailureReason::SourceUnreachable,
                        format!("cannot fetch the {what} {uri}: {why}"),
                    ));
                };
                tokio::time::sleep(delay).await;
            }
        }
    }
    download.file.flush().await.map_err(disk("write", destination))?;
    Ok(Content {
        digest: download.hasher.finish(),
        size: download.done,
    })
}

fn client(what: &str, limits: &Limits) -> Result<Client, Failure> {
    install_crypto_provider();
    let roots = trusted_roots(limits.extra_ca.as_deref()).map_err(|error| of_source(what, &error))?;
    let hosts = limits.plain_http_hosts.clone();
    let redirects = Policy::custom(move |attempt| {
        if attempt.previous().len() > REDIRECTS_MAX {
            attempt.error("too many redirects")
        } else if attempt.url().scheme() == "https" || allows_plain_http(attempt.url(), &hosts) {
            attempt.follow()
        } else {
            attempt.error("it redirects to plain HTTP")
        }
    });
    let builder = Client::builder()
        .user_agent(concat!("plimsoll/", env!("CARGO_PKG_VERSION")))
        .tls_certs_only(roots.iter().filter_map(|root| Certificate::from_der(root).ok()))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(redirects);
    builder.build().map_err(|error| internal("cannot make an HTTP client", &error))
}

fn host_and_port(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn allows_plain_http(url: &Url, hosts: &[String]) -> bool {
    url.scheme() == "http"
        && hosts
            .iter()
            .any(|host| *host == host_and_port(url) || Some(host.as_str()) == url.host_str())
}

struct Download<'a> {
    what: &'a str,
    url: Url,
    client: Client,
    credentials: Credentials,
    size_max: u64,
    destination: &'a Path,
    file: File,
    hasher: Hasher,
    done: u64,
    /// What the server must still have for the rest to fit to the beginning.
    validator: Option<HeaderValue>,
    activity: &'a Activity,
}

enum Broken {
    /// The connection broke off; it may be taken up.
    Off(String),
    /// Nothing will come of it.
    For(Failure),
}

impl Download<'_> {
    async fn attempt(&mut self) -> Result<(), Broken> {
        let mut request = self.client.get(self.url.clone());
        request = match &self.credentials {
            Credentials::Basic { username, password } => request.basic_auth(username, Some(password)),
            Credentials::Token(token) => request.bearer_auth(token),
            Credentials::Anonymous | Credentials::PerRegistry(_) => request,
        };
        let resumed = self.validator.clone().filter(|_| self.done > 0);
        if let Some(validator) = &resumed {
            request = request.header(RANGE, format!("bytes={}-", self.done)).header(IF_RANGE, validator);
        }
        let mut response = request.send().await.map_err(|error| self.sending_failed(&error))?;
        let status = response.status();
        let beginning = if resumed.is_some() && status == StatusCode::PARTIAL_CONTENT {
            let expected = format!("bytes {}-", self.done);
            let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
            range.is_none_or(|range| !range.starts_with(&expected))
        } else if status == StatusCode::OK {
            true
        } else {
            return Err(self.refused(status));
        };
        if beginning {
            if status != StatusCode::OK {
                self.validator = None;
                return Err(Broken::Off("the server continues at another place than asked for".into()));
            }
            self.restart().await.map_err(Broken::For)?;
        }
        self.validator = validator(response.headers());
        let total = response.content_length().map(|rest| rest + self.done);
        if let Some(total) = total.filter(|total| *total > self.size_max) {
            return Err(Broken::For(too_large(self.what, self.url.as_str(), Some(total), self.size_max)));
        }
        while let Some(piece) = response.chunk().await.map_err(|error| Broken::Off(chain(&error)))? {
            let done = self.done + piece.len() as u64;
            if done > self.size_max {
                return Err(Broken::For(too_large(self.what, self.url.as_str(), None, self.size_max)));
            }
            self.hasher.update(&piece);
            self.file
                .write_all(&piece)
                .await
                .map_err(disk("write", self.destination))
                .map_err(Broken::For)?;
            self.done = done;
            self.activity.report(done, total);
        }
        Ok(())
    }

    async fn restart(&mut self) -> Result<(), Failure> {
        self.file = File::create(self.destination).await.map_err(disk("write", self.destination))?;
        self.hasher = Hasher::default();
        self.done = 0;
        Ok(())
    }

    fn sending_failed(&self, error: &reqwest::Error) -> Broken {
        if error.is_redirect() {
            let message = format!("cannot fetch the {} {}: {}", self.what, self.url, chain(error));
            return Broken::For(failure(FailureReason::SourceRefused, message));
        }
        Broken::Off(chain(error))
    }

    fn refused(&self, status: StatusCode) -> Broken {
        if status.is_server_error() || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS) {
            return Broken::Off(format!("the server answers {status}"));
        }
        let advice = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                "; name a Secret with credentials for it (credentialsSecret), or check those"
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => "; check the address",
            _ => "",
        };
        let message = format!("cannot fetch the {} {}: the server answers {status}{advice}", self.what, self.url);
        Broken::For(failure(FailureReason::SourceRefused, message))
    }
}

/// A strong entity tag, or else the date of the last change (RFC 9110, section 13.1.5).
fn validator(headers: &HeaderMap) -> Option<HeaderValue> {
    let strong = headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"));
    strong.or_else(|| headers.get(LAST_MODIFIED)).cloned()
}
