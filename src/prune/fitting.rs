//! How layers are fitted: what of the recipe and of the machine the fits depend on.

use std::path::Path;

use anyhow::{Context, Result};

use super::{projections::RefitProjections, recipe::PruneRecipe};
use crate::calibrate::{
    Calibrator,
    memory::{STREAMS_IN_MEMORY, bytes_of_kept},
};

/// How to fit.
#[derive(Clone, Copy, Debug)]
pub struct Fitting<'a> {
    /// Relative to the mean diagonal; `None`: for layers chosen by the residual on noised latents left out, for refits from
    /// the number of tokens.
    pub ridge: Option<f64>,
    /// On the activations of the already pruned prefix.
    pub sequential: bool,
    /// Output projections of what is kept that are refitted.
    pub refit_projections: RefitProjections,
    /// Noised latents in one forward.
    pub batch: usize,
    /// Tokens of each stream in one forward that sums are made of, evenly spread; `None`: all.
    pub tokens: Option<usize>,
    /// Bytes of token streams that may stay on a device of its own memory, if that is more than 2 GiB.
    pub on_device: u64,
    /// Bytes of token streams that may stay in host memory.
    pub in_memory: u64,
    /// Folder of the temporary file for token streams that find no room in memory.
    pub scratch: &'a Path,
}

impl<'a> Fitting<'a> {
    /// As `recipe` says, with token streams that find no room in memory in the folder `scratch`.
    ///
    /// # Errors
    /// When the recipe is not resolved.
    pub fn new(calibrator: &Calibrator, recipe: &PruneRecipe, scratch: &'a Path) -> Result<Self> {
        let (options, fit) = (&calibrator.options, &recipe.fit);
        Ok(Self {
            ridge: fit.ridge,
            sequential: fit.sequential,
            refit_projections: fit.refit_projections.context("what to refit is resolved")?,
            batch: options.batch,
            tokens: options.recipe.tokens_per_forward,
            // there were sums of calibration, which are gone now
            on_device: bytes_of_kept(&calibrator.pipeline.config, calibrator.stats_memory),
            in_memory: STREAMS_IN_MEMORY,
            scratch,
        })
    }
}
