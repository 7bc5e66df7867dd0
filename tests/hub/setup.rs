//! A hub, an empty cache and what the tests look for in them.

use std::{fs, path::PathBuf, time::Duration};

use fastflux::{
    files::{Files, HubSettings},
    ui::Reporter,
};
use tempfile::TempDir;

use crate::mock::{Hub, ID, Served};

pub(crate) const CONFIG: &str = "transformer/config.json";
pub(crate) const WEIGHTS: &str = "transformer/model.safetensors";

/// Bytes without a pattern, so that a wrong offset shows.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 1_u64;
    std::iter::repeat_with(|| {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (x >> 56) as u8
    })
    .take(len)
    .collect()
}

fn git(bytes: &[u8]) -> Served {
    Served {
        bytes: bytes.to_vec(),
        stored: false,
    }
}

pub(crate) fn stored(len: usize) -> Served {
    Served {
        bytes: noise(len),
        stored: true,
    }
}

/// A hub with one small and one large file, and an empty cache.
pub(crate) struct Setup {
    pub(crate) hub: Hub,
    pub(crate) cache: TempDir,
    pub(crate) settings: HubSettings,
}

impl Setup {
    pub(crate) fn new(weights: Served) -> Self {
        let hub = Hub::start(&[
            (CONFIG, git(b"{\"hidden_size\": 64}")),
            (WEIGHTS, weights),
            ("README.md", git(b"# tiny")),
            ("../outside", git(b"escaped")),
        ]);
        let cache = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            endpoint: hub.address.clone(),
            cache: cache.path().to_owned(),
            token: None,
            offline: false,
            reporter: Reporter::silent(),
            // far more than any of the faults needs, however slow the machine
            patience: Duration::from_secs(60),
        };
        Self {
            hub,
            cache,
            settings,
        }
    }

    pub(crate) fn small() -> Self {
        Self::new(stored(300_000))
    }

    /// Gives up at once if nothing comes.
    pub(crate) fn impatient() -> Self {
        let mut setup = Self::small();
        setup.settings.patience = Duration::ZERO;
        setup
    }

    pub(crate) fn open(&self) -> anyhow::Result<Files> {
        Files::hub_with(&self.settings, ID, None)
    }

    pub(crate) fn weights(&self) -> anyhow::Result<Vec<u8>> {
        Ok(self.open()?.read(WEIGHTS)?.to_vec())
    }

    pub(crate) fn expected(&self) -> Vec<u8> {
        self.hub.state().files[WEIGHTS].bytes.clone()
    }

    /// The files of the cache whose path contains `part`.
    pub(crate) fn cached(&self, part: &str) -> Vec<PathBuf> {
        let mut folders = vec![self.cache.path().to_owned()];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.to_str().unwrap().contains(part) {
                    found.push(path);
                }
            }
        }
        found
    }

    /// The cache shows no file, whole or half.
    pub(crate) fn assert_nothing_shown(&self) {
        assert_eq!(self.cached("snapshots"), Vec::<PathBuf>::new());
        let blobs = self.cached("blobs").into_iter();
        let whole: Vec<_> = blobs
            .filter(|p| p.extension().is_none_or(|e| e != "fastflux-part"))
            .collect();
        assert_eq!(whole, Vec::<PathBuf>::new());
    }
}

/// The error of `result`, which names all of `parts` and no token.
#[track_caller]
pub(crate) fn assert_says<T>(result: anyhow::Result<T>, parts: &[&str]) {
    let Err(error) = result else {
        panic!("no error, but one with {parts:?} was expected");
    };
    let text = format!("{error:#}");
    for part in parts {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
    assert!(!text.contains("hf_secret"), "{text}");
}
