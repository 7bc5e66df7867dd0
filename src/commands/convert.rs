//! `convert`: the same model in another number format.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::{
    checkpoint::{
        convert::{self, Target},
        output,
        target::{self as place, OutputFolder},
        transformer_json,
    },
    cli::ConvertArgs,
    pipeline::{convert as conversion, convert::ConvertReport},
    quant::F8_MAX,
    ui::Reporter,
};

pub(super) fn run(args: &ConvertArgs, reporter: &Reporter) -> Result<()> {
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
    let pipeline = super::open(&super::bare_choice(&args.model, reporter))?;
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
        conversion::measured(source, target, reporter)?
    };
    let record = conversion::record(&pipeline, target)?;
    checkpoint.metadata = output::metadata(Some(&record))?;
    if let Target::Gguf(packed) = target {
        conversion::note_fallbacks(&checkpoint, packed, reporter);
    }
    if !args.dry_run.dry_run {
        let name = format!("{}.{extension}", output::ORIGINAL_STEM);
        if file {
            if let Some(folder) = args.output.path.parent() {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("cannot create `{}`", folder.display()))?;
            }
            conversion::write(&checkpoint, target, &args.output.path, reporter)?;
        } else {
            let folder = OutputFolder::create(&args.output.path, args.output.force)?;
            conversion::write(&checkpoint, target, &folder.path().join(name), reporter)?;
            let json = transformer_json::write(&pipeline.config, Some(&record));
            output::write_json(&folder.path().join("config.json"), &json)?;
            conversion::write_card(folder.path(), &pipeline, &record, &checkpoint, target)?;
            folder.finish()?;
        }
    }
    let written = !args.dry_run.dry_run;
    let report = ConvertReport::new(&pipeline, &checkpoint, &args.output.path, written);
    super::show(args.output.print, &report, || report.text())
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
