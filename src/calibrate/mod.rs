//! Runs the model on its own images and observes its blocks: prompts → images → noised latents → statistics.

use anyhow::{Context, Result};
use candle::Tensor;

use self::{
    file::Calibration,
    held_out::HeldOut,
    noised::NoisedLatents,
    options::{HELD_OUT_NOISE_LEVELS, ResolvedOptions},
    pass::Pass,
};
use crate::{
    device::Runtime,
    model::{Flux, memory::BATCHES_PER_LOAD},
    pipeline::{Pipeline, load, placement::MemoryBudget},
    sample::{
        denoise::{Denoise, Encoded, starting_noise},
        finite::FiniteCheck,
        schedule::Schedule,
    },
    ui,
};

mod behind;
pub mod file;
pub mod header;
pub mod held_out;
mod images;
pub mod journal;
pub mod memory;
mod noise_levels;
pub mod noised;
mod on_gpu;
pub mod options;
pub mod pass;
pub mod recipe;
pub mod report;
pub mod run;
mod sampling;
pub mod stats;
pub mod subsample;
mod sums;
mod token_sums;

pub use behind::gather_behind;
pub use noise_levels::NoiseLevels;
pub use sampling::{sample, sample_range};

/// See the module.
pub struct Calibrator<'a> {
    /// The model.
    pub pipeline: &'a Pipeline,
    /// What is computed with.
    pub runtime: &'a Runtime,
    /// What was asked for, nothing left open.
    pub options: ResolvedOptions,
    /// Its transformer.
    pub flux: Flux,
    /// Bytes that the sums may take; `None` if the memory limit is unknown.
    pub stats_memory: Option<u64>,
    encoded: Encoded,
    schedule: Schedule,
    /// Given images as packed latents, (prompts, tokens, 4 · channels).
    images: Option<Tensor>,
}

impl<'a> Calibrator<'a> {
    /// Encodes the prompts (and the images, if they are given) and loads the transformer. `stats_memory` is what the user
    /// allows for sums, in bytes.
    ///
    /// # Errors
    /// When a component is missing, damaged, or does not fit into memory.
    pub fn open(
        pipeline: &'a Pipeline,
        budget: &'a MemoryBudget,
        options: ResolvedOptions,
        stats_memory: Option<u64>,
    ) -> Result<Self> {
        let runtime = budget.runtime();
        let schedule = load::schedule(pipeline)?;
        let images = options.images.as_deref();
        let images = images
            .map(|images| images::encode(pipeline, runtime, options.size, images))
            .transpose()?;
        let held_out = options.prompts.len() - options.num_prompts;
        pipeline.reporter.note(format!(
            "{} to calibrate on, {held_out} held out to compare by",
            ui::counted(options.num_prompts, "prompt")
        ));
        let mut encoded = load::encode_prompts(pipeline, &options.prompts, None, runtime)?;
        let paths = &options.recipe.reference_images;
        if !paths.is_empty() {
            let prompts = options.prompts.len();
            let references = images::references(pipeline, runtime, options.size, paths, prompts);
            encoded.references = Some(references?);
        }
        let (activity, stats_memory) = memory::activity(pipeline, budget, &options, stats_memory);
        let flux = budget.flux(pipeline, activity)?;
        Ok(Self {
            pipeline,
            runtime,
            options,
            flux,
            stats_memory,
            encoded,
            schedule,
            images,
        })
    }

    fn denoise<'b>(&'b self, flux: &'b Flux) -> Result<Denoise<'b>> {
        let recipe = &self.options.recipe;
        Ok(Denoise {
            flux,
            dtype: self.runtime.dtype,
            device: &self.runtime.device,
            schedule: &self.schedule,
            steps: recipe.steps.context("steps are resolved")?,
            guidance: recipe.guidance.context("guidance is resolved")?,
            cfg_scale: self.pipeline.cfg_scale(recipe.guidance.unwrap_or_default()),
            size: self.options.size.latent(self.pipeline.config.family),
        })
    }

    fn channels(&self) -> usize {
        self.pipeline.config.out_channels / 4
    }

