//! A model repository on the Hugging Face hub, through hf-hub and its shared cache.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// One repository at one revision.
#[derive(Debug)]
pub(super) struct Repo {
    id: String,
    revision: Option<String>,
}

impl Repo {
    pub(super) fn open(id: &str, revision: Option<&str>) -> Result<Self> {
        let repo = Self {
            id: id.to_owned(),
            revision: revision.map(str::to_owned),
        };
        bail!("cannot open `{}`", repo.name())
    }

    pub(super) fn name(&self) -> String {
        match &self.revision {
            Some(revision) => format!("{}@{revision}", self.id),
            None => self.id.clone(),
        }
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        std::iter::empty()
    }

    pub(super) fn get(&self, path: &str) -> Result<Option<PathBuf>> {
        bail!("cannot fetch `{path}` of `{}`", self.name())
    }
}
