//! A small HTTP/1.1 client that shows what a library would hide: when a connection is kept and when it is closed.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// An answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub(crate) fn error(&self) -> String {
        self.json()["error"].as_str().expect("an error has a text").to_owned()
    }
}

/// A connection.
pub(crate) struct Connection(BufReader<TcpStream>);

impl Connection {
    pub(crate) fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.get_mut().write_all(bytes)
    }

    pub(crate) fn send(&mut self, method: &str, path: &str, headers: &str, body: &str) -> io::Result<Answer> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        );
        self.write(format!("{head}{body}").as_bytes())?;
        self.answer()
    }

    /// As [`send`](Self::send), with a body that may be no text and a length that may be a lie.
    pub(crate) fn send_bytes(&mut self, path: &str, headers: &str, length: usize, body: &[u8]) -> io::Result<Answer> {
        let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n{headers}\r\n");
        self.write(&[head.as_bytes(), body].concat())?;
        self.answer()
    }

    /// Says that nothing more is sent; what comes can still be read.
    pub(crate) fn end(&self) -> io::Result<()> {
        self.0.get_ref().shutdown(Shutdown::Write)
    }

    pub(crate) fn answer(&mut self) -> io::Result<Answer> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .ok_or(io::ErrorKind::InvalidData)?;
        let mut headers = vec![];
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                break;
            };
            headers.push((name.to_lowercase(), value.to_owned()));
        }
        let mut answer = Answer {
            status,
            headers,
            text: String::new(),
        };
        let length = answer.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        answer.text = String::from_utf8(body).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(answer)
    }

    /// Whether the server has closed the connection, waiting for it.
    pub(crate) fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0))
    }
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Answer {
    Connection::open(address).unwrap().send("GET", path, "", "").unwrap()
}

pub(crate) fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    Connection::open(address)
        .unwrap()
        .send("POST", path, "", &body.to_string())
        .unwrap()
}
