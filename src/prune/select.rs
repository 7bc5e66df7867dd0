//! Chooses which blocks to give up: greedily, by running the model, or once, by scores that were measured before.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::{
    budget::{Budget, Goal},
    candidates::RefitCandidates,
    plan::PruningPlan,
    recipe::PruneRecipe,
};
use crate::{
    calibrate::{Calibrator, NoisedSplit, held_out::HeldOut, stats::CalibrationStats},
    checkpoint::record,
    fit::layers::LayerMap,
    layout::BlockId,
    pipeline::Pipeline,
    score::{
        Metric, Scores,
        ablation::{Greedy, greedy},
    },
};

/// What calibration and scoring found.
pub struct GreedySelection {
    /// The scalar sums of every block.
    pub stats: CalibrationStats,
    /// The plain fit of every block on the original's activations.
    pub fits: LayerMap,
    /// The choices, and the importance of every block.
    pub greedy: Greedy,
}

/// A plan, and what is known of the importance of blocks.
#[derive(Clone, Debug)]
pub struct RankedPlan {
    /// The plan.
    pub plan: PruningPlan,
    /// Importance of every block; empty if the plan was given.
    pub importance: BTreeMap<BlockId, f64>,
}

/// Scores all blocks and chooses among those that are not protected until the budget is reached.
fn greedy_selection(
    calibrator: &Calibrator,
    recipe: &PruneRecipe,
    stats: CalibrationStats,
    noised: &NoisedSplit,
    held_out: &HeldOut,
    budget: &Budget,
    protect: &[BlockId],
) -> Result<GreedySelection> {
    let mut refits = RefitCandidates {
        calibrator,
        recipe,
        noised,
        protect,
        stats: Some(stats),
        first: None,
    };
    let blocks = calibrator.flux.trunk.len();
    // the first round measures every block, later ones a handful
    let rounds = match budget.goal {
        Goal::Blocks(count) => count,
        _ => blocks / 5,
    };
    let steps = (blocks + 6 * rounds.saturating_sub(1)) * held_out.batches();
    let progress = calibrator.pipeline.reporter.progress(steps, "scoring");
    let greedy = greedy(&calibrator.flux, &mut refits, held_out, budget, &progress)?;
    calibrator
        .pipeline
        .reporter
        .done(&progress, "scored and chose blocks");
    let (stats, fits) = refits.first.context("no block was scored")?;
    Ok(GreedySelection {
        stats,
        fits,
        greedy,
    })
}

/// Chooses blocks by running the model, one after another.
///
/// # Errors
/// When too few blocks have sums, a forward fails, or every candidate makes the velocity NaN or infinite.
pub fn by_model(
    calibrator: &Calibrator,
    recipe: &PruneRecipe,
    stats: CalibrationStats,
    noised: &NoisedSplit,
    held_out: &HeldOut,
    budget: &Budget,
    protect: &[BlockId],
) -> Result<(GreedySelection, PruningPlan)> {
    let known = stats.blocks.iter().filter(|b| b.img.has_sums());
    let candidates: Vec<BlockId> = known
        .map(|b| b.id)
        .filter(|id| !protect.contains(id))
        .collect();
    budget.check(&candidates).with_context(|| {
        let count = candidates.len();
        format!("{count} blocks have sums and may be chosen (see --stats-memory, --protect)")
    })?;
    let selection = greedy_selection(calibrator, recipe, stats, noised, held_out, budget, protect)?;
    let chosen: Vec<BlockId> = selection.greedy.choices.iter().map(|c| c.block).collect();
    let reason = format!(
        "greedy: {} of {} blocks, each the one whose replacement by its linear fit costs the final velocity least",
        chosen.len(),
        calibrator.pipeline.config.original_ids().count()
    );
    let source = record::fingerprint(&calibrator.pipeline.transformer)?;
    let plan = budget.plan(&chosen, source, reason);
    Ok((selection, plan))
}

/// Ranks by scores that were measured before.
///
/// # Errors
/// When they are of another model, lack the metric, or the goal cannot be reached.
pub fn by_scores(
    pipeline: &Pipeline,
    budget: &Budget,
    protect: &[BlockId],
    scores: &Scores,
    metric: Option<Metric>,
) -> Result<RankedPlan> {
    let source = record::fingerprint(&pipeline.transformer)?;
    ensure!(
        scores.source == source,
        "--scores: the scores are of another model (`{}`, fingerprint {}; this one has {source})\nhint: run `fastflux score` on this model",
        scores.model,
        scores.source
    );
    let metric = metric.unwrap_or(scores.metric);
    scores
        .check_blocks(&pipeline.config.kept_ids())
        .context("--scores")?;
    let all = scores.importance(metric).context("--scores")?;
    let free: BTreeMap<BlockId, f64> = all
        .iter()
        .filter(|(id, _)| !protect.contains(id))
        .map(|(id, value)| (*id, *value))
        .collect();
    let chosen = budget.knapsack(&free)?;
    let reason = format!(
        "ranked once by {metric}: the {} of {} blocks of least importance that reach the goal",
        chosen.len(),
        pipeline.config.original_ids().count()
    );
    Ok(RankedPlan {
        plan: budget.plan(&chosen, source, reason),
        importance: all,
    })
}
