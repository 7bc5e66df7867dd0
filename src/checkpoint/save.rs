//! Streamed, atomic writing: one tensor in memory at a time, a temporary sibling, then a rename.

use std::{
    borrow::Cow,
    collections::HashMap,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use safetensors::{Dtype, View};

use super::{Checkpoint, Source};

/// One tensor as the safetensors writer asks for it.
struct Lazy<'a>(&'a Source);

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        self.0.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // Only a dense tensor can fail here (copy from a device); an empty answer makes the writer's length check fail.
        self.0.bytes().unwrap_or_default()
    }

    fn data_len(&self) -> usize {
        self.0.byte_len()
    }
}

/// Writes a checkpoint with its metadata to `path`, which appears whole or not at all.
///
/// Peak memory is one tensor above the mapped input.
///
/// # Errors
/// When the folder is not writable or the disk is full; nothing is left behind.
pub fn write(checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    let file = sibling(path)?;
    let metadata: HashMap<String, String> = checkpoint.metadata.clone().into_iter().collect();
    let metadata = (!metadata.is_empty()).then_some(metadata);
    let tensors = checkpoint.iter().map(|(name, source)| (name, Lazy(source)));
    safetensors::serialize_to_file(tensors, metadata, file.path())
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    let expected: u64 = checkpoint.bytes() as u64;
    let written = std::fs::metadata(file.path())?.len();
    ensure!(
        written > expected,
        "cannot write `{}`: {written} of more than {expected} bytes arrived",
        path.display()
    );
    persist(file, path)
}

/// Writes a small file atomically.
///
/// # Errors
/// When the folder is not writable or the disk is full; nothing is left behind.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = sibling(path)?;
    file.write_all(bytes)
        .and_then(|()| file.flush())
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    persist(file, path)
}

fn sibling(path: &Path) -> Result<tempfile::NamedTempFile> {
    let folder = parent(path);
    tempfile::Builder::new()
        .prefix(".fastflux-")
        .tempfile_in(&folder)
        .with_context(|| format!("cannot write into `{}`", folder.display()))
}

fn persist(file: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    file.as_file()
        .sync_all()
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    make_readable(file.path())?;
    file.persist(path)
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(())
}

/// Temporary files are private to their owner; an output has the permissions any new file has.
fn make_readable(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))?;
    }
    #[cfg(not(unix))]
    let _ = path;
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
    staging: tempfile::TempDir,
}

impl OutputFolder {
    /// Starts an output folder at `target`.
    ///
    /// # Errors
    /// When `target` exists and `force` is off, or its parent is not writable.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        check_free(target, force)?;
        let folder = parent(target);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create `{}`", folder.display()))?;
        let staging = tempfile::Builder::new()
            .prefix(".fastflux-")
            .tempdir_in(&folder)
            .with_context(|| format!("cannot write into `{}`", folder.display()))?;
        Ok(Self {
            target: target.to_path_buf(),
            staging,
        })
    }

    /// Where to write the files of the folder for now.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Puts the folder in its place; what stood there (with `force`) goes away only now.
    ///
    /// # Errors
    /// When renaming fails; then `target` is as it was.
    pub fn finish(self) -> Result<()> {
        let context = || {
            format!(
                "cannot move the finished output to `{}`",
                self.target.display()
            )
        };
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(self.staging.path(), std::fs::Permissions::from_mode(0o755))
                .with_context(context)?;
        }
        let old = if self.target.exists() {
            let old = tempfile::Builder::new()
                .prefix(".fastflux-old-")
                .tempdir_in(parent(&self.target))?;
            std::fs::rename(&self.target, old.path().join("old")).with_context(context)?;
            Some(old)
        } else {
            None
        };
        let staged = self.staging.keep();
        if let Err(error) = std::fs::rename(&staged, &self.target) {
            if let Some(old) = old {
                let _ = std::fs::rename(old.path().join("old"), &self.target);
            }
            let _ = std::fs::remove_dir_all(&staged);
            return Err(error).with_context(|| {
                format!(
                    "cannot move the finished output to `{}`",
                    self.target.display()
                )
            });
        }
        Ok(())
    }
}

/// Fails when an output exists already and may not be overwritten.
///
/// # Errors
/// When `path` exists and `force` is off.
pub fn check_free(path: &Path, force: bool) -> Result<()> {
    if path.exists() && !force {
        bail!(
            "`{}` exists already\nhint: add --force to overwrite it, or choose another --output",
            path.display()
        );
    }
    Ok(())
}
