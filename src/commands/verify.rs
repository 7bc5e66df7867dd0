//! `verify`: a model's own numbers against tensors recorded from diffusers.

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    cli::VerifyArgs,
    ui,
    verify::{self, Reference},
};

/// Exit status 1 if a tensor is off.
pub(super) fn run(args: &VerifyArgs) -> Result<ExitCode> {
    verify::check_tolerance(args.tolerance)?;
    let runtime = super::runtime(args.run)?;
    let reference = Reference::open(&args.reference)?;
    let pipeline = super::open(&super::model_choice(&args.pipeline))?;
    let report = verify::run(&pipeline, &reference, args.tolerance, &runtime)?;
    if args.print.json {
        ui::json(&report)?;
    } else {
        ui::data(report.table())?;
        ui::note(match &report.first_off {
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
