//! What a calibration takes: forwards, arithmetic and memory, counted before anything is loaded (`--dry-run`).

use anyhow::{Context, Result};
use serde::Serialize;

mod check;
mod counts;
mod fits;

pub use counts::{Bytes, Flops, Forwards};
pub use fits::Refits;

use super::{options::ResolvedOptions, pass::Shard, recipe::LatentSource};
use crate::{
    device::free_host_memory,
    layout::FluxConfig,
    model::cost,
    pipeline::{
        Pipeline,
        placement::{Activity, MemoryBudget, UNCOUNTED_ON_GPU},
    },
    ui,
};

/// Bytes of token streams of the sequential fits that stay in host memory; what is more lies in a temporary file.
pub const STREAMS_IN_MEMORY: u64 = 4 << 30;
/// Most bytes of sums in host memory unless the user says otherwise: with the fits of FLUX.1 that follow, 12 GB are enough.
const SUMS_IN_MEMORY: u64 = 6 << 30;

/// Bytes of the sums of one block: ZᵀZ and ZᵀR of both streams, in f64.
pub(super) fn bytes_of_sums(config: &FluxConfig) -> u64 {
    let d = config.hidden_size as u64;
    2 * 8 * (d + 1) * (2 * d + 1)
}

/// How many blocks' sums fit into `memory`, at least one.
pub(super) fn blocks_within(config: &FluxConfig, memory: Option<u64>) -> usize {
    let all = config.kept_ids().len();
    let fit = memory.map_or(all, |bytes| (bytes / bytes_of_sums(config)) as usize);
    fit.clamp(1, all.max(1))
}

/// Bytes of the sums that are kept if there is room for `memory` bytes of them; 0 if the limit is unknown.
pub fn bytes_of_kept(config: &FluxConfig, memory: Option<u64>) -> u64 {
    memory.map_or(0, |bytes| {
        blocks_within(config, Some(bytes)) as u64 * bytes_of_sums(config)
    })
}

/// What is on the device during a calibration in addition to the blocks, and the bytes that its sums may take: `given` ones, or
/// half of what is left, the other half is for solving; in host memory no more than [`SUMS_IN_MEMORY`].
pub(super) fn activity(
    pipeline: &Pipeline,
    budget: &MemoryBudget,
    options: &ResolvedOptions,
    given: Option<u64>,
) -> (Activity, Option<u64>) {
    let config = &pipeline.config;
    let (batch, tokens) = (options.batch, options.tokens());
    // one stream of one block in f32 (f64 on the CPU), its change, and the fresh products next to the sums
    let wide = if budget.on_cpu() { 8 } else { 4 };
    let stream = (batch * tokens * config.hidden_size) as u64;
    // and, at other times, candidates that are scored together, images that are generated together
    let waiting = budget.waiting(config, batch, tokens);
    let mut activity = Activity {
        batch,
        tokens,
        extra_bytes: (2 * stream * wide).max(waiting) + bytes_of_sums(config),
    };
    let most = if budget.on_cpu() {
        SUMS_IN_MEMORY
    } else {
        u64::MAX
    };
    let sums = given.or_else(|| Some((budget.headroom(config, activity)? / 2).min(most)));
    let kept = blocks_within(config, sums) as u64 * bytes_of_sums(config);
    // layers and solver are on the host
    activity.extra_bytes += if budget.on_cpu() { 2 * kept } else { kept };
    (activity, sums)
}

/// What a calibration takes. Memory is what programs allocate; mapped pages of the model's file are not counted.
#[derive(Clone, Debug, Serialize)]
pub struct CalibrationEstimate {
    /// How the model is called.
    pub model: String,
    /// Number format and device.
    pub runtime: String,
    /// Prompts to sample.
    pub prompts: usize,
    /// Sampling steps.
    pub steps: usize,
    /// Image tokens of one image.
    pub image_tokens: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Noised latents in one forward.
    #[serde(rename = "noised_latents_per_forward")]
    pub batch: usize,
    /// Forwards, of this shard.
    pub forwards: Forwards,
    /// Operations, of this shard.
    pub flops: Flops,
    /// Blocks that are not replaced.
    pub blocks: usize,
    /// Blocks whose sums fit into memory.
    pub blocks_with_sums: usize,
    /// Blocks that stay on the device.
    pub blocks_on_the_device: usize,
    /// Memory.
    pub bytes: Bytes,
    /// Bytes of the device that are free; `None` if unknown.
    pub free: Option<u64>,
    /// Free bytes of host memory; `None` if unknown.
    pub free_host: Option<u64>,
    /// Bytes that are written, temporary files included; 0 until the output is known.
    pub disk: u64,
    /// Free bytes on that disk; `None` if unknown.
    pub free_disk: Option<u64>,
    /// Which shard, `2/8`; `None` for all.
    pub shard: Option<String>,
    /// Seconds for all arithmetic; `None` until the speed was measured.
    pub seconds: Option<f64>,
    #[serde(skip)]
    details: Details,
}

