//! Compressed bodies: gzip and deflate, in both directions, bounded.

use std::io::{self, Read as _, Write as _};

use axum::body::Bytes;
use axum::http::header::ACCEPT_ENCODING;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use flate2::Compression;

use super::inference::{Admission, off_thread};
use super::refusal::{Reason, Refusal};

/// How a body is compressed (RFC 9110, section 8.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Gzip,
    /// In the zlib format, as the name means in HTTP.
    Deflate,
}

/// Answers of fewer bytes are not compressed: they fit into a packet or two as they are.
const ANSWER_BYTES_MIN: usize = 1 << 10;

/// Bytes that are decompressed between two looks at the bounds.
const STEP: u64 = 1 << 18;

impl Encoding {
    /// How the body of a request is compressed, by that header; `None` where it is not.
    ///
    /// # Errors
    /// Where it is in another way.
    pub(super) fn of_request(headers: &HeaderMap, header: &HeaderName) -> Result<Option<Self>, Refusal> {
        let Some(name) = headers.get(header) else {
            return Ok(None);
        };
        match name.to_str().map(str::trim) {
            Ok("identity") => Ok(None),
            Ok("gzip" | "x-gzip") => Ok(Some(Self::Gzip)),
            Ok("deflate") => Ok(Some(Self::Deflate)),
            _ => Err(Refusal::new(
                Reason::UnsupportedEncoding,
                format!("the body's encoding is {name:?}; send gzip, deflate or identity"),
            )),
        }
    }

    /// How an answer of so many bytes is to be compressed for the client; the first that it names of those that are known.
    pub(super) fn of_answer(headers: &HeaderMap, bytes: usize) -> Option<Self> {
        if bytes < ANSWER_BYTES_MIN {
            return None;
        }
        headers.get(ACCEPT_ENCODING)?.to_str().ok()?.split(',').find_map(|accepted| {
            let (name, weight) = accepted.split_once(';').unwrap_or((accepted, ""));
            let refused = weight.trim().strip_prefix("q=").is_some_and(|weight| weight.parse() == Ok(0.0));
            match name.trim() {
                "gzip" if !refused => Some(Self::Gzip),
                "deflate" if !refused => Some(Self::Deflate),
                _ => None,
            }
        })
    }

    pub(super) fn name(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        })
    }

    /// The body as it was before it was compressed.
    ///
    /// # Errors
    /// Where it is not compressed in this way, has more than `bytes_max` bytes, or `hold` refuses the memory for as many as there are.
    pub(super) fn decompress(
        self,
        body: &[u8],
        bytes_max: usize,
        mut hold: impl FnMut(usize) -> Result<(), Refusal>,
    ) -> Result<Vec<u8>, Refusal> {
        let mut reader: Box<dyn io::Read + '_> = match self {
            Self::Gzip => Box::new(flate2::read::MultiGzDecoder::new(body)),
            Self::Deflate => Box::new(flate2::read::ZlibDecoder::new(body)),
        };
        let mut out = vec![];
        loop {
            let before = out.len();
            let read = reader.by_ref().take(STEP).read_to_end(&mut out);
            read.map_err(|error| Refusal::invalid(format!("the body cannot be decompressed: {error}")))?;
            if out.len() > bytes_max {
                return Err(Refusal::too_large(bytes_max));
            }
            if out.len() == before {
                return Ok(out);
            }
            hold(out.len())?;
        }
    }

    /// As [`decompress`](Self::decompress), off the threads that serve connections and within the memory that is held for the request.
    pub(super) async fn decompress_admitted(
        self,
        body: Bytes,
        bytes_max: usize,
        mut admission: Admission,
    ) -> Result<(Bytes, Admission), Refusal> {
        let decompress = move || {
            let body = self.decompress(&body, bytes_max, |bytes| admission.hold(bytes))?;
            Ok((Bytes::from(body), admission))
        };
        off_thread(usize::MAX, decompress).await?
    }

    /// The answer, compressed as fast as can be.
    pub(super) fn compress(self, answer: &[u8]) -> io::Result<Vec<u8>> {
        let out = Vec::with_capacity(answer.len() / 2);
        match self {
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(out, Compression::fast());
                encoder.write_all(answer)?;
                encoder.finish()
            }
            Self::Deflate => {
                let mut encoder = flate2::write::ZlibEncoder::new(out, Compression::fast());
                encoder.write_all(answer)?;
                encoder.finish()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::header::CONTENT_ENCODING;

    use super::*;

    #[test]
    fn what_is_compressed_is_read_back_and_a_bomb_is_not() {
        let body = vec![7_u8; 100_000];
        for encoding in [Encoding::Gzip, Encoding::Deflate] {
            let small = encoding.compress(&body).unwrap();
            assert!(small.len() < 1000);
            assert_eq!(encoding.decompress(&small, 100_000, |_| Ok(())).unwrap(), body);
            let refusal = encoding.decompress(&small, 99_999, |_| Ok(())).unwrap_err();
            assert_eq!(refusal.reason, Reason::TooLarge);
            let refusal = encoding
                .decompress(&small, 100_000, |_| Err(Refusal::overloaded("much")))
                .unwrap_err();
            assert_eq!(refusal.reason, Reason::Overloaded);
            assert_eq!(
                encoding.decompress(b"plain", 10, |_| Ok(())).unwrap_err().reason,
                Reason::InvalidArgument
            );
        }
    }

    #[test]
    fn the_client_says_which() {
        let headers = |name, value: &'static str| HeaderMap::from_iter([(name, HeaderValue::from_static(value))]);
        let answer = |value, bytes| Encoding::of_answer(&headers(ACCEPT_ENCODING, value), bytes);
        assert_eq!(answer("br, deflate, gzip", 5000), Some(Encoding::Deflate));
        assert_eq!(answer("gzip;q=0, deflate;q=0.5", 5000), Some(Encoding::Deflate));
        assert_eq!(answer("gzip", 10), None);
        assert_eq!(answer("identity", 5000), None);
        assert_eq!(Encoding::of_answer(&HeaderMap::new(), 5000), None);
        let request = |value| Encoding::of_request(&headers(CONTENT_ENCODING, value), &CONTENT_ENCODING);
        assert_eq!(request("gzip").unwrap(), Some(Encoding::Gzip));
        assert_eq!(request("identity").unwrap(), None);
        assert_eq!(request("br").unwrap_err().reason, Reason::UnsupportedEncoding);
    }
}
