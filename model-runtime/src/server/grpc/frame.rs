//! Messages on the wire ("gRPC over HTTP2", Length-Prefixed-Message): a byte that says whether it is compressed, its length in 32 bits, big
//! endian, and its bytes.

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bytes::{Buf as _, BytesMut};
use http_body_util::BodyExt as _;
use prost::Message;

use crate::server::encoding::Encoding;
use crate::server::inference::Admission;
use crate::server::refusal::Refusal;

/// How the messages of a call are compressed.
pub(super) const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// How the other side may compress its own.
pub(super) const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
/// The compressions that are known.
pub(super) const ENCODINGS: HeaderValue = HeaderValue::from_static("identity,gzip,deflate");

/// Bytes before a message.
const PREFIX: usize = 5;

/// The messages of a request's body, one after another.
pub(super) struct Messages {
    body: Body,
    unread: BytesMut,
    encoding: Option<Encoding>,
    bytes_max: usize,
}

/// What stands before a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    compressed: bool,
    /// Bytes of the message as it is sent.
    pub(super) length: usize,
}

/// A message as it was sent.
#[derive(Debug)]
pub(super) struct Sent {
    bytes: Bytes,
    encoding: Option<Encoding>,
}

impl Messages {
    /// The messages of `body`, each of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// Where they are compressed in a way that is not known.
    pub(super) fn new(headers: &HeaderMap, body: Body, bytes_max: usize) -> Result<Self, Refusal> {
        Ok(Self {
            body,
            unread: BytesMut::new(),
            encoding: Encoding::of_request(headers, &ENCODING)?,
            bytes_max,
        })
    }

    /// Waits for the next message to begin; `None` where the client has sent its last. It may be dropped while it waits.
    ///
    /// # Errors
    /// Where what comes is no message, or one of more bytes than the bound.
    pub(super) async fn prefix(&mut self) -> Result<Option<Prefix>, Refusal> {
        if !self.fill(PREFIX).await? {
            return if self.unread.is_empty() { Ok(None) } else { Err(broken_off()) };
        }
        let flag = self.unread.get_u8();
        let length = self.unread.get_u32() as usize;
        let compressed = match (flag, self.encoding) {
            (0, _) => false,
            (1, Some(_)) => true,
            (1, None) => return Err(Refusal::invalid("a message is compressed and grpc-encoding does not say how")),
            _ => {
                return Err(Refusal::invalid(format!(
                    "a message begins with {flag}; it takes 0, or 1 where it is compressed"
                )));
            }
        };
        if length > self.bytes_max {
            return Err(Refusal::too_large(self.bytes_max));
        }
        Ok(Some(Prefix { compressed, length }))
    }

    /// Reads the message that `prefix` began.
    ///
    /// # Errors
    /// Where it breaks off.
    pub(super) async fn message(&mut self, prefix: Prefix) -> Result<Sent, Refusal> {
        self.unread.reserve(prefix.length.saturating_sub(self.unread.len()));
        if !self.fill(prefix.length).await? {
            return Err(broken_off());
        }
        Ok(Sent {
            bytes: self.unread.split_to(prefix.length).freeze(),
            encoding: self.encoding.filter(|_| prefix.compressed),
        })
    }

    /// Reads the one message of a call; `admit` is told its length before.
    ///
    /// # Errors
    /// Where there is none, or more than one; and what `admit` refuses.
    pub(super) async fn only(&mut self, admit: impl FnOnce(usize) -> Result<(), Refusal>) -> Result<Sent, Refusal> {
        let none = || Refusal::invalid("the call has no message");
        let prefix = self.prefix().await?.ok_or_else(none)?;
        admit(prefix.length)?;
        let sent = self.message(prefix).await?;
        match self.prefix().await? {
            None => Ok(sent),
            Some(_) => Err(Refusal::invalid("the call has more than one message")),
        }
    }

    /// Passes over the message that `prefix` began, without keeping it.
    ///
    /// # Errors
    /// Where it breaks off.
    pub(super) async fn skip(&mut self, prefix: Prefix) -> Result<(), Refusal> {
        let mut left = prefix.length;
        loop {
            let here = left.min(self.unread.len());
            self.unread.advance(here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            if !self.fill(1).await? {
                return Err(broken_off());
            }
        }
    }

    /// Reads until so many bytes are there; `false` where the body ends before.
    async fn fill(&mut self, bytes: usize) -> Result<bool, Refusal> {
        while self.unread.len() < bytes {
            let Some(frame) = self.body.frame().await else { return Ok(false) };
            let frame = frame.map_err(|error| Refusal::invalid(format!("the body broke off: {error}")))?;
            if let Ok(part) = frame.into_data() {
                self.unread.extend_from_slice(&part);
            }
        }
        Ok(true)
    }
}

impl Sent {
    /// The message as it was before it was compressed, within the memory that is held for it.
    ///
    /// # Errors
    /// Where it is not compressed as it says, or is larger than the bounds.
    pub(super) async fn decompressed(self, bytes_max: usize, admission: Admission) -> Result<(Bytes, Admission), Refusal> {
        match self.encoding {
            None => Ok((self.bytes, admission)),
            Some(encoding) => encoding.decompress_admitted(self.bytes, bytes_max, admission).await,
        }
    }

