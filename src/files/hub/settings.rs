//! Which hub, where its files are kept, and as whom to ask.

use std::{env, fmt, path::PathBuf, time::Duration};

use crate::ui::Reporter;

/// The hub that is asked without `HF_ENDPOINT`.
const ENDPOINT: &str = "https://huggingface.co";

/// Which hub to ask, where its files are kept, and as whom. [`HubSettings::from_env`] reads the variables that
/// `huggingface_hub` reads, so both share one cache and one token.
#[derive(Clone)]
pub struct HubSettings {
    /// The hub's address without a trailing slash.
    pub endpoint: String,
    /// The cache folder that holds `models--owner--name`.
    pub cache: PathBuf,
    /// The access token; gated and private repositories need one.
    pub token: Option<String>,
    /// Never ask the hub: only what the cache holds is there.
    pub offline: bool,
    /// Draws the bars of downloads.
    pub reporter: Reporter,
    /// How long a download goes on trying while no bytes come, before it counts as cut.
    pub patience: Duration,
}

impl HubSettings {
    /// `HF_ENDPOINT`; `HF_HUB_CACHE`, or `hub` in `HF_HOME`; `HF_TOKEN`, or the file that `hf auth login` writes;
    /// `HF_HUB_OFFLINE`.
    pub fn from_env(reporter: Reporter) -> Self {
        Self {
            endpoint: variable("HF_ENDPOINT")
                .map_or_else(|| ENDPOINT.to_owned(), |e| e.trim_end_matches('/').into()),
            cache: cache(),
            token: token(),
            offline: is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"),
            reporter,
            patience: Duration::from_secs(120),
        }
    }
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "…")) // never in a log
            .field("offline", &self.offline)
            .field("patience", &self.patience)
            .finish()
    }
}

/// The folder of all Hugging Face tools: `HF_HOME`, else in the user's cache. hf-hub 0.5 knows `HF_HOME` alone.
fn home() -> PathBuf {
    let cache = || match variable("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => env::home_dir().unwrap_or_default().join(".cache"),
    };
    variable("HF_HOME").map_or_else(|| cache().join("huggingface"), PathBuf::from)
}

/// The folder of downloaded repositories.
fn cache() -> PathBuf {
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
        .map_or_else(|| home().join("hub"), PathBuf::from)
}

/// A variable that is set to something.
fn variable(name: &str) -> Option<String> {
    let text = env::var(name).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Whether a variable says yes, as `huggingface_hub` reads it.
fn is_set(name: &str) -> bool {
    variable(name).is_some_and(|v| {
        ["1", "on", "yes", "true"]
            .iter()
            .any(|yes| v.eq_ignore_ascii_case(yes))
    })
}

/// The token of the environment, else of the file that `hf auth login` writes.
fn token() -> Option<String> {
    if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let stored = || {
        let file = variable("HF_TOKEN_PATH").map_or_else(|| home().join("token"), PathBuf::from);
        let text = std::fs::read_to_string(file).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    variable("HF_TOKEN")
        .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
        .or_else(stored)
}
