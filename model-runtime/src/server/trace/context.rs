//! The context of a request: the headers `traceparent` and `tracestate` (W3C, "Trace Context").

use axum::http::{HeaderMap, HeaderName, HeaderValue};

const PARENT: HeaderName = HeaderName::from_static("traceparent");
const STATE: HeaderName = HeaderName::from_static("tracestate");

/// Most bytes of a `tracestate` that are passed on: as many as the recommendation asks for.
const STATE_BYTES_MAX: usize = 512;

/// Which trace a request belongs to, and which span asks for it.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::server) struct Context {
    pub(in crate::server) trace: u128,
    pub(in crate::server) span: u64,
    /// Whether the trace is recorded.
    pub(in crate::server) sampled: bool,
    /// What tracing systems keep there for themselves; passed on as it is.
    pub(in crate::server) state: Option<HeaderValue>,
}

impl Context {
    /// The context that the headers give; `None` where they give none, or one that is not valid.
    pub(in crate::server) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut parents = headers.get_all(PARENT).iter();
        let parent = parents.next()?.to_str().ok()?;
        if parents.next().is_some() {
            return None;
        }
        let (trace, span, sampled) = parse(parent)?;
        let mut states = headers.get_all(STATE).iter();
        let state = match (states.next(), states.next()) {
            (Some(state), None) => Some(state.clone()).filter(|state| state.len() <= STATE_BYTES_MAX),
            // Several headers are one list; hardly anybody sends them, and nobody may lose a part of it.
            _ => None,
        };
        Some(Self {
            trace,
            span,
            sampled,
            state,
        })
    }

    /// The headers that tell it.
    pub(in crate::server) fn headers(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let parent = format!("00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.sampled));
        let parent = HeaderValue::try_from(parent).ok().map(|parent| (PARENT, parent));
        parent.into_iter().chain(self.state.clone().map(|state| (STATE, state)))
    }
}

/// The trace, the span and whether the trace is recorded, of a `traceparent` (section 3.2).
fn parse(parent: &str) -> Option<(u128, u64, bool)> {
    let mut parts = parent.split('-');
    let mut next = |digits: usize| {
        let part = parts.next().filter(|part| part.len() == digits)?;
        // Capitals are not allowed.
        let lowercase = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        lowercase.then(|| u128::from_str_radix(part, 16).ok())?
    };
    let (version, trace, span, flags) = (next(2)?, next(32)?, next(16)?, next(2)?);
    // A later version may have more behind the flags, version 0 has nothing.
    let known = version != 0xff && (version != 0 || parts.next().is_none());
    (known && trace != 0 && span != 0).then_some((trace, span as u64, flags & 1 == 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn read(parent: &str) -> Option<(u128, u64, bool)> {
        let headers = HeaderMap::from_iter([(PARENT, HeaderValue::from_str(parent).unwrap())]);
        Context::of(&headers).map(|context| (context.trace, context.span, context.sampled))
    }

    #[test]
    fn a_valid_parent_is_read_alone() {
        let (trace, span) = (0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0x00f0_67aa_0ba9_02b7);
        assert_eq!(read(&format!("00-{TRACE}-00f067aa0ba902b7-01")), Some((trace, span, true)));
        assert_eq!(read(&format!("00-{TRACE}-00f067aa0ba902b7-00")), Some((trace, span, false)));
        assert_eq!(
            read(&format!("cc-{TRACE}-00f067aa0ba902b7-03-what-comes")),
            Some((trace, span, true))
        );
        for broken in [
            format!("ff-{TRACE}-00f067aa0ba902b7-01"),
            format!("00-{TRACE}-00f067aa0ba902b7-01-"),
            format!("00-{}-00f067aa0ba902b7-01", TRACE.to_uppercase()),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{TRACE}-0000000000000000-01"),
            format!("00-{TRACE}-00f067aa0ba902b7"),
            format!("00-{TRACE}-00f067aa0ba902b-01"),
            "\"}{".to_owned(),
            String::new(),
        ] {
            assert_eq!(read(&broken), None, "{broken}");
        }
    }

    #[test]
    fn it_is_passed_on_as_it_came() {
        let given = [
            (PARENT, HeaderValue::try_from(format!("00-{TRACE}-00f067aa0ba902b7-01")).unwrap()),
            (STATE, HeaderValue::from_static("vendor=t61rcWkgMzE,other=1")),
        ];
        let mut headers = HeaderMap::from_iter(given.clone());
        let context = Context::of(&headers).unwrap();
        assert_eq!(context.headers().collect::<Vec<_>>(), given);
        headers.append(PARENT, given[0].1.clone());
        assert_eq!(Context::of(&headers), None, "two parents are none");
    }
}
