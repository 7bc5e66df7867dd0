//! A model loaded for calibration: prompts encoded, transformer on the device, everything the recipe left open filled in.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle::Tensor;

use super::gather;
use crate::{
    calibrate::{
        FiniteCheck,
        file::{Calibration, Header},
        pass::Pass,
        recipe::{CalibrationRecipe, StateSource},
        states::States,
    },
    device::Runtime,
    model::{Flux, memory::BATCHES_PER_LOAD},
    pipeline::{Pipeline, load, placement::MemoryBudget},
    sample::{
        denoise::{Denoise, Encoded, starting_noise},
        image, latents,
        schedule::Schedule,
        size::{ImageSize, TOKENS_PER_FORWARD},
    },
    ui,
};

/// Prompts sampled for calibration unless asked otherwise.
const SAMPLES: usize = 640;
/// The same for models whose pictures have many tokens: each picture is thousands of rows.
const SAMPLES_LARGE: usize = 96;
/// Noised states that later fits look at, of small and of large pictures, where that is at most as many of a picture as
/// of a held-out one.
const STATES_LATER: usize = 1280;
const STATES_LATER_LARGE: usize = 256;
/// Noised states of a held-out picture.
const DRAWS_HELD_OUT: usize = 8;

/// Everything a calibration needs to know before anything is loaded.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Nothing left open.
    pub(super) recipe: CalibrationRecipe,
    pub(super) size: ImageSize,
    /// Prompts to gather statistics of, then those held out.
    pub(super) prompts: Vec<String>,
    /// How many of the prompts are for statistics.
    pub(super) samples: usize,
    /// Held-out states that blocks are compared on.
    pub(super) held_out: usize,
    /// Sampling steps of pictures to look at: those asked for, or the model's own default.
    pub(super) drawing_steps: usize,
    /// States in one forward.
    pub(super) batch: usize,
    /// Text tokens the model is given.
    pub(super) text_tokens: usize,
}

impl Settings {
    /// Fills in what `recipe` leaves open. `given` is the number of pictures where they are given with their captions.
    pub(super) fn resolve(
        pipeline: &Pipeline,
        mut recipe: CalibrationRecipe,
        held_out: Option<usize>,
        prompts: Vec<String>,
        given: Option<usize>,
    ) -> Result<Self> {
        recipe.validate()?;
        let size = pipeline.image_size(recipe.width, recipe.height)?;
        (recipe.width, recipe.height) = (Some(size.width), Some(size.height));
        let drawing_steps = recipe.steps.unwrap_or(pipeline.default_steps());
        let usual = match recipe.source {
            StateSource::Trajectory => pipeline.default_steps(),
            _ => pipeline.default_steps_of_data(),
        };
        let steps = *recipe.steps.get_or_insert(usual);
        recipe.guidance.get_or_insert(pipeline.default_guidance());
        let usual = size.default_held_out();
        let held_out = held_out.unwrap_or(usual);
        let draws = match recipe.source {
            StateSource::Latents => steps as f64 / 5.0,
            StateSource::Trajectory => steps as f64,
            StateSource::Images => 4.0,
        };
        recipe.draws.get_or_insert(draws);
        let held_out_prompts = held_out.div_ceil(DRAWS_HELD_OUT);
        let (samples, total) = match given {
            None => {
                let usual = if size.is_large() {
                    SAMPLES_LARGE
                } else {
                    SAMPLES
                };
                let samples = recipe.samples.unwrap_or(usual);
                (samples, samples + held_out_prompts)
            }
            // an eighth of the pictures is kept for comparing
            Some(given) => {
                let samples = given - (given / 8).clamp(1, held_out_prompts);
                let samples = samples.min(recipe.samples.unwrap_or(samples));
                ensure!(
                    samples > 0,
                    "--images: at least two pictures are needed, one to fit on and one to compare by"
                );
                (samples, given.min(samples + held_out_prompts))
            }
        };
        recipe.samples = Some(samples);
        let text_tokens = pipeline.default_text_length()?;
        let usual = (TOKENS_PER_FORWARD / (size.tokens() + text_tokens)).max(1);
        let batch = *recipe.batch.get_or_insert(usual);
        Ok(Self {
            recipe,
            size,
            // a short list is drawn from again, with other noise
            prompts: prompts.iter().cycle().take(total).cloned().collect(),
            samples,
            held_out,
            drawing_steps,
            batch,
            text_tokens,
        })
    }

