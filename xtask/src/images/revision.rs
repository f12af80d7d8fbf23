//! Which state of the sources an image was built from.

use std::process::Command;

use crate::workspace;

/// The commit that is checked out.
pub(crate) struct Revision {
    /// Its hash, with `-dirty` where files differ from it; `unknown` outside of Git.
    pub(crate) commit: String,
    /// Its time in UTC, RFC 3339; the epoch outside of Git.
    pub(crate) created: String,
}

impl Revision {
    /// Asks Git.
    pub(crate) fn current() -> Self {
        let unknown = || Self {
            commit: "unknown".to_owned(),
            created: "1970-01-01T00:00:00Z".to_owned(),
        };
        let read = || {
            let hash = git(&["rev-parse", "HEAD"])?;
            let changes = git(&["status", "--porcelain"])?;
            let created = git(&[
                "show",
                "--no-patch",
                "--format=%cd",
                "--date=format-local:%Y-%m-%dT%H:%M:%SZ",
                "HEAD",
            ])?;
            Some(Self {
                commit: if changes.is_empty() { hash } else { format!("{hash}-dirty") },
                created,
            })
        };
        read().unwrap_or_else(unknown)
    }
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(workspace::root())
        .env("TZ", "UTC")
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
