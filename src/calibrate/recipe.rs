//! The numbers that decide what a calibration gathers, as they stand in recipes and in statistics files.

use std::{fmt, path::PathBuf, str::FromStr};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::pipeline::defaults::MAX_STEPS_OF_DATA;

/// Where the noised latents come from whose activations are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", try_from = "String")]
pub enum LatentSource {
    /// The model's own images, noised again at times spread evenly.
    #[default]
    Latents,
    /// Given images with captions, noised.
    Images,
}

impl fmt::Display for LatentSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Latents => "latents",
            Self::Images => "images",
        })
    }
}

impl FromStr for LatentSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "latents" => Ok(Self::Latents),
            "images" => Ok(Self::Images),
            "trajectory" => Err(
                "`trajectory` is gone: what sampling passes through made no better sums, and fits never saw it; leave it out"
                    .to_owned(),
            ),
            _ => Err(format!("`{text}`: expected latents or images")),
        }
    }
}

impl TryFrom<String> for LatentSource {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Where input/output pairs come from, and how many.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct CalibrationRecipe {
    /// `latents` or `images`.
    pub source: LatentSource,
    /// Prompts to sample (or images to take); `null`: 640 for small images and 96 for large ones.
    #[serde(alias = "samples")]
    pub num_prompts: Option<usize>,
    /// Noised latents of each image, on average; `null`: a fifth of the sampling steps, so that the pass over them
    /// adds a fifth to the time that sampling takes, and 4 for given images.
    #[serde(alias = "draws")]
    pub noise_levels_per_image: Option<f64>,
    /// Sampling steps; `null`: 4 for small images and 8 for large ones, or the model's own default if that is lower. Many images
    /// drawn in few steps make better fits than few in many.
    pub steps: Option<usize>,
    /// Guidance; `null`: the model's own default.
    pub guidance: Option<f64>,
    /// Image width in pixels; `null`: the model's own default.
    pub width: Option<usize>,
    /// Image height in pixels; `null`: the model's own default.
    pub height: Option<usize>,
    /// Seed of starting noise and noised latents.
    pub seed: u64,
    /// Noised latents in one forward; `null`: as many as make some 1,536 tokens, whatever the memory: which rows share a product
    /// shows in its last bits, and the same settings give the same bytes everywhere.
    pub batch: Option<usize>,
    /// Tokens of each stream that enter the products of one forward; `null`: all.
    pub tokens_per_forward: Option<usize>,
    /// Reference images of the prompts, for a model that edits: the first of the first prompt and so on, from the first
    /// again if they are fewer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reference_images: Vec<PathBuf>,
}

impl Default for CalibrationRecipe {
    fn default() -> Self {
        Self {
            source: LatentSource::Latents,
            num_prompts: None,
            noise_levels_per_image: None,
            steps: None,
            guidance: None,
            width: None,
            height: None,
            seed: 0,
            batch: None,
            tokens_per_forward: None,
            reference_images: Vec::new(),
        }
    }
}

/// Bounds of what a recipe may ask for: beyond them a number is a slip, and would exhaust memory before it is noticed.
pub(crate) const MAX_PROMPTS: usize = 1_000_000;
const MAX_NOISE_LEVELS: f64 = 1000.0;
pub(crate) const MAX_BATCH: usize = 65_536;

impl CalibrationRecipe {
    /// Checks the ranges of all numbers.
    ///
    /// # Errors
    /// When one is out of range; the message names it and the range.
    pub fn validate(&self) -> Result<()> {
        let within = |value: Option<usize>, most| value.is_none_or(|v| (1..=most).contains(&v));
        let number = |value: Option<usize>| value.map_or_else(String::new, |v| v.to_string());
        ensure!(
            within(self.num_prompts, MAX_PROMPTS),
            "--num-prompts {}: expected 1 to {MAX_PROMPTS} prompts",
            number(self.num_prompts)
        );
        ensure!(
            within(self.steps, MAX_STEPS_OF_DATA),
            "--steps {}: expected 1 to {MAX_STEPS_OF_DATA}",
            number(self.steps)
        );
        ensure!(
            self.noise_levels_per_image
                .is_none_or(|d| d > 0.0 && d <= MAX_NOISE_LEVELS),
            "recipe: `calibration.noise-levels-per-image` must be above 0 and at most {MAX_NOISE_LEVELS}"
        );
        ensure!(
            within(self.batch, MAX_BATCH),
            "recipe: `calibration.batch` must be 1 to {MAX_BATCH}"
        );
        ensure!(
            self.guidance.is_none_or(|g| g.is_finite() && g >= 0.0),
            "recipe: `calibration.guidance` must be a number of at least 0"
        );
        ensure!(
            self.tokens_per_forward != Some(0),
            "--tokens-per-forward 0: at least one token must be taken"
        );
        Ok(())
    }
}
