//! One model of an evaluation: loaded, drawn with, its velocity and its time taken, and freed again.

use anyhow::{Context, Result, ensure};
use candle::Tensor;

use crate::{
    calibrate::{self, states::States},
    device::Runtime,
    eval::{
        latency::{self, Effort, MemoryWatch, Timing},
        report::Memory,
        velocity::Velocities,
    },
    model::{Flux, demand::TOGETHER},
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
    least: 3,
    most: 100,
    seconds: 3.0,
};

/// What all models are given.
pub(super) struct Task<'a> {
    pub(super) runtime: &'a Runtime,
    pub(super) place: &'a MemoryBudget,
    pub(super) encoded: Encoded,
    pub(super) schedule: Schedule,
    pub(super) size: ImageSize,
    pub(super) steps: usize,
    pub(super) guidance: f64,
    pub(super) seed: u64,
    /// Whether all models are small enough to be loaded together, so that steps are timed by [`Task::in_turn`].
    pub(super) together: bool,
}

/// What one model did.
pub(super) struct Measured {
    /// Packed latents, (pictures, tokens, 4 · channels), f32 on the CPU.
    pub(super) latents: Tensor,
    pub(super) velocities: Velocities,
    /// One step of one picture; not timed yet where models are timed together.
    pub(super) step: Timing,
    pub(super) memory: Memory,
}

impl Task<'_> {
    /// Draws the baseline's pictures; they, noised anew, are the states that all velocities are compared on.
    pub(super) fn baseline(&self, pipeline: &Pipeline) -> Result<(Measured, States)> {
        let mut states = None;
        let measured = self.run(pipeline, &mut |latents: &Tensor| {
            let wanted = self.size.default_held_out();
            let draws = wanted.div_ceil(self.encoded.len());
            let noised = States::noised(
                latents.clone(),
                self.encoded.clone(),
                self.size.latent(),
                self.guidance,
                draws,
                self.seed.wrapping_add(1),
            )?;
            states = Some(noised.first(wanted));
            Ok(states.clone())
        })?;
        Ok((measured, states.context("the baseline drew nothing")?))
    }

    /// Draws a model's pictures and takes its velocity on `states`.
    pub(super) fn model(&self, pipeline: &Pipeline, states: &States) -> Result<Measured> {
        self.run(pipeline, &mut |_: &Tensor| Ok(Some(states.clone())))
    }

    fn run(
        &self,
        pipeline: &Pipeline,
        states: &mut dyn FnMut(&Tensor) -> Result<Option<States>>,
    ) -> Result<Measured> {
        let runtime = self.runtime;
        let free = || {
            (!runtime.device.is_cpu())
                .then(|| runtime.free_memory())
                .flatten()
        };
        let mut memory = MemoryWatch::start(free());
        let tokens = self.size.tokens() + self.encoded.txt.dim(1)?;
        let usual = TOKENS_PER_FORWARD / tokens;
        let place = self.place.clone().of(pipeline);
        let batch = place.batch(&pipeline.config, tokens, usual);
        let need = Activity {
            batch,
            tokens,
            extra_bytes: place.waiting(&pipeline.config, batch, tokens),
        };
        let flux = place.flux(pipeline, need)?;
        let denoise = Denoise {
            flux: &flux,
            dtype: runtime.dtype,
            device: &runtime.device,
            schedule: &self.schedule,
            steps: self.steps,
            guidance: self.guidance,
            size: self.size.latent(),
        };
        let pictures = self.encoded.len();
        let progress = ui::progress(pictures.div_ceil(batch) * self.steps, "drawing");
        let channels = pipeline.config.out_channels / 4;
        let latents = calibrate::sample(
            &denoise,
            &self.encoded,
            channels,
            batch,
            TOGETHER,
            self.seed,
            &progress,
        )
        .with_context(|| format!("while drawing with `{}`", pipeline.name))?;
        ui::done(
            &progress,
            format!("drew {pictures} pictures with `{}`", pipeline.name),
        );
        memory.look(free());
        let states = states(&latents)?.context("no states to compare on")?;
        let progress = ui::progress(states.batches(batch).len(), "comparing");
        let velocities = Velocities::of(&flux, &states, batch, runtime, &progress)
            .with_context(|| format!("`{}`", pipeline.name))?;
        progress.finish_and_clear();
        memory.look(free());
        let timings = if self.together {
            Vec::new()
        } else {
            self.time(&[flux], &states)?
        };
        Ok(Measured {
            latents,
            velocities,
            step: timings.first().copied().unwrap_or_default(),
            memory: Memory {
                host: memory.host(),
                device: memory.device(),
            },
        })
    }
}

impl Task<'_> {
    /// Times one step of each model, in turn, so that a busy machine slows all of them alike.
    pub(super) fn in_turn(&self, pipelines: &[&Pipeline], states: &States) -> Result<Vec<Timing>> {
        let load = |pipeline: &&Pipeline| load::flux(pipeline, self.runtime);
        let models: Vec<Flux> = pipelines.iter().map(load).collect::<Result<_>>()?;
        self.time(&models, states)
    }

    fn time(&self, models: &[Flux], states: &States) -> Result<Vec<Timing>> {
        let (device, dtype) = (&self.runtime.device, self.runtime.dtype);
        let one = states.batch(0..1, device, dtype)?;
        let step = |flux: &Flux| -> Result<()> {
            flux.forward(&one.inputs(), &mut ())?;
            Ok(())
        };
        let mut works: Vec<_> = models.iter().map(|flux| || step(flux)).collect();
        let mut works: Vec<&mut dyn FnMut() -> Result<()>> =
            works.iter_mut().map(|work| work as _).collect();
        latency::measure(device, STEPS, &mut works)
    }
}

/// Fails where the models cannot be given the same prompts and noise.
pub(super) fn check_family(baseline: &Pipeline, model: &Pipeline) -> Result<()> {
    let (a, b) = (&baseline.config, &model.config);
    for (what, a, b) in [
        ("input channels", a.in_channels, b.in_channels),
        ("output channels", a.out_channels, b.out_channels),
        ("T5 width", a.context_in_dim, b.context_in_dim),
        ("CLIP width", a.vec_in_dim, b.vec_in_dim),
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
        "`{}` takes {} input channels but predicts {}: models that take a picture as input (Fill, Canny, Depth) cannot draw from a prompt alone",
        baseline.name,
        a.in_channels,
        a.out_channels
    );
    Ok(())
}
