//! What can go wrong with the hub, each with its own sentence and what to do about it.
//!
//! Words only: no request is made here.

use std::{io, path::Path};

use anyhow::{Error, anyhow};
use indicatif::DecimalBytes;

use super::settings::HubSettings;

/// A failed request, and whether the cache may answer in its place.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    /// The hub could not answer now (network, load); it did not refuse.
    pub(super) transient: bool,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

/// What was asked for, and as whom: the messages name it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) settings: &'a HubSettings,
    pub(super) id: &'a str,
    pub(super) revision: &'a str,
    /// The file, when it is about one.
    pub(super) path: Option<&'a str>,
}

/// An answer that is not a success: the status, and the hub's own words.
#[derive(Debug, Default)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// `X-Error-Code`: `GatedRepo`, `RepoNotFound`, `RevisionNotFound`, `EntryNotFound`, …
    pub(super) code: Option<String>,
    /// `X-Error-Message`, or `error` in the body.
    pub(super) message: Option<String>,
    /// `Retry-After` in seconds.
    pub(super) wait: Option<u64>,
}

impl Asked<'_> {
    /// An answer that says no.
    pub(super) fn refused(&self, refusal: &Refusal) -> Failure {
        let Asked { id, revision, .. } = *self;
        let site = &self.settings.endpoint;
        let tokens = format!("{site}/settings/tokens");
        let has_token = self.settings.token.is_some();
        let message = refusal.message.as_deref().unwrap_or_default();
        let said = if message.is_empty() {
            String::new()
        } else {
            format!(" (the hub says: {})", message.trim_end_matches('.'))
        };
        let code = refusal.code.as_deref().unwrap_or_default();
        let gated = code == "GatedRepo"
            || (code.is_empty()
                && matches!(refusal.status, 401 | 403)
                && message.contains("is restricted"));
        let error = match (refusal.status, code) {
            _ if gated => {
                if has_token {
                    anyhow!(
                        "`{id}` is gated, and your token has no access to it{said}\nhint: accept the licence at {site}/{id} with the account of the token; a fine-grained token also needs \"read access to public gated repositories\" ({tokens})"
                    )
                } else {
                    anyhow!(
                        "`{id}` is gated: its licence has to be accepted once\nhint: accept it at {site}/{id}, make a token at {tokens}, and set HF_TOKEN to it (or run `hf auth login`)"
                    )
                }
            }
            (_, "RepoNotFound") | (401, _) if !has_token => anyhow!(
                "`{id}` does not exist on {site}, or it is private\nhint: check the spelling (`owner/name`); for a private repository set HF_TOKEN to a token from {tokens} (or run `hf auth login`)"
            ),
            (401, _) => anyhow!(
                "the hub does not accept your token{said}\nhint: make a new one at {tokens} and set HF_TOKEN to it (or run `hf auth login`)"
            ),
            (_, "RepoNotFound") => anyhow!(
                "`{id}` does not exist on {site}, or your token may not see it\nhint: check the spelling (`owner/name`); a fine-grained token has to list the repository ({tokens})"
            ),
            (_, "RevisionNotFound") => anyhow!(
                "`{id}` has no revision `{revision}`\nhint: a revision is a branch, a tag, `refs/pr/N` or a full commit hash: {site}/{id}/commits"
            ),
            (403, _) => anyhow!(
                "the hub forbids access to `{id}`{said}\nhint: see {site}/{id}; a fine-grained token needs the right to read this repository ({tokens})"
            ),
            (404, _) => match self.path {
                Some(path) => anyhow!("`{id}@{revision}` has no file `{path}`"),
                None => anyhow!(
                    "`{id}` at revision `{revision}` does not exist on {site}\nhint: check the spelling (`owner/name[@revision]`)"
                ),
            },
            (429, _) => {
                let wait = refusal
                    .wait
                    .map(|s| format!(" and asks to wait {s} seconds"))
                    .unwrap_or_default();
                let more = if has_token {
                    ""
                } else {
                    ", or set HF_TOKEN: signed-in users may ask more often"
                };
                anyhow!(
                    "the hub answers that there were too many requests{wait}\nhint: wait and run the same command again{more}"
                )
            }
            (status @ (408 | 500..), _) => anyhow!(
                "the hub has trouble answering (HTTP {status}){said}\nhint: run the same command again later; what is downloaded is kept"
            ),
            (status, _) => anyhow!("the hub answers HTTP {status} for `{id}`{said}"),
        };
        Failure {
            error,
            transient: matches!(refusal.status, 408 | 429 | 500..),
        }
    }

    /// No answer at all.
    pub(super) fn unreachable(&self, error: &ureq::Error) -> Failure {
        let cause = match error {
            ureq::Error::Io(error) => error.to_string(), // without `io: `
            _ => error.to_string(),
        };
        let hint = if cause.contains("certificate") {
            "set SSL_CERT_FILE to a file with the certificate of the proxy or mirror (PEM), or install the system's root certificates (package `ca-certificates`)"
        } else {
            "check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror"
        };
        Failure {
            error: anyhow!(
                "cannot reach {} for `{}`: {cause}\nhint: {hint}",
                self.settings.endpoint,
                self.id
            ),
            transient: true,
        }
    }

    /// An answer that is not what a hub sends.
    pub(super) fn nonsense(&self, what: &str) -> Failure {
        Failure {
            error: anyhow!(
                "{} does not answer as a Hugging Face hub does: {what}\nhint: check HF_ENDPOINT, or whether a proxy asks for a login",
                self.settings.endpoint
            ),
            transient: true,
        }
    }
}

/// A download that stopped, with what is there of it.
pub(super) fn cut(name: &str, done: u64, size: u64, cause: &Error) -> Error {
    let cause = without_hint(cause);
    anyhow!(
        "the download of `{name}` was cut at {} of {}: {cause}\nhint: run the same command again; it goes on from there",
        DecimalBytes(done),
        DecimalBytes(size),
    )
}

/// A download of unknown length, of which nothing is kept, that the network ended early.
pub(super) fn cut_at_once(name: &str, done: u64, cause: &Error) -> Error {
    anyhow!(
        "the download of `{name}` was cut after {}: {}\nhint: run the same command again",
        DecimalBytes(done),
        without_hint(cause)
    )
}

/// The first line: the hint is for the beginning of a download.
fn without_hint(cause: &Error) -> String {
    let cause = cause.to_string();
    cause.lines().next().unwrap_or_default().to_owned()
}

/// Too little room for the rest of a download.
pub(super) fn full(name: &str, missing: u64, free: Option<u64>, folder: &Path) -> Error {
    let free = free.map_or_else(String::new, |f| {
        format!(", but {} are free", DecimalBytes(f))
    });
    anyhow!(
        "the disk is full: `{name}` needs {} more in `{}`{free}\nhint: free some space and run the same command again (it goes on where it stopped), or set HF_HOME to a folder on a larger disk",
        DecimalBytes(missing),
        folder.display(),
    )
}

/// A cache that cannot be written to.
pub(super) fn unwritable(folder: &Path, error: &io::Error) -> Error {
    anyhow!(
        "cannot write to the hub cache `{}`: {error}\nhint: set HF_HOME to a folder that can be written",
        folder.display()
    )
}

/// Whether a write failed for want of room.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
