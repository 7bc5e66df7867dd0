//! The candidates of each round of the greedy choice: every block that may still be given up with its plain fit.

use std::collections::BTreeMap;

use anyhow::Result;

use super::recipe::PruneRecipe;
use crate::{
    calibrate::{self, Calibrator, NoisedSplit, stats::CalibrationStats},
    fit::layers::LayerMap,
    layout::BlockId,
    model::{Block, Trunk},
    score::{ablation::Candidates, measure::plain_fit},
};

/// Rows for each channel that fits are made of in the rounds after the first. A fit of so few is worse than one of many, and
/// alike for all candidates: the bundled model loses the same blocks at 20, 33, 40 and 50 % as with half as many again.
const ROWS_PER_CHANNEL: usize = 16;

/// Fits every block in the first round; in later ones again, on the activations of the trunk with the earlier choices
/// replaced, if the recipe says so.
pub(super) struct RefitCandidates<'a> {
    pub(super) calibrator: &'a Calibrator<'a>,
    pub(super) recipe: &'a PruneRecipe,
    pub(super) noised: &'a NoisedSplit,
    pub(super) protect: &'a [BlockId],
    /// The original's own statistics, until the first round has used them.
    pub(super) stats: Option<CalibrationStats>,
    pub(super) first: Option<(CalibrationStats, LayerMap)>,
}

impl Candidates for RefitCandidates<'_> {
    fn fit(&mut self, trunk: &Trunk, chosen: &[BlockId]) -> Result<BTreeMap<usize, Block>> {
        let (first, mut stats) = match (self.stats.take(), &self.first) {
            (Some(stats), _) => (true, stats),
            (None, Some((_, fits))) if self.recipe.score.refit_between_rounds == Some(false) => {
                return self.blocks(trunk, fits, chosen);
            }
            (None, _) => (false, self.gather_behind(trunk)?),
        };
        let mut fits = LayerMap::new();
        for (spec, _) in trunk.entries() {
            let block = stats.get(spec.id());
            let block = block.filter(|b| b.img.has_sums() && !chosen.contains(&b.id));
            if let Some(block) = block {
                fits.insert(block.id, plain_fit(block, self.recipe.fit.ridge)?);
            }
        }
        let blocks = self.blocks(trunk, &fits, chosen)?;
        if first {
            stats.forget_products(); // gigabytes for a wide model, and not needed any more
            self.first = Some((stats, fits));
        }
        Ok(blocks)
    }
}

impl RefitCandidates<'_> {
    /// The fits of those that may still be given up, by trunk entry.
    fn blocks(
        &self,
        trunk: &Trunk,
        fits: &LayerMap,
        chosen: &[BlockId],
    ) -> Result<BTreeMap<usize, Block>> {
        let runtime = self.calibrator.runtime;
        let mut out = BTreeMap::new();
        for (index, (spec, _)) in trunk.entries().iter().enumerate() {
            let id = spec.id();
            let free = !chosen.contains(&id) && !self.protect.contains(&id);
            if let Some(layers) = fits.get(&id).filter(|_| free) {
                out.insert(index, layers.block(&runtime.device, runtime.dtype)?);
            }
        }
        Ok(out)
    }

    /// The statistics behind the earlier choices, from part of the noised latents.
    fn gather_behind(&self, trunk: &Trunk) -> Result<CalibrationStats> {
        let calibrator = self.calibrator;
        let width = calibrator.pipeline.config.hidden_size;
        let fewest = calibrator
            .options
            .size
            .tokens()
            .min(calibrator.options.text_tokens);
        let rows = ROWS_PER_CHANNEL * width;
        let noised = self.noised.fit.first(rows.div_ceil(fewest.max(1)));
        let batch = calibrator.options.batch;
        let progress = calibrator
            .pipeline
            .reporter
            .progress(noised.batches(batch).len(), "calibrating");
        let stats = calibrate::gather_behind(
            &calibrator.flux,
            trunk,
            self.empty(),
            &noised,
            batch,
            calibrator.runtime,
            &progress,
        )?;
        progress.finish_and_clear();
        Ok(stats)
    }

    /// Empty sums for the candidates: the blocks whose sums were kept in the first round.
    fn empty(&self) -> CalibrationStats {
        let candidates = self.first.iter().flat_map(|(_, fits)| fits.keys().copied());
        CalibrationStats::new(&self.calibrator.pipeline.config.layout, true)
            .with_products_of(candidates)
    }
}
