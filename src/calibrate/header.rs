//! What made a calibration: everything must agree for files to be added up, and for a killed run to go on.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{pass::Division, recipe::CalibrationRecipe};
use crate::layout::BlockId;

/// What made the statistics. Everything but `units` and `done` must agree for files to be added up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Header {
    /// Version of this header's form.
    pub version: u32,
    /// Fingerprint of the model.
    pub model: String,
    /// How the model is called.
    pub model_name: String,
    /// Number format and kind of device of the activations.
    pub runtime: String,
    /// The recipe, nothing left open.
    pub recipe: CalibrationRecipe,
    /// Prompts of the images for statistics, then those held out.
    pub prompts: Vec<String>,
    /// How many of the prompts are for statistics.
    #[serde(alias = "samples")]
    pub num_prompts: usize,
    /// Blocks whose products were gathered.
    pub products: Vec<BlockId>,
    /// Units of the whole calibration.
    pub units: usize,
    /// Units that are in this file.
    pub done: BTreeSet<usize>,
}

impl Header {
    /// The version that this build writes and the newest it reads.
    pub const VERSION: u32 = 1;

    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.done.len() == self.units
    }

    /// Checks that nothing is left open and that the counts agree.
    pub(super) fn validate(&self) -> Result<Division> {
        let recipe = &self.recipe;
        recipe.validate()?;
        for (name, is_there) in [
            ("num-prompts", recipe.num_prompts.is_some()),
            (
                "noise-levels-per-image",
                recipe.noise_levels_per_image.is_some(),
            ),
            ("steps", recipe.steps.is_some()),
            ("guidance", recipe.guidance.is_some()),
            ("width", recipe.width.is_some()),
            ("height", recipe.height.is_some()),
            ("batch", recipe.batch.is_some()),
        ] {
            ensure!(is_there, "`recipe.{name}` is missing");
        }
        let prompts = self.prompts.len();
        ensure!(
            (1..prompts).contains(&self.num_prompts),
            "`num-prompts` is {} of {prompts} prompts: there must be some of each kind",
            self.num_prompts
        );
        let division = Division {
            prompts,
            num_prompts: self.num_prompts,
            batch: recipe.batch.unwrap_or(1),
        };
        ensure!(
            self.units == division.units(),
            "`units` is {}, but {} for statistics of {prompts} prompts in batches of {} are {}",
            self.units,
            self.num_prompts,
            division.batch,
            division.units()
        );
        if let Some(unit) = self.done.iter().find(|unit| **unit >= self.units) {
            bail!("`done` names unit {unit} of {}", self.units);
        }
        Ok(division)
    }

    /// The first setting in which two headers differ, with both values: `recipe.seed: 0 and 1`.
    pub fn difference(&self, other: &Self) -> Result<Option<String>> {
        let settings = |header: &Self| {
            serde_json::to_value(Self {
                done: BTreeSet::new(),
                ..header.clone()
            })
        };
        Ok(first_difference("", &settings(self)?, &settings(other)?))
    }
}

fn first_difference(path: &str, a: &serde_json::Value, b: &serde_json::Value) -> Option<String> {
    if let (Some(a), Some(b)) = (a.as_object(), b.as_object()) {
        return a.iter().find_map(|(key, value)| {
            let path = if path.is_empty() {
                key.clone()
            } else {
                format!("{path}.{key}")
            };
            first_difference(&path, value, b.get(key).unwrap_or(&serde_json::Value::Null))
        });
    }
    if a == b {
        return None;
    }
    // lists of prompts are too long for a message
    if a.is_array() || b.is_array() {
        return Some(path.to_owned());
    }
    Some(format!("{path}: {a} and {b}"))
}