/// What only the text says.
#[derive(Clone, Copy, Debug)]
struct Details {
    width: usize,
    height: usize,
    noised: usize,
    sums_of_a_block: u64,
    all_blocks: usize,
    fitting: bool,
    on_cpu: bool,
    held_out: usize,
    flops_per_latent: f64,
}

impl CalibrationEstimate {
    /// Of `options` with at most `stats_memory` bytes of sums (0: none, as if a plan is given); with `fitting`, of the fits after it too.
    ///
    /// # Errors
    /// When the memory limit is too low for a forward.
    pub fn new(
        pipeline: &Pipeline,
        budget: &MemoryBudget,
        options: &ResolvedOptions,
        shard: Shard,
        stats_memory: Option<u64>,
        fitting: Option<Refits>,
    ) -> Result<Self> {
        let runtime = budget.runtime();
        let config = &pipeline.config;
        let steps = options.recipe.steps.context("steps are resolved")?;
        let noise_levels_per_image = options
            .recipe
            .noise_levels_per_image
            .context("noise_levels_per_image are resolved")?;
        let (num_prompts, prompts, batch) =
            (options.num_prompts, options.prompts.len(), options.batch);
        let sampling = match options.recipe.source {
            LatentSource::Images => 0,
            LatentSource::Latents => prompts * steps,
        };
        let noised = (num_prompts as f64 * noise_levels_per_image).ceil() as usize;
        // images alone are drawn if nothing is to be chosen
        let no_sums = stats_memory == Some(0);
        let gathered = if no_sums { 0 } else { noised };
        let of_shard = |count: usize| count.div_ceil(shard.of);
        let image_tokens = options.size.tokens();
        let tokens = options.tokens();
        let per_latent = cost::model(config, tokens - options.text_tokens, options.text_tokens);
        let flops = |count: usize| of_shard(count) as f64 * per_latent.flops() as f64;
        let (activity, room) = self::activity(pipeline, budget, options, stats_memory);
        let kept = if no_sums {
            0
        } else {
            blocks_within(config, room)
        };
        let offload_plan = budget.offload_plan(config, activity)?;
        let d = config.hidden_size as u64;
        let rows = match options.recipe.tokens_per_forward {
            None => noised * tokens,
            Some(limit) => noised.div_ceil(batch) * (2 * limit).min(batch * tokens),
        };
        // 2 · rows · (k² / 2 + k d) multiply-adds
        let products = (kept * of_shard(rows)) as f64 * 2.0 * (d as f64) * (1.5 * d as f64);
        let weights = offload_plan.bytes;
        let sums = kept as u64 * bytes_of_sums(config);
        let element = runtime.dtype.size_in_bytes() as u64;
        let on_cpu = runtime.device.is_cpu();
        let forward = budget.activations(config, batch, tokens);
        // one stream of one block in f32 (f64 on the CPU), its change, and the fresh products next to the sums
        let wide = if on_cpu { 8 } else { 4 };
        let activations = forward + (batch * tokens) as u64 * 2 * d * wide + bytes_of_sums(config);
        let images = (prompts * image_tokens * config.in_channels * 4) as u64;
        let (solving, fitting_on_device, streams, temporary_file) = match fitting {
            Some(refits) => {
                // a layer for each stream of every block with sums, f32
                let layers = kept as u64 * 2 * d * (d + 1) * 4;
                let (solver, on_device) = refits.bytes(config, on_cpu);
                let held = (num_prompts * options.noise_levels_later() * tokens) as u64;
                let streams = 2 * held * d * element;
                let waiting = streams.min(STREAMS_IN_MEMORY);
                (layers + solver, on_device, waiting, streams - waiting)
            }
            None => (0, 0, 0, 0),
        };
        let fits = fitting.map_or(0.0, |refits| {
            let latents = num_prompts * options.noise_levels_later();
            2.0 * flops(latents) + refits.flops_per_token * (latents * tokens) as f64 + refits.flops
        });
        // sums are gone when the sequential fits begin
        let work = (sums + solving + activations).max(streams + solving + forward);
        Ok(Self {
            model: pipeline.name.clone(),
            runtime: runtime.to_string(),
            prompts,
            steps,
            image_tokens,
            text_tokens: options.text_tokens,
            batch,
            forwards: Forwards {
                sampling: of_shard(sampling).div_ceil(batch),
                statistics: of_shard(gathered).div_ceil(batch),
            },
            flops: Flops {
                sampling: flops(sampling),
                statistics: flops(gathered),
                products,
                scoring: 0.0,
                fits,
            },
            blocks: config.kept_ids().len(),
            blocks_with_sums: kept,
            blocks_on_the_device: offload_plan.count(),
            bytes: Bytes {
                weights,
                statistics: sums,
                activations,
                images,
                file: sums + images,
                solving,
                streams,
                temporary_file,
                device: weights
                    + if on_cpu {
                        work
                    } else {
                        activations + sums.max(fitting_on_device) + UNCOUNTED_ON_GPU
                    },
                host: images
                    + if on_cpu {
                        weights + work
                    } else {
                        // sums stay on the device, and one block's at a time comes to be solved
                        solving + streams
                    },
            },
            free: runtime.free_memory(),
            free_host: free_host_memory(),
            disk: 0,
            free_disk: None,
            shard: (shard != Shard::WHOLE).then(|| format!("{}/{}", shard.index, shard.of)),
            details: Details {
                width: options.size.width,
                height: options.size.height,
                noised: gathered,
                sums_of_a_block: bytes_of_sums(config),
                all_blocks: offload_plan.total(),
                fitting: fitting.is_some(),
                on_cpu,
                held_out: options.compared,
                flops_per_latent: per_latent.flops() as f64,
            },
            seconds: None,
        })
    }

