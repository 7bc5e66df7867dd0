//! What an output may replace: never an input, a device, or a file that fastflux did not write.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::{
    marker, parent,
    registry::{builder, expect_new},
};
use crate::{files, ui};

/// Fails when nothing could be written at `path`, or when it is or holds a file that this process reads, without leaving
/// anything there: to be asked before long work and after inputs are opened.
///
/// # Errors
/// When the nearest folder above `path` that exists is not writable or is no folder, or an input would be lost.
pub fn check_writable(path: &Path) -> Result<()> {
    check_apart(path)?;
    let folder = nearest(path)?;
    builder(0o777)
        .tempdir_in(&folder)
        .map(drop)
        .with_context(|| format!("cannot write into `{}`", folder.display()))
}

/// Free bytes on the disk that `path` will be on; `None` if unknown.
pub fn free_space(path: &Path) -> Option<u64> {
    files::free_space(&nearest(path).ok()?)
}

/// Fails when the disk that `path` will be on has less room than `bytes`: to be asked before long work.
///
/// # Errors
/// The message says how much there is.
pub fn check_space(path: &Path, bytes: u64) -> Result<()> {
    let Some(free) = free_space(path).filter(|free| *free < bytes) else {
        return Ok(());
    };
    bail!(
        "`{}` takes {}, and {} are free on its disk\nhint: free some space, or choose another --output",
        path.display(),
        ui::bytes(bytes as f64),
        ui::bytes(free as f64)
    )
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
        _ => {
            check_new(path, force)?;
            expect_new(path, force);
            Ok(())
        }
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
    check_new(path, force)?;
    ensure!(
        path.is_dir(),
        "`{shown}` is not a folder\nhint: remove it, or choose another --output"
    );
    let real = path
        .canonicalize()
        .with_context(|| format!("cannot resolve `{shown}`"))?;
    let here = std::env::current_dir().context("the current folder is gone")?;
    ensure!(
        !here.starts_with(&real),
        "`{shown}` is the folder this command runs in, or above it\nhint: choose another --output"
    );
    check_apart(path)?;
    if let Some(stranger) =
        marker::stranger(path).with_context(|| format!("cannot read `{shown}`"))?
    {
        bail!(
            "`{shown}` holds `{}`, which fastflux did not write, so --force does not replace it\nhint: choose another --output, or remove the folder yourself",
            stranger.display()
        );
    }
    Ok(())
}

fn check_new(path: &Path, force: bool) -> Result<()> {
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
    use crate::files::{Blob, output::OutputFolder};

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
    fn inputs_are_not_replaced() {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("flux.safetensors");
        std::fs::write(&path, "weights").unwrap();
        check_writable(&path).unwrap();
        check_space(&path, 1).unwrap();
        #[cfg(unix)]
        says(check_space(&path, u64::MAX), "are free on its disk");
        marker::write(work.path()).unwrap();
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
}
