//! The hub's side: which files a repository has, one file's facts, and a stream of its bytes from any offset.
//!
//! Nothing is written to disk here.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use anyhow::{Result, anyhow, bail};
use hf_hub::{HFClient, HFClientSync, repository::RepoTreeEntry};
use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{self, HeaderMap, HeaderValue},
    redirect::Policy,
};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use xet::xet_session::{XetConfig, XetDownloadStream, XetFileInfo, XetSession, XetSessionBuilder};

use super::{
    cache::is_inside,
    failure::{Asked, Failure, Refusal, cause},
    settings::HubSettings,
};

/// How often a request is repeated when the network or the hub stumbles.
const RETRIES: usize = 3;
/// Without an answer for so long a connection counts as dead.
const SILENCE: Duration = Duration::from_secs(60);
/// Below this size one connection is as fast as many.
const XET_FROM: u64 = 16 << 20;

/// One repository at the hub.
pub(super) struct Remote {
    settings: HubSettings,
    id: String,
    runtime: Runtime,
    client: Client,
    /// For HEAD: the facts are in the hub's own answer, not in that of the store it points to.
    plain: Client,
    xet: Mutex<Option<(XetSession, TempDir)>>,
}

/// What the hub says about one file.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) etag: String,
    /// The SHA-256 of the bytes, for files that are not in git itself.
    pub(super) sha256: Option<String>,
    pub(super) size: u64,
    /// The address to fetch the bytes from.
    url: Url,
    /// The Xet hash, while that way is worth trying.
    pub(super) xet: Option<String>,
}

/// Bytes of one file, in order.
pub(super) enum Bytes {
    Http(Response),
    Xet(XetDownloadStream),
}

/// What came of asking for the bytes from an offset.
pub(super) enum Opened {
    /// They follow.
    From(Bytes),
    /// The server sends the file from its beginning instead.
    Whole(Bytes),
    /// The server has no such offset.
    BeyondEnd,
}

