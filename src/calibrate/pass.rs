//! One calibration pass, unit by unit. A unit is a batch of prompts: sampled together, noised, sent through the
//! transformer once more and forgotten. Units do not depend on each other, so they can be divided between processes
//! (`--shard`) and picked up after a kill, and what they add is the same wherever they run.

use anyhow::{Context, Result, ensure};
use candle::{Device, Tensor};
use indicatif::ProgressBar;

use super::{
    NoiseLevels,
    noised::{NoisedLatents, Share},
    stats::CalibrationStats,
};
use crate::{
    model::{Flux, Observer},
    sample::denoise::{Denoise, Encoded, starting_noise},
};

/// What a pass looks at.
#[derive(Clone, Debug)]
pub struct Pass<'a> {
    /// How images are sampled.
    pub denoise: Denoise<'a>,
    /// Prompts of the images to gather statistics of, then those held out.
    pub prompts: &'a Encoded,
    /// How many of the prompts are for statistics.
    pub num_prompts: usize,
    /// Noised latents of each image, on average.
    pub noise_levels_per_image: f64,
    /// Prompts and noised latents in one forward.
    pub batch: usize,
    /// Latent channels.
    pub channels: usize,
    /// Seed of starting noise; noised latents take the next.
    pub seed: u64,
    /// Given images as packed latents (prompts, tokens, 4 · channels); otherwise they are sampled.
    pub images: Option<&'a Tensor>,
    /// Noise levels of the noised latents.
    pub levels: NoiseLevels,
}

impl Pass<'_> {
    /// Number of units: batches of prompts for statistics, then batches of prompts held out.
    pub fn units(&self) -> usize {
        self.division().units()
    }

    /// The prompts of a unit.
    pub fn prompts_of(&self, unit: usize) -> std::ops::Range<usize> {
        self.division().prompts_of(unit)
    }

    fn division(&self) -> Division {
        Division {
            prompts: self.prompts.len(),
            num_prompts: self.num_prompts,
            batch: self.batch,
        }
    }

    /// Noised latents of all images that statistics are gathered of.
    pub fn num_noised(&self) -> usize {
        (self.num_prompts as f64 * self.noise_levels_per_image).ceil() as usize
    }

    /// Forwards of a unit: of sampling, and of gathering after it.
    pub fn forwards_of(&self, unit: usize) -> usize {
        let prompts = self.prompts_of(unit);
        let sampling = if self.images.is_some() {
            0
        } else {
            self.denoise.steps
        };
        let gathered = prompts.start < self.num_prompts;
        let in_unit =
            |i: usize| i % self.num_prompts >= prompts.start && i % self.num_prompts < prompts.end;
        let count = (0..self.num_noised())
            .filter(|i| gathered && in_unit(*i))
            .count();
        sampling + count.div_ceil(self.batch)
    }

    /// Carries out one unit: adds to `stats` and gives the images, packed latents (prompts, tokens, 4 · channels) in
    /// f32 on the CPU.
    ///
    /// # Errors
    /// When a forward fails or values become NaN or infinite.
    pub fn run(
        &self,
        unit: usize,
        stats: &mut CalibrationStats,
        progress: &ProgressBar,
    ) -> Result<Tensor> {
        let range = self.prompts_of(unit);
        ensure!(!range.is_empty(), "no unit {unit} in this calibration");
        let gather = range.start < self.num_prompts;
        // every forward has a number of its own, whoever runs it: they are counted from here
        stats.start_forward((unit as u64) << 20);
        let prompts = self.prompts.range(range.clone())?;
        let images = match self.images {
            Some(images) => images.narrow(0, range.start, range.len())?,
            None => self.sample(range.clone(), &prompts, progress)?,
        };
        if gather {
            let share = Share {
                first: range.start,
                of: self.num_prompts,
                num_noised: self.num_noised(),
            };
            let (size, guidance) = (self.denoise.size, self.denoise.guidance);
            let seed = self.seed.wrapping_add(1);
            let noised =
                NoisedLatents::share(images.clone(), prompts, share, size, guidance, seed)?
                    .with_levels(self.levels.clone());
            for range in noised.batches(self.batch) {
                let batch = noised.batch(range, self.denoise.device, self.denoise.dtype)?;
                trunk_only(self.denoise.flux, &batch.inputs(), stats)?;
                progress.inc(1);
            }
        }
        stats.settle()?;
        Ok(images)
    }

    /// Samples prompts; image i starts from the noise of seed `seed + i`, whatever the unit.
    fn sample(
        &self,
        range: std::ops::Range<usize>,
        prompts: &Encoded,
        progress: &ProgressBar,
    ) -> Result<Tensor> {
        let noise = range.map(|i| {
            let seed = self.seed.wrapping_add(i as u64);
            starting_noise(seed, 1, self.channels, self.denoise.size)
        });
        let noise = Tensor::cat(&noise.collect::<Result<Vec<_>>>()?, 0)?;
        let latents = self
            .denoise
            .run(&noise, prompts, &mut (), &mut || progress.inc(1))
            .context("while sampling")?;
        Ok(latents.to_device(&Device::Cpu)?)
    }
}

/// How prompts make units. The batch is at least 1, and `num_prompts` is at most all prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Division {
    /// All prompts.
    pub(super) prompts: usize,
    /// Those for statistics, which come first.
    pub(super) num_prompts: usize,
    /// Prompts of a unit.
    pub(super) batch: usize,
}

impl Division {
    pub(super) fn units(self) -> usize {
        let held_out = self.prompts - self.num_prompts;
        self.num_prompts.div_ceil(self.batch) + held_out.div_ceil(self.batch)
    }

    pub(super) fn prompts_of(self, unit: usize) -> std::ops::Range<usize> {
        let of_statistics = self.num_prompts.div_ceil(self.batch);
        let (start, end) = match unit.checked_sub(of_statistics) {
            None => (unit * self.batch, self.num_prompts),
            Some(unit) => (self.num_prompts + unit * self.batch, self.prompts),
        };
        start.min(end)..(start + self.batch).min(end)
    }
}

/// Which part of the units to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1 to `of`.
    pub index: usize,
    /// Number of shards.
    pub of: usize,
}

impl Shard {
    /// All units.
    pub const WHOLE: Self = Self { index: 1, of: 1 };

    /// Whether a unit is in it.
    pub fn has(self, unit: usize) -> bool {
        unit % self.of == self.index - 1
    }
}

impl std::str::FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(index, of)| {
            let (index, of) = (index.parse().ok()?, of.parse().ok()?);
            (1..=of).contains(&index).then_some(Self { index, of })
        });
        parsed.ok_or_else(|| "expected i/n with i from 1 to n, such as 2/8".to_owned())
    }
}

/// All blocks, without the head: the velocity is not used.
fn trunk_only(
    flux: &Flux,
    inputs: &crate::model::Inputs,
    observer: &mut dyn Observer,
) -> Result<()> {
    let (stream, conditioning) = flux.embed(inputs)?;
    let all = 0..flux.trunk.len();
    flux.trunk
        .forward_range(all, &stream, &conditioning, observer)?;
    Ok(())
}