    /// With the arithmetic of `rounds` rounds of scoring: the first measures every block, later ones a handful, and each
    /// candidate runs half of the model on average.
    #[must_use]
    pub fn with_scoring(mut self, rounds: usize) -> Self {
        let candidates = match rounds {
            0 => 0,
            rounds => self.blocks + 6 * (rounds - 1),
        };
        let latents = candidates * self.details.held_out;
        self.flops.scoring = latents as f64 * self.details.flops_per_latent / 2.0;
        self
    }

    /// With the time of all its arithmetic at a speed, in operations per second.
    #[must_use]
    pub fn timed(mut self, flops_per_second: f64) -> Self {
        let f = &self.flops;
        let all = f.sampling + f.statistics + f.products + f.scoring + f.fits;
        self.seconds = Some(all / flops_per_second);
        self
    }

    /// For people.
    pub fn text(&self) -> String {
        let size = |bytes: u64| ui::bytes(bytes as f64);
        let (b, d) = (&self.bytes, &self.details);
        let mut lines = vec![
            format!("model       {} on {}", self.model, self.runtime),
            format!(
                "sampling    {} × {} at {}×{}, {} of {}: {}",
                ui::counted(self.prompts, "prompt"),
                ui::counted(self.steps, "step"),
                d.width,
                d.height,
                ui::counted(self.forwards.sampling, "forward"),
                self.batch,
                ui::flops(self.flops.sampling)
            ),
            format!(
                "statistics  {}, {} more: {}",
                ui::counted(d.noised, "noised latent"),
                ui::counted(self.forwards.statistics, "forward"),
                ui::flops(self.flops.statistics),
            ),
            format!(
                "sums        {} of {} blocks, {} ({} each): {}",
                self.blocks_with_sums,
                self.blocks,
                size(b.statistics),
                size(d.sums_of_a_block),
                ui::flops(self.flops.products)
            ),
            if self.blocks_on_the_device == d.all_blocks {
                format!("weights     {}", size(b.weights))
            } else {
                format!(
                    "weights     {} at a time, {} of {} blocks all the time",
                    size(b.weights),
                    self.blocks_on_the_device,
                    d.all_blocks
                )
            },
            format!("activations {}", size(b.activations)),
        ];
        lines.push(if d.fitting {
            format!(
                "fits        {} for layers and solver, {} of streams: {}",
                size(b.solving),
                size(b.streams),
                ui::flops(self.flops.fits)
            )
        } else {
            format!("file        {}", size(b.file))
        });
        if b.temporary_file > 0 {
            lines.push(format!(
                "disk        {} of token streams in a temporary file next to the output",
                size(b.temporary_file)
            ));
        }
        lines.push(if d.on_cpu {
            format!("memory      {}", size(b.host))
        } else {
            format!(
                "memory      {} on the device, {} on the host",
                size(b.device),
                size(b.host)
            )
        });
        lines.extend(self.free.map(|free| format!("free        {}", size(free))));
        if self.disk > 0 {
            let free = self
                .free_disk
                .map(|free| format!(", {} are free", size(free)));
            lines.push(format!(
                "written     {}{}",
                size(self.disk),
                free.unwrap_or_default()
            ));
        }
        if self.flops.scoring > 0.0 {
            let flops = ui::flops(self.flops.scoring);
            lines.push(format!(
                "scoring     {flops} for choosing blocks by running the model"
            ));
        }
        lines.extend(self.seconds.map(|s| {
            let time = ui::duration(s);
            format!("time        about {time} at the speed of a large product here")
        }));
        lines.join("\n")
    }
}
