//! Writing outputs: a file or folder is written under a temporary name next to its place and renamed when it is whole.
//! Every writer of the crate goes through here, so that an interrupted run leaves nothing.

mod check;
mod marker;
mod registry;
#[cfg(unix)]
mod signals;

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use tempfile::TempDir;

pub use check::{check_file, check_folder, check_other, check_writable};
pub use registry::final_name;
use registry::{begin, builder, without_interruption};
#[cfg(unix)]
pub use signals::install_signal_handlers;

/// Writes the file `path` atomically: `fill` writes a temporary sibling, which is then renamed.
///
/// # Errors
/// When the folder is not writable, the disk is full, or `fill` fails; nothing is left behind.
pub fn write(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let folder = parent(path);
    let make = || builder(0o666).tempfile_in(&folder);
    let mut file = begin(path, make, |file| file.path().to_path_buf())
        .with_context(|| format!("cannot write into `{}`", final_name(&folder).display()))?;
    let context = || format!("cannot write `{}`", final_name(path).display());
    fill(file.as_file_mut()).with_context(context)?;
    file.as_file().sync_all().with_context(context)?;
    file.persist(path)
        .map_err(|e| e.error)
        .with_context(context)?;
    Ok(())
}

/// As [`write()`], through a temporary sibling of a fixed name: a run that is killed while it saves leaves at most that
/// one file, which the next save takes over. For files that one run writes again and again.
///
/// # Errors
/// As [`write()`].
pub fn rewrite(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = PathBuf::from(name);
    let make = || File::create(&temporary);
    let written = begin(path, make, |_| temporary.clone())
        .map_err(anyhow::Error::from)
        .and_then(|mut file| {
            fill(&mut file)?;
            file.sync_all()?;
            Ok(std::fs::rename(&temporary, path)?)
        });
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write `{}`", path.display()))
}

/// Writes a small file atomically.
///
/// # Errors
/// As [`write()`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, |file| Ok(file.write_all(bytes)?))
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// An output folder that appears whole or not at all: files go into a hidden sibling, which is renamed at the end.
#[derive(Debug)]
pub struct OutputFolder {
    target: PathBuf,
    staging: TempDir,
}

impl OutputFolder {
    /// Starts an output folder at `target`.
    ///
    /// # Errors
    /// As [`check_folder`], and when the parent of `target` is not writable.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        check_folder(target, force)?;
        let target = std::path::absolute(target)
            .with_context(|| format!("cannot resolve `{}`", target.display()))?;
        let folder = parent(&target);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create `{}`", folder.display()))?;
        let make = || builder(0o777).tempdir_in(&folder);
        let staging = begin(&target, make, |staging| staging.path().to_path_buf())
            .with_context(|| format!("cannot write into `{}`", folder.display()))?;
        Ok(Self { target, staging })
    }

    /// Where to write the files of the folder for now.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Puts the folder in its place; what stood there (with `force`) goes away only now.
    ///
    /// # Errors
    /// When renaming fails; then `target` is as it was, or the message says where its content is.
    pub fn finish(self) -> Result<()> {
        let target = &self.target;
        let context = || format!("cannot move the finished output to `{}`", target.display());
        marker::write(self.staging.path()).with_context(context)?;
        if !target.exists() {
            std::fs::rename(self.staging.path(), target).with_context(context)?;
            let _ = self.staging.keep(); // it is elsewhere by now
            return Ok(());
        }
        check_folder(target, true)?;
        let aside = tempfile::Builder::new()
            .prefix(".fastflux-old-")
            .tempdir_in(parent(target))
            .with_context(context)?;
        let old = aside.path().join("old");
        let swap = || -> std::io::Result<Result<(), std::io::Error>> {
            std::fs::rename(target, &old)?;
            Ok(
                std::fs::rename(self.staging.path(), target).inspect_err(|_| {
                    let _ = std::fs::rename(&old, target);
                }),
            )
        };
        // interrupted between the two renames, the process would leave neither folder
        if let Err(error) = without_interruption(swap).with_context(context)? {
            let error = anyhow::Error::new(error).context(context());
            if old.exists() {
                let kept = aside.keep().join("old");
                return Err(error.context(format!(
                    "what stood at `{}` is in `{}` now",
                    target.display(),
                    kept.display()
                )));
            }
            return Err(error);
        }
        let _ = self.staging.keep();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_meanwhile_is_not_replaced() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("out");
        let folder = OutputFolder::create(&path, false).unwrap();
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("thesis.txt"), "mine").unwrap();
        let error = format!("{:#}", folder.finish().unwrap_err());
        assert!(error.contains("thesis.txt"), "{error}");
        assert!(path.join("thesis.txt").is_file());
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("a");
        for write in [
            |path: &Path| write(path, |_| anyhow::bail!("half")),
            |path: &Path| rewrite(path, |_| anyhow::bail!("half")),
        ] {
            assert!(write(&path).is_err());
            assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn temporary_names_are_not_shown() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("out");
        let folder = OutputFolder::create(&path, false).unwrap();
        assert_eq!(final_name(&folder.path().join("a/b")), path.join("a/b"));
        assert_eq!(final_name(work.path()), work.path());
    }
}
