//! Calibrates a session, scores its blocks and chooses which to give up.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::session::{AllStates, Session};
use crate::{
    calibrate::{
        self,
        stats::{BlockStats, CalibrationStats, StreamStats},
    },
    layout::{BlockId, BlockSpec},
    model::{Block, Trunk},
    prune::{
        budget::{Budget, Goal},
        fit,
        layers::{Fitted, LayerMap, Layers},
        recipe::PruneRecipe,
    },
    score::ablation::{Candidates, Greedy, HeldOut, greedy},
    ui,
};

/// Ridge of the fits that blocks are compared by.
const SCORING_RIDGE: f64 = 1e-4;
/// Rows for each channel that fits are made of in the rounds after the first: at 48 the error of a fit is a few
/// percent above that of many more, and alike for all candidates.
const ROWS_PER_CHANNEL: usize = 48;

/// What calibration and scoring found.
pub(super) struct Selection {
    pub(super) stats: CalibrationStats,
    /// The plain fit of every block on the original's activations.
    pub(super) fits: LayerMap,
    pub(super) greedy: Greedy,
}

/// Fits every block in the first round; in later ones again, on the activations of the trunk with the earlier choices
/// replaced, where the recipe says so.
struct Refits<'a> {
    session: &'a Session<'a>,
    recipe: &'a PruneRecipe,
    states: &'a AllStates,
    protect: &'a [BlockId],
    /// The original's own statistics, until the first round has used them.
    stats: Option<CalibrationStats>,
    first: Option<(CalibrationStats, LayerMap)>,
}

impl Candidates for Refits<'_> {
    fn fit(&mut self, trunk: &Trunk, chosen: &[BlockId]) -> Result<BTreeMap<usize, Block>> {
        let (first, mut stats) = match (self.stats.take(), &self.first) {
            (Some(stats), _) => (true, stats),
            (None, Some((_, fits))) if self.recipe.score.refit == Some(false) => {
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
            stats.forget_products(); // gigabytes for a wide model, and nobody needs them any more
            self.first = Some((stats, fits));
        }
        Ok(blocks)
    }
}

impl Refits<'_> {
    /// The fits of those that may still be given up, by trunk entry.
    fn blocks(
        &self,
        trunk: &Trunk,
        fits: &LayerMap,
        chosen: &[BlockId],
    ) -> Result<BTreeMap<usize, Block>> {
        let runtime = self.session.runtime;
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

    /// The statistics behind the earlier choices, from part of the states.
    fn gather_behind(&self, trunk: &Trunk) -> Result<CalibrationStats> {
        let session = self.session;
        let width = session.pipeline.config.hidden_size;
        let fewest = session
            .settings
            .size
            .tokens()
            .min(session.settings.text_tokens);
        let rows = ROWS_PER_CHANNEL * width;
        let states = self.states.fit.first(rows.div_ceil(fewest.max(1)));
        let batch = session.settings.batch;
        let progress = ui::progress(states.batches(batch).len(), "calibrating");
        let stats = calibrate::gather_behind(
            &session.flux,
            trunk,
            self.empty(),
            &states,
            batch,
            session.runtime,
            &progress,
        )?;
        progress.finish_and_clear();
        Ok(stats)
    }

    /// Empty sums for the candidates: the blocks whose sums were kept in the first round.
    fn empty(&self) -> CalibrationStats {
        let candidates = self.first.iter().flat_map(|(_, fits)| fits.keys().copied());
        CalibrationStats::new(&self.session.pipeline.config.layout, true)
            .with_products_of(candidates)
    }
}

/// Scores all blocks and chooses among those that are not protected until the budget is reached.
pub(super) fn select(
    session: &Session,
    recipe: &PruneRecipe,
    stats: CalibrationStats,
    states: &AllStates,
    held_out: &HeldOut,
    budget: &Budget,
    protect: &[BlockId],
) -> Result<Selection> {
    let mut refits = Refits {
        session,
        recipe,
        states,
        protect,
        stats: Some(stats),
        first: None,
    };
    let blocks = session.flux.trunk.len();
    // the first round measures every block, later ones a handful
    let rounds = match budget.goal {
        Goal::Blocks(count) => count,
        _ => blocks / 5,
    };
    let steps = (blocks + 6 * rounds.saturating_sub(1)) * held_out.batches();
    let progress = ui::progress(steps, "scoring");
    let greedy = greedy(&session.flux, &mut refits, held_out, budget, &progress)?;
    ui::done(&progress, "scored and chose blocks");
    let (stats, fits) = refits.first.context("no block was scored")?;
    Ok(Selection {
        stats,
        fits,
        greedy,
    })
}

/// Whether an entry of the layout is a block of the original model.
pub(super) fn is_original(spec: &BlockSpec) -> bool {
    matches!(spec, BlockSpec::Original(_))
}

/// The plain layers of a block from its statistics alone.
pub(super) fn plain_fit(block: &BlockStats, ridge: Option<f64>) -> Result<Layers> {
    let fit = |stats: &StreamStats| -> Result<Box<Fitted>> {
        let sums = stats
            .sums()?
            .with_context(|| format!("block {}: no tokens were seen", block.id))?;
        let solution = fit::solve(&sums, ridge.unwrap_or(SCORING_RIDGE))
            .with_context(|| format!("block {}", block.id))?;
        let width = solution.coefficients.ncols();
        Ok(Box::new(Fitted {
            weight: fit::weight(&solution.coefficients, 0..width)?,
            bias: fit::bias(&solution.coefficients)?,
            vec: None,
            modulation: None,
            error: solution.residual_sq / sums.target_sq.max(f64::MIN_POSITIVE),
            ridge: solution.ridge,
        }))
    };
    Ok(Layers::Streams {
        txt: fit(&block.txt)?,
        img: fit(&block.img)?,
    })
}
