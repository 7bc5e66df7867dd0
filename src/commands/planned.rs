//! A plan carried out in memory, so that it can be judged without writing a model.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{calibrate, choose::Wanted, gather, session::Session};
use crate::{
    cli::{CalibrationArgs, GoalArgs, RecipeArgs},
    device::Runtime,
    pipeline::{Pipeline, placement::MemoryBudget},
    prune::{
        apply,
        outputs::Refit,
        plan::PruningPlan,
        recipe::PruneRecipe,
        refit::{self, Fitting},
    },
    ui,
};

/// Seconds between saves of unfinished work, as `prune` has it.
const SAVE_EVERY: u64 = 120;

/// A plan that fits its model, not carried out yet.
pub(super) struct Planned {
    name: String,
    plan: PruningPlan,
    recipe: PruneRecipe,
}

impl Planned {
    /// Reads a plan, and the recipe to carry it out with, and checks it against `base`.
    pub(super) fn read(path: &Path, recipe: Option<&Path>, base: &Pipeline) -> Result<Self> {
        let mut recipe = calibrate::recipe(&CalibrationArgs {
            recipe: RecipeArgs {
                recipe: recipe.map(Path::to_path_buf),
            },
            ..arguments()
        })?;
        let usual = Refit::usual(base.config.hidden_size);
        recipe.fit.refit.get_or_insert(usual);
        let plan = PruningPlan::read(path)?;
        let name = path.display().to_string();
        match Wanted::new(&GoalArgs::default(), &recipe, base, Some(plan))
            .with_context(|| format!("`{name}`"))?
        {
            Wanted::Plan(plan) => Ok(Self { name, plan, recipe }),
            Wanted::Choose { .. } => bail!("`{name}` is not a plan"),
        }
    }

    /// The model that `prune --plan` writes with this recipe; unfinished work is kept beside `output`.
    pub(super) fn carry_out(
        mut self,
        base: &Pipeline,
        runtime: &Runtime,
        place: &MemoryBudget,
        output: &Path,
    ) -> Result<Pipeline> {
        let (settings, _) = calibrate::settings(&arguments(), None, &mut self.recipe, base)?;
        let session = Session::open(base, runtime, place, settings, None, Some(0))?;
        let gathering = calibrate::gathering(&arguments(), output, false);
        let calibration = gather::obtain(&session, None, &gathering)?;
        let states = session.states(&calibration)?;
        let f = &self.recipe.fit;
        let refit = f.refit.context("what to refit is resolved")?;
        let fitting = Fitting {
            ridge: f.ridge,
            sequential: f.sequential,
            refit,
            batch: session.settings.batch,
            tokens: session.settings.recipe.tokens_per_forward,
            on_device: 0,
        };
        let replace = &self.plan.replace;
        let batches = states.fit.batches(fitting.batch).len();
        let flux = &session.flux;
        let steps = refit::steps(&flux.trunk, batches, replace, refit);
        let progress = ui::progress(steps, "fitting");
        let fits = refit::fit_layers(flux, &states.fit, replace, fitting, runtime, &progress)?;
        ui::done(&progress, format!("carried out `{}`", self.name));
        let (mut transformer, config) =
            apply::apply(&base.transformer, &base.config, &self.plan, &fits.layers)?;
        apply::put_outputs(&mut transformer, &config, &fits.outputs)?;
        calibrate::remove_partial(&gathering.partial)?;
        let record = base.record_of(&config, json!({ "prune": self.recipe, "plan": self.plan }))?;
        let mut out = base.clone();
        out.name = self.name;
        out.transformer = transformer;
        out.config = config;
        out.record = Some(record);
        Ok(out)
    }
}

fn arguments() -> CalibrationArgs {
    CalibrationArgs {
        save_every: SAVE_EVERY,
        ..CalibrationArgs::default()
    }
}
