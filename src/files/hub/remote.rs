//! The hub's side: which files a repository has, one file's facts, and a stream of its bytes from any offset.
//!
//! hf-hub 0.5 knows the addresses; the requests are ours, because its own drop the headers that say why the hub
//! refuses. Nothing is written to disk here.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Result, anyhow};
use serde::Deserialize;
use ureq::{
    Agent, Body, BodyReader,
    http::{HeaderMap, Response, StatusCode, Uri, header},
    tls::{RootCerts, TlsConfig},
};

use super::{
    cache::is_inside,
    failure::{Asked, Failure, Refusal},
    redirect::{redirected, same_origin},
    settings::HubSettings,
};

/// How often a request is repeated when the network or the hub stumbles.
const RETRIES: usize = 3;
/// How many redirections of one request are followed.
const MAX_REDIRECTIONS: usize = 10;
/// Without an answer for so long a connection counts as dead.
const SILENCE: Duration = Duration::from_secs(60);
/// The longest listing or error page that is read, in bytes.
const MAX_PAGE: u64 = 64 << 20;

/// One repository at the hub.
#[derive(Debug)]
pub(super) struct Remote {
    settings: HubSettings,
    id: String,
    agent: Agent,
    /// Scheme, host and port of the hub: the token goes nowhere else.
    origin: String,
}

/// What the hub says about one file.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) etag: String,
    /// The SHA-256 of the bytes, for files that are not in git itself.
    pub(super) sha256: Option<String>,
    /// In bytes; a server that compresses its answer does not say it.
    pub(super) size: Option<u64>,
    /// The address to fetch the bytes from.
    url: String,
}

/// What came of asking for the bytes from an offset.
pub(super) enum Opened {
    /// They follow.
    From(BodyReader<'static>),
    /// The server sends the file from its beginning instead.
    Whole(BodyReader<'static>),
    /// The server has no such offset.
    BeyondEnd,
}

/// The hub's answer about a repository: <https://huggingface.co/docs/hub/api>. hf-hub's own type leaves out the sizes.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    /// In bytes; mirrors may leave it out.
    size: Option<u64>,
}

#[derive(Clone, Copy)]
enum Method {
    Head,
    Get,
}

impl Remote {
    pub(super) fn new(settings: &HubSettings, id: &str) -> Result<Self, Failure> {
        let endpoint = &settings.endpoint;
        let parsed = endpoint.parse::<Uri>().map(Uri::into_parts);
        let parts = parsed.map(|uri| (uri.scheme, uri.authority));
        let Ok((Some(scheme), Some(authority))) = parts else {
            return Err(Failure {
                error: anyhow!("`{endpoint}` is not the address of a hub\nhint: check HF_ENDPOINT"),
                transient: false,
            });
        };
        // the system's certificates, as a company's proxy may have its own
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier);
        let mut config = Agent::config_builder()
            .tls_config(tls.build())
            .user_agent(concat!("fastflux/", env!("CARGO_PKG_VERSION")))
            // a length or an offset means nothing once the body is packed
            .accept_encoding("identity")
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .http_status_as_error(false)
            .max_redirects_will_error(false);
        if ["localhost", "127.0.0.1", "[::1]"].contains(&authority.host()) {
            config = config.proxy(None); // a mirror on this machine is never behind the proxy
        }
        Ok(Self {
            settings: settings.clone(),
            id: id.to_owned(),
            agent: config.build().into(),
            origin: format!("{scheme}://{authority}"),
        })
    }

    /// How long to wait for bytes.
    pub(super) fn patience(&self) -> Duration {
        self.settings.patience
    }

