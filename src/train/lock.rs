//! One run at a time in a state's folder.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::files::output;

/// The file that keeps other runs out.
const LOCK: &str = "lock";

/// Keeps other runs out of a state's folder as long as it lives; then it takes its file away, and the folder if it is empty.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: std::fs::File,
}

impl Lock {
    /// In `folder`, which is made if it is missing; `None` for a dry run, which writes nothing.
    ///
    /// # Errors
    /// When another run works in it, or it cannot be written.
    pub fn new(folder: &Path, dry_run: bool) -> Result<Option<Self>> {
        if dry_run {
            return Ok(None);
        }
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create `{}`", folder.display()))?;
        let path = folder.join(LOCK);
        let file = output::lock(&path, "is training into this output")?;
        output::goes_when_stopped(&path);
        Ok(Some(Self { path, _file: file }))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        if let Some(folder) = self.path.parent() {
            let _ = std::fs::remove_dir(folder); // only if nothing else is in it
        }
    }
}
