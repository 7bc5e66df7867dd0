//! `verify`: a model's own numbers against tensors recorded from diffusers.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::{
    cli::VerifyArgs,
    ui::{self, Reporter},
    verify::{self, Reference, target},
};

/// Exit status 1 if a tensor is off.
pub(super) fn run(args: &VerifyArgs, reporter: &Reporter) -> Result<ExitCode> {
    if let (Some(program), Some(file)) = (args.target, &args.file) {
        let report = target::check(program, file)?;
        super::show(args.print, &report, || report.text())?;
        return Ok(ExitCode::from(u8::from(!report.opens)));
    }
    verify::check_tolerance(args.tolerance)?;
    let reference = args
        .reference
        .as_deref()
        .context("--reference is missing")?;
    let runtime = super::runtime(args.run)?;
    let reference = Reference::open(reference)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline, reporter))?;
    let report = verify::run(&pipeline, &reference, args.tolerance, &runtime)?;
    if args.print.json {
        ui::json(&report)?;
    } else {
        ui::data(report.table())?;
        reporter.note(report.verdict(&runtime.to_string()));
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}