    /// As [`decompressed`](Self::decompressed), where the bound is small.
    pub(super) fn decompressed_here(self, bytes_max: usize) -> Result<Bytes, Refusal> {
        match self.encoding {
            None => Ok(self.bytes),
            Some(encoding) => Ok(encoding.decompress(&self.bytes, bytes_max, |_| Ok(()))?.into()),
        }
    }
}

fn broken_off() -> Refusal {
    Refusal::invalid("the body broke off in the middle of a message")
}

/// A message, ready to be sent. Room for `more` bytes is left behind it, which [`extend`] fills.
pub(super) fn frame(message: &impl Message, more: usize) -> Vec<u8> {
    let length = message.encoded_len();
    let mut out = Vec::with_capacity(PREFIX + length + more);
    out.extend([0; PREFIX]);
    // A vector takes whatever is written to it.
    let _ = message.encode(&mut out);
    set_length(&mut out);
    out
}

/// Appends fields to a message: protobuf takes them in any order and any number of pieces.
pub(super) fn extend(frame: &mut Vec<u8>, append: impl FnOnce(&mut Vec<u8>)) {
    append(frame);
    set_length(frame);
}

/// The message within a frame.
pub(in crate::server) fn message(frame: &[u8]) -> &[u8] {
    &frame[PREFIX..]
}

/// The frame with its message compressed.
///
/// # Errors
/// Never in practice: it is written to memory.
pub(super) fn compress(frame: &[u8], encoding: Encoding) -> std::io::Result<Vec<u8>> {
    let mut out = vec![0; PREFIX];
    out.extend(encoding.compress(message(frame))?);
    set_length(&mut out);
    out[0] = 1;
    Ok(out)
}

fn set_length(frame: &mut [u8]) {
    let length = (frame.len() - PREFIX) as u32;
    frame[1..PREFIX].copy_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::grpc::proto::inference::ModelReadyRequest;
    use crate::server::refusal::Reason;

    fn messages(headers: &HeaderMap, parts: &[&[u8]]) -> Messages {
        let parts: Vec<Result<Bytes, std::io::Error>> = parts.iter().map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        let body = Body::from_stream(futures::stream::iter(parts));
        Messages::new(headers, body, 100).unwrap()
    }

    fn gzip() -> HeaderMap {
        HeaderMap::from_iter([(ENCODING, HeaderValue::from_static("gzip"))])
    }

    fn text() -> ModelReadyRequest {
        ModelReadyRequest {
            name: "m".repeat(60),
            ..ModelReadyRequest::default()
        }
    }

    #[tokio::test]
    async fn messages_are_read_however_they_are_cut_into_parts() {
        let plain = frame(&text(), 0);
        let packed = compress(&plain, Encoding::Gzip).unwrap();
        let both = [&plain[..], &packed, &plain].concat();
        for size in [1, 4, 7, both.len()] {
            let parts: Vec<&[u8]> = both.chunks(size).collect();
            let mut messages = messages(&gzip(), &parts);
            for kept in [true, false, true] {
                let prefix = messages.prefix().await.unwrap().unwrap();
                if kept {
                    let sent = messages.message(prefix).await.unwrap();
                    assert_eq!(sent.decompressed_here(100).unwrap(), text().encode_to_vec());
                } else {
                    assert_eq!(prefix.length, packed.len() - PREFIX);
                    messages.skip(prefix).await.unwrap();
                }
            }
            assert_eq!(messages.prefix().await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn a_call_has_one_message() {
        let one = frame(&text(), 0);
        let length = one.len() - PREFIX;
        let only = async |bytes: &[u8], room: usize| {
            let admit = |length| if length <= room { Ok(()) } else { Err(Refusal::overloaded("much")) };
            messages(&HeaderMap::new(), &[bytes])
                .only(admit)
                .await
                .map_err(|refusal| refusal.reason)
        };
        assert!(only(&one, length).await.is_ok());
        assert_eq!(only(&one, length - 1).await.err(), Some(Reason::Overloaded));
        assert_eq!(only(&[], length).await.err(), Some(Reason::InvalidArgument));
        assert_eq!(only(&[&one[..], &one].concat(), length).await.err(), Some(Reason::InvalidArgument));
    }

    #[tokio::test]
    async fn what_is_no_message_is_refused_in_words() {
        async fn refuse(headers: &HeaderMap, bytes: &[u8]) -> Refusal {
            let mut messages = messages(headers, &[bytes]);
            match messages.prefix().await {
                Err(refusal) => refusal,
                Ok(prefix) => messages
                    .message(prefix.unwrap())
                    .await
                    .and_then(|sent| sent.decompressed_here(100))
                    .unwrap_err(),
            }
        }
        let none = HeaderMap::new();
        assert_eq!(
            refuse(&none, &[0, 0, 0]).await.text,
            "the body broke off in the middle of a message"
        );
        assert_eq!(
            refuse(&none, &[0, 0, 0, 0, 9, 1]).await.text,
            "the body broke off in the middle of a message"
        );
        assert_eq!(refuse(&none, &[0, 0, 0, 0, 101]).await.reason, Reason::TooLarge);
        assert_eq!(refuse(&none, &[0, 255, 255, 255, 255]).await.reason, Reason::TooLarge);
        assert!(
            refuse(&none, &[1, 0, 0, 0, 0])
                .await
                .text
                .contains("grpc-encoding does not say how")
        );
        assert!(refuse(&none, &[7, 0, 0, 0, 0]).await.text.starts_with("a message begins with 7"));
        let bomb = compress(&[&[0; PREFIX][..], &[0; 10_000]].concat(), Encoding::Gzip).unwrap();
        assert!(bomb.len() < 100);
        assert_eq!(refuse(&gzip(), &bomb).await.reason, Reason::TooLarge);
        let unknown = HeaderMap::from_iter([(ENCODING, HeaderValue::from_static("snappy"))]);
        let refusal = Messages::new(&unknown, Body::empty(), 1).err().unwrap();
        assert_eq!(refusal.reason, Reason::UnsupportedEncoding);
    }
}
