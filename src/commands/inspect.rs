//! `inspect`: what a checkpoint holds, from its header alone.

use anyhow::Result;

use crate::{cli::InspectArgs, pipeline::inspect::InspectReport, ui::Reporter};

pub(super) fn run(args: &InspectArgs, reporter: &Reporter) -> Result<()> {
    let pipeline = super::open(&super::bare_choice(&args.model, reporter))?;
    let size = pipeline.image_size(args.size.width, args.size.height)?;
    let text = match args.text_tokens {
        Some(tokens) => tokens,
        None => pipeline.default_text_length()?,
    };
    let report = InspectReport::new(&pipeline, size, text);
    super::show(args.print, &report, || report.text())
}
