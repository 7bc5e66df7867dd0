//! The temporary files and folders of this process, so that Ctrl-C leaves none.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Temporary files and folders of this process, each with the output that it becomes.
static TEMPORARY: Mutex<Vec<(PathBuf, PathBuf)>> = Mutex::new(Vec::new());

/// Removes what this process has begun to write and not put in place, and lets nothing more be begun: the process is about
/// to exit.
pub(super) fn remove_temporaries() {
    let all = TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner);
    for (temporary, _) in &*all {
        // again if a file was added meanwhile
        for _ in 0..8 {
            if std::fs::remove_file(temporary).is_ok()
                || std::fs::remove_dir_all(temporary).is_ok()
                || !temporary.exists()
            {
                break;
            }
        }
    }
    // keep the lock forever: the process is about to exit and must not create new files
    std::mem::forget(all);
}

/// Makes something temporary that will become `target`; told to stop, the process removes it.
pub(super) fn begin<T>(
    target: &Path,
    make: impl FnOnce() -> std::io::Result<T>,
    path: impl FnOnce(&T) -> PathBuf,
) -> std::io::Result<T> {
    let mut all = TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|(old, _)| old.exists());
    let made = make()?;
    all.push((path(&made), target.to_path_buf()));
    Ok(made)
}

/// Temporary files are private to their owner by default; an output has the permissions any new one has.
pub(super) fn builder(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".fastflux-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(mode)); // less the umask
    }
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// The final name of `path`, which may lie in a temporary folder: the one to show in messages.
pub fn final_name(path: &Path) -> PathBuf {
    let all = TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner);
    let known = |(temporary, target): &(PathBuf, PathBuf)| {
        let rest = path.strip_prefix(temporary).ok()?;
        Some(target.join(rest))
    };
    all.iter()
        .rev()
        .find_map(known)
        .unwrap_or_else(|| path.to_path_buf())
}

/// Runs `work` while no signal can remove temporaries: for two renames of which neither may happen alone.
pub(super) fn without_interruption<T>(work: impl FnOnce() -> T) -> T {
    let _lock = TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner);
    work()
}
