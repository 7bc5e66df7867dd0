//! Decides which weights stay on the device, which are offloaded, and the largest batch that fits. The sizes themselves
//! are counted by `model::memory`.

use anyhow::{Context, Result, bail};

use super::{Pipeline, load};
use crate::{
    device::Runtime,
    layout::FluxConfig,
    model::{
        Flux,
        memory::{self, ElementSizes, OffloadPlan},
        ops,
    },
    ui::{self, Reporter},
};

/// Bytes of freed memory that stay with the process under `--offload`: enough for the blocks on their way.
const KEPT_IF_OFFLOADED: u64 = 4 << 30;
/// Bytes of a limit for what a process takes on a GPU that no estimate counts: the driver's context, workspaces of products,
/// what an allocator cannot use again. Without them an H200 held 0.7 GiB more than a limit of 12 GiB, as `nvidia-smi` sees it.
pub const UNCOUNTED_ON_GPU: u64 = 1 << 30;
/// Share of the memory that is free at the start that counts as usable: allocators and kernels take the rest.
const USABLE: f64 = 0.92;

/// How much of the device the user allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryLimit {
    /// Keep all blocks off the device.
    pub offload: bool,
    /// Most bytes to use; `None`: what is free.
    pub max_bytes: Option<u64>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct MemoryBudget {
    pub(super) runtime: Runtime,
    offload: bool,
    /// Memory limit in bytes; `None` if unknown.
    pub(super) limit: Option<u64>,
    /// Whether the user set it.
    asked: bool,
    /// Bytes of a weight on the device, on average.
    weight: f64,
    pub(super) reporter: Reporter,
}

/// What is on the device while a transformer runs.
#[derive(Clone, Copy, Debug)]
pub struct Activity {
    /// Noised latents in a forward.
    pub batch: usize,
    /// Image and text tokens of a state.
    pub tokens: usize,
    /// Bytes of what else is on the device at the same time.
    pub extra_bytes: u64,
}

impl MemoryBudget {
    /// What the user and the device allow. To be made before anything is loaded, as it asks for free memory.
    pub fn new(allowed: MemoryLimit, runtime: &Runtime, reporter: &Reporter) -> Self {
        // what is kept of freed memory counts to everybody who asks the driver: on an H100 a limit of 12 GiB was broken by
        // 5 % as long as all was kept
        if let Some(limit) = allowed.max_bytes {
            ops::limit_kept_memory(limit / 2);
        } else if allowed.offload {
            ops::limit_kept_memory(KEPT_IF_OFFLOADED);
        }
        let free = || Some((runtime.free_memory()? as f64 * USABLE) as u64);
        Self {
            runtime: runtime.clone(),
            offload: allowed.offload,
            limit: allowed.max_bytes.or_else(free),
            asked: allowed.max_bytes.is_some(),
            weight: runtime.dtype.size_in_bytes() as f64,
            reporter: reporter.clone(),
        }
    }

    /// With the weights of `pipeline`, which may stay packed.
    #[must_use]
    pub fn for_pipeline(mut self, pipeline: &Pipeline) -> Self {
        self.weight = pipeline.bytes_of_a_weight(self.runtime.dtype);
        self
    }

    /// Whether on the CPU.
    pub fn on_cpu(&self) -> bool {
        self.runtime.device.is_cpu()
    }

    /// Bytes of a limit that are not there for tensors.
    fn uncounted(&self) -> u64 {
        if self.asked && !self.on_cpu() {
            UNCOUNTED_ON_GPU
        } else {
            0
        }
    }

    /// Memory limit in bytes; `None` if unknown.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Who is told about it.
    pub fn reporter(&self) -> &Reporter {
        &self.reporter
    }

