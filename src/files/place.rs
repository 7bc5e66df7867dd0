//! Puts a file of a model somewhere else: copied, or as a hard link.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::{Files, Root};

impl Files {
    /// Puts the file `path` at `target`, which is not there yet. With `link` as a hard link, where the file system has them
    /// and both lie on one.
    ///
    /// # Errors
    /// When the file is missing or cannot be fetched, or `target` cannot be written.
    pub fn place(&self, path: &str, target: &Path, link: bool) -> Result<()> {
        let full = format!("{}{path}", self.prefix);
        let context = || {
            format!(
                "cannot write `{}`",
                super::output::final_name(target).display()
            )
        };
        let source = match &self.root {
            Root::Bundled => None,
            Root::Folder(folder) => Some(folder.join(&full)),
            #[cfg(feature = "hub")]
            Root::Hub(repo) => Some(repo.get(&full)?.ok_or_else(|| self.missing(path))?),
        };
        let Some(source) = source else {
            return fs::write(target, &*self.read(path)?).with_context(context);
        };
        // a link to a link would be one to a name in the hub's cache
        let source = source
            .canonicalize()
            .with_context(|| format!("cannot read `{}`", self.describe(path)))?;
        if link && fs::hard_link(&source, target).is_ok() {
            return Ok(());
        }
        fs::copy(&source, target).map(drop).with_context(context)
    }

    /// Bytes of the file `path`, which is fetched for it; 0 if it is not there.
    ///
    /// # Errors
    /// When it cannot be read or fetched.
    pub fn size(&self, path: &str) -> Result<u64> {
        Ok(self.get(path)?.map_or(0, |blob| blob.len() as u64))
    }
}