    /// Those of a calibration that was made before.
    pub(super) fn of(
        pipeline: &Pipeline,
        header: &Header,
        held_out: Option<usize>,
    ) -> Result<Self> {
        let recipe = &header.recipe;
        let size = pipeline.image_size(recipe.width, recipe.height)?;
        let kept = (header.prompts.len() - header.samples) * DRAWS_HELD_OUT;
        let usual = size.default_held_out();
        Ok(Self {
            recipe: recipe.clone(),
            size,
            prompts: header.prompts.clone(),
            samples: header.samples,
            held_out: held_out.unwrap_or(usual).min(kept),
            drawing_steps: pipeline.default_steps(),
            batch: recipe.batch.context("the statistics name no batch")?,
            text_tokens: pipeline.default_text_length()?,
        })
    }

    /// Noised states of each picture that later fits look at.
    pub(super) fn draws_later(&self) -> usize {
        let states = if self.large() {
            STATES_LATER_LARGE
        } else {
            STATES_LATER
        };
        (states / self.samples.max(1)).clamp(1, DRAWS_HELD_OUT)
    }

    /// Whether pictures take long to draw.
    pub(super) fn large(&self) -> bool {
        self.size.is_large()
    }
}

/// See the module.
pub(super) struct Session<'a> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) runtime: &'a Runtime,
    pub(super) settings: Settings,
    pub(super) flux: Flux,
    /// Bytes that the sums may take, where anybody knows.
    pub(super) sums: Option<u64>,
    encoded: Encoded,
    schedule: Schedule,
    /// Given pictures as packed latents, (prompts, tokens, 4 · channels).
    images: Option<Tensor>,
}

/// Noised states of the calibration's pictures.
pub(super) struct AllStates {
    /// To fit on.
    pub(super) fit: States,
    /// To compare by; of other prompts.
    pub(super) held_out: States,
}

impl<'a> Session<'a> {
    /// Encodes the prompts (and `images`, one for each, where pictures are given) and loads the transformer. `sums` is
    /// what the user allows for sums, in bytes.
    pub(super) fn open(
        pipeline: &'a Pipeline,
        runtime: &'a Runtime,
        place: &MemoryBudget,
        settings: Settings,
        images: Option<&[PathBuf]>,
        sums: Option<u64>,
    ) -> Result<Self> {
        let schedule = load::schedule(pipeline)?;
        let images = images
            .map(|images| encode_images(pipeline, runtime, settings.size, images))
            .transpose()?;
        let encoded = load::encode_prompts(pipeline, &settings.prompts, None, runtime)?;
        let (need, sums) = gather::need(pipeline, place, &settings, sums);
        let flux = place.flux(pipeline, need)?;
        Ok(Self {
            pipeline,
            runtime,
            settings,
            flux,
            sums,
            encoded,
            schedule,
            images,
        })
    }

    pub(super) fn denoise<'b>(&'b self, flux: &'b Flux) -> Result<Denoise<'b>> {
        let recipe = &self.settings.recipe;
        Ok(Denoise {
            flux,
            dtype: self.runtime.dtype,
            device: &self.runtime.device,
            schedule: &self.schedule,
            steps: recipe.steps.context("steps are resolved")?,
            guidance: recipe.guidance.context("guidance is resolved")?,
            size: self.settings.size.latent(),
        })
    }

    fn channels(&self) -> usize {
        self.pipeline.config.out_channels / 4
    }

