//! Where text encoders and VAE of a model are: named by flags, in the model's own folder, or with its base model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::{ModelChoice, Pipeline, known::Place, locate::locate};
use crate::{
    checkpoint::{Checkpoint, part::Part, with_hint},
    files::{BUNDLED, Blob, Files},
    layout::{FluxConfig, TextModel},
    sample::{
        text::TextFiles,
        vae::{Vae, VaeConfig},
    },
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
    /// One file, with diffusers or original names, of a VAE alone or of a whole pipeline.
    Weights(Checkpoint),
}

impl VaeFiles {
    /// The sizes of the VAE, from headers alone.
    ///
    /// # Errors
    /// When it is none like FLUX.1's; the message names the file.
    pub fn sizes(&self) -> Result<VaeConfig> {
        match self {
            Self::Folder(files) => Vae::sizes(Ok(files)),
            Self::Weights(file) => Vae::sizes(Err(file)),
        }
    }

    /// Whether looking into it means to download it.
    pub(super) fn is_remote(&self) -> bool {
        matches!(self, Self::Folder(files) if files.resolved().is_some())
    }
}

/// Where to look for text encoders and VAE, in this order: flags, the model's own folder, its base model.
#[derive(Clone, Debug)]
pub(super) struct Components {
    pub(super) choice: ModelChoice,
    pub(super) own: Option<Files>,
    /// The model's file, if other parts lie in it.
    pub(super) inside: Option<Checkpoint>,
    pub(super) base: Option<String>,
    /// What opens it on this machine.
    pub(super) place: Option<String>,
    pub(super) hub: Option<&'static str>,
}

impl ModelChoice {
    /// Fills in what flags left open from where it was before, as far as it is still there.
    pub(super) fn fill_from(&mut self, place: Option<&Place>) {
        let Some(parts) = place else {
            return;
        };
        let exists = |path: &PathBuf| {
            let text = path.to_string_lossy();
            path.exists() || text.split(',').all(|part| Path::new(part).exists())
        };
        let there = |path: &Option<PathBuf>| path.clone().filter(exists);
        self.text_encoders = self
            .text_encoders
            .take()
            .or_else(|| there(&parts.text_encoders));
        self.vae = self.vae.take().or_else(|| there(&parts.vae));
    }
}

