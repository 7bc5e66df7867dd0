//! What `train-sandwich` writes: the healed checkpoint, the trained values alone, and a report.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    merge::healed,
    peft,
    report::{REPORT, TrainReport},
    setup::TrainSetup,
    trained::Trained,
};
use crate::{
    checkpoint::{Checkpoint, Source, output, record::Record, save},
    pipeline::{
        LORA_FILE,
        card::{self, CardFacts},
        whole::WholePipeline,
    },
};

/// What of a recipe is of training.
const TRAINED: &str = "train-sandwich";

/// The trained values, in f32 under the names of the blocks they belong to.
const SANDWICH: &str = "sandwich.safetensors";

/// Writes everything but the chart into `folder`; with `keep_lora`, the LoRA next to the checkpoint instead of merged.
///
/// # Errors
/// When the disk is full.
pub fn write(
    folder: &Path,
    setup: &TrainSetup,
    trained: &Trained,
    report: &TrainReport,
    (layout, whole): (output::Naming, Option<&WholePipeline>),
    keep_lora: bool,
) -> Result<()> {
    let pair = &setup.pair;
    let record = record(setup, report, keep_lora)?;
    let (config, student) = (&pair.pruned.config, &trained.student.trunk);
    let checkpoint = healed(pair, student, !keep_lora)?;
    output::write(folder, &checkpoint, config, Some(&record), layout)?;
    whole.map_or(Ok(()), |whole| whole.write(folder))?;
    let facts = CardFacts {
        layout,
        whole: whole.is_some(),
        parameters: [&pair.teacher.transformer, &checkpoint].map(Checkpoint::parameters),
        bytes: checkpoint.bytes(),
        family: pair.teacher.family(),
        results: vec![format!(
            "velocity error {:.4}, before training {:.4}: relative mean squared error against the unpruned model, on noised latents that were not trained on",
            report.velocity_error.after, report.velocity_error.before
        )],
        ..CardFacts::default()
    };
    card::write(folder, &record, &facts)?;
    drop(checkpoint);
    let mut values = Checkpoint::default();
    for (name, value) in &trained.saved.values {
        values.insert(name, Source::dense(value)?);
    }
    values.metadata = output::metadata(Some(&record))?;
    save::write(&values, &folder.join(SANDWICH))?;
    if keep_lora {
        save::write(&peft::factors(config, student)?, &folder.join(LORA_FILE))?;
    }
    let mut file = serde_json::to_value(report)?;
    if let Some(file) = file.as_object_mut() {
        file.remove("seconds");
        let log = serde_json::to_value(&trained.saved.progress.log)?;
        file.insert("log".to_owned(), log);
    }
    output::write_json(&folder.join(REPORT), &file)
}

/// The pruned model's record, with what was trained.
fn record(setup: &TrainSetup, report: &TrainReport, keep_lora: bool) -> Result<Record> {
    let before = &setup.pair.pruned.record;
    let before = before.as_ref().context("the pruned model has a record")?;
    let trained =
        json!({ "recipe": report.recipe, "phases": report.phases, "kept-lora": keep_lora });
    let mut earlier = before.earlier.clone();
    let mut recipe = match before.recipe.clone() {
        Value::Object(recipe) if !recipe.contains_key(TRAINED) => recipe,
        // trained before
        other => {
            earlier.push(other);
            serde_json::Map::new()
        }
    };
    recipe.insert(TRAINED.to_owned(), trained);
    Ok(Record {
        earlier,
        lora: setup.pair.pruned.recorded_lora(),
        ..before.with_recipe(Value::Object(recipe))
    })
}
