//! Streamed, atomic writing: a part of one tensor in memory at a time, a temporary sibling, then a rename.

use std::{
    collections::BTreeMap,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::{Checkpoint, Source, gguf_write, scales};
use crate::formats::Packed;

/// Writes a checkpoint with its metadata to `path`, which appears whole or not at all.
///
/// Peak memory is a few megabytes above the mapped input, whatever the size of the tensors.
///
/// # Errors
/// When the folder is not writable or the disk is full; nothing is left behind.
pub fn write(checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    write_with(checkpoint, path, &mut |_| ())
}

/// As [`write()`]; `written` is told the bytes of each tensor that is done.
///
/// # Errors
/// As [`write()`].
pub fn write_with(
    checkpoint: &Checkpoint,
    path: &Path,
    written: &mut dyn FnMut(usize),
) -> Result<()> {
    let mut file = sibling(path)?;
    stream(checkpoint, file.as_file_mut(), written)
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    persist(file, path)
}

/// As [`write_with()`], in GGUF, for a checkpoint whose matrices are mostly in the format `main`.
///
/// # Errors
/// As [`write()`], and when a tensor is in a format that GGUF has not.
pub fn write_gguf(
    checkpoint: &Checkpoint,
    main: Packed,
    path: &Path,
    written: &mut dyn FnMut(usize),
) -> Result<()> {
    let mut file = sibling(path)?;
    gguf_write::write(checkpoint, main, file.as_file_mut(), written)
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    persist(file, path)
}

/// As [`write()`], through a temporary sibling of a fixed name: a run that is killed while it saves leaves at most that
/// one file, which the next save takes over. For files that one run writes again and again.
///
/// # Errors
/// As [`write()`].
pub fn write_again(checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = PathBuf::from(name);
    let context = || format!("cannot write `{}`", path.display());
    let written = std::fs::File::create(&temporary)
        .map_err(anyhow::Error::from)
        .and_then(|mut file| {
            stream(checkpoint, &mut file, &mut |_| ())?;
            Ok(file.sync_all()?)
        })
        .and_then(|()| Ok(std::fs::rename(&temporary, path)?));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.with_context(context)
}

/// The tensors as a safetensors file holds them: wide number formats first (so that all are aligned), then by name.
///
/// The order is that of the safetensors library, so a file that it wrote comes out as it went in.
fn in_file_order(checkpoint: &Checkpoint) -> Vec<(&str, &Source)> {
    let mut tensors: Vec<_> = checkpoint.iter().collect();
    tensors.sort_by(|(a, left), (b, right)| {
        let order = right.format().dtype().cmp(&left.format().dtype());
        order.then(a.cmp(b))
    });
    tensors
}

fn header(metadata: &BTreeMap<String, String>, tensors: &[(&str, &Source)]) -> Result<Vec<u8>> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut at = 0;
    for (name, source) in tensors {
        let end = at + source.byte_len();
        let format = source.format();
        let dtype = format
            .dtype()
            .with_context(|| format!("tensor `{name}`: safetensors has no {format}"))?;
        let entry = json!({ "dtype": dtype, "shape": source.shape(), "data_offsets": [at, end] });
        header.insert((*name).to_owned(), entry);
        at = end;
    }
    let mut bytes = serde_json::to_vec(&Value::Object(header))?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

fn stream(
    checkpoint: &Checkpoint,
    file: &mut std::fs::File,
    written: &mut dyn FnMut(usize),
) -> Result<()> {
    let checkpoint = &scales::detached(checkpoint)?;
    let tensors = in_file_order(checkpoint);
    let header = header(&checkpoint.metadata, &tensors)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (name, source) in tensors {
        source
            .write_to(&mut out)
            .with_context(|| format!("tensor `{name}`"))?;
        written(source.byte_len());
    }
    out.flush()?;
    let expected = (8 + header.len() + checkpoint.bytes()) as u64;
    let arrived = out.get_ref().metadata()?.len();
    ensure!(arrived == expected, "{arrived} of {expected} bytes arrived");
    Ok(())
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

/// Fails when nothing could be written at `path`, without leaving anything there: to be asked before long work.
///
/// # Errors
/// When the nearest folder above `path` that exists is not writable, or is no folder.
pub fn check_writable(path: &Path) -> Result<()> {
    let mut folder = parent(path);
    while !folder.exists() {
        folder = parent(&folder);
    }
    tempfile::Builder::new()
        .prefix(".fastflux-")
        .tempdir_in(&folder)
        .map(drop)
        .with_context(|| format!("cannot write into `{}`", folder.display()))
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
