//! A model's files wherever they are: embedded in the binary, in a folder, or on the Hugging Face hub.
//!
//! Knows paths and bytes; what the bytes mean is decided by `checkpoint` and `sample`.

use std::{
    fs::File,
    ops::Deref,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use anyhow::{Context, Result, anyhow};
use memmap2::Mmap;

mod bundled;
#[cfg(feature = "hub")]
mod hub;
mod id;
pub mod output;
mod place;
mod small;
mod space;

#[cfg(feature = "hub")]
pub use hub::HubSettings;
pub use id::{parse_file, parse_id};
use small::check_file;
pub use small::{MAX_SMALL, read_small};
pub use space::free_space;

use crate::ui::Reporter;

/// The bytes of one file: part of the binary, or memory-mapped. Cloning is cheap.
#[derive(Clone, Debug)]
pub enum Blob {
    /// A file embedded in the binary.
    Static(&'static [u8]),
    /// A memory-mapped file; pages are read when they are touched.
    Mapped(Arc<Mmap>),
}

/// The files that are mapped, under their real paths.
static MAPPED: Mutex<Vec<(PathBuf, Weak<Mmap>)>> = Mutex::new(Vec::new());

/// A file that this process has mapped and that is `path` or lies below it.
pub fn mapped_below(path: &Path) -> Option<PathBuf> {
    let path = path.canonicalize().ok()?;
    let mapped = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut alive = mapped.iter().filter(|(_, map)| map.strong_count() > 0);
    alive
        .find(|(file, _)| file.starts_with(&path))
        .map(|(file, _)| file.clone())
}

/// A mapped file that is shorter by now than it was.
fn mapped_and_cut() -> Option<PathBuf> {
    // never waited for: the thread that holds the list may be the one that cannot go on
    let mapped = MAPPED.try_lock().ok()?;
    let is_cut = |(path, map): &&(PathBuf, Weak<Mmap>)| {
        let length = map.upgrade().map_or(0, |map| map.len() as u64);
        std::fs::metadata(path).is_ok_and(|meta| meta.len() < length)
    };
    mapped.iter().find(is_cut).map(|(path, _)| path.clone())
}

impl Blob {
    /// Maps a file.
    ///
    /// # Errors
    /// When the file cannot be opened or mapped; the message names it.
    #[expect(unsafe_code, reason = "mapping is the one way not to hold 24 GB twice")]
    pub fn map(path: &Path) -> Result<Self> {
        check_file(path)?;
        let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
        let meta = file
            .metadata()
            .with_context(|| format!("cannot read `{}`", path.display()))?;
        if !meta.is_file() {
            return Err(anyhow!("`{}` is not a file", path.display()));
        }
        if meta.len() == 0 {
            return Ok(Self::Static(&[])); // an empty file cannot be mapped
        }
        // SAFETY: the map is read-only and we never write to an input file. If another process truncates or
        // rewrites the file while it is mapped, reads give changed bytes or the process gets SIGBUS: the same
        // contract as every safetensors loader. Our own outputs are new files that are renamed into place.
        let map = unsafe { Mmap::map(&file) };
        let map = map.with_context(|| format!("cannot map `{}`", path.display()))?;
        let map = Arc::new(map);
        if let Ok(real) = path.canonicalize() {
            let mut mapped = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
            mapped.retain(|(_, map)| map.strong_count() > 0);
            mapped.push((real, Arc::downgrade(&map)));
        }
        Ok(Self::Mapped(map))
    }
}

impl Deref for Blob {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Static(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }
}

/// A folder of model files. Cloning is cheap; [`Files::sub`] goes down one level.
#[derive(Clone, Debug)]
pub struct Files {
    root: Root,
    prefix: String,
}

#[derive(Clone, Debug)]
enum Root {
    Bundled,
    Folder(PathBuf),
    #[cfg(feature = "hub")]
    Hub(Arc<hub::Repo>),
}

impl Files {
    /// The tiny trained pipeline in the binary.
    pub fn bundled() -> Self {
        Self::from_root(Root::Bundled)
    }

    /// A folder on disk.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self::from_root(Root::Folder(path.into()))
    }

    /// A model repository on the hub, `owner/name` at a revision (`None`: `main`). `reporter` draws the bars of downloads.
    ///
    /// # Errors
    /// When this build has no hub support, or the repository cannot be listed: gated, unauthorised, offline and
    /// not-found each say what to do.
    pub fn hub(id: &str, revision: Option<&str>, reporter: &Reporter) -> Result<Self> {
        #[cfg(feature = "hub")]
        {
            let files = Self::hub_with(&HubSettings::from_env(reporter.clone()), id, revision)?;
            if let Some(note) = files.note() {
                reporter.note(note);
            }
            Ok(files)
        }
        #[cfg(not(feature = "hub"))]
        let _ = reporter;
        #[cfg(not(feature = "hub"))]
        Err(anyhow!(
            "`{id}{}` is a hub id, but this build has no hub support\nhint: build with `--features hub`, or download the files and name the folder",
            revision.map(|r| format!("@{r}")).unwrap_or_default()
        ))
    }

    /// As [`Files::hub`], with settings that are not those of the environment.
    ///
    /// # Errors
    /// As [`Files::hub`].
    #[cfg(feature = "hub")]
    pub fn hub_with(settings: &HubSettings, id: &str, revision: Option<&str>) -> Result<Self> {
        let repo = hub::Repo::open(settings, id, revision)?;
        Ok(Self::from_root(Root::Hub(Arc::new(repo))))
    }

    /// `owner/name@commit` of a repository on the hub: names the same bytes when the revision has moved on.
    pub fn resolved(&self) -> Option<String> {
        match &self.root {
            #[cfg(feature = "hub")]
            Root::Hub(repo) => Some(repo.resolved()),
            _ => None,
        }
    }

    /// The folder on disk; `None` for files that lie elsewhere.
    pub fn on_disk(&self) -> Option<&Path> {
        match &self.root {
            Root::Folder(path) if self.prefix.is_empty() => Some(path),
            _ => None,
        }
    }

    /// Whether the cache holds files of the hub id `id`.
    pub fn is_cached(id: &str) -> bool {
        #[cfg(feature = "hub")]
        if let Some((repo, revision)) = parse_id(id) {
            let settings = HubSettings {
                offline: true,
                ..HubSettings::from_env(crate::ui::Reporter::silent())
            };
            return Self::hub_with(&settings, &repo, revision.as_deref()).is_ok();
        }
        let _ = id;
        false
    }

    /// What the user should know about where the files come from: the hub cannot be reached, and the cache is used.
    pub fn note(&self) -> Option<String> {
        match &self.root {
            #[cfg(feature = "hub")]
            Root::Hub(repo) => repo.note(),
            _ => None,
        }
    }

    fn from_root(root: Root) -> Self {
        Self {
            root,
            prefix: String::new(),
        }
    }

    /// The sub-folder `name`; it need not exist.
    #[must_use]
    pub fn sub(&self, name: &str) -> Self {
        Self {
            root: self.root.clone(),
            prefix: format!("{}{name}/", self.prefix),
        }
    }

    /// The file `path` (relative, `/`-separated), or `None` when there is none.
    ///
    /// # Errors
    /// When the file exists but cannot be read or fetched.
    pub fn get(&self, path: &str) -> Result<Option<Blob>> {
        let full = format!("{}{path}", self.prefix);
        match &self.root {
            Root::Bundled => Ok(bundled::get(&full).map(Blob::Static)),
            Root::Folder(dir) => {
                let file = dir.join(&full);
                if file.exists() {
                    Blob::map(&file).map(Some)
                } else {
                    Ok(None)
                }
            }
            #[cfg(feature = "hub")]
            Root::Hub(repo) => repo.get(&full)?.map(|p| Blob::map(&p)).transpose(),
        }
    }

    /// The file `path`.
    ///
    /// # Errors
    /// When it is missing or cannot be read or fetched.
    pub fn read(&self, path: &str) -> Result<Blob> {
        self.get(path)?.ok_or_else(|| self.missing(path))
    }

    fn missing(&self, path: &str) -> anyhow::Error {
        match &self.root {
            #[cfg(feature = "hub")]
            Root::Hub(repo) => anyhow!(repo.missing(&format!("{}{path}", self.prefix))),
            _ => anyhow!("`{}` does not exist", self.describe(path)),
        }
    }

    /// The JSON file `path`, or `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read or is not JSON.
    pub fn json(&self, path: &str) -> Result<Option<serde_json::Value>> {
        let Some(blob) = self.get(path)? else {
            return Ok(None);
        };
        if blob.len() as u64 > MAX_SMALL {
            return Err(anyhow!(
                "`{}` is larger than {} MB, which no such file is",
                self.describe(path),
                MAX_SMALL >> 20
            ));
        }
        let value = serde_json::from_slice(&blob)
            .with_context(|| format!("`{}` is not valid JSON", self.describe(path)))?;
        Ok(Some(value))
    }

    /// Whether the file `path` is there.
    ///
    /// # Errors
    /// When the hub cannot be asked.
    pub fn has(&self, path: &str) -> Result<bool> {
        Ok(self.list()?.iter().any(|name| name == path))
    }

    /// The paths of all files, with their folders; of a repository on the hub alone.
    pub fn all_paths(&self) -> Vec<String> {
        match &self.root {
            #[cfg(feature = "hub")]
            Root::Hub(repo) => repo.paths().map(str::to_owned).collect(),
            _ => Vec::new(),
        }
    }

    /// The names of all files directly in this folder, sorted.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn list(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = match &self.root {
            Root::Bundled => direct_children(bundled::paths(), &self.prefix),
            Root::Folder(dir) => {
                let dir = dir.join(&self.prefix);
                if !dir.is_dir() {
                    return Ok(Vec::new());
                }
                let entries = std::fs::read_dir(&dir)
                    .with_context(|| format!("cannot list `{}`", dir.display()))?;
                entries
                    .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                    .collect()
            }
            #[cfg(feature = "hub")]
            Root::Hub(repo) => direct_children(repo.paths(), &self.prefix),
        };
        names.sort();
        Ok(names)
    }

    /// How to name `path` in a message: a path, `bundled:…` or `owner/name:…`.
    pub fn describe(&self, path: &str) -> String {
        let path = &crate::ui::printable_name(path, 400);
        let full = format!("{}{path}", self.prefix);
        match &self.root {
            Root::Bundled => format!("bundled:{full}"),
            Root::Folder(dir) => dir.join(full).display().to_string(),
            #[cfg(feature = "hub")]
            Root::Hub(repo) => format!("{}:{full}", repo.name()),
        }
    }

    /// The text that opens this folder again with `--model` from any working directory.
    pub fn model_ref(&self) -> String {
        match &self.root {
            Root::Bundled => BUNDLED.to_owned(),
            Root::Folder(dir) => {
                // by its components: without a slash at the end
                let dir: PathBuf = dir.join(&self.prefix).components().collect();
                std::path::absolute(&dir)
                    .unwrap_or(dir)
                    .display()
                    .to_string()
            }
            #[cfg(feature = "hub")]
            Root::Hub(repo) => repo.resolved(),
        }
    }
}

