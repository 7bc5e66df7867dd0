//! Everything that a training run is asked for: the recipe, with what it left open filled in, and its prompts.

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

use super::recipe::SandwichRecipe;
use crate::{pipeline::Pipeline, sample::size::ImageSize};

/// Prompts to sample by default if images are large.
const DEFAULT_LARGE_IMAGES: usize = 128;
/// Share of the images that is held out: one in so many.
const HELD_OUT_SHARE: usize = 8;
/// Tokens in one forward if the recipe names no batch.
const TOKENS_PER_FORWARD: usize = 1344;
/// Image tokens of all held-out noised latents if the recipe names no number, within [`MIN_HELD_OUT`] and [`MAX_HELD_OUT`].
const HELD_OUT_TOKENS: usize = 65_536;
const MIN_HELD_OUT: usize = 8;
const MAX_HELD_OUT: usize = 192;
/// Rank of a LoRA if the recipe names none: twice as much heals better, where the optimiser can hold it.
const DEFAULT_RANK: usize = 64;
const DEFAULT_RANK_WIDE: usize = 32;
/// A model wider than this is wide.
const WIDE: usize = 1024;

/// What to train, on what, and for how long.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// With a value for everything.
    pub recipe: SandwichRecipe,
    /// Size of the images.
    pub size: ImageSize,
    /// One for each image.
    pub prompts: Vec<String>,
    /// Text tokens of a prompt.
    pub text_tokens: usize,
    /// Noised latents in a forward.
    pub batch: usize,
    /// Held-out noised latents.
    pub held_out: usize,
    /// Steps after which a run is saved.
    pub save_every: usize,
}

impl TrainOptions {
    /// The recipe's numbers, checked; what it leaves open is taken from the `teacher`. `prompts` are used again if they are
    /// fewer than the recipe asks for.
    ///
    /// # Errors
    /// When a number is out of range; the message names it and the range.
    pub fn new(
        mut recipe: SandwichRecipe,
        prompts: &[String],
        teacher: &Pipeline,
        save_every: usize,
    ) -> Result<Self> {
        recipe.validate(teacher.config.hidden_size)?;
        let width = teacher.config.hidden_size;
        let rank = if width > WIDE {
            DEFAULT_RANK_WIDE
        } else {
            DEFAULT_RANK.min(width)
        };
        recipe.lora.rank.get_or_insert(rank);
        teacher.check_parts(false)?;
        let size = teacher.image_size(recipe.data.width, recipe.data.height)?;
        let d = &mut recipe.data;
        (d.width, d.height) = (Some(size.width), Some(size.height));
        d.steps.get_or_insert(teacher.default_steps_of_data());
        d.guidance = Some(teacher.guidance_or_default(d.guidance));
        teacher.note_guesses(d.steps);
        let default = if size.is_large() {
            DEFAULT_LARGE_IMAGES
        } else {
            prompts.len()
        };
        let count = *d.num_prompts.get_or_insert(default.max(2));
        ensure!(
            count >= 2,
            "--num-prompts {count}: at least two prompts are needed, one of them to be held out"
        );
        let prompts: Vec<String> = prompts.iter().cycle().take(count).cloned().collect();
        let text_tokens = teacher.default_text_length()?;
        let tokens = size.tokens() + text_tokens;
        let batch = *d.batch.get_or_insert((TOKENS_PER_FORWARD / tokens).max(1));
        let held_out = (HELD_OUT_TOKENS / size.tokens()).clamp(MIN_HELD_OUT, MAX_HELD_OUT);
        let held_out = *d.held_out.get_or_insert(held_out);
        Ok(Self {
            recipe,
            size,
            prompts,
            text_tokens,
            batch,
            held_out,
            save_every,
        })
    }

    /// How many of the images are held out.
    pub(super) fn held_out_images(&self) -> usize {
        (self.prompts.len() / HELD_OUT_SHARE).max(1)
    }

    /// Identity of the prompts and their order.
    pub(super) fn prompts_hash(&self) -> String {
        let mut hash = Sha256::new();
        for prompt in &self.prompts {
            hash.update(prompt);
            hash.update("\n");
        }
        let bytes = hash.finalize();
        bytes.iter().take(8).map(|b| format!("{b:02x}")).collect()
    }
}
