//! Writing outputs: a file or folder is written under a temporary name next to its place and renamed when it is whole.
//! Every writer of the crate goes through here, so that an interrupted run leaves nothing.

mod check;
mod leftovers;
mod marker;
mod registry;
#[cfg(unix)]
mod signals;

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

pub use check::{check_file, check_folder, check_other, check_space, check_writable, free_space};
pub use leftovers::lock;
use registry::{begin, builder, is_to_be_new, is_written, without_interruption};
pub use registry::{final_name, goes_when_stopped, is_temporary, resumes_from, take_notes};
#[cfg(unix)]
pub use signals::install_signal_handlers;

/// Writes the file `path` atomically: `fill` writes a temporary sibling, which is then renamed. A file that was not there
/// when [`check_file`] looked, and appeared since, is not replaced: what was written stays next to it.
///
/// # Errors
/// When the folder is not writable, the disk is full, `fill` fails (then nothing is left behind), or another file has
/// appeared at `path`.
pub fn write(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let folder = parent(path);
    leftovers::remove(&folder);
    let make = || builder(0o666).tempfile_in(&folder);
    let mut file = begin(path, make, |file| file.path().to_path_buf())
        .with_context(|| format!("cannot write into `{}`", final_name(&folder).display()))?;
    leftovers::mark(file.as_file());
    let context = || format!("cannot write `{}`", final_name(path).display());
    fill(file.as_file_mut()).with_context(context)?;
    file.as_file().sync_all().with_context(context)?;
    if !is_to_be_new(path) {
        file.persist(path)
            .map_err(|e| e.error)
            .with_context(context)?;
        return Ok(());
    }
    let Err(error) = file.persist_noclobber(path) else {
        is_written(path);
        return Ok(());
    };
    if error.error.kind() != std::io::ErrorKind::AlreadyExists {
        return Err(error.error).with_context(context);
    }
    let spare = spare_name(path);
    error
        .file
        .persist_noclobber(&spare)
        .map_err(|e| e.error)
        .with_context(context)?;
    bail!(
        "`{}` appeared while this command ran and is not replaced\nhint: what it wrote is in `{}`; two runs at once need two outputs",
        path.display(),
        spare.display()
    )
}

/// A name next to `path` that is free.
fn spare_name(path: &Path) -> PathBuf {
    let name = |n: usize| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    };
    let is_free = |path: &PathBuf| std::fs::symlink_metadata(path).is_err();
    (2..10_000)
        .map(name)
        .find(is_free)
        .unwrap_or_else(|| name(1))
}

/// Renames if nothing is at `to`; whether it has.
fn rename_new(from: &Path, to: &Path) -> std::io::Result<bool> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::EXIST) => return Ok(false),
            // a file system that cannot do so
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if std::fs::symlink_metadata(to).is_ok() {
        return Ok(false);
    }
    std::fs::rename(from, to).map(|()| true)
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
    /// Whether what is there may be replaced.
    force: bool,
    /// Held while the folder is filled: without it another run may take it away.
    _mark: Option<File>,
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
        leftovers::remove(&folder);
        let make = || builder(0o777).tempdir_in(&folder);
        let staging = begin(&target, make, |staging| staging.path().to_path_buf())
            .with_context(|| format!("cannot write into `{}`", folder.display()))?;
        let mark = leftovers::mark_folder(staging.path());
        Ok(Self {
            target,
            staging,
            force,
            _mark: mark,
        })
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
        let free = std::fs::symlink_metadata(target).is_err();
        if free && rename_new(self.staging.path(), target).with_context(context)? {
            let _ = self.staging.keep(); // it is elsewhere by now
            return Ok(());
        }
        if !self.force {
            let spare = spare_name(target);
            rename_new(self.staging.path(), &spare).with_context(context)?;
            let _ = self.staging.keep();
            bail!(
                "`{}` appeared while this command ran and is not replaced\nhint: what it wrote is in `{}`; two runs at once need two outputs",
                target.display(),
                spare.display()
            );
        }
        check_folder(target, true)?;
        let aside = builder(0o777)
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
        for force in [true, false] {
            let folder = OutputFolder::create(&path, force).unwrap();
            std::fs::write(folder.path().join("plan.json"), "x").unwrap();
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("thesis.txt"), "mine").unwrap();
            let error = format!("{:#}", folder.finish().unwrap_err());
            let word = if force { "thesis.txt" } else { "out.2" };
            assert!(error.contains(word), "{error}");
            assert!(path.join("thesis.txt").is_file());
            assert_eq!(work.path().join("out.2/plan.json").is_file(), !force);
            std::fs::remove_dir_all(&path).unwrap();
        }
        let path = work.path().join("a.json");
        check_file(&path, false).unwrap();
        std::fs::write(&path, "mine").unwrap();
        let error = write_bytes(&path, b"ours").unwrap_err().to_string();
        assert!(error.contains("a.json.2"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        assert_eq!(
            std::fs::read(work.path().join("a.json.2")).unwrap(),
            b"ours"
        );
        // a file of this run is replaced as often as it writes it
        let path = work.path().join("b.json");
        check_file(&path, false).unwrap();
        write_bytes(&path, b"1").unwrap();
        write_bytes(&path, b"2").unwrap();
        check_file(&path, true).unwrap();
        write_bytes(&path, b"3").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"3");
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("a");
        assert!(write(&path, |_| anyhow::bail!("half")).is_err());
        assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_run_left_is_taken_away_and_what_another_writes_is_not() {
        let work = tempfile::tempdir().unwrap();
        let live = ".fastflux-aB3aB3aB3aB3live";
        for name in [
            ".fastflux-aB3aB3aB3aB3dead",
            live,
            ".fastflux-backup",
            ".fastflux.json",
            "thesis",
        ] {
            std::fs::write(work.path().join(name), "x").unwrap();
        }
        for name in [".fastflux-aB3aB3aB3aB3fold", ".fastflux-my-notes-of-2026"] {
            std::fs::create_dir(work.path().join(name)).unwrap();
        }
        let of_live = File::open(work.path().join(live)).unwrap();
        leftovers::mark(&of_live);
        write_bytes(&work.path().join("a"), b"x").unwrap();
        let mut left: Vec<_> = std::fs::read_dir(work.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        let kept = [
            live,
            ".fastflux-backup",
            ".fastflux-my-notes-of-2026",
            ".fastflux.json",
            "a",
            "thesis",
        ];
        assert_eq!(left, kept);
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
