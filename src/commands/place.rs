//! How much of the device a command uses: what stays there, what is brought when it is needed, in what portions.
//! The sizes themselves are counted by `model::demand` and `sample::vae`.

use anyhow::{Context, Result, bail};

use super::load;
use crate::{
    cli::MemoryArgs,
    device::Runtime,
    layout::FluxConfig,
    model::{
        Flux,
        demand::{self, Format, Residence},
    },
    pipeline::Pipeline,
    ui,
};

/// Share of the memory that is free at the start that counts as usable: allocators and kernels take some beside.
const USABLE: f64 = 0.92;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Place {
    runtime: Runtime,
    offload: bool,
    /// Bytes that may be used, where anybody says.
    limit: Option<u64>,
    /// Whether the user said so.
    asked: bool,
}

/// What is on the device while a transformer runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// States in a forward.
    pub(super) batch: usize,
    /// Image and text tokens of a state.
    pub(super) tokens: usize,
    /// Bytes of what else is there meanwhile.
    pub(super) beside: u64,
}

impl Place {
    /// What the flags and the device allow. To be asked before anything is loaded.
    pub(super) fn new(args: MemoryArgs, runtime: &Runtime) -> Self {
        let free = || Some((runtime.free_memory()? as f64 * USABLE) as u64);
        Self {
            runtime: runtime.clone(),
            offload: args.offload,
            limit: args.max_vram.or_else(free),
            asked: args.max_vram.is_some(),
        }
    }

    /// Whether on the CPU.
    pub(super) fn on_cpu(&self) -> bool {
        self.runtime.device.is_cpu()
    }

    /// What is computed with.
    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    fn format(&self) -> Format {
        Format {
            element: self.runtime.dtype.size_in_bytes() as u64,
            cpu: self.runtime.device.is_cpu(),
        }
    }

    /// Whether blocks are not to stay, or there is no room for `bytes` of weights.
    pub(super) fn is_short_of(&self, bytes: u64) -> bool {
        self.offload || self.limit.is_some_and(|limit| limit < bytes)
    }

    /// Bytes of a forward's activations.
    pub(super) fn activations(&self, config: &FluxConfig, batch: usize, tokens: usize) -> u64 {
        demand::activations(config, batch, tokens, self.format())
    }

    /// `usual` states in a forward, or as few as fit.
    pub(super) fn batch(&self, config: &FluxConfig, tokens: usize, usual: usize) -> usize {
        let format = self.format();
        let least = Residence::none(config, format).bytes;
        let fits = |batch: usize| {
            let at_work = demand::activations(config, batch, tokens, format);
            self.limit.is_none_or(|limit| least + at_work <= limit)
        };
        let mut batch = usual.max(1);
        while batch > 1 && !fits(batch) {
            batch = batch.div_ceil(2);
        }
        if batch < usual {
            ui::note(format!(
                "{batch} states in a forward instead of {usual}, so that they fit into {}",
                ui::bytes(self.limit.unwrap_or_default() as f64)
            ));
        }
        batch
    }

    /// Bytes that are left for something beside the blocks when no more of them than necessary are on the device;
    /// `None` where nobody says.
    pub(super) fn spare(&self, config: &FluxConfig, need: Need) -> Option<u64> {
        let format = self.format();
        let taken = Residence::none(config, format).bytes + self.at_work(config, need);
        Some(self.limit?.saturating_sub(taken))
    }

    fn at_work(&self, config: &FluxConfig, need: Need) -> u64 {
        demand::activations(config, need.batch, need.tokens, self.format()) + need.beside
    }

    /// Which blocks stay on the device.
    pub(super) fn residence(&self, config: &FluxConfig, need: Need) -> Result<Residence> {
        let format = self.format();
        if self.offload {
            return Ok(Residence::none(config, format));
        }
        let Some(limit) = self.limit else {
            return Ok(Residence::all(config, format));
        };
        let at_work = self.at_work(config, need);
        let room = limit.saturating_sub(at_work);
        if let Some(residence) = Residence::within(config, format, room) {
            return Ok(residence);
        }
        let least = Residence::none(config, format);
        let size = |bytes: u64| ui::bytes(bytes as f64);
        let text = format!(
            "{} of memory are too little: two blocks at a time and what is around them take {}, {} state{} of {} tokens {}",
            size(limit),
            size(least.bytes),
            need.batch,
            if need.batch == 1 { "" } else { "s" },
            need.tokens,
            size(at_work)
        );
        if self.asked {
            bail!(
                "--max-vram: {text}\nhint: allow {}, or draw smaller pictures (--width, --height), or take --dtype bf16",
                size(least.bytes + at_work)
            );
        }
        ui::warn(format!("{text}; trying all the same"));
        Ok(least)
    }

    /// The transformer, with as many of its blocks on the device as there is room for.
    pub(super) fn flux(&self, pipeline: &Pipeline, need: Need) -> Result<Flux> {
        let config = &pipeline.config;
        let residence = self.residence(config, need)?;
        if residence.is_all() {
            return load::flux(pipeline, &self.runtime);
        }
        let size = |bytes: u64| ui::bytes(bytes as f64);
        let limit = self.limit.filter(|_| !self.offload);
        ui::note(format!(
            "`{}`: {} of {} blocks stay on the device, the others are read when they are run; {} of weights at a time and {} for the rest{}",
            pipeline.name,
            residence.count(),
            residence.of(),
            size(residence.bytes),
            size(self.at_work(config, need)),
            limit.map_or_else(String::new, |limit| format!(", of {}", size(limit)))
        ));
        let vb = pipeline
            .transformer
            .var_builder(self.runtime.dtype, &self.runtime.device);
        Flux::stored(config, &vb, &|index| residence.stays(index))
            .with_context(|| format!("cannot load the transformer of `{}`", pipeline.name))
    }
}
