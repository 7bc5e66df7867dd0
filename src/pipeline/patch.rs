//! `--model BASE --patch FILE`: the pruned model that a patch makes of its base.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::ModelChoice;
use crate::{
    checkpoint::{
        Checkpoint,
        config::ConfigFile,
        patch::{self, Patch},
        record::Record,
    },
    files::BUNDLED,
};

/// A patch and which of its levels.
#[derive(Clone, Debug)]
pub struct PatchChoice {
    /// `--patch`.
    pub path: PathBuf,
    /// `--level`; `None`: the only one.
    pub level: Option<String>,
}

/// The choice itself; if its model is a patch, or a folder with nothing else, the base that it names with that patch.
pub(super) fn resolved(choice: &ModelChoice) -> Result<ModelChoice> {
    let path = choice.model.as_deref().filter(|_| choice.patch.is_none());
    let Some(path) = path.and_then(|model| patch::find(Path::new(model))) else {
        return Ok(choice.clone());
    };
    let opened = Patch::open(&path)?;
    let first = opened.levels().first().copied().map(str::to_owned);
    let base = opened.level(first.as_deref())?.record.base;
    Ok(ModelChoice {
        model: Some(base),
        patch: Some(PatchChoice { path, level: None }),
        ..choice.clone()
    })
}

/// The pruned model that the patch makes of `base`, and its record, whose base is the one at hand.
pub(super) fn apply(
    choice: &PatchChoice,
    base: &Checkpoint,
    base_ref: &str,
) -> Result<(Checkpoint, Record)> {
    let patch = Patch::open(&choice.path)?;
    let level = patch.level(choice.level.as_deref())?;
    let transformer = level.apply(base, &base.name, &patch.name)?;
    let record = Record {
        base: base_ref.to_owned(),
        ..level.record
    };
    Ok((transformer, record))
}

/// Takes out of a base's configuration how many blocks it has.
pub(super) fn forget_counts(configs: &mut [ConfigFile]) {
    for json in configs
        .iter_mut()
        .filter_map(|config| config.json.as_object_mut())
    {
        json.remove("num_layers");
        json.remove("num_single_layers");
    }
}

/// How messages and tables name a model: `bundled + patch.safetensors:20`.
pub(super) fn name(choice: &ModelChoice) -> String {
    let model = choice.model.as_deref().unwrap_or(BUNDLED);
    let Some(patch) = &choice.patch else {
        return model.to_owned();
    };
    let file = patch.path.file_name().unwrap_or_default().to_string_lossy();
    let level = patch
        .level
        .as_ref()
        .map_or_else(String::new, |level| format!(":{level}"));
    format!("{model} + {file}{level}")
}
