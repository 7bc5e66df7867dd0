//! Where outputs go: what may be written over, temporary siblings, folders that appear whole. Nothing of their contents.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};
use tempfile::{NamedTempFile, TempDir};

use crate::files;

/// What fastflux writes into output folders. A folder that holds anything else is never replaced.
const OURS: [&str; 17] = [
    "before-after.png",
    "config.json",
    "fastflux_flux.py",
    "flux.gguf",
    "flux.safetensors",
    "lora.safetensors",
    "loss.svg",
    "pictures.png",
    "plan.json",
    "report.html",
    "report.json",
    "sandwich.safetensors",
    "scores.json",
    "scores.svg",
    "train.jsonl",
    "training.json",
    "transformer",
];

/// Temporary files and folders of this process, each with the output that it becomes.
static TEMPORARY: Mutex<Vec<(PathBuf, PathBuf)>> = Mutex::new(Vec::new());

/// Removes what this process has begun to write and not put in place: for the moment it is told to stop.
pub fn remove_temporaries() {
    let all = TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner);
    for (temporary, _) in &*all {
        // again where a file came meanwhile
        for _ in 0..8 {
            if std::fs::remove_file(temporary).is_ok()
                || std::fs::remove_dir_all(temporary).is_ok()
                || !temporary.exists()
            {
                break;
            }
        }
    }
    // for good, as the process ends: nothing more is begun or put in place
    std::mem::forget(all);
}