impl Pipeline {
    /// Where text encoders and tokenizers are.
    ///
    /// # Errors
    /// When there are none; the message names the flag.
    pub fn text_files(&self) -> Result<TextFiles> {
        if let Some(named) = &self.components.choice.text_encoders {
            let mut files = text_files(named).context("--text-encoders")?;
            // a folder with nothing but a tokenizer is for the encoder in the model's own file
            if let (Some(inside), Some(folder), []) = (
                &self.components.inside,
                &files.folder,
                files.weights.as_slice(),
            ) && Part::Qwen3.is_in(inside)
                && folder.sub("text_encoder").list()?.is_empty()
            {
                files.weights.push(inside.clone());
            }
            return Ok(files);
        }
        const WHAT: [&str; 3] = ["text_encoder", "the text encoders", "--text-encoders DIR"];
        let folder = || self.part_of(WHAT[0], WHAT[1], WHAT[2]);
        let Some(inside) = &self.components.inside else {
            return folder().map(TextFiles::from);
        };
        if self.config.family.text == TextModel::Qwen3 {
            // its tokenizer lies in a folder, with the encoder or without
            let inside = Part::Qwen3.is_in(inside).then(|| inside.clone());
            return Ok(TextFiles {
                folder: Some(folder()?),
                weights: inside.into_iter().collect(),
            });
        }
        let holds = [Part::Clip, Part::T5].map(|part| part.is_in(inside));
        if holds == [false, false] {
            return folder().map(TextFiles::from);
        }
        let own = self.components.own.clone();
        Ok(TextFiles {
            folder: if holds == [true, true] {
                own
            } else {
                let [has, lacks] = if holds[0] {
                    [Part::Clip, Part::T5]
                } else {
                    [Part::T5, Part::Clip]
                };
                Some(folder().with_context(|| {
                    format!(
                        "`{}` holds a {} but no {}",
                        inside.name,
                        has.name(),
                        lacks.name()
                    )
                })?)
            },
            weights: vec![inside.clone()],
        })
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
            let opened = open_file(path, "--vae FILE");
            return opened.map(VaeFiles::Weights).context("--vae");
        }
        if let Some(inside) = &self.components.inside
            && Part::Vae.is_in(inside)
        {
            return Ok(VaeFiles::Weights(inside.clone()));
        }
        let files = self.part_of("vae", "the VAE", "--vae FILE")?;
        Ok(VaeFiles::Folder(files.sub("vae")))
    }

    /// Whether the text encoders or the VAE would come from FLUX.1's repository on the hub.
    pub(super) fn takes_from_hub(&self, part: &str) -> bool {
        let own = self.components.own.as_ref();
        let has = own.is_some_and(|own| own.sub(part).list().is_ok_and(|names| !names.is_empty()));
        !has && self.components.base.is_none() && self.components.hub.is_some()
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
            let base = self.base_ref(base)?;
            let located = locate(Some(&base), &self.reporter).with_context(|| {
                format!(
                    "`{}` takes {what} from its base model `{base}`\nhint: name them with {flag}",
                    self.name
                )
            })?;
            if let Some(files) = located.pipeline
                && has(&files)?
            {
                self.check_base(&base)?;
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

impl Pipeline {
    /// What opens the model that this one was made of. A name in a checkpoint alone opens no path, and downloads nothing.
    ///
    /// # Errors
    /// When nobody knows where it is, or it would have to be downloaded and the user has not said so.
    pub(super) fn base_ref(&self, base: &str) -> Result<String> {
        let Some(place) = &self.components.place else {
            bail!(
                "`{}` was made of `{base}`, and where that lies is not known here\nhint: name it (train-sandwich --teacher, eval --baseline), or its parts with --text-encoders and --vae",
                self.name
            );
        };
        let downloads = place != BUNDLED && !Path::new(place).exists();
        ensure!(
            !downloads || self.components.choice.fetch_base || Files::is_cached(place),
            "`{}` says that it was made of `{place}` on the hub, which is not on this machine\nhint: if you trust that, --fetch-base downloads it",
            self.name
        );
        Ok(place.clone())
    }

    /// Fails where parts would be taken from another model than this one was made of.
    fn check_base(&self, base: &str) -> Result<()> {
        if self.record.is_none() || base == BUNDLED {
            return Ok(());
        }
        self.base().map(drop)
    }
}

/// What `--text-encoders` names: a folder, a file, or several of them with commas between.
fn text_files(named: &Path) -> Result<TextFiles> {
    let text = named.to_string_lossy();
    let parts: Vec<&Path> = if named.exists() {
        vec![named]
    } else {
        text.split(',').map(|part| Path::new(part.trim())).collect()
    };
    let mut out = TextFiles::default();
    for path in parts {
        if path.is_dir() {
            ensure!(
                out.folder.is_none(),
                "`{}` names two folders\nhint: give one folder, and files next to it",
                named.display()
            );
            out.folder = Some(Files::folder(path));
        } else {
            out.weights.push(open_file(path, "--text-encoders")?);
        }
    }
    Ok(out)
}

/// One file of weights, whatever it holds.
fn open_file(path: &Path, flag: &str) -> Result<Checkpoint> {
    let name = path.display().to_string();
    ensure!(
        path.exists(),
        "`{name}` does not exist\nhint: name a folder or a file with {flag}"
    );
    let opened = Blob::map(path).and_then(|blob| Checkpoint::from_blob(&name, &blob));
    with_hint(opened, &format!("name another with {flag}"))
}
