//! Temporaries that killed runs left: known by their names, and by that nobody holds their lock.

use std::{
    fs::{File, TryLockError},
    path::Path,
};

use anyhow::{Context, Result, bail};

use super::registry::{self, is_temporary};
use crate::ui;

/// Marks a temporary file as one that is being written, as long as it is open.
pub(super) fn mark(file: &File) {
    // a file system without locks has no marks, and nothing is taken away there
    let _ = file.try_lock_shared();
}

/// The same of a folder, as long as what is given back lives.
pub(super) fn mark_folder(folder: &Path) -> Option<File> {
    let folder = File::open(folder).ok()?;
    mark(&folder);
    Some(folder)
}

/// Takes temporaries away that no run holds, and says so.
pub(super) fn remove(folder: &Path) {
    let (mut count, mut bytes) = (0, 0);
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if !is_temporary(&entry.file_name().to_string_lossy()) {
            continue;
        }
        let (path, Ok(kind)) = (entry.path(), entry.file_type()) else {
            continue;
        };
        let free = || File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
        // neither links nor pipes: opening one may wait for ever
        if !(kind.is_file() || kind.is_dir()) || !free() {
            continue;
        }
        let size = entry.metadata().map_or(0, |meta| meta.len());
        let removed = if kind.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        if removed.is_ok() {
            count += 1;
            bytes += if kind.is_file() { size } else { 0 };
        }
    }
    if count > 0 {
        registry::note(format!(
            "removed what a killed run left in `{}`: {}, {}",
            folder.display(),
            ui::counted(count, "temporary file or folder"),
            ui::bytes(bytes as f64)
        ));
    }
}

/// Keeps other runs out of what the lock file `path` stands for, as long as what is given back lives.
///
/// # Errors
/// When another run holds it; `what` says what that run does.
pub fn lock(path: &Path, what: &str) -> Result<File> {
    let name = path.display();
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot write `{name}`"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "another run {what} (it holds `{name}`)\nhint: wait for it, or choose another --output"
        ),
        // some network file systems have no locks: better to go on than to refuse
        Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {
            Ok(file)
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock `{name}`"))
        }
    }
}
