//! A small gRPC client that shows what a library would hide: when a call is answered, and with what.

use std::convert::Infallible;
use std::net::SocketAddr;

use futures::channel::mpsc::{UnboundedSender, unbounded};
use futures::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::runtime::Runtime;

#[allow(dead_code, unreachable_pub, clippy::all)]
#[path = "../../src/server/grpc/proto/inference.rs"]
pub(crate) mod proto;

/// The status of a call that failed.
#[derive(Debug, PartialEq)]
pub(crate) struct Failed {
    pub(crate) code: u32,
    pub(crate) text: String,
    /// `grpc-retry-pushback-ms`.
    pub(crate) pushback: Option<String>,
}

pub(crate) const INVALID_ARGUMENT: u32 = 3;
pub(crate) const DEADLINE_EXCEEDED: u32 = 4;
pub(crate) const NOT_FOUND: u32 = 5;
pub(crate) const RESOURCE_EXHAUSTED: u32 = 8;
pub(crate) const UNIMPLEMENTED: u32 = 12;
pub(crate) const UNAVAILABLE: u32 = 14;
pub(crate) const UNAUTHENTICATED: u32 = 16;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A connection.
pub(crate) struct Channel {
    runtime: Runtime,
    sender: SendRequest<Body>,
}

impl Channel {
    pub(crate) fn open(address: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let sender = runtime.block_on(async {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            sender
        });
        Self { runtime, sender }
    }

    /// Calls a method of the protocol.
    pub(crate) fn call<A: Message + Default>(&self, method: &str, headers: &[(&str, &str)], question: &impl Message) -> Result<A, Failed> {
        let path = format!("/inference.GRPCInferenceService/{method}");
        let mut messages = self.exchange(&path, headers, vec![framed(question)])?;
        let message = messages.next(self)?.expect("a call that succeeds has an answer");
        assert!(messages.next::<A>(self)?.is_none(), "one answer");
        Ok(message)
    }

    /// Sends messages that are framed already, as they are.
    pub(crate) fn exchange(&self, path: &str, headers: &[(&str, &str)], frames: Vec<Vec<u8>>) -> Result<Messages, Failed> {
        let frames = frames.into_iter().map(|frame| Ok(Frame::data(frame.into())));
        self.send(path, headers, StreamBody::new(stream::iter(frames)).boxed_unsync())
    }

    /// Opens a call whose messages are sent one by one.
    pub(crate) fn stream(&self, path: &str) -> (UnboundedSender<Vec<u8>>, Messages) {
        use futures::StreamExt as _;
        let (sender, messages) = unbounded::<Vec<u8>>();
        let frames = messages.map(|frame| Ok(Frame::data(frame.into())));
        let messages = self.send(path, &[], StreamBody::new(frames).boxed_unsync());
        (sender, messages.expect("the call is opened"))
    }

    /// Sends a call and goes away before it is answered, once `sent` says that it is there.
    pub(crate) fn abandon(&self, method: &str, question: &impl Message, sent: impl Fn() -> bool) {
        let path = format!("http://test/inference.GRPCInferenceService/{method}");
        let frame = framed(question);
        let body = StreamBody::new(stream::iter([Ok(Frame::data(frame.into()))])).boxed_unsync();
        let request = Request::post(path).header("content-type", "application/grpc").body(body).unwrap();
        let call = self.runtime.spawn(self.sender.clone().send_request(request));
        while !sent() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        call.abort();
    }

    fn send(&self, path: &str, headers: &[(&str, &str)], body: Body) -> Result<Messages, Failed> {
        let mut request = Request::post(format!("http://test{path}")).header("content-type", "application/grpc");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = self.sender.clone().send_request(request.body(body).unwrap());
        let answer: Response<Incoming> = self.runtime.block_on(answer).unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["content-type"]),
            (200, &"application/grpc".parse().unwrap())
        );
        failure(answer.headers())?;
        Ok(Messages {
            body: answer.into_body(),
            unread: vec![],
        })
    }
}

/// The messages of an answer.
pub(crate) struct Messages {
    body: Incoming,
    unread: Vec<u8>,
}

impl Messages {
    /// The next message, waited for; `None` where the call ended well.
    pub(crate) fn next<A: Message + Default>(&mut self, channel: &Channel) -> Result<Option<A>, Failed> {
        loop {
            if self.unread.len() >= 5 {
                let length = u32::from_be_bytes(self.unread[1..5].try_into().unwrap()) as usize;
                if self.unread.len() >= 5 + length {
                    assert_eq!(self.unread[0], 0, "not compressed");
                    let message: Vec<u8> = self.unread.drain(..5 + length).skip(5).collect();
                    return Ok(Some(A::decode(&message[..]).unwrap()));
                }
            }
            let frame = channel
                .runtime
                .block_on(self.body.frame())
                .expect("a call ends with its status")
                .unwrap();
            match frame.into_data() {
                Ok(data) => self.unread.extend_from_slice(&data),
                Err(trailers) => {
                    let trailers = trailers.into_trailers().unwrap();
                    assert!(trailers.contains_key("grpc-status") && self.unread.is_empty());
                    return failure(&trailers).map(|()| None);
                }
            }
        }
    }
}

/// What headers or trailers say of a call that failed.
fn failure(headers: &HeaderMap) -> Result<(), Failed> {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    match text("grpc-status").map(|code| code.parse().unwrap()) {
        None | Some(0) => Ok(()),
        Some(code) => Err(Failed {
            code,
            text: unescaped(&text("grpc-message").unwrap_or_default()),
            pushback: text("grpc-retry-pushback-ms"),
        }),
    }
}

/// A text whose special characters were written as `%` and two digits.
fn unescaped(text: &str) -> String {
    let mut out = vec![];
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'%').then(|| u8::from_str_radix(std::str::from_utf8(&after[..2]).unwrap(), 16).unwrap());
        out.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[2..] } else { after };
    }
    String::from_utf8(out).unwrap()
}

/// A message behind its length.
pub(crate) fn framed(message: &impl Message) -> Vec<u8> {
    let mut out = vec![0];
    out.extend((message.encoded_len() as u32).to_be_bytes());
    message.encode(&mut out).unwrap();
    out
}
