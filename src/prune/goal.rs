//! What to prune: a plan as it was given, or the blocks that a goal takes.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::{
    budget::{Budget, Goal},
    estimate::Workload,
    plan::{self, PruningPlan},
    recipe::PruneRecipe,
};
use crate::{
    calibrate::options::ResolvedOptions, checkpoint::record, device::Runtime, layout::BlockId,
    pipeline::Pipeline,
};

/// How far to prune, as it is asked for: the first that is given counts, otherwise the recipe's ratio.
#[derive(Clone, Debug, Default)]
pub struct GoalOptions {
    /// A plan to carry out, as a file.
    pub plan: Option<PathBuf>,
    /// Just these blocks, such as `double.05,single.20-24`.
    pub blocks: Option<String>,
    /// At most this many parameters.
    pub parameters: Option<u64>,
    /// At most this many bytes of device memory while generating.
    pub memory: Option<u64>,
    /// At least this many times faster, by arithmetic.
    pub speedup: Option<f64>,
    /// Blocks that are never replaced.
    pub protect: Option<String>,
}

impl GoalOptions {
    /// Rounds of scoring that finding the blocks takes, about; 0 if they are named.
    ///
    /// # Errors
    /// When the ratio rounds to no block.
    pub fn rounds(&self, recipe: &PruneRecipe, pipeline: &Pipeline) -> Result<usize> {
        let config = &pipeline.config;
        if self.plan.is_some() || self.blocks.is_some() {
            Ok(0)
        } else if self.parameters.or(self.memory).is_some() || self.speedup.is_some() {
            Ok(config.kept_ids().len() / 5)
        } else {
            Ok(plan::blocks_of_ratio(recipe.ratio, config)?)
        }
    }
}

/// What to replace.
#[derive(Clone, Debug)]
pub enum PruneTarget {
    /// Just this.
    Plan(PruningPlan),
    /// What the goal takes, but none of `protect`.
    Goal {
        /// How far.
        goal: Goal,
        /// Blocks that stay.
        protect: Vec<BlockId>,
    },
}

impl PruneTarget {
    /// What `options` and the recipe ask for of a model.
    ///
    /// # Errors
    /// When a plan cannot be read or is of another model, a block is named that the model does not have, or a number is
    /// out of range.
    pub fn new(options: &GoalOptions, recipe: &PruneRecipe, pipeline: &Pipeline) -> Result<Self> {
        let config = &pipeline.config;
        if let Some(path) = &options.plan {
            return Self::given(PruningPlan::read(path)?, pipeline);
        }
        if let Some(text) = &options.blocks {
            let blocks = plan::parse_blocks("--blocks", text, config)?;
            let source = record::fingerprint(&pipeline.transformer)?;
            let f = &recipe.fit;
            let reason = format!("--blocks {text}");
            let plan =
                PruningPlan::new(config, source, blocks, f.form, f.joint, f.collapse, reason);
            plan.validate(config)?;
            return Ok(Self::Plan(plan));
        }
        let protect = options.protect.as_deref();
        let protect = protect.map(|text| plan::parse_blocks("--protect", text, config));
        let goal = if let Some(most) = options.parameters {
            Goal::Parameters(most)
        } else if let Some(most) = options.memory {
            Goal::Memory(most)
        } else if let Some(factor) = options.speedup {
            Goal::SpeedUp(factor)
        } else {
            Goal::Blocks(plan::blocks_of_ratio(recipe.ratio, config)?)
        };
        Ok(Self::Goal {
            goal,
            protect: protect.transpose()?.unwrap_or_default(),
        })
    }

    /// A plan that was made before, checked against the model.
    ///
    /// # Errors
    /// When it does not fit the model or was made for another one.
    pub fn given(plan: PruningPlan, pipeline: &Pipeline) -> Result<Self> {
        plan.validate(&pipeline.config)?;
        let found = record::fingerprint(&pipeline.transformer)?;
        ensure!(
            plan.source.is_empty() || plan.source == found,
            "--plan: the plan was made for another model (fingerprint {}, this one has {found})\nhint: empty its `source` to use it all the same",
            plan.source
        );
        Ok(Self::Plan(PruningPlan {
            source: found,
            ..plan
        }))
    }
}

/// Where the model is to run: what estimates count for.
pub fn workload(pipeline: &Pipeline, runtime: &Runtime, options: &ResolvedOptions) -> Workload {
    let file_bytes = pipeline.transformer.bytes() as f64;
    Workload {
        image_tokens: options.size.tokens(),
        text_tokens: options.text_tokens,
        element: runtime.dtype.size_in_bytes(),
        weight_bytes: pipeline.bytes_of_a_weight(runtime.dtype),
        file_bytes: file_bytes / pipeline.transformer.parameters().max(1) as f64,
    }
}

/// A goal for this model.
///
/// # Errors
/// When it cannot be reached with what is not protected, or is reached already.
pub fn budget<'a>(
    pipeline: &'a Pipeline,
    workload: Workload,
    recipe: &PruneRecipe,
    goal: Goal,
    protect: &[BlockId],
) -> Result<Budget<'a>> {
    let f = &recipe.fit;
    let budget = Budget {
        goal,
        config: &pipeline.config,
        workload,
        form: f.form,
        joint: f.joint,
        collapse: f.collapse,
    };
    let mut free = pipeline.config.kept_ids();
    free.retain(|id| !protect.contains(id));
    budget.check(&free)?;
    ensure!(
        !budget.reaches(&[]),
        "the model is within the budget as it is: there is nothing to prune"
    );
    Ok(budget)
}
