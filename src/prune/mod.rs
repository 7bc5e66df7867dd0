//! Importance and statistics → a plan, fitted layers, and the pruned checkpoint.
//!
//! `goal` says what is asked for, `select` chooses blocks, [`prune`] carries a plan out, `run` does all of it into a folder.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use self::{fitting::Fitting, plan::PruningPlan, recipe::PruneRecipe, sequential::Fits};
use crate::{
    calibrate::{Calibrator, NoisedSplit},
    checkpoint::{Checkpoint, record::Record},
    layout::FluxConfig,
    model::Flux,
    ui,
};

mod activations;
pub mod apply;
pub mod budget;
mod candidates;
pub mod card;
pub mod curve;
pub mod estimate;
pub mod fitting;
pub mod goal;
pub mod options;
pub mod plan;
pub mod plan_run;
pub mod projections;
pub mod recipe;
mod replacement;
pub mod report;
pub mod run;
pub mod select;
pub mod sequential;
mod stream_store;
mod trunk;

/// A plan carried out on a model.
#[derive(Clone, Debug)]
pub struct Pruned {
    /// The plan.
    pub plan: PruningPlan,
    /// Fitted layers and projections.
    pub fits: Fits,
    /// The pruned transformer's tensors, as the model stores them.
    pub checkpoint: Checkpoint,
    /// Its sizes and layout.
    pub config: FluxConfig,
    /// What to write about it.
    pub record: Record,
}

/// Carries out `plan`: fits its layers on `noised`, and what is kept behind them as `recipe` says. Token streams that find no
/// room in memory lie in a temporary file in the folder `scratch` meanwhile.
///
/// # Errors
/// When the plan does not fit the model, a forward fails, or activations are NaN or infinite.
pub fn prune(
    calibrator: &Calibrator,
    recipe: &PruneRecipe,
    plan: PruningPlan,
    noised: &NoisedSplit,
    scratch: &Path,
) -> Result<Pruned> {
    let (pipeline, options) = (calibrator.pipeline, &calibrator.options);
    let fitting = Fitting::new(calibrator, recipe, scratch)?;
    let flux = &calibrator.flux;
    let batches = noised.fit.batches(options.batch).len();
    let steps = sequential::steps(&flux.trunk, batches, &plan.replace, &fitting);
    let progress = pipeline.reporter.progress(steps, "fitting");
    let fits = sequential::fit_layers(
        flux,
        &noised.fit,
        &plan.replace,
        fitting,
        calibrator.runtime,
        &progress,
    )?;
    let layers = ui::counted(plan.replace.len(), "layer");
    pipeline
        .reporter
        .done(&progress, format!("fitted {layers} on the pruned prefix"));
    let (mut checkpoint, config) =
        apply::apply(&pipeline.transformer, &pipeline.config, &plan, &fits.layers)?;
    apply::put_output_projections(&mut checkpoint, &config, &fits.output_projections)?;
    let record = pipeline.record_of(&config, json!({ "prune": recipe, "plan": plan }))?;
    Ok(Pruned {
        plan,
        fits,
        checkpoint,
        config,
        record,
    })
}

impl Pruned {
    /// The model with the layers in place.
    ///
    /// # Errors
    /// When they do not fit on the device.
    pub fn flux(&self, calibrator: &Calibrator) -> Result<Flux> {
        let (flux, runtime) = (&calibrator.flux, calibrator.runtime);
        let mut out = trunk::pruned(flux, &self.plan.replace, &self.fits.layers, runtime)?;
        projections::put(&mut out, &self.fits.output_projections, runtime)?;
        Ok(out)
    }
}
