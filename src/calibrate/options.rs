//! What a calibration is made of: options as they are given, and the same with nothing left open.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{
    file,
    header::Header,
    images::captioned,
    recipe::{CalibrationRecipe, LatentSource},
};
use crate::{
    checkpoint::{record, with_hint},
    pipeline::{Pipeline, prompts},
    sample::size::{ImageSize, TOKENS_PER_FORWARD},
};

/// What to do about a statistics file that is damaged.
pub const AGAIN: &str = "make it again with `fastflux calibrate`";

/// Prompts sampled for calibration unless asked otherwise.
const NUM_PROMPTS: usize = 640;
/// The same for models whose images have many tokens: each image is thousands of rows.
const NUM_PROMPTS_LARGE: usize = 96;
/// Noised latents that later fits look at, of small and of large images, if that is at most as many of an image as
/// of a held-out one.
const LATENTS_LATER: usize = 1280;
const LATENTS_LATER_LARGE: usize = 256;
/// Noised latents that blocks are compared on: few tell the same blocks apart as many, and choosing takes a third of the time.
const COMPARED: usize = 96;
/// Sampling steps of small images, if that is at most as many as of training data: the fits gain from many different
/// images and hardly from their quality.
const STEPS_SMALL: usize = 4;
/// Noised latents of a held-out image.
pub(super) const HELD_OUT_NOISE_LEVELS: usize = 8;

/// A calibration as it is asked for: recipe and flags.
#[derive(Clone, Debug)]
pub struct CalibrationOptions {
    /// What is looked at, and how much of it.
    pub recipe: CalibrationRecipe,
    /// Held-out noised latents that blocks are compared on; `None`: by the size of images.
    pub held_out: Option<usize>,
    /// A file of prompts; `None`: a bundled list.
    pub prompts: Option<PathBuf>,
    /// A folder of images with captions, to take instead of sampling.
    pub images: Option<PathBuf>,
    /// Statistics made before, to use instead of calibrating.
    pub stats: Option<PathBuf>,
    /// Most bytes of sums; `None`: half of what is free.
    pub stats_memory: Option<u64>,
    /// How often unfinished work is saved.
    pub save_every: Duration,
}

impl Default for CalibrationOptions {
    fn default() -> Self {
        Self {
            recipe: CalibrationRecipe::default(),
            held_out: None,
            prompts: None,
            images: None,
            stats: None,
            stats_memory: None,
            save_every: Duration::from_secs(120),
        }
    }
}

/// Everything that a calibration needs to know before anything is loaded: nothing is left open.
#[derive(Clone, Debug)]
pub struct ResolvedOptions {
    /// The recipe.
    pub recipe: CalibrationRecipe,
    /// Size of the images.
    pub size: ImageSize,
    /// Prompts to gather statistics of, then those held out.
    pub prompts: Vec<String>,
    /// How many of the prompts are for statistics.
    pub num_prompts: usize,
    /// Held-out noised latents that a pruned model's error is measured on.
    pub held_out: usize,
    /// Those of them that blocks are compared on.
    pub compared: usize,
    /// Sampling steps of images for people to look at: those asked for, or the model's own default.
    pub drawing_steps: usize,
    /// Noised latents in one forward.
    pub batch: usize,
    /// Text tokens the model is given.
    pub text_tokens: usize,
    /// Image files, one for each prompt, if images are given.
    pub images: Option<Vec<PathBuf>>,
    /// Statistics made before, to use instead of calibrating.
    pub stats: Option<PathBuf>,
}

impl ResolvedOptions {
    /// Fills in what the options leave open, from the model or from the header of a calibration that was made before.
    ///
    /// # Errors
    /// When a number is out of range, prompts or images cannot be read, or the statistics are of another model.
    pub fn new(pipeline: &Pipeline, options: &CalibrationOptions) -> Result<Self> {
        let references = options.recipe.reference_images.len();
        pipeline.check_parts(options.images.is_some() || references > 0)?;
        pipeline.check_references(references)?;
        if let Some(path) = &options.stats {
            let header = read_header(pipeline, path)?;
            let mut out = Self::of_header(pipeline, &header, options.held_out)?;
            out.stats = Some(path.clone());
            return Ok(out);
        }
        let (prompts, images) = match (&options.images, &options.prompts) {
            (Some(folder), _) => {
                let (prompts, images) = captioned(folder)?;
                (prompts, Some(images))
            }
            (None, Some(path)) => (prompts::read("--prompts", path)?, None),
            (None, None) => (prompts::bundled(pipeline), None),
        };
        let given = images.as_ref().map(Vec::len);
        let recipe = options.recipe.clone();
        let mut out = Self::fill_in(pipeline, recipe, options.held_out, &prompts, given)?;
        out.images = images.map(|mut images| {
            images.truncate(out.prompts.len());
            images
        });
        Ok(out)
    }

