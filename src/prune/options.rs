//! Everything that a pruning run is asked for: recipe, goal, calibration, and what is written where.

use std::path::PathBuf;

use super::{goal::GoalOptions, projections::RefitProjections, recipe::PruneRecipe};
use crate::{
    calibrate::options::{CalibrationOptions, ResolvedOptions},
    checkpoint::output::Naming,
    pipeline::{Pipeline, whole::Copying},
};

/// A pruning run as it is asked for.
#[derive(Clone, Debug, Default)]
pub struct PruneOptions {
    /// How blocks are chosen and layers are fitted.
    pub recipe: PruneRecipe,
    /// How far.
    pub goal: GoalOptions,
    /// What is looked at.
    pub calibration: CalibrationOptions,
    /// Folder to write.
    pub output: PathBuf,
    /// Whether an existing folder is replaced.
    pub force: bool,
    /// Whose names the tensors have.
    pub layout: Naming,
    /// How the other parts of the pipeline get into the folder, if they shall be there.
    pub whole: Option<Copying>,
    /// Whether a patch is written in place of the whole checkpoint.
    pub patch: bool,
    /// FitSplit of pixels of the bands that images are decoded in; 0: at once; `None`: as fits.
    pub vae_tile: Option<usize>,
}

impl PruneRecipe {
    /// Fills in what the recipe leaves open, so that it says what was used.
    pub fn resolve(&mut self, pipeline: &Pipeline, resolved: &ResolvedOptions) {
        self.calibration = resolved.recipe.clone();
        self.score.held_out = Some(resolved.compared);
        let width = pipeline.config.hidden_size;
        self.score
            .refit_between_rounds
            .get_or_insert(width <= NARROW);
        let default = RefitProjections::for_width(width);
        self.fit.refit_projections.get_or_insert(default);
    }
}

/// Width up to which fitting all candidates again between rounds takes seconds.
const NARROW: usize = 1024;
