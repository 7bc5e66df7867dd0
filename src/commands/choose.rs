//! What a command is to prune: a plan as it was given, or blocks to choose for a goal.

use anyhow::{Context, Result, ensure};

use super::{
    select::{self, Selection},
    session::{AllStates, Session, Settings},
};
use crate::{
    calibrate::stats::CalibrationStats,
    checkpoint::record,
    cli::GoalArgs,
    device::Runtime,
    layout::BlockId,
    pipeline::Pipeline,
    prune::{
        budget::{Budget, Goal},
        forecast::Situation,
        plan::{self, PruningPlan, originals},
        recipe::PruneRecipe,
    },
    score::ablation::HeldOut,
};

/// What to replace.
pub(super) enum Wanted {
    /// Just this.
    Plan(PruningPlan),
    /// What the goal takes, but none of `protect`.
    Choose { goal: Goal, protect: Vec<BlockId> },
}

impl Wanted {
    /// From a plan, or from flags and recipe.
    pub(super) fn new(
        args: &GoalArgs,
        recipe: &PruneRecipe,
        pipeline: &Pipeline,
        given: Option<PruningPlan>,
    ) -> Result<Self> {
        let config = &pipeline.config;
        if let Some(plan) = given {
            plan.validate(config)?;
            let found = record::fingerprint(&pipeline.transformer)?;
            ensure!(
                plan.source.is_empty() || plan.source == found,
                "--plan: the plan was made for another model (fingerprint {}, this one has {found})\nhint: empty its `source` to use it all the same",
                plan.source
            );
            return Ok(Self::Plan(PruningPlan {
                source: found,
                ..plan
            }));
        }
        if let Some(text) = &args.blocks {
            let blocks = plan::parse_blocks("--blocks", text, config)?;
            let source = record::fingerprint(&pipeline.transformer)?;
            let f = &recipe.fit;
            let reason = format!("--blocks {text}");
            let plan =
                PruningPlan::new(config, source, blocks, f.form, f.joint, f.collapse, reason);
            plan.validate(config)?;
            return Ok(Self::Plan(plan));
        }
        let protect = args.protect.as_deref();
        let protect = protect.map(|text| plan::parse_blocks("--protect", text, config));
        let goal = if let Some(most) = args.budget_params {
            Goal::Parameters(most)
        } else if let Some(most) = args.budget_vram {
            Goal::Memory(most)
        } else if let Some(factor) = args.target_speedup {
            ensure!(
                factor.is_finite() && factor > 1.0,
                "--target-speedup {factor}: expected a factor above 1, such as 1.2"
            );
            Goal::SpeedUp(factor)
        } else {
            Goal::Blocks(plan::blocks_of_ratio(recipe.ratio, config)?)
        };
        Ok(Self::Choose {
            goal,
            protect: protect.transpose()?.unwrap_or_default(),
        })
    }
}

/// Where the model is to run: what forecasts count for.
pub(super) fn situation(pipeline: &Pipeline, runtime: &Runtime, settings: &Settings) -> Situation {
    let file_bytes = pipeline.transformer.bytes() as f64;
    Situation {
        image_tokens: settings.size.tokens(),
        text_tokens: settings.text_tokens,
        element: runtime.dtype.size_in_bytes(),
        weight_bytes: pipeline.bytes_of_a_weight(runtime.dtype),
        file_bytes: file_bytes / pipeline.transformer.parameters().max(1) as f64,
    }
}

/// A goal for this model; fails when it cannot be reached with what is not protected.
pub(super) fn budget<'a>(
    pipeline: &'a Pipeline,
    situation: Situation,
    recipe: &PruneRecipe,
    goal: Goal,
    protect: &[BlockId],
) -> Result<Budget<'a>> {
    let f = &recipe.fit;
    let budget = Budget {
        goal,
        config: &pipeline.config,
        situation,
        form: f.form,
        joint: f.joint,
        collapse: f.collapse,
    };
    let mut free = originals(&pipeline.config);
    free.retain(|id| !protect.contains(id));
    budget.check(&free)?;
    ensure!(
        !budget.reaches(&[]),
        "the model is within the budget as it is: there is nothing to prune"
    );
    Ok(budget)
}

/// Chooses blocks by running the model.
pub(super) fn choose(
    session: &Session,
    recipe: &PruneRecipe,
    stats: CalibrationStats,
    states: &AllStates,
    held_out: &HeldOut,
    budget: &Budget,
    protect: &[BlockId],
) -> Result<(Selection, PruningPlan)> {
    let known = stats.blocks.iter().filter(|b| b.img.has_sums());
    let candidates: Vec<BlockId> = known
        .map(|b| b.id)
        .filter(|id| !protect.contains(id))
        .collect();
    budget.check(&candidates).with_context(|| {
        let count = candidates.len();
        format!("{count} blocks have sums and may be chosen (see --stats-memory, --protect)")
    })?;
    let selection = select::select(session, recipe, stats, states, held_out, budget, protect)?;
    let chosen: Vec<BlockId> = selection.greedy.choices.iter().map(|c| c.block).collect();
    let reason = format!(
        "greedy: {} of {} blocks, each the one whose replacement by its linear fit costs the final velocity least",
        chosen.len(),
        session.pipeline.config.original_ids().count()
    );
    let source = record::fingerprint(&session.pipeline.transformer)?;
    let plan = budget.plan(&chosen, source, reason);
    Ok((selection, plan))
}
