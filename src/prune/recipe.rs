//! Every number that changes what `prune` writes, as one JSON file (`configs/prune.json`).

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    budget::{Budget, Goal},
    projections::RefitProjections,
};
use crate::{
    calibrate::{memory::Refits, recipe::CalibrationRecipe},
    layout::{BlockId, FluxConfig, Form},
};

/// The recipe of a pruning run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct PruneRecipe {
    /// Share of all blocks to replace, above 0 and below 1.
    pub ratio: f64,
    /// Where input/output pairs come from.
    pub calibration: CalibrationRecipe,
    /// How blocks are chosen.
    pub score: ScoreRecipe,
    /// How layers are fitted.
    pub fit: FitRecipe,
}

/// Greedy choice by the error of the final velocity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ScoreRecipe {
    /// Held-out noised latents that blocks are compared on; `null`: 96, or fewer if images are large.
    pub held_out: Option<usize>,
    /// Fit all candidates again behind each choice before they are compared; `null`: for models up to 1,024 wide, where
    /// that costs seconds. Otherwise they are compared by their fits on the original's activations.
    #[serde(alias = "refit")]
    pub refit_between_rounds: Option<bool>,
}

/// Ridge least squares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct FitRecipe {
    /// What takes a block's place: `linear`, `conditioned`, `modulated` or `remove`.
    pub form: Form,
    /// One layer for text and image tokens together instead of one for each.
    pub joint: bool,
    /// Neighbouring replaced blocks become one layer.
    pub collapse: bool,
    /// Ridge, relative to the mean diagonal of the Gram matrix; `null`: for layers chosen by the residual on noised latents
    /// left out, for refits from the number of tokens.
    pub ridge: Option<f64>,
    /// Fit in network order on the activations of the already pruned prefix.
    pub sequential: bool,
    /// Output projections of what is kept that are refitted: `none`, `head`, or `all` (also of kept blocks behind a
    /// replaced one and right ahead of one); `null`: `all` up to a width of 1,024, where that takes seconds, and `head` above.
    #[serde(alias = "refit")]
    pub refit_projections: Option<RefitProjections>,
}

impl Default for PruneRecipe {
    fn default() -> Self {
        Self {
            ratio: 0.2,
            calibration: CalibrationRecipe::default(),
            score: ScoreRecipe::default(),
            fit: FitRecipe::default(),
        }
    }
}

impl Default for FitRecipe {
    fn default() -> Self {
        Self {
            form: Form::Linear,
            joint: false,
            collapse: true,
            ridge: None,
            sequential: true,
            refit_projections: None,
        }
    }
}

impl FitRecipe {
    /// What refitting takes in a model of this configuration.
    pub fn refits(&self, config: &FluxConfig) -> Refits {
        let refit = self
            .refit_projections
            .unwrap_or(RefitProjections::for_width(config.hidden_size));
        refit.cost(config)
    }
}

impl PruneRecipe {
    /// Reads a recipe; what it does not name has its default.
    ///
    /// # Errors
    /// When the file cannot be read, is not JSON, or has an unknown key or a value of the wrong type.
    pub fn read(path: &std::path::Path) -> Result<Self> {
        let name = path.display();
        let text = crate::checkpoint::read_small(path).context("--recipe")?;
        serde_json::from_slice(&text)
            .with_context(|| format!("--recipe: `{name}` is not a pruning recipe"))
    }

    /// What the comparison of candidates depends on, besides the calibration.
    ///
    /// # Errors
    /// When a number is none that JSON has.
    pub(super) fn comparison(&self, budget: &Budget, protect: &[BlockId]) -> Result<Value> {
        let goal = match budget.goal {
            // all blocks are worth the same, and more of them are on the same way
            Goal::Blocks(_) => "blocks".to_owned(),
            goal => format!("{goal:?}"),
        };
        Ok(json!({
            "score": serde_json::to_value(&self.score)?,
            "ridge": self.fit.ridge,
            "form": self.fit.form,
            "joint": self.fit.joint,
            "goal": goal,
            "protect": protect,
        }))
    }

    /// Checks the ranges of all numbers.
    ///
    /// # Errors
    /// When one is out of range; the message names it and the range.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            self.ratio > 0.0 && self.ratio < 1.0,
            "--ratio {}: expected a share of the blocks above 0 and below 1, such as 0.2",
            self.ratio
        );
        self.calibration.validate()?;
        ensure!(
            self.score
                .held_out
                .is_none_or(|n| (1..=1_000_000).contains(&n)),
            "recipe: `score.held-out` must be 1 to 1000000"
        );
        ensure!(
            self.fit.ridge.is_none_or(|r| r.is_finite() && r >= 0.0),
            "recipe: `fit.ridge` must be a number of at least 0, or null"
        );
        ensure!(
            !(self.fit.joint && self.fit.form == Form::Modulated),
            "a modulated layer cannot be joint: each stream has a modulation of its own"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_in_configs_is_the_default() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/prune.json");
        assert_eq!(PruneRecipe::read(&path).unwrap(), PruneRecipe::default());
    }

    #[test]
    fn a_misspelt_key_is_refused_by_name() {
        let error = serde_json::from_str::<PruneRecipe>(r#"{"fit": {"rigde": 1}}"#).unwrap_err();
        assert!(error.to_string().contains("rigde"), "{error}");
    }
}