    fn asked<'a>(&'a self, revision: &'a str, path: Option<&'a str>) -> Asked<'a> {
        Asked {
            settings: &self.settings,
            id: &self.id,
            revision,
            path,
        }
    }

    /// The commit that `revision` names, and the files in it with their sizes in bytes.
    pub(super) fn list(
        &self,
        revision: &str,
    ) -> Result<(String, BTreeMap<String, Option<u64>>), Failure> {
        let asked = self.asked(revision, None);
        let repo =
            hf_hub::Repo::with_revision(self.id.clone(), hf_hub::RepoType::Model, escape(revision));
        let url = format!(
            "{}/api/{}?blobs=true",
            self.settings.endpoint,
            repo.api_url()
        );
        let (_, mut answer) = self.send(&asked, Method::Get, &url, 0)?;
        if !answer.status().is_success() {
            return Err(refused(&asked, answer));
        }
        let listing: Listing = answer
            .body_mut()
            .with_config()
            .limit(MAX_PAGE)
            .read_to_vec()
            .map_err(|error| asked.unreachable(&error))
            .and_then(|page| {
                serde_json::from_slice(&page).map_err(|error| asked.nonsense(&error.to_string()))
            })?;
        if !is_inside(&listing.sha) || listing.sha.contains('/') {
            return Err(asked.nonsense("it names no commit"));
        }
        let files = listing.siblings.into_iter();
        let files = files.filter(|file| is_inside(&file.rfilename));
        Ok((
            listing.sha,
            files.map(|file| (file.rfilename, file.size)).collect(),
        ))
    }

    /// The facts about the file `path` of `commit`.
    pub(super) fn head(&self, commit: &str, path: &str) -> Result<Head> {
        let asked = self.asked(commit, Some(path));
        let path_segments: Vec<_> = path.split('/').map(escape).collect();
        let url = format!(
            "{}/{}/resolve/{}/{}",
            self.settings.endpoint,
            self.id,
            escape(commit),
            path_segments.join("/")
        );
        let (url, answer) = self.send(&asked, Method::Head, &url, 0)?;
        let status = answer.status();
        if !status.is_success() && !status.is_redirection() {
            return Err(refused(&asked, answer).error);
        }
        let headers = answer.headers();
        let linked = text(headers, "x-linked-etag").map(tag);
        let own = text(headers, header::ETAG.as_str()).map(tag);
        // a length means nothing for a body that is packed
        let packed = headers.contains_key(header::CONTENT_ENCODING);
        let length = text(headers, header::CONTENT_LENGTH.as_str()).filter(|_| !packed);
        let size = text(headers, "x-linked-size").or(length.filter(|_| status.is_success()));
        let is_sha256 = |t: &&str| t.len() == 64 && t.chars().all(|c| c.is_ascii_hexdigit());
        let Some(etag) = linked.or(own) else {
            let what = format!("no entity tag for `{path}`");
            return Err(asked.nonsense(&what).error);
        };
        let size = size.and_then(|s| s.parse().ok());
        Ok(Head {
            etag: etag.to_owned(),
            sha256: linked.filter(is_sha256).map(str::to_ascii_lowercase),
            size,
            url,
        })
    }

    /// Asks for the bytes of the file `path` of `commit` from `offset` on.
    pub(super) fn open(
        &self,
        commit: &str,
        path: &str,
        head: &Head,
        offset: u64,
    ) -> Result<Opened, Failure> {
        let asked = self.asked(commit, Some(path));
        let (_, answer) = self.send(&asked, Method::Get, &head.url, offset)?;
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                let start = text(answer.headers(), header::CONTENT_RANGE.as_str())
                    .and_then(|r| r.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
                if start != Some(offset) {
                    return Err(asked.nonsense("it sent another part of the file"));
                }
                Ok(Opened::From(answer.into_body().into_reader()))
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(Opened::BeyondEnd),
            status if status.is_success() => Ok(Opened::Whole(answer.into_body().into_reader())),
            _ => Err(refused(&asked, answer)),
        }
    }

    /// The answer to one request, and the address that gave it. Redirections are followed; the token goes to the hub's own
    /// origin alone. For HEAD, a redirection that states the file's facts is the answer. Repeated when the network or the
    /// hub stumbles.
    fn send(
        &self,
        asked: &Asked,
        method: Method,
        url: &str,
        from: u64,
    ) -> Result<(String, Response<Body>), Failure> {
        let mut url = url.to_owned();
        for _ in 0..MAX_REDIRECTIONS {
            let answer = self.request(asked, method, &url, from)?;
            let headers = answer.headers();
            let next = text(headers, header::LOCATION.as_str())
                .filter(|_| answer.status().is_redirection());
            let Some(next) = next else {
                return Ok((url, answer));
            };
            let next = redirected(&url, next)
                .ok_or_else(|| asked.nonsense("it redirects to something that is no address"))?;
            let facts = headers.contains_key("x-linked-etag");
            if matches!(method, Method::Head) && facts && !same_origin(&next, &self.origin) {
                // the file's facts are in the hub's own answer, not in that of the store it points to
                return Ok((url, answer));
            }
            url = next;
        }
        Err(asked.nonsense("too many redirections"))
    }

    /// One request, with the token where it goes to the hub itself; no redirection is followed.
    fn request(
        &self,
        asked: &Asked,
        method: Method,
        url: &str,
        from: u64,
    ) -> Result<Response<Body>, Failure> {
        let mut attempt = 0;
        loop {
            let mut request = match method {
                Method::Head => self.agent.head(url),
                Method::Get => self.agent.get(url),
            };
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if same_origin(url, &self.origin)
                && let Some(token) = &self.settings.token
            {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let answer = request.config().max_redirects(0).build().call();
            let stumbled = match &answer {
                Ok(answer) => matches!(answer.status().as_u16(), 408 | 429 | 500..),
                Err(error) => is_network(error),
            };
            if !stumbled || attempt == RETRIES {
                return answer.map_err(|error| asked.unreachable(&error));
            }
            std::thread::sleep(Duration::from_millis(200 << attempt));
            attempt += 1;
        }
    }
}

/// The failure that an answer stands for, with the hub's own words.
fn refused(asked: &Asked, mut answer: Response<Body>) -> Failure {
    let headers = answer.headers();
    let mut refusal = Refusal {
        status: answer.status().as_u16(),
        code: text(headers, "x-error-code").map(str::to_owned),
        message: text(headers, "x-error-message").map(str::to_owned),
        wait: text(headers, header::RETRY_AFTER.as_str()).and_then(|w| w.parse().ok()),
    };
    if refusal.message.is_none() {
        let page = answer.body_mut().with_config().limit(MAX_PAGE);
        let page = page.read_to_vec().unwrap_or_default();
        let page: Option<serde_json::Value> = serde_json::from_slice(&page).ok();
        refusal.message = page.and_then(|p| Some(p.get("error")?.as_str()?.to_owned()));
    }
    asked.refused(&refusal)
}

/// Whether the network failed, rather than the address or the settings.
fn is_network(error: &ureq::Error) -> bool {
    use ureq::Error as E;
    matches!(
        error,
        E::Io(_) | E::Timeout(_) | E::HostNotFound | E::ConnectionFailed | E::Protocol(_)
    )
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// An entity tag without its marks: `W/"abc"` is `abc`.
fn tag(raw: &str) -> &str {
    raw.strip_prefix("W/").unwrap_or(raw).trim_matches('"')
}

/// One segment of an address, percent-encoded (RFC 3986, unreserved characters stay).
fn escape(segment: &str) -> String {
    let mut escaped = String::new();
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(byte.into());
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn addresses_are_escaped_segment_by_segment() {
        assert_eq!(escape("flux1-dev.safetensors"), "flux1-dev.safetensors");
        assert_eq!(escape("a b#c?d/é%"), "a%20b%23c%3Fd%2F%C3%A9%25");
    }
}
