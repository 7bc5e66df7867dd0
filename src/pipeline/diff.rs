//! What differs between a pruned model and its base, and how much that is.

use std::path::Path;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::Pipeline;
use crate::{
    checkpoint::{
        Checkpoint,
        patch::{self, PatchLevel},
        record::{self, Record},
    },
    ui,
};

impl Pipeline {
    /// What a pruned model called `name` has that this model has not got; `record` is its record, `lora` what it was trained
    /// with and is not in its weights.
    ///
    /// # Errors
    /// When it was made from another model, or a tensor cannot be read.
    pub fn difference(
        &self,
        name: &str,
        pruned: &Checkpoint,
        record: Record,
        lora: Option<Checkpoint>,
    ) -> Result<PatchLevel> {
        let base = self.transformer.unadapted();
        let found = record::fingerprint(&base)?;
        ensure!(
            found == record.base_fingerprint,
            "`{}` was pruned from `{}` (fingerprint {}), and `{}` is another model (fingerprint {found})",
            name,
            record.base,
            record.base_fingerprint,
            self.name
        );
        Ok(PatchLevel {
            name: patch::level_name(&record.layout),
            tensors: patch::difference(&base, pruned, &record)?,
            record,
            lora,
        })
    }
}

/// What `diff` wrote.
#[derive(Clone, Debug, Serialize)]
pub struct DiffReport {
    /// The patch.
    pub output: String,
    /// One for each pruned model.
    pub levels: Vec<LevelReport>,
}

/// One pruned model in a patch.
#[derive(Clone, Debug, Serialize)]
pub struct LevelReport {
    /// What `--level` takes.
    pub level: String,
    /// The pruned model.
    pub model: String,
    /// Tensors in the patch.
    pub tensors: usize,
    /// Bytes in the patch.
    pub bytes: usize,
    /// Bytes of the whole pruned model.
    pub of: usize,
}

impl DiffReport {
    /// Of the pruned models and what differs.
    pub fn new(pruned: &[Pipeline], levels: &[PatchLevel], output: &Path) -> Self {
        let each = pruned.iter().zip(levels);
        let level = |(pipeline, level): (&Pipeline, &PatchLevel)| {
            let parts = || std::iter::once(&level.tensors).chain(&level.lora);
            LevelReport {
                level: level.name.clone(),
                model: pipeline.name.clone(),
                tensors: parts().map(Checkpoint::len).sum(),
                bytes: parts().map(Checkpoint::bytes).sum(),
                of: pipeline.transformer.bytes(),
            }
        };
        Self {
            output: output.display().to_string(),
            levels: each.map(level).collect(),
        }
    }

    /// As a table.
    pub fn text(&self) -> String {
        let row = |level: &LevelReport| {
            vec![
                level.level.clone(),
                level.model.clone(),
                level.tensors.to_string(),
                ui::bytes(level.bytes as f64),
                ui::bytes(level.of as f64),
            ]
        };
        let rows: Vec<Vec<String>> = self.levels.iter().map(row).collect();
        ui::table(
            &["level", "model", "tensors", "patch", "whole"],
            &rows,
            &[2, 3, 4],
        )
    }
}
