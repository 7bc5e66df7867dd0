//! `diff`: pruned models → what differs from their base.

use anyhow::{Context, Result};

use crate::{
    checkpoint::{patch, save, target},
    cli::DiffArgs,
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
        levels.push(base.difference(&pipeline.name, &pipeline.transformer, record)?);
    }
    target::check_writable(output)?;
    let report = DiffReport::new(&pruned, &levels, output);
    save::write(&patch::patch(levels)?, output)?;
    super::show(args.output.print, &report, || report.text())?;
    reporter.note(format!("wrote `{}`", output.display()));
    Ok(())
}