    /// What is computed with.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    fn format(&self, config: &FluxConfig) -> ElementSizes {
        ElementSizes {
            element: self.runtime.dtype.size_in_bytes() as u64,
            weight: self.weight,
            scores: ops::holds_scores(&self.runtime.device, self.runtime.dtype, config.head_dim()),
        }
    }

    /// Whether blocks are not to stay, or there is no room for `bytes` of weights.
    pub fn is_short_of(&self, bytes: u64) -> bool {
        self.offload || self.limit.is_some_and(|limit| limit < bytes)
    }

    /// Bytes of a forward's activations.
    pub fn activations(&self, config: &FluxConfig, batch: usize, tokens: usize) -> u64 {
        memory::activations(config, batch, tokens, self.format(config))
    }

    /// Bytes of the batches that wait while one of them goes through a block that is read for all.
    pub fn waiting(&self, config: &FluxConfig, batch: usize, tokens: usize) -> u64 {
        memory::waiting(config, batch, tokens, self.format(config))
    }

    /// `default` noised latents in a forward, or as few as fit.
    pub fn batch(&self, config: &FluxConfig, tokens: usize, default: usize) -> usize {
        let format = self.format(config);
        let least = OffloadPlan::none(config, format).bytes;
        let fits = |batch: usize| {
            let at_work = memory::activations(config, batch, tokens, format);
            let taken = least + at_work + self.uncounted();
            self.limit.is_none_or(|limit| taken <= limit)
        };
        let mut batch = default.max(1);
        while batch > 1 && !fits(batch) {
            batch = batch.div_ceil(2);
        }
        if batch < default {
            self.reporter.note(format!(
                "{batch} noised latents in a forward instead of {default}, so that they fit into {}",
                ui::bytes(self.limit.unwrap_or_default() as f64)
            ));
        }
        batch
    }

    /// Bytes that are left for something else when no more of them than necessary are on the device;
    /// `None` if the limit is unknown.
    pub fn headroom(&self, config: &FluxConfig, activity: Activity) -> Option<u64> {
        let format = self.format(config);
        let taken = OffloadPlan::none(config, format).bytes + self.at_work(config, activity);
        Some(self.limit?.saturating_sub(taken + self.uncounted()))
    }

    fn at_work(&self, config: &FluxConfig, activity: Activity) -> u64 {
        memory::activations(config, activity.batch, activity.tokens, self.format(config))
            + activity.extra_bytes
    }

    /// Which blocks stay on the device.
    pub fn offload_plan(&self, config: &FluxConfig, activity: Activity) -> Result<OffloadPlan> {
        let format = self.format(config);
        if self.offload {
            return Ok(OffloadPlan::none(config, format));
        }
        let Some(limit) = self.limit else {
            return Ok(OffloadPlan::all(config, format));
        };
        let at_work = self.at_work(config, activity);
        let room = limit.saturating_sub(at_work + self.uncounted());
        if let Some(offload_plan) = OffloadPlan::within(config, format, room) {
            return Ok(offload_plan);
        }
        let least = OffloadPlan::none(config, format);
        let size = |bytes: u64| ui::bytes(bytes as f64);
        let text = format!(
            "{} of memory are too little: two blocks at a time and what is around them take {}, {} of {} tokens {}",
            size(limit),
            size(least.bytes),
            ui::counted(activity.batch, "noised latent"),
            activity.tokens,
            size(at_work)
        );
        if self.asked {
            // what is drawn goes one by one before this; what is gathered keeps its batch
            let fewer = if activity.batch > 1 {
                ", or fewer noised latents in a forward (`calibration.batch` in the recipe)"
            } else {
                ""
            };
            bail!(
                "--max-vram: {text}\nhint: allow {}, or draw smaller images (--width, --height){fewer}, or take --dtype bf16",
                size(least.bytes + at_work + self.uncounted())
            );
        }
        self.reporter.warn(format!("{text}; trying all the same"));
        Ok(least)
    }

    /// The transformer, with as many of its blocks on the device as there is room for.
    pub fn flux(&self, pipeline: &Pipeline, activity: Activity) -> Result<Flux> {
        let config = &pipeline.config;
        let offload_plan = self.offload_plan(config, activity)?;
        if offload_plan.is_all() {
            return load::flux(pipeline, &self.runtime);
        }
        let size = |bytes: u64| ui::bytes(bytes as f64);
        let limit = self.limit.filter(|_| !self.offload);
        self.reporter.note(format!(
            "`{}`: {} of {} blocks stay on the device, the others are read when they are run; {} of weights at a time and {} for the rest{}",
            pipeline.name,
            offload_plan.count(),
            offload_plan.total(),
            size(offload_plan.bytes),
            size(self.at_work(config, activity)),
            limit.map_or_else(String::new, |limit| format!(", of {}", size(limit)))
        ));
        load::check_kernels(&self.runtime, &self.reporter);
        let vb = pipeline
            .transformer
            .offloaded_var_builder(self.runtime.dtype, &self.runtime.device);
        Flux::offloaded(config, &vb, &|index| offload_plan.is_resident(index))
            .with_context(|| format!("cannot load the transformer of `{}`", pipeline.name))
    }
}