/// Where files of the hub are kept, and how the hub is asked.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Cache {
    /// The folder.
    pub folder: String,
    /// Whether the hub is never asked.
    pub offline: bool,
    /// Whether there is an access token.
    pub has_token: bool,
    /// Free bytes on its disk.
    pub free: Option<u64>,
}

impl Cache {
    /// As the environment says; `None` in a build without hub.
    pub fn from_env() -> Option<Self> {
        #[cfg(feature = "hub")]
        {
            let settings = HubSettings::from_env(Reporter::silent());
            let mut there = settings.cache.ancestors();
            Some(Self {
                free: there.find(|folder| folder.exists()).and_then(free_space),
                folder: settings.cache.display().to_string(),
                offline: settings.offline,
                has_token: settings.token.is_some(),
            })
        }
        #[cfg(not(feature = "hub"))]
        None
    }
}

/// The `--model` value that names the bundled model.
pub const BUNDLED: &str = "bundled";

/// The names in `paths` that lie directly under `prefix`, each once; folders included.
fn direct_children<'a>(paths: impl Iterator<Item = &'a str>, prefix: &str) -> Vec<String> {
    let names: std::collections::BTreeSet<&str> = paths
        .filter_map(|path| path.strip_prefix(prefix)?.split('/').next())
        .collect();
    names.into_iter().map(str::to_owned).collect()
}