impl Remote {
    pub(super) fn new(settings: &HubSettings, id: &str) -> std::result::Result<Self, Failure> {
        let failed = |error| Failure {
            error,
            transient: true,
        };
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| failed(e.into()))?;
        Ok(Self {
            client: client(settings, Policy::default()).map_err(failed)?,
            plain: client(settings, Policy::none()).map_err(failed)?,
            settings: settings.clone(),
            id: id.to_owned(),
            runtime,
            xet: Mutex::new(None),
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

    /// The commit that `revision` names, and the files in it with their sizes.
    pub(super) fn list(
        &self,
        revision: &str,
    ) -> std::result::Result<(String, BTreeMap<String, u64>), Failure> {
        let asked = self.asked(revision, None);
        let failed = |error| asked.failed(&error);
        self.url(&[]).map_err(|error| Failure {
            error,
            transient: false,
        })?;
        let mut builder = HFClient::builder()
            .client(self.client.clone())
            .endpoint(&self.settings.endpoint)
            .cache_dir(&self.settings.cache)
            .retry_max_attempts(RETRIES);
        if let Some(token) = &self.settings.token {
            builder = builder.token(token);
        }
        let client = builder.build().map_err(failed)?;
        let client = HFClientSync::from_inner(client).map_err(failed)?;
        let (owner, name) = hf_hub::split_id(&self.id);
        let repo = client.model(owner, name);
        let info = repo
            .info()
            .revision(revision)
            .expand(vec!["sha".to_owned()])
            .send()
            .map_err(failed)?;
        let Some(commit) = info.sha.filter(|c| is_inside(c) && !c.contains('/')) else {
            return Err(asked.nonsense("it names no commit"));
        };
        let tree = repo.list_tree().revision(&commit).recursive(true).send();
        let files = tree.map_err(failed)?.into_iter().filter_map(|e| match e {
            RepoTreeEntry::File { path, size, .. } if is_inside(&path) => Some((path, size)),
            _ => None,
        });
        let files = files.collect();
        Ok((commit, files))
    }

    /// The facts about the file `path` of `commit`.
    pub(super) fn head(&self, commit: &str, path: &str) -> Result<Head> {
        let asked = self.asked(commit, Some(path));
        let mut url = self.url(&[&self.id, "resolve", commit, path])?;
        // a renamed repository answers with its new address; anything else that redirects is a store
        for _ in 0..5 {
            let answer = self.send(&asked, &self.plain, &Method::HEAD, &url, None)?;
            let status = answer.status();
            let headers = answer.headers();
            let next = text(headers, header::LOCATION.as_str()).filter(|l| l.starts_with('/'));
            if let Some(next) = next.filter(|l| status.is_redirection() && !l.starts_with("//")) {
                url = url.join(next)?;
                continue;
            }
            if !status.is_success() && !status.is_redirection() {
                return Err(self.refused(&asked, answer).error);
            }
            let linked = text(headers, "x-linked-etag").map(tag);
            let own = text(headers, header::ETAG.as_str()).map(tag);
            let length = text(headers, header::CONTENT_LENGTH.as_str());
            let size = text(headers, "x-linked-size").or(length.filter(|_| status.is_success()));
            let is_sha256 = |t: &&str| t.len() == 64 && t.chars().all(|c| c.is_ascii_hexdigit());
            let (Some(etag), Some(size)) = (linked.or(own), size.and_then(|s| s.parse().ok()))
            else {
                return Err(asked
                    .nonsense(&format!("no size or entity tag for `{path}`"))
                    .error);
            };
            let xet = text(headers, "x-xet-hash").filter(|_| self.settings.xet && size >= XET_FROM);
            return Ok(Head {
                etag: etag.to_owned(),
                sha256: linked.filter(is_sha256).map(str::to_ascii_lowercase),
                size,
                xet: xet.map(str::to_owned),
                url,
            });
        }
        Err(asked.nonsense("too many redirections").error)
    }

    /// Asks for the bytes of the file `path` of `commit` from `offset` on.
    pub(super) fn open(
        &self,
        commit: &str,
        path: &str,
        head: &Head,
        offset: u64,
    ) -> std::result::Result<Opened, Failure> {
        let asked = self.asked(commit, Some(path));
        if let Some(hash) = &head.xet {
            let stream = self.open_xet(commit, hash, head.size, offset);
            return match stream {
                Ok(stream) => Ok(Opened::From(Bytes::Xet(stream))),
                Err(error) => Err(Failure {
                    error,
                    transient: true,
                }),
            };
        }
        let range = (offset > 0).then_some(offset);
        let answer = self.send(&asked, &self.client, &Method::GET, &head.url, range)?;
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                let start = text(answer.headers(), header::CONTENT_RANGE.as_str())
                    .and_then(|r| r.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
                if start != Some(offset) {
                    return Err(asked.nonsense("it sent another part of the file"));
                }
                Ok(Opened::From(Bytes::Http(answer)))
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(Opened::BeyondEnd),
            status if status.is_success() => Ok(Opened::Whole(Bytes::Http(answer))),
            _ => Err(self.refused(&asked, answer)),
        }
    }

    /// The next bytes, or `None` at the end.
    pub(super) fn next(&self, bytes: &mut Bytes) -> Result<Option<impl AsRef<[u8]> + use<>>> {
        match bytes {
            Bytes::Http(response) => self
                .runtime
                .block_on(async { response.chunk().await })
                .map_err(|error| anyhow!(cause(&error))),
            Bytes::Xet(stream) => Ok(stream.blocking_next()?),
        }
    }

    fn open_xet(
        &self,
        commit: &str,
        hash: &str,
        size: u64,
        offset: u64,
    ) -> Result<XetDownloadStream> {
        let session = {
            let mut slot = self
                .xet
                .lock()
                .map_err(|_| anyhow!("a transfer panicked"))?;
            match &*slot {
                Some((session, _)) => session.clone(),
                None => slot.insert(xet_session()?).0.clone(),
            }
        };
        let url = self.url(&["api/models", &self.id, "xet-read-token", commit])?;
        let group = session
            .new_download_stream_group()?
            .with_token_refresh_url(url, self.identity())
            .build_blocking()?;
        let info = XetFileInfo::new(hash.to_owned(), size);
        Ok(group.download_stream_blocking(info, Some(offset..size))?)
    }

    /// One request; repeated when the network or the hub stumbles.
    fn send(
        &self,
        asked: &Asked,
        client: &Client,
        method: &Method,
        url: &Url,
        from: Option<u64>,
    ) -> std::result::Result<Response, Failure> {
        let mut attempt = 0;
        loop {
            let mut request = client
                .request(method.clone(), url.clone())
                .headers(self.identity())
                // a length or an offset means nothing once the body is packed
                .header(header::ACCEPT_ENCODING, "identity");
            if let Some(from) = from {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            // inside the future: its timers need the runtime from the start
            let answer = self.runtime.block_on(async { request.send().await });
            let stumbled = match &answer {
                Ok(answer) => matches!(answer.status().as_u16(), 408 | 429 | 500..),
                Err(error) => !error.is_builder() && !error.is_redirect(),
            };
            if !stumbled || attempt == RETRIES {
                return answer.map_err(|error| asked.unreachable(&error));
            }
            std::thread::sleep(Duration::from_millis(200 << attempt));
            attempt += 1;
        }
    }

    fn refused(&self, asked: &Asked, answer: Response) -> Failure {
        let headers = answer.headers();
        let mut refusal = Refusal {
            status: answer.status().as_u16(),
            code: text(headers, "x-error-code").map(str::to_owned),
            message: text(headers, "x-error-message").map(str::to_owned),
            wait: text(headers, header::RETRY_AFTER.as_str()).and_then(|w| w.parse().ok()),
        };
        if refusal.message.is_none() {
            let body = self.runtime.block_on(async { answer.bytes().await });
            let body = body.unwrap_or_default();
            let body: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
            refusal.message = body.and_then(|b| Some(b.get("error")?.as_str()?.to_owned()));
        }
        asked.refused(&refusal)
    }

    /// The address of `parts` at the hub; each part may hold several segments, which are escaped one by one.
    fn url(&self, parts: &[&str]) -> Result<Url> {
        let endpoint = &self.settings.endpoint;
        let parsed = Url::parse(endpoint).ok().filter(|u| !u.cannot_be_a_base());
        let Some(mut url) = parsed else {
            bail!("`{endpoint}` is not the address of a hub\nhint: check HF_ENDPOINT");
        };
        url.path_segments_mut()
            .map_err(|()| anyhow!("`{endpoint}` cannot have a path"))?
            .pop_if_empty()
            .extend(parts.iter().flat_map(|part| part.split('/')));
        Ok(url)
    }

    fn identity(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let token = self.settings.token.as_ref();
        if let Some(Ok(mut value)) = token.map(|t| HeaderValue::from_str(&format!("Bearer {t}"))) {
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        headers
    }
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote")
            .field("settings", &self.settings)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

fn client(settings: &HubSettings, policy: Policy) -> Result<Client> {
    let mut builder = Client::builder()
        .user_agent(concat!("fastflux/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(SILENCE)
        .redirect(policy);
    let local = Url::parse(&settings.endpoint)
        .is_ok_and(|u| matches!(u.host_str(), Some("localhost" | "127.0.0.1" | "[::1]")));
    if local {
        builder = builder.no_proxy(); // a mirror on this machine is never behind the proxy
    }
    builder.build().map_err(|error| {
        anyhow!(
            "cannot set up HTTPS: {}\nhint: install the system's root certificates (package `ca-certificates`)",
            cause(&error)
        )
    })
}

/// One Xet session, which has its own threads, and the folder it wants for itself (downloads leave it empty).
fn xet_session() -> Result<(XetSession, TempDir)> {
    let mut config = XetConfig::new();
    // it gives up soon: plain HTTP takes over
    config.client.retry_max_attempts = 2;
    config.client.retry_base_delay = Duration::from_millis(500);
    config.client.connect_timeout = Duration::from_secs(10);
    config.client.read_timeout = SILENCE;
    config.telemetry.enabled = false; // nothing about the user's transfers is reported
    let folder = tempfile::tempdir()?;
    let session = XetSessionBuilder::new_with_config(config).with_cache_dir(folder.path());
    Ok((session.build()?, folder))
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// An entity tag without its marks: `W/"abc"` is `abc`.
fn tag(raw: &str) -> &str {
    raw.strip_prefix("W/").unwrap_or(raw).trim_matches('"')
}
