//! Measures one model of an evaluation: loads it, samples images, takes its velocity and its time, and frees it again.

use std::cell::RefCell;

use anyhow::{Context, Result, ensure};
use candle::Tensor;

use super::{report::Memory, unfinished::Unfinished, velocity::Velocities};
use crate::{
    bench::timing::{self, Effort, MemoryWatch, Timing},
    calibrate::{self, NoiseLevels, noised::NoisedLatents},
    device::Runtime,
    model::{Flux, memory::BATCHES_PER_LOAD},
    pipeline::{
        Pipeline, load,
        placement::{Activity, MemoryBudget},
    },
    sample::{
        denoise::{Denoise, Encoded},
        schedule::Schedule,
        size::{ImageSize, TOKENS_PER_FORWARD},
    },
    ui,
};

/// How often a step is timed.
const STEPS: Effort = Effort {
    warm_up: 1,
    min_runs: 3,
    max_runs: 40,
    seconds: 3.0,
};

/// Prompts that the baseline draws once more from other noise, but at most a quarter of all: how far two images of one prompt
/// are apart.
const AGAIN: usize = 8;

/// What all models are given.
pub(super) struct Task<'a> {
    pub(super) runtime: &'a Runtime,
    pub(super) budget: &'a MemoryBudget,
    pub(super) encoded: Encoded,
    pub(super) schedule: Schedule,
    pub(super) size: ImageSize,
    pub(super) steps: usize,
    pub(super) guidance: f64,
    pub(super) cfg_scale: f64,
    pub(super) seed: u64,
    /// Where sampled images are kept while the evaluation is unfinished.
    pub(super) unfinished: RefCell<Unfinished>,
    /// Whether all models are small enough to be loaded together; steps are then timed by [`Task::in_turn`].
    pub(super) together: bool,
}

/// What one model did.
pub(super) struct Measured {
    /// Packed latents, (images, tokens, 4 · channels), f32 on the CPU.
    pub(super) latents: Tensor,
    /// Latents of the first [`AGAIN`] prompts from other noise, of the baseline.
    pub(super) again: Option<Tensor>,
    pub(super) velocities: Velocities,
    /// One step of one image; not timed yet if models are timed together.
    pub(super) step: Timing,
    pub(super) memory: Memory,
}

