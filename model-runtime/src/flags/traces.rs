//! Where traces go: by flags, or by the environment variables that every program with OpenTelemetry has (OpenTelemetry, "Environment Variable
//! Specification", "Protocol Exporter").

use std::str::FromStr;

use plimsoll_runtime::server::{self, Traces};

/// What is sent below a collector's address.
const PATH: &str = "v1/traces";

#[derive(clap::Args)]
pub(super) struct Flags {
    /// Address of an OpenTelemetry collector that takes OTLP over HTTP: traces of inference requests are sent to URL/v1/traces, in protobuf.
    /// Without it there are none.
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT", default_value = "")]
    otlp_endpoint: Endpoint,

    /// Address for traces alone, which is taken as it is.
    #[arg(long, hide = true, env = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", default_value = "")]
    otlp_traces_endpoint: Endpoint,

    /// Headers of what is sent there: NAME=VALUE,NAME=VALUE.
    #[arg(long, hide = true, env = "OTEL_EXPORTER_OTLP_HEADERS", hide_env_values = true, default_value = "")]
    otlp_headers: Pairs,

    /// The service's name in traces.
    #[arg(long, hide = true, env = "OTEL_SERVICE_NAME", default_value = "")]
    service_name: String,

    /// More attributes of the service in traces: NAME=VALUE,NAME=VALUE.
    #[arg(long, hide = true, env = "OTEL_RESOURCE_ATTRIBUTES", default_value = "")]
    resource_attributes: Pairs,

    /// Share of the requests that are traced whose caller has not decided it by a `traceparent`, 0% to 100%.
    #[arg(long, value_name = "PERCENT", default_value = "100%", value_parser = super::share)]
    trace_share: f64,
}

/// A collector's address; an empty variable is as good as none.
#[derive(Clone)]
struct Endpoint(Option<String>);

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(written: &str) -> Result<Self, String> {
        if written.is_empty() {
            return Ok(Self(None));
        }
        match written.strip_prefix("http://").or_else(|| written.strip_prefix("https://")) {
            Some(rest) if !rest.is_empty() => Ok(Self(Some(written.to_owned()))),
            _ => Err("write http://HOST:PORT or https://...".to_owned()),
        }
    }
}

/// Names and values as W3C's baggage has them: separated by commas, values with `%` escapes.
#[derive(Clone)]
struct Pairs(Vec<(String, String)>);

impl FromStr for Pairs {
    type Err = String;

    fn from_str(written: &str) -> Result<Self, String> {
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').ok_or("write NAME=VALUE,NAME=VALUE")?;
            Ok((name.trim().to_owned(), decoded(value.trim())))
        };
        let pairs = written.split(',').filter(|pair| !pair.trim().is_empty());
        pairs.map(pair).collect::<Result<_, String>>().map(Self)
    }
}

/// The value with its `%` escapes read; what is no escape, or gives no text, stays as it is.
fn decoded(value: &str) -> String {
    let mut bytes = vec![];
    let mut rest = value.as_bytes();
    while let [first, after @ ..] = rest {
        let escaped = after.first_chunk::<2>().filter(|_| *first == b'%');
        let digits = escaped.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8(bytes).unwrap_or_else(|_| value.to_owned())
}

impl Flags {
    pub(super) fn resolve(self) -> Option<Traces> {
        let below = |base: String| format!("{}/{PATH}", base.trim_end_matches('/'));
        let url = self.otlp_traces_endpoint.0.or_else(|| self.otlp_endpoint.0.map(below))?;
        let Pairs(mut attributes) = self.resource_attributes;
        // The variable of its own goes before the attribute.
        let among = attributes
            .extract_if(.., |(name, _)| name == "service.name")
            .map(|(_, value)| value)
            .last();
        let service = Some(self.service_name).filter(|name| !name.is_empty()).or(among);
        Some(Traces {
            url,
            headers: self.otlp_headers.0,
            service: service.unwrap_or_else(|| server::NAME.to_owned()),
            attributes,
            share: self.trace_share,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        flags: Flags,
    }

    fn traces(arguments: &[&str]) -> Option<Traces> {
        let arguments = ["test"].iter().chain(arguments);
        Program::try_parse_from(arguments).map(|program| program.flags.resolve()).unwrap()
    }

    #[test]
    fn an_address_is_a_collectors_or_that_of_traces() {
        let url = |arguments: &[&str]| traces(arguments).map(|traces| traces.url);
        assert_eq!(url(&[]), None);
        assert_eq!(url(&["--otlp-endpoint="]), None);
        assert_eq!(url(&["--otlp-endpoint=http://c:4318"]).unwrap(), "http://c:4318/v1/traces");
        assert_eq!(url(&["--otlp-endpoint=https://c/otlp/"]).unwrap(), "https://c/otlp/v1/traces");
        assert_eq!(
            url(&["--otlp-traces-endpoint=http://c/a", "--otlp-endpoint=http://d"]).unwrap(),
            "http://c/a"
        );
        assert!(Program::try_parse_from(["test", "--otlp-endpoint=c:4317"]).is_err());
    }

    #[test]
    fn names_and_values_are_read() {
        let of = |arguments: &[&str]| traces(&[&["--otlp-endpoint=http://c"], arguments].concat()).unwrap();
        assert_eq!(of(&[]).service, "plimsoll-runtime");
        let attributes = "--resource-attributes=service.name=a,team=b%2Cc ,x=100%";
        assert_eq!(of(&[attributes]).service, "a");
        assert_eq!(of(&[attributes, "--service-name=d"]).service, "d");
        let expected = [("team", "b,c"), ("x", "100%")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(of(&[attributes]).attributes, expected);
        assert!(Program::try_parse_from(["test", "--otlp-headers=a"]).is_err());
    }
}