/// Makes something temporary that will become `target`; told to stop, the process removes it.
fn begin<T>(
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
fn builder(mode: u32) -> tempfile::Builder<'static, 'static> {
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

/// The name that people know a file by which is for now in a temporary folder.
pub(super) fn known_as(path: &Path) -> PathBuf {
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

/// A file that will be renamed to `path`.
pub(super) fn sibling(path: &Path) -> Result<NamedTempFile> {
    let folder = parent(path);
    let make = || builder(0o666).tempfile_in(&folder);
    begin(path, make, |file| file.path().to_path_buf())
        .with_context(|| format!("cannot write into `{}`", known_as(&folder).display()))
}

/// Puts a written file in its place.
pub(super) fn persist(file: NamedTempFile, path: &Path) -> Result<()> {
    let context = || format!("cannot write `{}`", known_as(path).display());
    file.as_file().sync_all().with_context(context)?;
    file.persist(path)
        .map_err(|e| e.error)
        .with_context(context)?;
    Ok(())
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
        // told to stop between the two, the process would leave neither
        let _both = TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner);
        std::fs::rename(target, &old).with_context(context)?;
        if let Err(error) = std::fs::rename(self.staging.path(), target) {
            let error = anyhow::Error::new(error).context(context());
            if std::fs::rename(&old, target).is_err() {
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

/// Fails when nothing could be written at `path`, or when it is or holds a file that this process reads, without leaving
/// anything there: to be asked before long work and after inputs are opened.
///
/// # Errors
/// When the nearest folder above `path` that exists is not writable or is no folder, or an input would be lost.
pub fn check_writable(path: &Path) -> Result<()> {
    check_apart(path)?;
    let folder = nearest(path)?;
    tempfile::Builder::new()
        .prefix(".fastflux-")
        .tempdir_in(&folder)
        .map(drop)
        .with_context(|| format!("cannot write into `{}`", folder.display()))
}

/// The nearest folder above `path` that exists.
fn nearest(path: &Path) -> Result<PathBuf> {
    let mut folder = parent(path);
    while std::fs::symlink_metadata(&folder).is_err() {
        folder = parent(&folder);
    }
    ensure!(
        folder.is_dir(),
        "`{}` is not a folder: `{}` cannot be written\nhint: choose another place",
        folder.display(),
        path.display()
    );
    Ok(folder)
}

/// Fails when an output would replace a file that this process reads.
fn check_apart(output: &Path) -> Result<()> {
    if let Some(input) = files::mapped_below(output) {
        bail!(
            "`{}` would replace `{}`, which this command reads\nhint: choose another place",
            output.display(),
            input.display()
        );
    }
    Ok(())
}

/// Fails when an output file would replace one of these inputs.
///
/// # Errors
/// When `output` is the same file as one of them.
pub fn check_other(output: &Path, inputs: &[Option<&Path>]) -> Result<()> {
    let Ok(real) = output.canonicalize() else {
        return Ok(()); // not there yet
    };
    for input in inputs.iter().flatten() {
        ensure!(
            input.canonicalize().ok().as_ref() != Some(&real),
            "`{}` is read by this command and would be replaced\nhint: choose another --output",
            output.display()
        );
    }
    Ok(())
}

/// Fails when `path` cannot become an output file: it exists and may not be overwritten (`force`), or it is a folder, a
/// device, or below something that is no folder.
///
/// # Errors
/// See above; the message says what to do.
pub fn check_file(path: &Path, force: bool) -> Result<()> {
    let slash = path.as_os_str().to_string_lossy().ends_with(['/', '\\']);
    ensure!(
        path.file_name().is_some() && !slash && !path.is_dir(),
        "`{}` is a folder\nhint: name a file in it",
        path.display()
    );
    nearest(path)?;
    match std::fs::metadata(path) {
        Ok(meta) if !meta.is_file() => bail!(
            "`{}` is not a file that can be replaced\nhint: choose another --output",
            path.display()
        ),
        _ => check_absent(path, force),
    }
}

/// Fails when `path` cannot become an output folder: it exists and may not be replaced (`force`), is no folder, or holds
/// what fastflux did not write.
///
/// # Errors
/// See above; the message says what to do.
pub fn check_folder(path: &Path, force: bool) -> Result<()> {
    nearest(path)?;
    let shown = path.display();
    if std::fs::symlink_metadata(path).is_err() {
        return Ok(());
    }
    check_absent(path, force)?;
    ensure!(
        path.is_dir(),
        "`{shown}` is not a folder\nhint: remove it, or choose another --output"
    );
    check_apart(path)?;
    let real = path
        .canonicalize()
        .with_context(|| format!("cannot resolve `{shown}`"))?;
    let here = std::env::current_dir().context("the current folder is gone")?;
    ensure!(
        !here.starts_with(&real),
        "`{shown}` is the folder this command runs in, or above it\nhint: choose another --output"
    );
    let entries = std::fs::read_dir(path).with_context(|| format!("cannot read `{shown}`"))?;
    for entry in entries {
        let name = entry
            .with_context(|| format!("cannot read `{shown}`"))?
            .file_name();
        ensure!(
            OURS.iter().any(|ours| name == *ours),
            "`{shown}` holds `{}`, which fastflux did not write, so --force does not replace it\nhint: choose another --output, or remove the folder yourself",
            name.to_string_lossy()
        );
    }
    Ok(())
}

fn check_absent(path: &Path, force: bool) -> Result<()> {
    ensure!(
        force || std::fs::symlink_metadata(path).is_err(),
        "`{}` exists already\nhint: add --force to overwrite it, or choose another --output",
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Blob;

    fn says<T>(result: Result<T>, part: &str) {
        let error = result.err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }

    #[test]
    fn a_folder_is_replaced_only_when_all_of_it_is_ours() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("out");
        let write = |name: &str| {
            let folder = OutputFolder::create(&path, true)?;
            std::fs::write(folder.path().join(name), "x")?;
            folder.finish()
        };
        write("plan.json").unwrap();
        says(OutputFolder::create(&path, false), "--force");
        write("report.json").unwrap();
        assert!(path.join("report.json").is_file() && !path.join("plan.json").exists());
        std::fs::write(path.join("thesis.txt"), "mine").unwrap();
        says(write("plan.json"), "thesis.txt");
        assert!(path.join("thesis.txt").is_file() && path.join("report.json").is_file());
        assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 1);
        says(check_folder(Path::new("."), true), "runs in");
        says(check_folder(&path.join("thesis.txt"), true), "not a folder");
        says(
            check_folder(&path.join("thesis.txt/x"), false),
            "not a folder",
        );
    }

    #[test]
    fn what_came_meanwhile_is_not_replaced() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("out");
        let folder = OutputFolder::create(&path, false).unwrap();
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("thesis.txt"), "mine").unwrap();
        says(folder.finish(), "thesis.txt");
        assert!(path.join("thesis.txt").is_file());
    }

    #[test]
    fn inputs_are_not_replaced() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("flux.safetensors");
        std::fs::write(&path, "weights").unwrap();
        check_writable(&path).unwrap();
        check_folder(work.path(), true).unwrap();
        let blob = Blob::map(&path).unwrap();
        says(check_writable(&path), "reads");
        says(check_folder(work.path(), true), "reads");
        says(
            check_other(&path, &[None, Some(Path::new("no")), Some(&path)]),
            "read",
        );
        drop(blob);
        check_folder(work.path(), true).unwrap();
    }

    #[test]
    fn files_replace_files_only() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("a");
        check_file(&path, false).unwrap();
        std::fs::write(&path, "x").unwrap();
        says(check_file(&path, false), "--force");
        check_file(&path, true).unwrap();
        says(check_file(work.path(), true), "is a folder");
        says(check_file(&work.path().join("new/"), true), "is a folder");
        says(check_file(&path.join("b"), false), "not a folder");
        #[cfg(unix)]
        {
            says(check_file(Path::new("/dev/null"), true), "not a file");
            std::os::unix::fs::symlink("nowhere", work.path().join("link")).unwrap();
            says(
                check_folder(&work.path().join("link"), true),
                "not a folder",
            );
        }
    }

    #[test]
    fn temporary_names_are_not_shown() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("out");
        let folder = OutputFolder::create(&path, false).unwrap();
        assert_eq!(known_as(&folder.path().join("a/b")), path.join("a/b"));
        assert_eq!(known_as(work.path()), work.path());
    }
}