impl Task<'_> {
    /// Measures the baseline and then each model on the baseline's images.
    pub(super) fn all(&self, baseline: &Pipeline, models: &[Pipeline]) -> Result<Vec<Measured>> {
        let (before, noised) = self.baseline(baseline)?;
        let mut measured = vec![before];
        for (place, model) in (1..).zip(models) {
            measured.push(self.model(place, model, &noised)?);
        }
        if self.together {
            let all: Vec<&Pipeline> = std::iter::once(baseline).chain(models).collect();
            let timings = self.in_turn(&all, &noised)?;
            for (measured, timing) in measured.iter_mut().zip(timings) {
                measured.step = timing;
            }
        }
        Ok(measured)
    }

    /// Samples the baseline's images; noised again, they are the latents that all velocities are compared on.
    fn baseline(&self, pipeline: &Pipeline) -> Result<(Measured, NoisedLatents)> {
        let mut compared = None;
        let levels = NoiseLevels::of_model(pipeline, self.size, self.steps)?;
        let measured = self.run(0, pipeline, &mut |latents: &Tensor| {
            let wanted = self.size.default_held_out();
            let noise_levels = wanted.div_ceil(self.encoded.len());
            let noised = NoisedLatents::new(
                latents.clone(),
                self.encoded.clone(),
                self.size.latent(pipeline.config.family),
                self.guidance,
                noise_levels,
                self.seed.wrapping_add(1),
            )?
            .with_levels(levels.clone());
            compared = Some(noised.first(wanted));
            Ok(compared.clone())
        })?;
        Ok((measured, compared.context("the baseline sampled nothing")?))
    }

    /// Samples a model's images and takes its velocity on `noised`.
    fn model(&self, place: usize, pipeline: &Pipeline, noised: &NoisedLatents) -> Result<Measured> {
        self.run(place, pipeline, &mut |_: &Tensor| Ok(Some(noised.clone())))
    }

    fn run(
        &self,
        place: usize,
        pipeline: &Pipeline,
        noised: &mut dyn FnMut(&Tensor) -> Result<Option<NoisedLatents>>,
    ) -> Result<Measured> {
        let runtime = self.runtime;
        let free = || {
            (!runtime.device.is_cpu())
                .then(|| runtime.free_memory())
                .flatten()
        };
        let mut memory = MemoryWatch::start(free());
        let tokens = self.size.tokens() + self.encoded.txt.dim(1)?;
        let default = TOKENS_PER_FORWARD / tokens;
        let budget = self.budget.clone().for_pipeline(pipeline);
        let batch = budget.batch(&pipeline.config, tokens, default);
        let activity = Activity {
            batch,
            tokens,
            extra_bytes: budget.waiting(&pipeline.config, batch, tokens),
        };
        let flux = budget.flux(pipeline, activity)?;
        let denoise = Denoise {
            flux: &flux,
            dtype: runtime.dtype,
            device: &runtime.device,
            schedule: &self.schedule,
            steps: self.steps,
            guidance: self.guidance,
            cfg_scale: self.cfg_scale,
            size: self.size.latent(pipeline.config.family),
        };
        let latents = self
            .sample(place, pipeline, &denoise, batch)
            .with_context(|| format!("while sampling with `{}`", pipeline.name))?;
        let again = if place == 0 {
            Some(self.again(pipeline, &denoise, batch)?)
        } else {
            None
        };
        memory.sample(free());
        let noised = noised(&latents)?.context("no noised latents to compare on")?;
        let progress = pipeline
            .reporter
            .progress(noised.batches(batch).len(), "comparing");
        let velocities = Velocities::new(&flux, &noised, batch, runtime, &progress)
            .with_context(|| format!("`{}`", pipeline.name))?;
        progress.finish_and_clear();
        memory.sample(free());
        let timings = if self.together {
            Vec::new()
        } else {
            self.time(&[flux], &noised)?
        };
        Ok(Measured {
            latents,
            again,
            velocities,
            step: timings.first().copied().unwrap_or_default(),
            memory: Memory {
                host: memory.host(),
                device: memory.device(),
            },
        })
    }

    /// Latents of the first [`AGAIN`] prompts from the seeds behind those of the images.
    fn again(&self, pipeline: &Pipeline, denoise: &Denoise, batch: usize) -> Result<Tensor> {
        let images = self.encoded.len();
        let first = self.encoded.range(0..AGAIN.min(images.div_ceil(4)))?;
        let forwards = first.len().div_ceil(batch) * self.steps;
        let progress = pipeline.reporter.progress(forwards, "sampling once more");
        let latents = calibrate::sample(
            denoise,
            &first,
            pipeline.config.out_channels / 4,
            batch,
            BATCHES_PER_LOAD,
            self.seed.wrapping_add(images as u64),
            &progress,
        )?;
        progress.finish_and_clear();
        Ok(latents)
    }

    /// The images that an earlier, killed run has not sampled yet, behind those that it has.
    fn sample(
        &self,
        place: usize,
        pipeline: &Pipeline,
        denoise: &Denoise,
        batch: usize,
    ) -> Result<Tensor> {
        let before = self.unfinished.borrow().of_model(place).cloned();
        let (all, have) = (self.encoded.len(), before.as_ref().map_or(0, rows));
        let forwards = (all - have.min(all)).div_ceil(batch) * self.steps;
        let progress = pipeline.reporter.progress(forwards, "sampling");
        let mut images: Vec<Tensor> = before.into_iter().collect();
        if have < all {
            let earlier = images.clone();
            let sampled = calibrate::sample_range(
                denoise,
                &self.encoded,
                pipeline.config.out_channels / 4,
                batch,
                BATCHES_PER_LOAD,
                self.seed,
                have..all,
                &progress,
                &mut |new| {
                    let so_far = [&earlier[..], new].concat();
                    self.unfinished.borrow_mut().keep(place, &so_far);
                },
            )?;
            images.extend(sampled);
        }
        let images = Tensor::cat(&images, 0)?;
        self.unfinished.borrow_mut().put(place, images.clone());
        pipeline.reporter.done(
            &progress,
            format!(
                "sampled {} with `{}`",
                ui::counted(all - have, "image"),
                pipeline.name
            ),
        );
        Ok(images)
    }

    /// Times one step of each model, in turn, so that a busy machine slows all of them alike.
    fn in_turn(&self, pipelines: &[&Pipeline], noised: &NoisedLatents) -> Result<Vec<Timing>> {
        let load = |pipeline: &&Pipeline| load::flux(pipeline, self.runtime);
        let models: Vec<Flux> = pipelines.iter().map(load).collect::<Result<_>>()?;
        self.time(&models, noised)
    }

    fn time(&self, models: &[Flux], noised: &NoisedLatents) -> Result<Vec<Timing>> {
        let (device, dtype) = (&self.runtime.device, self.runtime.dtype);
        let one = noised.batch(0..1, device, dtype)?;
        let step = |flux: &Flux| -> Result<()> {
            flux.forward(&one.inputs(), &mut ())?;
            Ok(())
        };
        let mut works: Vec<_> = models.iter().map(|flux| || step(flux)).collect();
        let mut works: Vec<&mut dyn FnMut() -> Result<()>> =
            works.iter_mut().map(|work| work as _).collect();
        timing::measure(device, STEPS, &mut works)
    }
}

fn rows(latents: &Tensor) -> usize {
    latents.dims().first().copied().unwrap_or(0)
}

/// Fails if the models cannot be given the same prompts and noise.
///
/// # Errors
/// The message names both and what differs.
pub fn check_family(baseline: &Pipeline, model: &Pipeline) -> Result<()> {
    let (a, b) = (&baseline.config, &model.config);
    for (what, a, b) in [
        ("input channels", a.in_channels, b.in_channels),
        ("output channels", a.out_channels, b.out_channels),
        ("width of the text", a.context_in_dim, b.context_in_dim),
        ("width of the pooled text", a.vec_in_dim, b.vec_in_dim),
    ] {
        ensure!(
            a == b,
            "`{}` and `{}` are of different families ({what} {b} and {a}): they cannot be given the same prompts and noise\nhint: name the model that `{}` was made from with --baseline",
            model.name,
            baseline.name,
            model.name
        );
    }
    ensure!(
        a.in_channels == a.out_channels,
        "`{}` takes {} input channels but predicts {}: models that take an image as input (Fill, Canny, Depth) cannot draw from a prompt alone",
        baseline.name,
        a.in_channels,
        a.out_channels
    );
    Ok(())
}