    /// Fills in what `recipe` leaves open; `given` is the number of images if they are given with their captions.
    fn fill_in(
        pipeline: &Pipeline,
        mut recipe: CalibrationRecipe,
        held_out: Option<usize>,
        prompts: &[String],
        given: Option<usize>,
    ) -> Result<Self> {
        recipe.validate()?;
        let size = pipeline.image_size(recipe.width, recipe.height)?;
        (recipe.width, recipe.height) = (Some(size.width), Some(size.height));
        let drawing_steps = recipe.steps.unwrap_or(pipeline.default_steps());
        let mut default_steps = pipeline.default_steps_of_data();
        if !size.is_large() {
            default_steps = default_steps.min(STEPS_SMALL);
        }
        let steps = *recipe.steps.get_or_insert(default_steps);
        recipe.guidance = Some(pipeline.guidance_or_default(recipe.guidance));
        pipeline.note_guesses(recipe.steps);
        let (held_out, compared) = held_out_and_compared(held_out, size);
        let noise_levels_per_image = match recipe.source {
            LatentSource::Latents => steps as f64 / 5.0,
            LatentSource::Images => 4.0,
        };
        recipe
            .noise_levels_per_image
            .get_or_insert(noise_levels_per_image);
        let held_out_prompts = held_out.div_ceil(HELD_OUT_NOISE_LEVELS);
        let (num_prompts, total) = match given {
            None => {
                let default = if size.is_large() {
                    NUM_PROMPTS_LARGE
                } else {
                    NUM_PROMPTS
                };
                let num_prompts = recipe.num_prompts.unwrap_or(default);
                (num_prompts, num_prompts + held_out_prompts)
            }
            // an eighth of the images is kept for comparing
            Some(given) => {
                let num_prompts = given - (given / 8).clamp(1, held_out_prompts);
                let num_prompts = num_prompts.min(recipe.num_prompts.unwrap_or(num_prompts));
                ensure!(
                    num_prompts > 0,
                    "--images: at least two images are needed, one to fit on and one to compare by"
                );
                (num_prompts, given.min(num_prompts + held_out_prompts))
            }
        };
        recipe.num_prompts = Some(num_prompts);
        let text_tokens = pipeline.default_text_length()?;
        let references = reference_tokens(&recipe, size);
        let default = TOKENS_PER_FORWARD / (size.tokens() + references + text_tokens);
        let batch = *recipe.batch.get_or_insert(default.max(1));
        Ok(Self {
            recipe,
            size,
            // a short list is drawn from again, with other noise
            prompts: prompts.iter().cycle().take(total).cloned().collect(),
            num_prompts,
            held_out,
            compared,
            drawing_steps,
            batch,
            text_tokens,
            images: None,
            stats: None,
        })
    }

    /// Those of a calibration that was made before.
    fn of_header(pipeline: &Pipeline, header: &Header, held_out: Option<usize>) -> Result<Self> {
        let recipe = &header.recipe;
        let size = pipeline.image_size(recipe.width, recipe.height)?;
        let kept = (header.prompts.len() - header.num_prompts) * HELD_OUT_NOISE_LEVELS;
        let (held_out, compared) = held_out_and_compared(held_out, size);
        Ok(Self {
            recipe: recipe.clone(),
            size,
            prompts: header.prompts.clone(),
            num_prompts: header.num_prompts,
            held_out: held_out.min(kept),
            compared: compared.min(kept),
            drawing_steps: pipeline.default_steps(),
            batch: recipe.batch.context("the statistics name no batch")?,
            text_tokens: pipeline.default_text_length()?,
            images: None,
            stats: None,
        })
    }

    /// Tokens of one forward of one image: its own, those of the text and those of a reference image.
    pub fn tokens(&self) -> usize {
        self.size.tokens() + reference_tokens(&self.recipe, self.size) + self.text_tokens
    }

    /// Noised latents of each image that later fits look at.
    pub(super) fn noise_levels_later(&self) -> usize {
        let count = if self.size.is_large() {
            LATENTS_LATER_LARGE
        } else {
            LATENTS_LATER
        };
        (count / self.num_prompts.max(1)).clamp(1, HELD_OUT_NOISE_LEVELS)
    }
}

/// Held-out noised latents that errors are measured on, and those of them that blocks are compared on; `asked` is both.
fn held_out_and_compared(asked: Option<usize>, size: ImageSize) -> (usize, usize) {
    let default = size.default_held_out();
    asked.map_or((default, COMPARED.min(default)), |asked| (asked, asked))
}

/// Tokens of the reference image of a prompt, which has the size of the image itself.
fn reference_tokens(recipe: &CalibrationRecipe, size: ImageSize) -> usize {
    if recipe.reference_images.is_empty() {
        0
    } else {
        size.tokens()
    }
}

/// The header of a complete calibration of this model.
fn read_header(pipeline: &Pipeline, path: &Path) -> Result<Header> {
    let name = path.display();
    let (_, header) = with_hint(file::open(path), AGAIN).context("--stats")?;
    let found = record::fingerprint(&pipeline.transformer)?;
    anyhow::ensure!(
        header.model == found,
        "--stats `{name}`: the statistics are of another model (`{}`, fingerprint {}; this one has {found})\nhint: run `fastflux calibrate` on this model",
        header.model_name,
        header.model
    );
    anyhow::ensure!(
        header.is_complete(),
        "--stats `{name}` holds {} of {} units\nhint: add the other shards with `fastflux merge-stats`",
        header.done.len(),
        header.units
    );
    Ok(header)
}
