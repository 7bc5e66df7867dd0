//! `diff`: pruned models → what differs from their base.

use anyhow::{Context, Result};

use crate::{
    checkpoint::{patch, save, target},
    cli::DiffArgs,
    files::BUNDLED,
    pipeline::{ModelChoice, Pipeline, diff::DiffReport},
    ui::Reporter,
};

pub(super) fn run(args: &DiffArgs, reporter: &Reporter) -> Result<()> {
    let output = &args.output.path;
    target::check_file(output, args.output.force)?;
    let choice = |model: &str| ModelChoice {
        model: Some(model.to_owned()),
        reporter: reporter.clone(),
        ..ModelChoice::default()
    };
    let pruned = args
        .model
        .iter()
        .map(|model| Pipeline::open(&choice(model)));
    let pruned = pruned.collect::<Result<Vec<_>>>()?;
    let mut levels = Vec::new();
    for pipeline in &pruned {
        let record =
            patch::check_pruned(&pipeline.name, &pipeline.config, pipeline.record.as_ref())?;
        let base = match &args.base {
            None => pipeline
                .base()
                .context("the base\nhint: name it with --base")?,
            Some(base) => {
                Pipeline::open_original(&choice(base), Some(&record)).context("--base")?
            }
        };
        let lora = pipeline.kept_lora()?;
        if lora.is_some() {
            reporter.note(format!(
                "`{}` was trained together with a LoRA, which is in the patch too: --lora {} applies it",
                pipeline.name,
                super::path_word(output)
            ));
        }
        levels.push(base.difference(&pipeline.name, &pipeline.transformer, record, lora)?);
    }
    target::check_writable(output)?;
    let report = DiffReport::new(&pruned, &levels, output);
    let base = levels.first().map(|level| level.record.base.clone());
    let model = super::model_flag(base.as_deref().filter(|base| *base != BUNDLED));
    let level = match levels.as_slice() {
        [first, _, ..] => format!(" --level {}", first.name),
        _ => String::new(),
    };
    save::write(&patch::patch(levels)?, output)?;
    super::show(args.output.print, &report, || report.text())?;
    let patch = super::path_word(output);
    let next = format!("generate {model}--patch {patch}{level} --prompt TEXT");
    super::wrote(reporter, output, &next);
    Ok(())
}
