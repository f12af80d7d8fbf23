//! Calls of gRPC over HTTP/2 in clear text (RFC 9113; "gRPC over HTTP2"): as much of it as one call at a time on a connection needs.

use std::io::{self, Write as _};
use std::net::TcpStream;

use super::Answer;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// What we take without asking the server to wait, in bytes.
const WINDOW: u32 = 1 << 30;

/// Most bytes of a frame, unless one says otherwise.
const FRAME_BYTES_MAX: usize = 16 << 10;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// What a client says first.
pub(super) fn preface() -> Vec<u8> {
    const INITIAL_WINDOW_SIZE: [u8; 2] = [0, 4];
    let settings = [&INITIAL_WINDOW_SIZE[..], &WINDOW.to_be_bytes()].concat();
    let mut preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    preface.extend(frame(SETTINGS, 0, 0, &settings));
    preface.extend(frame(WINDOW_UPDATE, 0, 0, &WINDOW.to_be_bytes()));
    preface
}

/// A call of `inference.GRPCInferenceService/ModelInfer`.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Call {
    headers: Vec<u8>,
    message: Vec<u8>,
}

/// An input of a call.
pub(in crate::bench) struct Tensor<'a> {
    pub name: &'a str,
    pub datatype: &'a str,
    pub shape: &'a [usize],
    pub bytes: Vec<u8>,
}

impl Call {
    /// Its inputs in `raw_input_contents`. One frame has to hold it.
    pub(in crate::bench) fn infer(model: &str, inputs: &[Tensor<'_>]) -> Self {
        let mut request = vec![];
        field(&mut request, 1, model.as_bytes());
        for input in inputs {
            let mut tensor = vec![];
            field(&mut tensor, 1, input.name.as_bytes());
            field(&mut tensor, 2, input.datatype.as_bytes());
            let mut shape = vec![];
            input.shape.iter().for_each(|&size| varint(&mut shape, size as u64));
            field(&mut tensor, 3, &shape);
            field(&mut request, 5, &tensor);
        }
        inputs.iter().for_each(|input| field(&mut request, 7, &input.bytes));
        let message = [&[0][..], &(request.len() as u32).to_be_bytes(), &request].concat();
        assert!(message.len() <= FRAME_BYTES_MAX, "the inputs fit into a frame");
        let mut headers = vec![];
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/inference.GRPCInferenceService/ModelInfer"),
            (":authority", "bench"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            // A literal without indexing (RFC 7541, section 6.2.2); each is shorter than 127 bytes.
            headers.push(0);
            for text in [name, value] {
                headers.push(text.len() as u8);
                headers.extend(text.as_bytes());
            }
        }
        Self { headers, message }
    }

    pub(super) fn on_stream(&self, stream: u32) -> Vec<u8> {
        let mut bytes = frame(HEADERS, END_HEADERS, stream, &self.headers);
        bytes.extend(frame(DATA, END_STREAM, stream, &self.message));
        bytes
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field of a protobuf message whose length goes before it.
fn field(out: &mut Vec<u8>, number: u8, content: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

/// An answer: a message is a success, for a refusal comes without one.
#[derive(Default)]
pub(super) struct Frames {
    pending: Vec<u8>,
    message_bytes: usize,
    /// Bytes of the connection's window that are not given back yet.
    taken: u32,
}

impl Answer for Frames {
    fn read(&mut self, stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Option<bool>> {
        self.pending.extend_from_slice(bytes);
        let (mut at, mut done) = (0, None);
        while let Some((header, rest)) = self.pending[at..].split_at_checked(9) {
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
            let Some(payload) = rest.get(..length) else { break };
            let (kind, flags) = (header[3], header[4]);
            match kind {
                DATA => {
                    self.message_bytes += length;
                    self.taken += length as u32;
                }
                SETTINGS if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, 0, &[]))?,
                PING if flags & ACK == 0 => stream.write_all(&frame(PING, ACK, 0, payload))?,
                GOAWAY => return Err(io::ErrorKind::ConnectionReset.into()),
                _ => {}
            }
            if kind == RST_STREAM || (matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0) {
                done = Some(std::mem::take(&mut self.message_bytes) > 0 && kind != RST_STREAM);
            }
            at += 9 + length;
        }
        self.pending.drain(..at);
        if self.taken > WINDOW / 2 {
            let taken = std::mem::take(&mut self.taken);
            stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &taken.to_be_bytes()))?;
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_a_success_and_trailers_alone_are_none() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut frames = Frames::default();
        let message = [
            frame(SETTINGS, 0, 0, &[]),
            frame(HEADERS, END_HEADERS, 1, &[0x88]),
            frame(DATA, 0, 1, &[0; 7]),
        ]
        .concat();
        for byte in message {
            assert_eq!(frames.read(&mut stream, &[byte]).unwrap(), None);
        }
        let trailers = frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x88]);
        assert_eq!(frames.read(&mut stream, &trailers).unwrap(), Some(true));
        assert_eq!(frames.read(&mut stream, &trailers).unwrap(), Some(false));
        assert!(frames.read(&mut stream, &frame(GOAWAY, 0, 0, &[0; 8])).is_err());
    }

    #[test]
    fn a_call_is_what_the_proto_says() {
        let tensor = Tensor {
            name: "x",
            datatype: "FP32",
            shape: &[1, 300],
            bytes: vec![9],
        };
        let call = Call::infer("m", &[tensor]);
        let request = [&b"\x0a\x01m\x2a\x0e\x0a\x01x\x12\x04FP32\x1a\x03\x01\xac\x02"[..], b"\x3a\x01\x09"].concat();
        assert_eq!(call.message, [&[0, 0, 0, 0, request.len() as u8][..], &request].concat());
    }
}
