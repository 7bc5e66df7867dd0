//! The cache folder that all Hugging Face tools share: `blobs`, `snapshots` and `refs` of one repository.
//!
//! Layout: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>. No network here.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Component, Path, PathBuf},
};

use anyhow::{Result, ensure};

use super::failure;

/// The part of the cache that holds one model repository; hf-hub names its folders.
#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
    folder: String,
    repo: hf_hub::CacheRepo,
}

impl Cache {
    pub(super) fn new(root: &Path, id: &str) -> Self {
        let repo = hf_hub::Repo::model(id.to_owned());
        Self {
            root: root.to_owned(),
            folder: repo.folder_name(),
            repo: hf_hub::Cache::new(root.to_owned()).repo(repo),
        }
    }

    /// The folder of this repository.
    pub(super) fn folder(&self) -> PathBuf {
        self.root.join(&self.folder)
    }

    /// The commit that `revision` named when it was last downloaded.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let file = self.folder().join("refs").join(revision);
        let commit = fs::read_to_string(file).ok()?.trim().to_owned();
        is_commit(&commit).then_some(commit)
    }

    /// The commit of the only snapshot that is here, for a cache whose `refs` are gone or never were written.
    pub(super) fn only_snapshot(&self) -> Option<String> {
        let entries = fs::read_dir(self.folder().join("snapshots")).ok()?;
        let commits = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut commits = commits.filter(|commit| is_commit(commit));
        let first = commits.next()?;
        commits.next().is_none().then_some(first)
    }

    /// Notes that `revision` names `commit`, so that it opens without network next time.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> io::Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let file = self.folder().join("refs").join(revision);
        let Some(parent) = file.parent() else {
            return Ok(());
        };
        fs::create_dir_all(parent)?;
        let temporary = tempfile::NamedTempFile::new_in(parent)?;
        fs::write(temporary.path(), commit)?;
        temporary.persist(file)?;
        Ok(())
    }

    /// The file `path` of `commit`, when it is here.
    pub(super) fn file(&self, commit: &str, path: &str) -> Option<PathBuf> {
        let file = self.snapshot(commit).join(path);
        file.is_file().then_some(file)
    }

    /// The paths of all files of `commit` that are here, sorted.
    pub(super) fn files(&self, commit: &str) -> Vec<String> {
        let mut found = Vec::new();
        list(&self.snapshot(commit), "", &mut found);
        found.sort();
        found
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo.pointer_path(commit)
    }

    /// Where the bytes with this entity tag are kept.
    pub(super) fn blob(&self, etag: &str) -> Result<PathBuf> {
        ensure!(
            !etag.is_empty()
                && etag
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)),
            "the hub sent the entity tag `{etag}`, which cannot name a file"
        );
        Ok(self.repo.blob_path(etag))
    }

    /// Shows the bytes with this entity tag as the file `path` of `commit`.
    pub(super) fn link(&self, commit: &str, path: &str, etag: &str) -> Result<PathBuf> {
        let pointer = self.snapshot(commit).join(path);
        let blob = self.blob(etag)?;
        let is_linked = || match (pointer.canonicalize(), blob.canonicalize()) {
            (Ok(pointer), Ok(blob)) => pointer == blob,
            _ => false,
        };
        if is_linked() {
            return Ok(pointer);
        }
        let place = || {
            if let Some(parent) = pointer.parent() {
                fs::create_dir_all(parent)?;
            }
            if fs::symlink_metadata(&pointer).is_ok() {
                fs::remove_file(&pointer)?; // an older or a broken link
            }
            match link_file(&blob, etag, path, &pointer) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_linked() => Ok(()),
                result => result,
            }
        };
        place().map_err(|error| failure::unwritable(&self.root, &error))?;
        Ok(pointer)
    }

    /// Waits until no other process downloads these bytes; `waiting` is called when there is one.
    pub(super) fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<File> {
        let file = self
            .root
            .join(".locks")
            .join(&self.folder)
            .join(format!("{etag}.lock"));
        let take = || {
            if let Some(parent) = file.parent() {
                fs::create_dir_all(parent)?;
            }
            let lock = File::create(&file)?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    waiting();
                    lock.lock()?;
                }
                // some network file systems have no locks: better to go on than to refuse
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
                Err(TryLockError::Error(error)) => return Err(error),
            }
            Ok(lock)
        };
        take().map_err(|error| failure::unwritable(&self.root, &error))
    }
}

