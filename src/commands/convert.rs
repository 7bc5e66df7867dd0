//! `convert`: the same model in another number format.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    checkpoint::{
        Checkpoint,
        convert::{self, Target},
        keys, output,
        record::Record,
        save,
        target::{self as place, OutputFolder},
        transformer_json,
    },
    cli::ConvertArgs,
    pipeline::Pipeline,
    quant::{F8_MAX, QuantType},
    ui,
};

/// Progress is counted in megabytes: a bar counts in machine words, and tensors differ too much to count them.
const UNIT: usize = 1 << 20;

pub(super) fn run(args: &ConvertArgs) -> Result<()> {
    let target = args.target();
    ensure!(
        !args.no_scale || matches!(target, Target::Float8 { .. }),
        "--no-scale is for --dtype f8e4m3"
    );
    let extension = match target {
        Target::Gguf(_) => "gguf",
        Target::Plain(_) | Target::Float8 { .. } => "safetensors",
    };
    let file = is_file(&args.output.path, extension)?;
    let pipeline = super::open(&super::bare_choice(&args.model))?;
    if !args.dry_run.dry_run {
        if file {
            place::check_file(&args.output.path, args.output.force)?;
        } else {
            place::check_folder(&args.output.path, args.output.force)?;
        }
        place::check_writable(&args.output.path)?;
    }
    let source = &pipeline.transformer;
    let mut checkpoint = if args.dry_run.dry_run {
        convert::converted(source, target, &mut |_| Ok(F8_MAX))?
    } else {
        measured(source, target)?
    };
    let record = record(&pipeline, args)?;
    checkpoint.metadata = output::metadata(Some(&record))?;
    let formats = formats(&checkpoint);
    if let Target::Gguf(packed) = target {
        note_fallbacks(&checkpoint, packed);
    }
    if !args.dry_run.dry_run {
        let name = format!("{}.{extension}", output::ORIGINAL_STEM);
        if file {
            if let Some(folder) = args.output.path.parent() {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("cannot create `{}`", folder.display()))?;
            }
            write(&checkpoint, target, &args.output.path)?;
        } else {
            let folder = OutputFolder::create(&args.output.path, args.output.force)?;
            write(&checkpoint, target, &folder.path().join(name))?;
            let json = transformer_json::write(&pipeline.config, Some(&record));
            output::write_json(&folder.path().join("config.json"), &json)?;
            folder.finish()?;
        }
    }
    let report = json!({
        "model": pipeline.name,
        "output": args.output.path.display().to_string(),
        "written": !args.dry_run.dry_run,
        "parameters": checkpoint.parameters(),
        "formats": formats,
        "before": source.bytes(),
        "bytes": checkpoint.bytes(),
    });
    if args.output.print.json {
        return ui::json(&report);
    }
    ui::data(text(&report))
}

/// Endings of files of other kinds: a folder that is called like one is a slip.
const OTHER_ENDINGS: [&str; 14] = [
    "bin",
    "ckpt",
    "csv",
    "ggml",
    "json",
    "log",
    "onnx",
    "png",
    "pt",
    "pth",
    "safetensor",
    "sft",
    "txt",
    "zip",
];

/// Whether `output` names a file, which must end in `extension`, or a folder.
fn is_file(output: &Path, extension: &str) -> Result<bool> {
    let given = output.extension().and_then(|e| e.to_str()).unwrap_or("");
    let lower = given.to_ascii_lowercase();
    let known = ["gguf", "safetensors"].contains(&lower.as_str());
    let other = OTHER_ENDINGS.contains(&lower.as_str()) && !output.is_dir();
    ensure!(
        given == extension || !(known || other),
        "--output `{}`: what is asked for is written as .{extension}\nhint: name a .{extension} file, or a folder",
        output.display()
    );
    Ok(given == extension)
}

/// The converted checkpoint, with the scales measured that it takes.
fn measured(source: &Checkpoint, target: Target) -> Result<Checkpoint> {
    let scaled = source.iter().filter(|(name, s)| target.scales(name, s));
    let total: usize = scaled.map(|(_, s)| s.byte_len()).sum();
    let bar = ui::progress(total.div_ceil(UNIT), "measuring");
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

fn write(checkpoint: &Checkpoint, target: Target, path: &Path) -> Result<()> {
    let bar = ui::progress(checkpoint.bytes().div_ceil(UNIT), "writing");
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
    ui::done(&bar, "wrote the checkpoint");
    Ok(())
}

/// The record of a pruned model goes along; that of a plain one says where its text encoders, VAE and scheduler are.
fn record(pipeline: &Pipeline, args: &ConvertArgs) -> Result<Record> {
    let before = pipeline.record.as_ref();
    let mut recipe = match before.map(|r| r.recipe.clone()) {
        Some(Value::Object(recipe)) => recipe,
        _ => serde_json::Map::new(),
    };
    recipe.insert(
        "convert".to_owned(),
        json!({ "to": format!("{:?}", args.target()) }),
    );
    let recipe = Value::Object(recipe);
    match before {
        Some(before) => Ok(before.with_recipe(recipe)),
        None => pipeline.record_of(&pipeline.config, recipe),
    }
}

/// Tensors and bytes by format.
fn formats(checkpoint: &Checkpoint) -> BTreeMap<String, Value> {
    let mut out: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (_, source) in checkpoint.iter() {
        let entry = out.entry(source.format().to_string()).or_default();
        entry.0 += 1;
        entry.1 += source.byte_len();
    }
    out.into_iter()
        .map(|(name, (tensors, bytes))| (name, json!({ "tensors": tensors, "bytes": bytes })))
        .collect()
}

/// Says which matrices of the kept blocks could not have the format that was asked for.
fn note_fallbacks(checkpoint: &Checkpoint, packed: QuantType) {
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
        ui::note(format!(
            "{} matrices have rows that are no multiple of {} and are not written in {packed}: `{name}` in {format}",
            all.len(),
            packed.block()
        ));
    }
}

fn text(report: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let empty = serde_json::Map::new();
    let rows: Vec<Vec<String>> = report["formats"]
        .as_object()
        .unwrap_or(&empty)
        .iter()
        .map(|(name, of)| {
            vec![
                name.clone(),
                of["tensors"].to_string(),
                ui::bytes(number(&of["bytes"])),
            ]
        })
        .collect();
    let table = ui::table(&["format", "tensors", "bytes"], &rows, &[1, 2]);
    let (before, after) = (number(&report["before"]), number(&report["bytes"]));
    let end = match report["written"].as_bool() {
        Some(true) => format!("in {}", report["output"].as_str().unwrap_or_default()),
        _ => "(nothing written)".to_owned(),
    };
    format!(
        "{table}\n\n{} parameters, {} before, {} after, {end}",
        ui::count(number(&report["parameters"])),
        ui::bytes(before),
        ui::bytes(after)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_a_file_of_its_format_or_a_folder() {
        let of = |name: &str| is_file(Path::new(name), "gguf");
        assert!(of("a/x.gguf").unwrap());
        for folder in ["x", "a/flux1-dev-0.2", "x.dev"] {
            assert!(!of(folder).unwrap(), "{folder}");
        }
        for other in ["x.safetensors", "x.txt", "x.GGUF", "x.pt"] {
            let error = of(other).unwrap_err().to_string();
            assert!(error.contains(other) && error.contains(".gguf"), "{error}");
        }
    }
}