    fn pass(&self) -> Result<Pass<'_>> {
        let recipe = &self.options.recipe;
        Ok(Pass {
            denoise: self.denoise(&self.flux)?,
            prompts: &self.encoded,
            num_prompts: self.options.num_prompts,
            noise_levels_per_image: recipe
                .noise_levels_per_image
                .context("noise_levels_per_image are resolved")?,
            batch: self.options.batch,
            channels: self.channels(),
            seed: recipe.seed,
            images: self.images.as_ref(),
            levels: self.noise_levels()?,
        })
    }

    /// The noise levels that the model is looked at.
    fn noise_levels(&self) -> Result<NoiseLevels> {
        let steps = self.options.recipe.steps.context("steps are resolved")?;
        NoiseLevels::of_model(self.pipeline, self.options.size, steps)
    }

    /// One step of one image: a damaged model is named by its block before hours are spent on it.
    fn probe(&self) -> Result<()> {
        let probe = Denoise {
            steps: 1,
            ..self.denoise(&self.flux)?
        };
        let noise = starting_noise(self.options.recipe.seed, 1, self.channels(), probe.size)?;
        let prompt = self.encoded.range(0..1)?;
        probe
            .run(&noise, &prompt, &mut FiniteCheck, &mut || ())
            .with_context(|| format!("`{}`", self.pipeline.name))?;
        Ok(())
    }

    /// The calibration's images noised again, for fits and comparisons.
    ///
    /// # Errors
    /// When the calibration is not complete.
    pub fn noised(&self, calibration: &Calibration) -> Result<NoisedSplit> {
        let images = calibration.all_images()?;
        let denoise = self.denoise(&self.flux)?;
        let seed = self.options.recipe.seed;
        let levels = self.noise_levels()?;
        let noised = |range: std::ops::Range<usize>,
                      noise_levels_per_image,
                      seed|
         -> Result<NoisedLatents> {
            let part: Tensor = images.narrow(0, range.start, range.len())?;
            let prompts = self.encoded.range(range)?;
            let noised = NoisedLatents::new(
                part,
                prompts,
                denoise.size,
                denoise.guidance,
                noise_levels_per_image,
                seed,
            )?;
            Ok(noised.with_levels(levels.clone()))
        };
        let num_prompts = self.options.num_prompts;
        let held_out = noised(
            num_prompts..self.encoded.len(),
            HELD_OUT_NOISE_LEVELS,
            seed.wrapping_add(2),
        )?;
        let later = self.options.noise_levels_later();
        Ok(NoisedSplit {
            fit: noised(0..num_prompts, later, seed.wrapping_add(1))?,
            held_out: held_out.first(self.options.held_out),
        })
    }

    /// The held-out part of `noised` with the unpruned model's velocity on it.
    ///
    /// # Errors
    /// When a forward fails or its result is not finite.
    pub fn held_out(&self, noised: &NoisedSplit) -> Result<HeldOut> {
        self.with_velocity(&noised.held_out)
    }

    /// [`Self::held_out`], as much of it as blocks are compared on.
    ///
    /// # Errors
    /// As there.
    pub fn compared(&self, noised: &NoisedSplit) -> Result<HeldOut> {
        self.with_velocity(&noised.held_out.first(self.options.compared))
    }

    fn with_velocity(&self, noised: &NoisedLatents) -> Result<HeldOut> {
        let Runtime { device, dtype } = self.runtime;
        HeldOut::new(&self.flux, noised, self.options.batch, device, *dtype)
    }

    /// Packed latents (prompts, tokens, 4 · channels) of the last `count` prompts by each of `models`, in the steps that
    /// people generate in, on the CPU; and the prompts.
    ///
    /// # Errors
    /// When a forward fails or values become NaN or infinite.
    pub fn draw(&self, models: &[&Flux], count: usize) -> Result<(Vec<Tensor>, &[String])> {
        let count = count.min(self.encoded.len());
        let last = self.encoded.len() - count..self.encoded.len();
        let encoded = self.encoded.range(last.clone())?;
        let batch = self.options.batch;
        let steps = self.options.drawing_steps;
        let progress = self
            .pipeline
            .reporter
            .progress(models.len() * steps * count.div_ceil(batch), "generating");
        let mut rows = Vec::new();
        for flux in models {
            let denoise = Denoise {
                steps,
                ..self.denoise(flux)?
            };
            // other noise than in calibration
            let seed = self.options.recipe.seed.wrapping_add(1000);
            let latents = sampling::sample(
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
        self.pipeline.reporter.done(
            &progress,
            format!(
                "generated {} with {}",
                ui::counted(count, "prompt"),
                ui::counted(models.len(), "model")
            ),
        );
        Ok((rows, &self.options.prompts[last]))
    }
}

/// The calibration's images, noised again.
pub struct NoisedSplit {
    /// To fit on.
    pub fit: NoisedLatents,
    /// To compare by; of other prompts.
    pub held_out: NoisedLatents,
}
