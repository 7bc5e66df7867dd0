//! `convert`: the same model in another number format.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::{
    checkpoint::{
        convert::{self, Target},
        output::{self, Naming},
        target::{self as place, OutputFolder},
        transformer_json,
    },
    cli::ConvertArgs,
    pipeline::{convert as conversion, convert::ConvertReport, whole::WholePipeline},
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
    let naming = args.folder.naming();
    ensure!(
        naming == Naming::Original || (!file && matches!(target, Target::Plain(_))),
        "diffusers' layout is a folder in bf16, f16 or f32\nhint: --dtype bf16 --output FOLDER, or leave out --layout and --whole"
    );
    let pipeline = super::open(&super::model_choice(&args.pipeline, reporter))?;
    let whole = args.folder.whole.map(|how| pipeline.whole(how));
    let whole = whole.transpose()?;
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
    let parts = whole.as_ref().map_or(Ok(0), WholePipeline::bytes)?;
    let bytes = checkpoint.bytes() as u64 + parts;
    if args.dry_run.dry_run {
        let report = ConvertReport::new(&pipeline, &checkpoint, &args.output.path, false);
        super::show(args.output.print, &report, || report.text())?;
        return place::check_space(&args.output.path, bytes);
    }
    place::check_space(&args.output.path, bytes)?;
    if file {
        if let Some(folder) = args.output.path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create `{}`", folder.display()))?;
        }
        conversion::write(&checkpoint, target, &args.output.path, reporter)?;
    } else {
        let folder = OutputFolder::create(&args.output.path, args.output.force)?;
        let path = folder.path();
        if naming == Naming::Diffusers {
            output::write(path, &checkpoint, &pipeline.config, Some(&record), naming)?;
            whole.as_ref().map_or(Ok(()), |whole| whole.write(path))?;
        } else {
            let name = format!("{}.{extension}", output::ORIGINAL_STEM);
            conversion::write(&checkpoint, target, &path.join(name), reporter)?;
            let json = transformer_json::write(&pipeline.config, Some(&record));
            output::write_json(&path.join("config.json"), &json)?;
        }
        let layout = (naming, whole.is_some());
        conversion::write_card(path, &pipeline, &record, &checkpoint, (target, layout))?;
        folder.finish()?;
    }
    let report = ConvertReport::new(&pipeline, &checkpoint, &args.output.path, true);
    super::show(args.output.print, &report, || report.text())?;
    let model = super::path_word(&args.output.path);
    super::wrote(
        reporter,
        &args.output.path,
        &format!("generate --model {model} --prompt TEXT"),
    );
    Ok(())
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
