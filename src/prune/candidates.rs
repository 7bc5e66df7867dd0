//! The candidates of each round of the greedy choice: every block that may still be given up with its plain fit.

use anyhow::{Context, Result, bail};

use super::recipe::PruneRecipe;
use crate::{
    calibrate::{self, Calibrator, NoisedSplit, stats::CalibrationStats},
    fit::layers::{LayerMap, Layers},
    layout::BlockId,
    model::{Block, Trunk},
    score::{ablation::Candidates, measure::plain_fit},
};

/// Rows for each channel that fits are made of in the rounds after the first. A fit of so few is worse than one of many, and
/// alike for all candidates: the bundled model loses the same blocks at 20, 33, 40 and 50 % as with half as many again.
const ROWS_PER_CHANNEL: usize = 16;

/// Fits every block in the first round; in later ones again those that are tried, on the activations of the trunk with the
/// earlier choices replaced, if the recipe says so.
pub(super) struct RefitCandidates<'a> {
    pub(super) calibrator: &'a Calibrator<'a>,
    pub(super) recipe: &'a PruneRecipe,
    pub(super) noised: &'a NoisedSplit,
    pub(super) protect: &'a [BlockId],
    /// The original's own statistics, until the first round has used them.
    pub(super) stats: Option<CalibrationStats>,
    pub(super) first: Option<(CalibrationStats, LayerMap)>,
    /// What a later round's fits are made of; `None`: they are the first round's.
    pub(super) behind: Option<CalibrationStats>,
}

impl Candidates for RefitCandidates<'_> {
    fn begin(&mut self, trunk: &Trunk, chosen: &[BlockId]) -> Result<Vec<usize>> {
        if let Some(stats) = self.stats.take() {
            self.first = Some(self.fit_all(stats)?);
        } else if self.recipe.score.refit_between_rounds != Some(false) {
            self.behind = None; // gigabytes for a wide model
            self.behind = Some(self.gather_behind(trunk)?);
        }
        let entries = trunk.entries().iter().enumerate();
        let free = entries.filter(|(_, (spec, _))| {
            let id = spec.id();
            let fitted = self
                .first
                .as_ref()
                .is_some_and(|(_, f)| f.contains_key(&id));
            fitted && !chosen.contains(&id) && !self.protect.contains(&id)
        });
        Ok(free.map(|(index, _)| index).collect())
    }

    fn fit(&mut self, trunk: &Trunk, index: usize) -> Result<Block> {
        let (spec, _) = trunk.entries().get(index).context("no such block")?;
        let id = spec.id();
        let runtime = self.calibrator.runtime;
        let place = |layers: &Layers| layers.block(&runtime.device, runtime.dtype);
        match (&self.behind, &self.first) {
            (Some(stats), _) => {
                let block = stats.get(id).context("a candidate without statistics")?;
                place(&plain_fit(block, self.recipe.fit.ridge)?)
            }
            (None, Some((_, fits))) => place(fits.get(&id).context("a candidate without a fit")?),
            (None, None) => bail!("candidates are fitted after a round has begun"),
        }
    }
}

impl RefitCandidates<'_> {
    /// The plain fit of every block that has sums, and the statistics without these.
    fn fit_all(&self, mut stats: CalibrationStats) -> Result<(CalibrationStats, LayerMap)> {
        let known: Vec<_> = stats.blocks.iter().filter(|b| b.img.has_sums()).collect();
        let reporter = &self.calibrator.pipeline.reporter;
        let progress = reporter.progress(known.len(), "fitting every block");
        let mut fits = LayerMap::new();
        for block in known {
            fits.insert(block.id, plain_fit(block, self.recipe.fit.ridge)?);
            progress.inc(1);
        }
        progress.finish_and_clear();
        stats.forget_products(); // gigabytes for a wide model, and not needed any more
        Ok((stats, fits))
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
