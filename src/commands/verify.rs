//! `verify`: a model's own numbers against tensors recorded from diffusers.

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    cli::VerifyArgs,
    ui::{self, Reporter},
    verify::{self, Reference},
};

/// Exit status 1 if a tensor is off.
pub(super) fn run(args: &VerifyArgs, reporter: &Reporter) -> Result<ExitCode> {
    verify::check_tolerance(args.tolerance)?;
    let runtime = super::runtime(args.run)?;
    let reference = Reference::open(&args.reference)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline, reporter))?;
    let report = verify::run(&pipeline, &reference, args.tolerance, &runtime)?;
    if args.print.json {
        ui::json(&report)?;
    } else {
        ui::data(report.table())?;
        reporter.note(match &report.first_off {
            None => format!("all {} tensors agree ({runtime})", report.tensors.len()),
            Some(name) => format!("the first component that is off is `{name}` ({runtime})"),
        });
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}
