//! Bearer tokens (RFC 6750): who does not send one of those in a file is told no more than the server's health.

use std::path::PathBuf;

use plimsoll_package::digest::Digest;

use super::refusal::{Reason, Refusal};
use super::watched::Watched;

/// The tokens that are let in, one a line in a file that is read anew when it changes.
pub(super) struct Tokens(Watched<Vec<Digest>>);

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// In words, where it is missing or holds no token.
    pub(super) fn new(path: PathBuf) -> Result<Self, String> {
        let paths = vec![path.clone()];
        let read = move || {
            let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let tokens = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let tokens: Vec<Digest> = tokens.map(|token| Digest::of(token.as_bytes())).collect();
            if tokens.is_empty() {
                return Err(format!("{}: holds no token", path.display()));
            }
            Ok(tokens)
        };
        Watched::new(paths, read).map(Self)
    }

    /// Lets in who sends `Bearer TOKEN` with a token of the file.
    ///
    /// # Errors
    /// [`Reason::Unauthenticated`].
    pub(super) fn check(&self, authorization: Option<&[u8]>) -> Result<(), Refusal> {
        let sent = authorization.and_then(|value| {
            let (scheme, token) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
        });
        let sent = sent.ok_or_else(|| Refusal::new(Reason::Unauthenticated, "send a token as `Authorization: Bearer TOKEN`"))?;
        // Digests are compared, so that the time tells nothing of a token.
        if self.0.get().contains(&Digest::of(sent)) {
            Ok(())
        } else {
            Err(Refusal::new(Reason::Unauthenticated, "this token is not known"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_token_is_let_in() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "first\n second \n\n").unwrap();
        let tokens = Tokens::new(file.path().to_owned()).unwrap();
        for known in ["Bearer first", "bearer second"] {
            assert!(tokens.check(Some(known.as_bytes())).is_ok(), "{known}");
        }
        for (unknown, text) in [
            (Some("Bearer third"), "this token is not known"),
            (Some("Basic first"), "send a token as `Authorization: Bearer TOKEN`"),
            (None, "send a token as `Authorization: Bearer TOKEN`"),
        ] {
            let refusal = tokens.check(unknown.map(str::as_bytes)).unwrap_err();
            assert_eq!((refusal.reason, &*refusal.text), (Reason::Unauthenticated, text));
        }
        std::fs::write(file.path(), "\n").unwrap();
        assert!(Tokens::new(file.path().to_owned()).err().unwrap().contains("holds no token"));
    }
}
