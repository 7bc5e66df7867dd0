//! A model repository on the Hugging Face hub: its files are listed once, and each is brought into the shared cache
//! when it is first read.
//!
//! What the files mean is decided elsewhere.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Result, anyhow};

mod cache;
mod failure;
mod fetch;
mod redirect;
mod remote;
mod settings;

use cache::Cache;
use failure::Failure;
use remote::Remote;
pub use settings::HubSettings;

use crate::ui::Reporter;

/// What a revision is called when none is given.
const MAIN: &str = "main";

/// One repository at one revision.
#[derive(Debug)]
pub(super) struct Repo {
    id: String,
    revision: Option<String>,
    /// Whether the cache did not say which commit the revision names, and its only snapshot is taken.
    guessed: bool,
    /// The commit that the revision names; all files are of this one.
    commit: String,
    /// Every file with its size, in bytes, if the hub said it.
    files: BTreeMap<String, Option<u64>>,
    cache: Cache,
    source: Source,
    reporter: Reporter,
}

/// Where files come from that are not in the cache.
#[derive(Debug)]
enum Source {
    Hub(Box<Remote>),
    /// Nowhere: the user wants it so.
    Offline,
    /// Nowhere: the hub did not answer, with the message that says so.
    Unreachable(String),
}

impl Repo {
    pub(super) fn open(settings: &HubSettings, id: &str, revision: Option<&str>) -> Result<Self> {
        let cache = Cache::new(&settings.cache, id);
        let wanted = revision.unwrap_or(MAIN);
        let mut repo = Self {
            id: id.to_owned(),
            revision: revision.map(str::to_owned),
            guessed: false,
            commit: String::new(),
            files: BTreeMap::new(),
            cache,
            source: Source::Offline,
            reporter: settings.reporter.clone(),
        };
        if settings.offline {
            return repo.cached(wanted).ok_or_else(|| {
                anyhow!(
                    "HF_HUB_OFFLINE is set, and `{}` is not in the cache `{}`\nhint: unset HF_HUB_OFFLINE to download it, or set HF_HOME to the cache that holds it",
                    name(id, revision),
                    settings.cache.display(),
                )
            });
        }
        let listed = Remote::new(settings, id).and_then(|remote| {
            let (commit, files) = remote.list(wanted)?;
            Ok((remote, commit, files))
        });
        match listed {
            Ok((remote, commit, files)) => {
                repo.commit = commit;
                repo.files = files;
                repo.source = Source::Hub(Box::new(remote));
                Ok(repo)
            }
            Err(Failure { error, transient }) => {
                repo.source = Source::Unreachable(error.to_string());
                let cached = repo.cached(wanted).filter(|_| transient);
                cached.ok_or(error)
            }
        }
    }

    /// The same repository with what the cache holds of `revision`; `None` when that is nothing.
    fn cached(mut self, revision: &str) -> Option<Self> {
        self.commit = match self.cache.commit(revision) {
            Some(commit) => commit,
            None if self.revision.is_none() => {
                self.guessed = true;
                self.cache.only_snapshot()?
            }
            None => return None,
        };
        let files = self.cache.files(&self.commit);
        self.files = files.into_iter().map(|path| (path, None)).collect();
        (!self.files.is_empty()).then_some(self)
    }

    /// `owner/name`, or `owner/name@revision`.
    pub(super) fn name(&self) -> String {
        name(&self.id, self.revision.as_deref())
    }

    /// `owner/name@commit`, which names the same bytes for ever.
    pub(super) fn resolved(&self) -> String {
        name(&self.id, Some(&self.commit))
    }

    /// The paths of all files, sorted; without a connection those in the cache.
    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The file `path` in the cache, downloaded first if need be; `None` when the repository has no such file (or,
    /// without a connection, the cache does not).
    pub(super) fn get(&self, path: &str) -> Result<Option<PathBuf>> {
        let Some(size) = self.files.get(path) else {
            return Ok(None);
        };
        if let Some(file) = self.cache.file(&self.commit, path) {
            let is_whole = |size: &u64| std::fs::metadata(&file).is_ok_and(|m| m.len() == *size);
            if size.as_ref().is_none_or(is_whole) {
                return Ok(Some(file));
            }
        }
        let Source::Hub(remote) = &self.source else {
            return Ok(None); // removed since it was listed
        };
        let name = format!("{}:{path}", self.name());
        let file = fetch::fetch(
            remote,
            &self.cache,
            &self.commit,
            path,
            &name,
            *size,
            &self.reporter,
        )?;
        // not worth failing for: without it the model merely needs the hub again next time
        let revision = self.revision.as_deref().unwrap_or(MAIN);
        let _ = self.cache.set_commit(revision, &self.commit);
        Ok(Some(file))
    }

    /// Why the file `path` is not there.
    pub(super) fn missing(&self, path: &str) -> String {
        let file = format!("`{}:{path}`", self.name());
        let cache = self.cache.folder();
        let cache = cache.display();
        match &self.source {
            Source::Hub(_) => format!("{file} does not exist"),
            Source::Offline => format!(
                "{file} is not in the cache `{cache}`, and HF_HUB_OFFLINE is set\nhint: unset it to download the file"
            ),
            Source::Unreachable(why) => format!("{file} is not in the cache `{cache}`: {why}"),
        }
    }

    /// Why only the cache is asked, if no flag asked for that.
    pub(super) fn note(&self) -> Option<String> {
        if self.guessed {
            return Some(format!(
                "the cache of `{}` does not say which commit `{MAIN}` is; using its only snapshot, `{}`",
                self.id, self.commit
            ));
        }
        let Source::Unreachable(why) = &self.source else {
            return None;
        };
        let why = why.lines().next().unwrap_or_default();
        Some(format!("{why}; using the cached `{}`", self.resolved()))
    }
}

fn name(id: &str, revision: Option<&str>) -> String {
    match revision {
        Some(revision) => format!("{id}@{revision}"),
        None => id.to_owned(),
    }
}
