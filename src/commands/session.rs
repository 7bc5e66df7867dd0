//! A model loaded for calibration: prompts encoded, transformer on the device, everything the recipe left open filled in.

use anyhow::{Context, Result};
use candle::Tensor;

use super::{PixelSize, load};
use crate::{
    calibrate::{self, FiniteCheck, states::States},
    device::Runtime,
    model::Flux,
    pipeline::Pipeline,
    prune::{outputs::Refit, recipe::PruneRecipe},
    sample::{
        denoise::{Denoise, Encoded, starting_noise},
        png::Picture,
        schedule::Schedule,
        vae::Vae,
    },
    ui,
};

/// Prompts sampled for calibration unless asked otherwise.
const SAMPLES: usize = 160;
/// The same for models whose pictures have many tokens: each picture is thousands of rows.
const SAMPLES_LARGE: usize = 32;
/// Image tokens from which a picture counts as large.
const LARGE: usize = 1024;
/// Tokens in one forward where the recipe names no batch.
const TOKENS_PER_FORWARD: usize = 1536;
/// Image tokens of all held-out states where the recipe names no number, within bounds.
const HELD_OUT_TOKENS: usize = 131_072;

/// See the module.
pub(super) struct Session<'a> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) runtime: &'a Runtime,
    pub(super) recipe: PruneRecipe,
    pub(super) size: PixelSize,
    pub(super) flux: Flux,
    /// States in one forward.
    pub(super) batch: usize,
    /// Those to fit on first, then those held out.
    prompts: Vec<String>,
    encoded: Encoded,
    schedule: Schedule,
}

/// Noised states of the model's own pictures.
pub(super) struct AllStates {
    /// To fit on.
    pub(super) fit: States,
    /// To compare by; of other prompts.
    pub(super) held_out: States,
}

impl<'a> Session<'a> {
    /// Resolves `recipe`, encodes the prompts and loads the transformer.
    pub(super) fn open(
        pipeline: &'a Pipeline,
        runtime: &'a Runtime,
        mut recipe: PruneRecipe,
        prompts: Vec<String>,
    ) -> Result<Self> {
        let size = super::picture_size(
            pipeline,
            recipe.calibration.width,
            recipe.calibration.height,
        )?;
        let hidden = pipeline.config.hidden_size;
        recipe.fit.refit.get_or_insert(Refit::usual(hidden));
        let c = &mut recipe.calibration;
        c.steps.get_or_insert(pipeline.default_steps());
        c.guidance.get_or_insert(pipeline.default_guidance());
        (c.width, c.height) = (Some(size.width), Some(size.height));
        let held_out = (HELD_OUT_TOKENS / size.tokens()).clamp(16, 256);
        let held_out = *recipe.score.held_out.get_or_insert(held_out);
        let usual = if size.tokens() >= LARGE {
            SAMPLES_LARGE
        } else {
            SAMPLES
        };
        let samples = *c.samples.get_or_insert(usual);
        // a short list is drawn from again, with other noise
        let total = samples + held_out.div_ceil(c.draws);
        let prompts: Vec<String> = prompts.iter().cycle().take(total).cloned().collect();
        let encoded = load::encode_prompts(pipeline, &prompts, None, runtime)?;
        let flux = load::flux(pipeline, runtime)?;
        let tokens = size.tokens() + encoded.txt.dim(1)?;
        let batch = recipe
            .calibration
            .batch
            .unwrap_or((TOKENS_PER_FORWARD / tokens).max(1));
        let schedule = load::schedule(pipeline)?;
        Ok(Self {
            pipeline,
            runtime,
            recipe,
            size,
            flux,
            batch,
            prompts,
            encoded,
            schedule,
        })
    }

    /// Whether pictures take long to draw.
    pub(super) fn large(&self) -> bool {
        self.size.tokens() >= LARGE
    }

    /// Text tokens the model is given.
    pub(super) fn text_tokens(&self) -> Result<usize> {
        Ok(self.encoded.txt.dim(1)?)
    }

    fn denoise<'b>(&'b self, flux: &'b Flux) -> Result<Denoise<'b>> {
        let c = &self.recipe.calibration;
        Ok(Denoise {
            flux,
            dtype: self.runtime.dtype,
            device: &self.runtime.device,
            schedule: &self.schedule,
            steps: c.steps.context("steps are resolved")?,
            guidance: c.guidance.context("guidance is resolved")?,
            size: self.size.latent(),
        })
    }

    /// Samples every prompt and noises the latents anew.
    pub(super) fn states(&self) -> Result<AllStates> {
        let denoise = self.denoise(&self.flux)?;
        let c = &self.recipe.calibration;
        let channels = self.pipeline.config.out_channels / 4;
        // one step first: a damaged model is named by its block before hours are spent on it
        let probe = Denoise {
            steps: 1,
            ..denoise.clone()
        };
        let noise = starting_noise(c.seed, 1, channels, denoise.size)?;
        probe.run(
            &noise,
            &self.encoded.range(0..1)?,
            &mut FiniteCheck,
            &mut || (),
        )?;
        let forwards = self.encoded.len().div_ceil(self.batch) * denoise.steps;
        let progress = ui::progress(forwards, "sampling");
        let pictures = calibrate::sample(
            &denoise,
            &self.encoded,
            channels,
            self.batch,
            c.seed,
            &progress,
        )?;
        ui::done(
            &progress,
            format!("sampled {} pictures", self.encoded.len()),
        );
        let noised = |range: std::ops::Range<usize>, seed| -> Result<States> {
            let part: Tensor = pictures.narrow(0, range.start, range.len())?;
            let prompts = self.encoded.range(range)?;
            States::noised(part, prompts, denoise.size, denoise.guidance, c.draws, seed)
        };
        let samples = c.samples.context("samples are resolved")?;
        let held_out = noised(samples..self.encoded.len(), c.seed.wrapping_add(2))?;
        Ok(AllStates {
            fit: noised(0..samples, c.seed.wrapping_add(1))?,
            held_out: held_out.first(
                self.recipe
                    .score
                    .held_out
                    .context("held-out states are resolved")?,
            ),
        })
    }

    /// The last `count` prompts drawn by each of `models`, one row each, and the prompts.
    pub(super) fn draw(
        &self,
        vae: &Vae,
        models: &[&Flux],
        count: usize,
    ) -> Result<(Vec<Vec<Picture>>, &[String])> {
        let count = count.min(self.encoded.len());
        let last = self.encoded.len() - count..self.encoded.len();
        let encoded = self.encoded.range(last.clone())?;
        let steps = self
            .recipe
            .calibration
            .steps
            .context("steps are resolved")?;
        let progress = ui::progress(models.len() * steps * count.div_ceil(self.batch), "drawing");
        let mut rows = Vec::new();
        for flux in models {
            let denoise = self.denoise(flux)?;
            let channels = self.pipeline.config.out_channels / 4;
            // other noise than in calibration
            let seed = self.recipe.calibration.seed.wrapping_add(1000);
            let latents =
                calibrate::sample(&denoise, &encoded, channels, self.batch, seed, &progress)?;
            rows.push(load::pictures(vae, &latents, denoise.size, self.runtime)?);
        }
        ui::done(
            &progress,
            format!("drew {count} prompts with {} models", models.len()),
        );
        Ok((rows, &self.prompts[last]))
    }
}