    /// The pass that gathers this session's calibration.
    pub(super) fn pass(&self) -> Result<Pass<'_>> {
        let recipe = &self.settings.recipe;
        Ok(Pass {
            denoise: self.denoise(&self.flux)?,
            prompts: &self.encoded,
            samples: self.settings.samples,
            source: recipe.source,
            draws: recipe.draws.context("draws are resolved")?,
            batch: self.settings.batch,
            channels: self.channels(),
            seed: recipe.seed,
            images: self.images.as_ref(),
        })
    }

    /// One step of one picture: a damaged model is named by its block before hours are spent on it.
    pub(super) fn probe(&self) -> Result<()> {
        let probe = Denoise {
            steps: 1,
            ..self.denoise(&self.flux)?
        };
        let noise = starting_noise(self.settings.recipe.seed, 1, self.channels(), probe.size)?;
        let prompt = self.encoded.range(0..1)?;
        probe
            .run(&noise, &prompt, &mut FiniteCheck, &mut || ())
            .with_context(|| format!("`{}`", self.pipeline.name))?;
        Ok(())
    }

    /// The calibration's pictures noised anew, for fits and comparisons.
    pub(super) fn states(&self, calibration: &Calibration) -> Result<AllStates> {
        let pictures = calibration.all_pictures()?;
        let denoise = self.denoise(&self.flux)?;
        let seed = self.settings.recipe.seed;
        let noised = |range: std::ops::Range<usize>, draws, seed| -> Result<States> {
            let part: Tensor = pictures.narrow(0, range.start, range.len())?;
            let prompts = self.encoded.range(range)?;
            States::noised(part, prompts, denoise.size, denoise.guidance, draws, seed)
        };
        let samples = self.settings.samples;
        let held_out = noised(
            samples..self.encoded.len(),
            DRAWS_HELD_OUT,
            seed.wrapping_add(2),
        )?;
        let later = self.settings.draws_later();
        Ok(AllStates {
            fit: noised(0..samples, later, seed.wrapping_add(1))?,
            held_out: held_out.first(self.settings.held_out),
        })
    }

    /// The last `count` prompts drawn by each of `models`, in the steps that people draw in, packed latents on the CPU,
    /// and the prompts.
    pub(super) fn draw(&self, models: &[&Flux], count: usize) -> Result<(Vec<Tensor>, &[String])> {
        let count = count.min(self.encoded.len());
        let last = self.encoded.len() - count..self.encoded.len();
        let encoded = self.encoded.range(last.clone())?;
        let batch = self.settings.batch;
        let steps = self.settings.drawing_steps;
        let progress = ui::progress(models.len() * steps * count.div_ceil(batch), "drawing");
        let mut rows = Vec::new();
        for flux in models {
            let denoise = Denoise {
                steps,
                ..self.denoise(flux)?
            };
            // other noise than in calibration
            let seed = self.settings.recipe.seed.wrapping_add(1000);
            let latents = crate::calibrate::sample(
                &denoise,
                &encoded,
                self.channels(),
                batch,
                BATCHES_PER_LOAD,
                seed,
                &progress,
            )?;
            rows.push(latents);
        }
        ui::done(
            &progress,
            format!("drew {count} prompts with {} models", models.len()),
        );
        Ok((rows, &self.settings.prompts[last]))
    }
}

/// Picture files → packed latents (pictures, tokens, 4 · channels), f32 on the CPU; one picture in memory at a time.
fn encode_images(
    pipeline: &Pipeline,
    runtime: &Runtime,
    size: ImageSize,
    images: &[PathBuf],
) -> Result<Tensor> {
    let vae = load::vae(&pipeline.vae_files()?, runtime)?;
    let progress = ui::progress(images.len(), "encoding pictures");
    let mut out = Vec::new();
    for path in images {
        let picture = image::read(path).context("--images")?;
        let picture = image::covering(&picture, size.width, size.height)?.unsqueeze(0)?;
        let picture = picture.to_device(&runtime.device)?;
        let latents = vae.encode(&picture.to_dtype(runtime.dtype)?)?;
        let packed = latents::pack(&latents.to_dtype(candle::DType::F32)?)?;
        out.push(packed.to_device(&candle::Device::Cpu)?);
        progress.inc(1);
    }
    ui::done(&progress, format!("encoded {} pictures", images.len()));
    Ok(Tensor::cat(&out, 0)?)
}
