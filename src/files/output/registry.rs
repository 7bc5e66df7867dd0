//! The temporary files and folders of this process, so that Ctrl-C leaves none.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Temporary files and folders of this process, each with the output that it becomes.
static TEMPORARY: Mutex<Vec<(PathBuf, PathBuf)>> = Mutex::new(Vec::new());

/// How names of temporaries begin.
const PREFIX: &str = ".fastflux-";
/// Letters and digits that follow, drawn at random: so many that no name which a person chose is taken for one.
const RANDOM: usize = 16;

/// Whether a file or folder of this name is a temporary of some run.
pub fn is_temporary(name: &str) -> bool {
    let random = name.strip_prefix(PREFIX);
    random.is_some_and(|random| {
        random.len() == RANDOM && random.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

/// Outputs that were not there when they were checked and may not be overwritten.
static TO_BE_NEW: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// What the user should know about outputs, until [`take_notes`] is asked.
static NOTES: Mutex<Vec<String>> = Mutex::new(Vec::new());

pub(super) fn note(text: String) {
    NOTES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(text);
}

/// What the user should know about outputs: temporaries of killed runs that were removed.
pub fn take_notes() -> Vec<String> {
    std::mem::take(&mut *NOTES.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Files and folders that a run which was stopped goes on from.
static RESUMED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Notes that the same command goes on from `path`, if it is there when the process is stopped.
pub fn resumes_from(path: &Path) {
    let mut all = RESUMED.lock().unwrap_or_else(PoisonError::into_inner);
    if !all.iter().any(|known| known == path) {
        all.push(path.to_path_buf());
    }
}

/// Where unfinished work lies; never waited for, as the process is stopped.
pub(super) fn unfinished() -> Option<PathBuf> {
    let all = RESUMED.try_lock().ok()?;
    all.iter().find(|path| path.exists()).cloned()
}

/// Lock files of this process, each in a folder of its own.
static LOCKS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Notes that the lock file `path` goes when the process is stopped, and its folder if nothing else is in it.
pub fn goes_when_stopped(path: &Path) {
    let mut all = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    all.push(path.to_path_buf());
}

/// Removes the lock files; never waits, as the process is stopped.
pub(super) fn remove_locks() {
    let Ok(all) = LOCKS.try_lock() else { return };
    for path in &*all {
        let _ = std::fs::remove_file(path);
        let _ = path.parent().map(std::fs::remove_dir);
    }
}

/// Notes that nothing is at `path`, and that nothing may be replaced there; or, with `force`, that it may.
pub(super) fn expect_new(path: &Path, force: bool) {
    let mut all = TO_BE_NEW.lock().unwrap_or_else(PoisonError::into_inner);
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    all.retain(|other| *other != path);
    if !force {
        all.push(path);
    }
}

/// Whether nothing may be replaced at `path`.
pub(super) fn is_to_be_new(path: &Path) -> bool {
    let all = TO_BE_NEW.lock().unwrap_or_else(PoisonError::into_inner);
    std::path::absolute(path).is_ok_and(|path| all.contains(&path))
}

/// Notes that this process has written `path`, and may do so again.
pub(super) fn is_written(path: &Path) {
    expect_new(path, true);
}

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
    builder.prefix(PREFIX).rand_bytes(RANDOM);
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
