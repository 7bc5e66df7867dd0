//! LoRA files and a model: which are added to it when it is opened, and which to the model that it was made from.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{LORA_FILE, ModelChoice, Pipeline};
use crate::{
    checkpoint::{
        Checkpoint,
        lora::{Applied, Lora, LoraChoice, RecordedLora},
        patch,
        record::Record,
    },
    files::{Blob, Files},
    layout::FluxConfig,
    ui::Reporter,
};

/// A LoRA file that was added to a model, and what became of its tensors.
#[derive(Clone, Debug)]
pub struct OpenedLora {
    /// The file.
    pub lora: Lora,
    /// What became of its tensors.
    pub applied: Applied,
}

/// Adds the files of a choice to the tensors of a model. `kept` is what `train-sandwich --keep-lora` wrote next to it.
pub(super) fn apply(
    choice: &ModelChoice,
    transformer: &mut Checkpoint,
    config: &FluxConfig,
    kept: Option<&Path>,
) -> Result<Vec<OpenedLora>> {
    let mut out = Vec::new();
    for file in &choice.lora {
        let level = choice
            .patch
            .as_ref()
            .and_then(|patch| patch.level.as_deref());
        let mut lora = Lora::open_in(file, level)?;
        if kept.is_some_and(|kept| same_file(kept, &lora.recorded.file)) {
            lora.trained_in(&config.layout);
        }
        let applied = lora.apply(transformer, config)?;
        let left_out = applied.left_out();
        if !left_out.is_empty() {
            choice.reporter.note(format!("`{}`: {left_out}", lora.name));
        }
        out.push(OpenedLora { lora, applied });
    }
    Ok(out)
}

fn same_file(one: &Path, other: &Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// Those files in a model's weights, by its record, that act on text encoders too: these are not part of its own files.
pub(super) fn for_text(record: Option<&Record>, reporter: &Reporter) -> Vec<Lora> {
    let all = record.into_iter().flat_map(|record| &record.lora);
    let open = |recorded: &RecordedLora| match reopen(recorded) {
        Ok(lora) => Some(lora),
        Err(error) => {
            reporter.warn(format!(
                "text is encoded without the LoRA that the model was made with: {error:#}"
            ));
            None
        }
    };
    all.filter(|recorded| recorded.text)
        .filter_map(open)
        .collect()
}

/// The choices that add a model's recorded files again.
pub(super) fn choices(record: &Record) -> Result<Vec<LoraChoice>> {
    let choice = |recorded: &RecordedLora| {
        reopen(recorded)?;
        Ok(recorded.choice())
    };
    record.lora.iter().map(choice).collect()
}

fn reopen(recorded: &RecordedLora) -> Result<Lora> {
    let lora = Lora::open(&recorded.choice()).context("a LoRA in its weights")?;
    ensure!(
        lora.recorded.fingerprint == recorded.fingerprint,
        "`{}` is not the LoRA that is in its weights (fingerprint {}, expected {})",
        lora.name,
        lora.recorded.fingerprint,
        recorded.fingerprint
    );
    Ok(lora)
}

/// A model's name with those of the files that are added to it: `bundled + style.safetensors:0.5`.
pub(super) fn name(model: &str, lora: &[OpenedLora]) -> String {
    let part = |opened: &OpenedLora| {
        let recorded = &opened.lora.recorded;
        let file = recorded.file.file_name().unwrap_or_default();
        let file = file.to_string_lossy();
        match recorded.weight {
            1.0 => format!(" + {file}"),
            weight => format!(" + {file}:{weight}"),
        }
    };
    let parts: String = lora.iter().map(part).collect();
    format!("{model}{parts}")
}

impl Pipeline {
    /// The factors that this model was trained with and that are not in its weights, if they lie next to them.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn kept_lora(&self) -> Result<Option<Checkpoint>> {
        let record = self.record.as_ref();
        if !record.is_some_and(|record| record.recipe["train-sandwich"]["kept-lora"] == true) {
            return Ok(None);
        }
        if let Some(patch) = &self.components.choice.patch {
            let name = patch.path.display().to_string();
            let file = Checkpoint::from_blob(&name, &Blob::map(&patch.path)?)?;
            return patch::lora(&file, patch.level.as_deref());
        }
        let Some(files) = &self.components.own else {
            return Ok(None);
        };
        let Some(blob) = files.get(LORA_FILE)? else {
            return Ok(None);
        };
        Checkpoint::from_blob(&files.describe(LORA_FILE), &blob).map(Some)
    }

    /// What files call the model, with the files that are added to it.
    pub fn public_name_with_lora(&self) -> String {
        name(&self.public_name(), &self.lora)
    }

    /// The files that were added, with their weights: `style.safetensors:0.5, turbo.safetensors:1`.
    pub fn lora_names(&self) -> String {
        let one =
            |opened: &OpenedLora| format!("{}:{}", opened.lora.name, opened.lora.recorded.weight);
        self.lora.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// The files that act on the unpruned model as well; those that were trained next to this model's layers do not.
    pub fn shared_lora(&self) -> Vec<LoraChoice> {
        let shared = self
            .lora
            .iter()
            .filter(|opened| !opened.lora.is_of_pruned());
        shared.map(|opened| opened.lora.recorded.choice()).collect()
    }

    /// The files that are in the weights of what is written of this model: those of its record, and those added now.
    pub fn recorded_lora(&self) -> Vec<RecordedLora> {
        let before = self.record.iter().flat_map(|record| record.lora.clone());
        let shared = self
            .lora
            .iter()
            .filter(|opened| !opened.lora.is_of_pruned());
        let now = shared.map(|opened| RecordedLora {
            text: opened.applied.text > 0,
            ..opened.lora.recorded.clone()
        });
        before.chain(now).collect()
    }
}

/// Says that a model was trained with a LoRA that is not in its weights, unless `choice` names it.
pub(super) fn note_kept(
    record: &Record,
    (kept, folder): (Option<&Path>, Option<&Files>),
    choice: &ModelChoice,
    name: &str,
) -> Result<()> {
    let Some(training) = record.recipe.get("train-sandwich") else {
        return Ok(());
    };
    let recorded = training["kept-lora"].as_bool();
    // earlier versions did not record it
    let in_folder = || folder.map_or(Ok(false), |files| files.has(LORA_FILE));
    if !recorded.map_or_else(in_folder, Ok)? {
        return Ok(());
    }
    let given = |lora: &LoraChoice| kept.is_some_and(|kept| same_file(kept, &lora.path));
    if choice.lora.iter().any(given) {
        return Ok(());
    }
    let path = kept.map_or_else(|| LORA_FILE.to_owned(), |kept| kept.display().to_string());
    choice.reporter.warn(format!(
        "`{name}` was trained together with a LoRA that is not in its weights: images and numbers are those without it\nhint: --lora {path} applies it"
    ));
    Ok(())
}
