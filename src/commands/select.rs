//! Calibrates a session, scores its blocks and chooses which to give up.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::session::{AllStates, Session};
use crate::{
    calibrate::{
        self,
        stats::{BlockStats, CalibrationStats, StreamStats},
    },
    layout::BlockId,
    model::{Block, Trunk},
    prune::{
        fit,
        layers::{Fitted, LayerMap, Layers},
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

/// Fits every block anew in each round, on the activations of the trunk with the earlier choices replaced.
struct Refits<'a> {
    session: &'a Session<'a>,
    states: &'a AllStates,
    protect: &'a [BlockId],
    first: Option<(CalibrationStats, LayerMap)>,
}

impl Candidates for Refits<'_> {
    fn fit(&mut self, trunk: &Trunk, chosen: &[BlockId]) -> Result<BTreeMap<usize, Block>> {
        let session = self.session;
        let first = self.first.is_none();
        let width = session.pipeline.config.hidden_size;
        let fewest = session.size.tokens().min(session.text_tokens()?).max(1);
        let states = if first {
            self.states.fit.clone()
        } else {
            self.states
                .fit
                .first((ROWS_PER_CHANNEL * width).div_ceil(fewest))
        };
        let layout = &session.pipeline.config.layout;
        let progress = ui::progress(states.batches(session.batch).len(), "calibrating");
        let pruned = (!first).then_some(trunk);
        let stats = calibrate::gather(
            &session.flux,
            pruned,
            layout,
            &states,
            session.batch,
            session.runtime,
            &progress,
        )?;
        if first {
            ui::done(&progress, format!("calibrated on {} states", states.len()));
        } else {
            progress.finish_and_clear();
        }
        let mut fits = LayerMap::new();
        let mut blocks = BTreeMap::new();
        for (index, (spec, _)) in trunk.entries().iter().enumerate() {
            let id = spec.id();
            let Some(block) = stats.get(id).filter(|_| !chosen.contains(&id)) else {
                continue;
            };
            let layers = plain_fit(block, session.recipe.fit.ridge)?;
            if !self.protect.contains(&id) {
                blocks.insert(
                    index,
                    layers.block(&session.runtime.device, session.runtime.dtype)?,
                );
            }
            fits.insert(id, layers);
        }
        if first {
            self.first = Some((stats, fits));
        }
        Ok(blocks)
    }
}

/// Calibrates, scores all blocks and chooses `count` of those that are not protected.
pub(super) fn select(
    session: &Session,
    states: &AllStates,
    held_out: &HeldOut,
    count: usize,
    protect: &[BlockId],
) -> Result<Selection> {
    let mut refits = Refits {
        session,
        states,
        protect,
        first: None,
    };
    let blocks = session.flux.trunk.len();
    // the first round measures every block, later ones a handful
    let progress = ui::progress(
        (blocks + 6 * count.saturating_sub(1)) * held_out.batches(),
        "scoring",
    );
    let greedy = greedy(&session.flux, &mut refits, held_out, count, &progress)?;
    ui::done(&progress, "scored and chose blocks");
    let (stats, fits) = refits.first.context("no block was scored")?;
    Ok(Selection {
        stats,
        fits,
        greedy,
    })
}

/// The plain layers of a block from its statistics alone.
fn plain_fit(block: &BlockStats, ridge: Option<f64>) -> Result<Layers> {
    let fit = |stats: &StreamStats| -> Result<Box<Fitted>> {
        let sums = stats
            .gram
            .as_ref()
            .with_context(|| format!("block {}: no tokens were seen", block.id))?;
        let solution = fit::solve(sums, ridge.unwrap_or(SCORING_RIDGE))
            .with_context(|| format!("block {}", block.id))?;
        let width = solution.coefficients.ncols();
        Ok(Box::new(Fitted {
            weight: fit::weight(&solution.coefficients, 0..width)?,
            bias: fit::bias(&solution.coefficients)?,
            vec: None,
            modulation: None,
            error: solution.residual_sq / stats.moments.change_sq.max(f64::MIN_POSITIVE),
            ridge: solution.ridge,
        }))
    };
    Ok(Layers::Streams {
        txt: fit(&block.txt)?,
        img: fit(&block.img)?,
    })
}
