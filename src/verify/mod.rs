//! Compares a model's own numbers with tensors recorded from diffusers: text encoders, every block, velocity, VAE, and
//! the whole pipeline.

use anyhow::{Result, ensure};

mod check;
mod coverage;
mod drawn;
mod images;
mod reference;
mod report;
pub mod target;

use check::Check;
pub use reference::Reference;
pub use report::{Comparison, Report};

use crate::{device::Runtime, pipeline::Pipeline};

/// Compares `pipeline` with everything that `reference` holds; `tolerance` is the largest relative error allowed, by
/// default 1e-5 (1e-4 for VAE and final latents), 2e-2 in half precision.
///
/// # Errors
/// When nothing can be compared, or the reference is not of this model.
pub fn run(
    pipeline: &Pipeline,
    reference: &Reference,
    tolerance: Option<f64>,
    runtime: &Runtime,
) -> Result<Report> {
    let guided = reference
        .negative_prompt()?
        .map(|(scale, negative)| pipeline.clone().with_negative_prompt(scale, negative))
        .transpose()?;
    let report = Check {
        reference,
        pipeline: guided.as_ref().unwrap_or(pipeline),
        runtime,
        tolerance,
        done: Vec::new(),
        skipped: Vec::new(),
        without: Vec::new(),
    }
    .run()?;
    ensure!(
        !report.tensors.is_empty(),
        "`{}` holds no tensor that this model can be compared with\nhint: record one with scripts/make_reference.py",
        reference.tensors.name
    );
    Ok(report)
}

/// Fails unless a tolerance is a number of at least 0.
///
/// # Errors
/// The message names the flag.
pub fn check_tolerance(tolerance: Option<f64>) -> Result<()> {
    if let Some(t) = tolerance {
        ensure!(
            t.is_finite() && t >= 0.0,
            "--tolerance {t}: expected a number of at least 0"
        );
    }
    Ok(())
}
