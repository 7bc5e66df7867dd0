//! A plan carried out in memory, so that it can be judged without writing a model.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{goal::PruneTarget, plan::PruningPlan, prune, recipe::PruneRecipe};
use crate::{
    calibrate::{
        Calibrator,
        options::{CalibrationOptions, ResolvedOptions},
        run::RunOptions,
    },
    pipeline::{Pipeline, placement::MemoryBudget},
};

/// A plan that fits its model, not carried out yet.
#[derive(Clone, Debug)]
pub struct PlanRun {
    name: String,
    plan: PruningPlan,
    recipe: PruneRecipe,
}

impl PlanRun {
    /// Reads a plan, and the recipe to carry it out with, and checks it against `base`.
    ///
    /// # Errors
    /// When a file cannot be read, or the plan does not fit the model or was made for another one.
    pub fn read(path: &Path, recipe: Option<&Path>, base: &Pipeline) -> Result<Self> {
        let recipe = match recipe {
            Some(path) => PruneRecipe::read(path)?,
            None => PruneRecipe::default(),
        };
        recipe.validate()?;
        let name = path.display().to_string();
        let plan = PruningPlan::read(path)?;
        match PruneTarget::given(plan, base).with_context(|| format!("`{name}`"))? {
            PruneTarget::Plan(plan) => Ok(Self { name, plan, recipe }),
            PruneTarget::Goal { .. } => bail!("`{name}` is not a plan"),
        }
    }

    /// The model that `prune --plan` writes with this recipe; unfinished work is kept next to `output`.
    ///
    /// # Errors
    /// When a forward fails, something does not fit into memory, or activations are NaN or infinite.
    pub fn carry_out(
        mut self,
        base: &Pipeline,
        budget: &MemoryBudget,
        output: &Path,
    ) -> Result<Pipeline> {
        let options = CalibrationOptions {
            recipe: self.recipe.calibration.clone(),
            held_out: self.recipe.score.held_out,
            ..CalibrationOptions::default()
        };
        let resolved = ResolvedOptions::new(base, &options)?;
        self.recipe.resolve(base, &resolved);
        let calibrator = Calibrator::open(base, budget, resolved, Some(0))?;
        let run = RunOptions {
            sums: false,
            ..RunOptions::for_output(output, options.save_every)
        };
        let noised = calibrator.noised(&calibrator.run(&run)?)?;
        let pruned = prune(&calibrator, &self.recipe, self.plan, &noised, run.folder())
            .with_context(|| format!("`{}`", self.name))?;
        run.remove_partial()?;
        let mut out = base.clone();
        out.name = self.name;
        out.transformer = pruned.checkpoint;
        out.config = pruned.config;
        out.record = Some(pruned.record);
        Ok(out)
    }
}
