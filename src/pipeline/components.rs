//! Where text encoders and VAE of a model are: named by flags, in the model's own folder, or with its base model.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::{ModelChoice, Pipeline, locate::locate};
use crate::{
    checkpoint::record::RecordedParts,
    files::{Blob, Files},
    layout::{FluxConfig, TextModel},
};

/// Where text encoders and VAE of a bare transformer of released sizes come from: a repository on the hub with the same
/// files, under Apache-2.0 where there is one.
pub(super) fn hub(config: &FluxConfig) -> Option<&'static str> {
    if config.head_dim() != 128 {
        return None;
    }
    match (config.family.text, config.context_in_dim, config.vec_in_dim) {
        (TextModel::ClipAndT5, 4096, 768) => Some("black-forest-labs/FLUX.1-schnell"),
        (TextModel::Qwen3, 7680, _) => Some("black-forest-labs/FLUX.2-klein-4B"),
        (TextModel::Qwen3, 12288, _) => Some("black-forest-labs/FLUX.2-klein-9B"),
        _ => None,
    }
}

/// Where a model's VAE is.
#[derive(Clone, Debug)]
pub enum VaeFiles {
    /// A folder in diffusers layout (`config.json` and weights).
    Folder(Files),
    /// One file, with diffusers or original names, and its name for messages.
    File(String, Blob),
}

/// Where to look for text encoders and VAE, in this order: flags, the model's own folder, its base model.
#[derive(Clone, Debug)]
pub(super) struct Components {
    pub(super) choice: ModelChoice,
    pub(super) own: Option<Files>,
    pub(super) base: Option<String>,
    pub(super) hub: Option<&'static str>,
}

impl ModelChoice {
    /// Fills in what flags left open from where it was before, as far as it is still there.
    pub(super) fn fill_from_record(&mut self, parts: Option<&RecordedParts>) {
        let Some(parts) = parts else {
            return;
        };
        let there = |path: &Option<PathBuf>| path.clone().filter(|path| path.exists());
        self.text_encoders = self
            .text_encoders
            .take()
            .or_else(|| there(&parts.text_encoders));
        self.vae = self.vae.take().or_else(|| there(&parts.vae));
    }
}

impl Pipeline {
    /// The text encoders and the VAE that flags or a record named, absolute, for the record of what is made of this model.
    pub fn recorded_parts(&self) -> RecordedParts {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        RecordedParts {
            text_encoders: self.components.choice.text_encoders.as_ref().map(absolute),
            vae: self.components.choice.vae.as_ref().map(absolute),
        }
    }

    /// The folder with text encoders and tokenizers.
    ///
    /// # Errors
    /// When there is none; the message names the flag.
    pub fn text_files(&self) -> Result<Files> {
        if let Some(dir) = &self.components.choice.text_encoders {
            ensure!(
                dir.is_dir(),
                "--text-encoders: `{}` is not a folder",
                dir.display()
            );
            return Ok(Files::folder(dir));
        }
        self.part_of("text_encoder", "the text encoders", "--text-encoders DIR")
    }

    /// Where the VAE is.
    ///
    /// # Errors
    /// When there is none; the message names the flag.
    pub fn vae_files(&self) -> Result<VaeFiles> {
        if let Some(path) = &self.components.choice.vae {
            if path.is_dir() {
                let folder = Files::folder(path);
                let nested = folder.sub("vae");
                return Ok(VaeFiles::Folder(if nested.list()?.is_empty() {
                    folder
                } else {
                    nested
                }));
            }
            return Ok(VaeFiles::File(
                path.display().to_string(),
                Blob::map(path).context("--vae")?,
            ));
        }
        let files = self.part_of("vae", "the VAE", "--vae FILE")?;
        Ok(VaeFiles::Folder(files.sub("vae")))
    }

    /// The pipeline folder that has the sub-folder `part`.
    fn part_of(&self, part: &str, what: &str, flag: &str) -> Result<Files> {
        let has = |files: &Files| anyhow::Ok(!files.sub(part).list()?.is_empty());
        if let Some(own) = &self.components.own
            && has(own)?
        {
            return Ok(own.clone());
        }
        if let Some(base) = &self.components.base {
            let located = locate(Some(base), &self.reporter).with_context(|| {
                format!(
                    "`{}` takes {what} from its base model `{base}`\nhint: name them with {flag}",
                    self.name
                )
            })?;
            if let Some(files) = located.pipeline
                && has(&files)?
            {
                return Ok(files);
            }
        }
        if let Some(repository) = self.components.hub {
            self.reporter.note(format!(
                "taking {what} from {repository} on the hub ({flag} names others)"
            ));
            return Files::hub(repository, None, &self.reporter)
                .with_context(|| format!("cannot fetch {what}; name them with {flag}"));
        }
        bail!(
            "`{}` comes without {what}\nhint: name them with {flag}",
            self.name
        )
    }
}
