//! Chooses which blocks to give up: greedily, by running the model, or once, by scores that were measured before.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::{
    budget::{Budget, Goal},
    candidates::RefitCandidates,
    curve::RatioPlan,
    plan::{PruningPlan, blocks_of_ratio},
    recipe::PruneRecipe,
};
use crate::{
    calibrate::{
        Calibrator, NoisedSplit, held_out::HeldOut, run::RunOptions, stats::CalibrationStats,
    },
    checkpoint::record,
    fit::layers::LayerMap,
    layout::{BlockId, FluxConfig, Form},
    pipeline::Pipeline,
    score::{
        Metric, Scores,
        ablation::{Choice, Greedy, greedy},
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
        behind: None,
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

/// A ranking, and the blocks in the order in which they were given up.
pub struct Ranking {
    /// Plan and importance.
    pub ranked: RankedPlan,
    /// Blocks with the velocity error up to each; empty if the model was not run.
    choices: Vec<Choice>,
}

impl Ranking {
    /// One that was not made by running the model.
    pub fn new(ranked: RankedPlan) -> Self {
        Self {
            ranked,
            choices: Vec::new(),
        }
    }

    /// The plan of each ratio, ascending, cut from the one of the largest; with `collapse`, neighbours become one layer.
    ///
    /// # Errors
    /// When a ratio rounds to no block.
    pub fn of_ratios(
        &self,
        ratios: &[f64],
        config: &FluxConfig,
        collapse: bool,
    ) -> Result<Vec<RatioPlan>> {
        let plan = &self.ranked.plan;
        let order: Vec<BlockId> = if self.choices.is_empty() {
            let mut blocks: Vec<BlockId> = plan.blocks().collect();
            let importance = |id: &BlockId| self.ranked.importance.get(id).copied();
            blocks.sort_by(|a, b| {
                let (a, b) = (importance(a), importance(b));
                a.unwrap_or(f64::MAX).total_cmp(&b.unwrap_or(f64::MAX))
            });
            blocks
        } else {
            self.choices.iter().map(|choice| choice.block).collect()
        };
        let mut ratios = ratios.to_vec();
        ratios.sort_by(f64::total_cmp);
        ratios.dedup();
        let first = plan.replace.first();
        let (form, joint) = first.map_or((Form::Linear, false), |r| (r.form, r.joint));
        ratios
            .into_iter()
            .map(|ratio| {
                let count = blocks_of_ratio(ratio, config)?.min(order.len());
                let reason = format!("{} at ratio {ratio}", plan.reason);
                let blocks = order[..count].to_vec();
                Ok(RatioPlan {
                    ratio,
                    plan: PruningPlan::new(
                        config,
                        plan.source.clone(),
                        blocks,
                        form,
                        joint,
                        collapse,
                        reason,
                    ),
                    velocity_error: self.choices.get(count.wrapping_sub(1)).map(|c| c.error),
                })
            })
            .collect()
    }
}

/// Calibrates (or opens the statistics) and chooses blocks by running the model.
///
/// # Errors
/// As [`by_model`].
pub fn rank(
    calibrator: &Calibrator,
    recipe: &PruneRecipe,
    run: &RunOptions,
    budget: &Budget,
    protect: &[BlockId],
) -> Result<Ranking> {
    let calibration = calibrator.load_or_run(run)?;
    let noised = calibrator.noised(&calibration)?;
    let settings = recipe.comparison(budget, protect)?;
    let held_out = calibrator.compared_in(run, &noised, &settings)?;
    let stats = calibration.stats;
    let (selection, plan) = by_model(
        calibrator, recipe, stats, &noised, &held_out, budget, protect,
    )?;
    Ok(Ranking {
        ranked: RankedPlan {
            plan,
            importance: selection.greedy.alone,
        },
        choices: selection.greedy.choices,
    })
}
