//! `bench`: how long steps and blocks take, next to what the machine reaches at most.

use std::path::Path;

use anyhow::{Context, Result};

use super::init;
use crate::{
    bench::{self, BenchOptions, Subject},
    checkpoint::transformer_json,
    cli::BenchArgs,
    pipeline::{ModelChoice, PatchChoice},
    ui::Reporter,
};

pub(super) fn run(args: &BenchArgs, reporter: &Reporter) -> Result<()> {
    let options = BenchOptions {
        sizes: args.size.clone(),
        batches: args.batch.clone(),
        text_tokens: args.text_tokens,
        dtypes: args.dtype.clone(),
        device: args.device.device,
        seconds: args.seconds,
        step_only: args.step_only,
        replaced: args.replaced,
        reporter: reporter.clone(),
    };
    options.validate()?;
    let report = bench::run(&options, &subjects(args, reporter)?)?;
    super::show(args.print, &report, || report.table())
}

/// The model or shape, and the one it is compared with.
fn subjects(args: &BenchArgs, reporter: &Reporter) -> Result<Vec<Subject>> {
    let open = |model: Option<&String>, patch: Option<PatchChoice>| -> Result<Subject> {
        let pipeline = super::open(&ModelChoice {
            model: model.cloned(),
            lora: args.lora.lora.clone(),
            patch,
            reporter: reporter.clone(),
            ..ModelChoice::default()
        })?;
        Subject::from_pipeline(pipeline)
    };
    let first = match &args.config {
        None => open(args.model.as_ref(), args.patch.choice())?,
        Some(name) => {
            let (config, _) = transformer_json::read(&init::read_config(name)?)?;
            Subject::from_config(format!("random {}", Path::new(name).display()), config)
        }
    };
    let mut out = vec![first];
    if let Some(other) = &args.against {
        let other = open(Some(other), None).context("--against")?;
        other.check_inputs(&out[0]).context("--against")?;
        out.push(other);
    }
    Ok(out)
}
