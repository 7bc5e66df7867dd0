//! A model in another number format: converted with progress, written, and reported.

use std::{collections::BTreeMap, path::Path};

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Pipeline,
    card::{self, CardFacts},
};
use crate::{
    checkpoint::{
        Checkpoint,
        convert::{self, Target},
        keys,
        output::Naming,
        record::Record,
        save,
    },
    quant::QuantType,
    ui::{self, Reporter},
};

/// Progress is counted in megabytes: a bar counts in machine words, and tensors differ too much to count them.
const UNIT: usize = 1 << 20;

/// The converted checkpoint, with the scales measured that it takes.
///
/// # Errors
/// When a tensor cannot be read or holds NaN.
pub fn measured(source: &Checkpoint, target: Target, reporter: &Reporter) -> Result<Checkpoint> {
    let scaled = source.iter().filter(|(name, s)| target.scales(name, s));
    let total: usize = scaled.map(|(_, s)| s.byte_len()).sum();
    let bar = reporter.progress(total.div_ceil(UNIT), "measuring");
    let mut done = 0;
    let out = convert::converted(source, target, &mut |source| {
        let largest = source.largest()?;
        done += source.byte_len();
        bar.set_position((done / UNIT) as u64);
        Ok(largest)
    })?;
    bar.finish_and_clear();
    Ok(out)
}

/// Writes a converted checkpoint.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write(
    checkpoint: &Checkpoint,
    target: Target,
    path: &Path,
    reporter: &Reporter,
) -> Result<()> {
    let bar = reporter.progress(checkpoint.bytes().div_ceil(UNIT), "writing");
    let mut done = 0;
    let mut written = |bytes| {
        done += bytes;
        bar.set_position((done / UNIT) as u64);
    };
    match target {
        Target::Gguf(packed) => save::write_gguf(checkpoint, packed, path, &mut written)?,
        Target::Plain(_) | Target::Float8 { .. } => {
            save::write_with(checkpoint, path, &mut written)?;
        }
    }
    reporter.done(&bar, "wrote the checkpoint");
    Ok(())
}

/// Writes the card of a folder with a converted model.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write_card(
    folder: &Path,
    pipeline: &Pipeline,
    record: &Record,
    checkpoint: &Checkpoint,
    (target, (layout, whole)): (Target, (Naming, bool)),
) -> Result<()> {
    let facts = CardFacts {
        parameters: [checkpoint.parameters(); 2],
        bytes: checkpoint.bytes(),
        layout,
        whole,
        quantized: !matches!(target, Target::Plain(_)),
        family: pipeline.family(),
        ..CardFacts::default()
    };
    card::write(folder, record, &facts)
}

/// The record of a pruned model goes along; that of a plain one says where its text encoders, VAE and scheduler are.
///
/// # Errors
/// When a configuration next to the model is damaged.
pub fn record(pipeline: &Pipeline, target: Target) -> Result<Record> {
    let before = pipeline.record.as_ref();
    let mut recipe = match before.map(|r| r.recipe.clone()) {
        Some(Value::Object(recipe)) => recipe,
        _ => serde_json::Map::new(),
    };
    recipe.insert("convert".to_owned(), json!({ "to": name(target) }));
    if pipeline
        .lora
        .iter()
        .any(|opened| opened.lora.is_of_pruned())
    {
        // it is in the weights now
        if let Some(training) = recipe.get_mut("train-sandwich") {
            training["kept-lora"] = false.into();
        }
    }
    let recipe = Value::Object(recipe);
    match before {
        Some(before) => Ok(Record {
            lora: pipeline.recorded_lora(),
            ..before.with_recipe(recipe)
        }),
        None => pipeline.record_of(&pipeline.config, recipe),
    }
}

/// How a number format is called on the command line.
fn name(target: Target) -> String {
    match target {
        Target::Plain(dtype) => format!("{dtype:?}").to_lowercase(),
        Target::Float8 { scaled: true } => "f8e4m3".to_owned(),
        Target::Float8 { scaled: false } => "f8e4m3 without scales".to_owned(),
        Target::Gguf(quant) => quant.to_string(),
    }
}

/// Says which matrices of the kept blocks could not have the format that was asked for.
pub fn note_fallbacks(checkpoint: &Checkpoint, packed: QuantType, reporter: &Reporter) {
    let unfit = checkpoint.iter().filter(|(name, source)| {
        let kept = keys::parse(name).is_some_and(|key| !key.of_replacement());
        let matrix = source.shape().len() == 2 && kept;
        let width = source.shape().last().copied().unwrap_or(0);
        matrix && !width.is_multiple_of(packed.block())
    });
    let all: Vec<(&str, String)> = unfit
        .map(|(name, source)| (name, source.format().to_string()))
        .collect();
    if let Some((name, format)) = all.first() {
        reporter.note(format!(
            "not in {packed}, as their rows are no multiple of {}: {}, such as `{name}` in {format}",
            packed.block(),
            ui::counted(all.len(), "tensor")
        ));
    }
}

/// What `convert` did, or would do.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// How the model is called.
    pub model: String,
    /// The file or folder.
    pub output: String,
    /// Whether it was written.
    pub written: bool,
    /// Numbers of the transformer.
    pub parameters: usize,
    /// Tensors and bytes by number format.
    pub formats: BTreeMap<String, FormatReport>,
    /// Bytes of the transformer as it was.
    pub before: usize,
    /// Bytes of the converted one.
    pub bytes: usize,
}

/// What is in one number format.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct FormatReport {
    /// Number of tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: usize,
}

impl ConvertReport {
    /// Of a converted checkpoint.
    pub fn new(pipeline: &Pipeline, checkpoint: &Checkpoint, output: &Path, written: bool) -> Self {
        let mut formats: BTreeMap<String, FormatReport> = BTreeMap::new();
        for (_, source) in checkpoint.iter() {
            let entry = formats.entry(source.format().to_string()).or_default();
            entry.tensors += 1;
            entry.bytes += source.byte_len();
        }
        Self {
            model: pipeline.name.clone(),
            output: output.display().to_string(),
            written,
            parameters: checkpoint.parameters(),
            formats,
            before: pipeline.transformer.bytes(),
            bytes: checkpoint.bytes(),
        }
    }

    /// As a table.
    pub fn text(&self) -> String {
        let row = |(name, of): (&String, &FormatReport)| {
            vec![
                name.clone(),
                of.tensors.to_string(),
                ui::bytes(of.bytes as f64),
            ]
        };
        let rows: Vec<Vec<String>> = self.formats.iter().map(row).collect();
        let end = if self.written {
            format!("in {}", self.output)
        } else {
            "nothing written".to_owned()
        };
        format!(
            "{}\n\n{} parameters, {} before, {} after, {end}",
            ui::table(&["format", "tensors", "bytes"], &rows, &[1, 2]),
            ui::count(self.parameters as f64),
            ui::bytes(self.before as f64),
            ui::bytes(self.bytes as f64)
        )
    }
}