/// Whether `revision` is a full commit hash, which never changes its meaning.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| c.is_ascii_hexdigit())
}

/// Whether `path` stays inside the folder it is joined to; a mirror might send anything.
pub(super) fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
}

/// Adds the files under `dir` to `found`; a link whose target is gone counts as missing.
fn list(dir: &Path, prefix: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = entry.path();
        if path.is_dir() {
            list(&path, &format!("{prefix}{name}/"), found);
        } else if path.is_file() {
            found.push(format!("{prefix}{name}"));
        }
    }
}

#[cfg(unix)]
fn link_file(_blob: &Path, etag: &str, path: &str, pointer: &Path) -> io::Result<()> {
    // relative, so that the cache can be moved: snapshots/COMMIT/a/b -> ../../../blobs/ETAG
    let up = "../".repeat(path.matches('/').count() + 2);
    std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), pointer)
}

#[cfg(not(unix))]
fn link_file(blob: &Path, _etag: &str, _path: &str, pointer: &Path) -> io::Result<()> {
    // symbolic links need a privilege on Windows
    fs::hard_link(blob, pointer).or_else(|_| fs::rename(blob, pointer))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), "o/n");
        (dir, cache)
    }

    #[test]
    fn a_linked_blob_is_found_under_its_path() {
        let (_dir, cache) = cache();
        let blob = cache.blob("etag").unwrap();
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(&blob, b"bytes").unwrap();
        for path in ["a", "b/c", "b/d/e"] {
            let file = cache.link(COMMIT, path, "etag").unwrap();
            assert_eq!(cache.file(COMMIT, path), Some(file.clone()));
            assert_eq!(fs::read(file).unwrap(), b"bytes");
        }
        assert_eq!(cache.files(COMMIT), ["a", "b/c", "b/d/e"]);
        fs::remove_file(blob).unwrap();
        assert_eq!(cache.files(COMMIT), Vec::<String>::new());
        assert_eq!(cache.file(COMMIT, "a"), None);
    }

    #[test]
    fn the_only_snapshot_is_found_without_refs() {
        let (_dir, cache) = cache();
        assert_eq!(cache.only_snapshot(), None);
        fs::create_dir_all(cache.folder().join("snapshots").join(COMMIT)).unwrap();
        assert_eq!(cache.only_snapshot().as_deref(), Some(COMMIT));
        fs::create_dir_all(cache.folder().join("snapshots").join("f".repeat(40))).unwrap();
        assert_eq!(cache.only_snapshot(), None);
    }

    #[test]
    fn a_revision_is_remembered_and_a_commit_is_itself() {
        let (_dir, cache) = cache();
        assert_eq!(cache.commit("refs/pr/1"), None);
        cache.set_commit("refs/pr/1", COMMIT).unwrap();
        assert_eq!(cache.commit("refs/pr/1").as_deref(), Some(COMMIT));
        assert_eq!(cache.commit(COMMIT).as_deref(), Some(COMMIT));
    }

    #[test]
    fn names_that_leave_the_cache_are_refused() {
        let (_dir, cache) = cache();
        for etag in ["", "../x", "a/b", "a.b"] {
            assert!(cache.blob(etag).is_err(), "{etag}");
        }
        for path in ["", "/etc/passwd", "../x", "a/../../x", "./a"] {
            assert!(!is_inside(path), "{path}");
        }
        assert!(is_inside("transformer/config.json"));
    }
}
