//! JSON text, read once from its front to its back (RFC 8259).
//!
//! What is small is read by `serde_json`. Objects and lists are walked here, so that the numbers of a tensor, which are most of a body, go
//! from the text into the tensor without a step between.

use std::borrow::Cow;

use serde::Deserialize;

/// Longest string that is looked through here for its end; keys and names are shorter.
const PLAIN_MAX: usize = 64;

/// A place in a text.
#[derive(Clone)]
pub(super) struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0 }
    }

    /// What is left.
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.text[self.at..]
    }

    /// Goes on by so many bytes of what is left.
    pub(super) fn advance(&mut self, bytes: usize) {
        self.at = self.text.len().min(self.at + bytes);
    }

    /// The first byte of what comes next, white space passed over.
    pub(super) fn peek(&mut self) -> Option<u8> {
        while matches!(self.text.get(self.at), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    /// Whether that byte comes next, which is passed over then.
    pub(super) fn takes(&mut self, byte: u8) -> bool {
        let takes = self.peek() == Some(byte);
        self.at += usize::from(takes);
        takes
    }

    /// Why the text is wrong, with its place.
    pub(super) fn wrong(&self, what: &str) -> String {
        let before = &self.text[..self.at.min(self.text.len())];
        let line = before.iter().filter(|&&byte| byte == b'\n').count();
        let column = before.len() - before.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        format!("{what} at line {} column {}", line + 1, column + 1)
    }

    /// The next value.
    ///
    /// # Errors
    /// Where it is no JSON, or no `T`.
    pub(super) fn value<T: Deserialize<'a>>(&mut self) -> Result<T, String> {
        self.peek();
        let mut values = serde_json::Deserializer::from_slice(self.rest()).into_iter();
        let value = values.next().unwrap_or_else(|| Err(serde::de::Error::custom("a value is missing")));
        let end = values.byte_offset();
        match value {
            Ok(value) => {
                self.at += end;
                Ok(value)
            }
            Err(error) => {
                let text = error.to_string();
                // Its place is one in what was left.
                let what = text.rfind(" at line ").map_or(&*text, |end| &text[..end]);
                Err(self.wrong(what))
            }
        }
    }

    /// The next value, a string.
    ///
    /// # Errors
    /// Where it is none.
    pub(super) fn string(&mut self) -> Result<Cow<'a, str>, String> {
        if self.peek() == Some(b'"') {
            let rest = &self.rest()[1..];
            let end = rest.iter().take(PLAIN_MAX).position(|&byte| matches!(byte, b'"' | b'\\' | 0..0x20));
            let plain = end
                .filter(|&end| rest[end] == b'"')
                .and_then(|end| std::str::from_utf8(&rest[..end]).ok());
            if let Some(plain) = plain {
                self.at += plain.len() + 2;
                return Ok(Cow::Borrowed(plain));
            }
        }
        self.value().map(Cow::Owned)
    }

    /// The next value, an object; `member` is given each key, and takes the value behind it.
    ///
    /// # Errors
    /// Where it is none, and those of `member`.
    pub(super) fn object(&mut self, mut member: impl FnMut(&mut Self, &str) -> Result<(), String>) -> Result<(), String> {
        if !self.takes(b'{') {
            return Err(self.wrong("expected an object"));
        }
        if self.takes(b'}') {
            return Ok(());
        }
        loop {
            let key = self.string()?;
            if !self.takes(b':') {
                return Err(self.wrong("expected `:`"));
            }
            member(self, &key)?;
            if !self.goes_on(b'}')? {
                return Ok(());
            }
        }
    }

    /// The next value, a list; `item` takes each of its values. Gives how many there were.
    ///
    /// # Errors
    /// Where it is none, and those of `item`.
    pub(super) fn list(&mut self, mut item: impl FnMut(&mut Self) -> Result<(), String>) -> Result<usize, String> {
        if !self.takes(b'[') {
            return Err(self.wrong("expected a list"));
        }
        if self.takes(b']') {
            return Ok(0);
        }
        let mut length = 0;
        loop {
            item(self)?;
            length += 1;
            if !self.goes_on(b']')? {
                return Ok(length);
            }
        }
    }

    /// Passes over what comes behind a member or an item: whether it is a comma, and not the end.
    fn goes_on(&mut self, end: u8) -> Result<bool, String> {
        match self.peek() {
            Some(b',') => {
                self.at += 1;
                Ok(true)
            }
            Some(byte) if byte == end => {
                self.at += 1;
                Ok(false)
            }
            _ => Err(self.wrong(&format!("expected `,` or `{}`", char::from(end)))),
        }
    }

    /// Nothing may come any more.
    ///
    /// # Errors
    /// Where something does.
    pub(super) fn end(&mut self) -> Result<(), String> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.wrong("trailing characters")),
        }
    }
}

/// Whether `text` begins as a number does: JSON knows neither a plus, nor a zero before other digits, nor a point without digits on both
/// sides, which readers of floats let pass.
pub(super) fn is_number(text: &[u8]) -> bool {
    let unsigned = text.strip_prefix(b"-").unwrap_or(text);
    let digits = unsigned.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let zeros_first = digits > 1 && unsigned[0] == b'0';
    let point = unsigned.get(digits) == Some(&b'.') && !unsigned.get(digits + 1).is_some_and(u8::is_ascii_digit);
    digits > 0 && !zeros_first && !point
}
