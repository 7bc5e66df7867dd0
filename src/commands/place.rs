//! How much of the device a command uses: what stays there, what is brought when it is needed, in what portions.
//! The sizes themselves are counted by `model::demand` and `sample::vae`.

use anyhow::{Context, Result, bail};

use candle::Device;

use super::load::{self, Decoder, InBands};
use crate::{
    cli::{DecodeArgs, MemoryArgs},
    device::Runtime,
    layout::FluxConfig,
    model::{
        Flux,
        demand::{self, Format, Residence},
        ops,
    },
    pipeline::{Pipeline, VaeFiles},
    sample::{
        denoise::LatentSize,
        vae::{Demand, VaeConfig},
    },
    ui,
};

/// Share of the memory that is free at the start that counts as usable: allocators and kernels take some beside.
const USABLE: f64 = 0.92;

/// Numbers that candle's GPU kernels can count, half of them to be safe: a larger feature map would come out wrong.
const COUNTED: u64 = 1 << 31;

/// Rows of latents in the smallest band: less saves next to nothing.
const LEAST_ROWS: usize = 4;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Place {
    runtime: Runtime,
    offload: bool,
    /// Bytes that may be used, where anybody says.
    limit: Option<u64>,
    /// Whether the user said so.
    asked: bool,
    /// Bytes of a weight on the device, on average.
    weight: f64,
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
            weight: runtime.dtype.size_in_bytes() as f64,
        }
    }

    /// With the weights of `pipeline`, which may stay packed.
    #[must_use]
    pub(super) fn of(mut self, pipeline: &Pipeline) -> Self {
        self.weight = pipeline.bytes_of_a_weight(self.runtime.dtype);
        self
    }

    /// Whether on the CPU.
    pub(super) fn on_cpu(&self) -> bool {
        self.runtime.device.is_cpu()
    }

    /// Bytes that may be used, where anybody says.
    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// What is computed with.
    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    fn format(&self, config: &FluxConfig) -> Format {
        Format {
            element: self.runtime.dtype.size_in_bytes() as u64,
            weight: self.weight,
            scores: ops::holds_scores(
                &self.runtime.device,
                self.runtime.dtype,
                config.head_dim(),
            ),
        }
    }

    /// Whether blocks are not to stay, or there is no room for `bytes` of weights.
    pub(super) fn is_short_of(&self, bytes: u64) -> bool {
        self.offload || self.limit.is_some_and(|limit| limit < bytes)
    }

    /// Bytes of a forward's activations.
    pub(super) fn activations(&self, config: &FluxConfig, batch: usize, tokens: usize) -> u64 {
        demand::activations(config, batch, tokens, self.format(config))
    }

    /// Bytes of the batches that wait while one of them goes through a block that is read for all.
    pub(super) fn waiting(&self, config: &FluxConfig, batch: usize, tokens: usize) -> u64 {
        demand::waiting(config, batch, tokens, self.format(config))
    }

    /// `usual` states in a forward, or as few as fit.
    pub(super) fn batch(&self, config: &FluxConfig, tokens: usize, usual: usize) -> usize {
        let format = self.format(config);
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
        let format = self.format(config);
        let taken = Residence::none(config, format).bytes + self.at_work(config, need);
        Some(self.limit?.saturating_sub(taken))
    }

    fn at_work(&self, config: &FluxConfig, need: Need) -> u64 {
        demand::activations(config, need.batch, need.tokens, self.format(config)) + need.beside
    }

    /// Which blocks stay on the device.
    pub(super) fn residence(&self, config: &FluxConfig, need: Need) -> Result<Residence> {
        let format = self.format(config);
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
            // what is drawn goes one by one before this; what is gathered keeps its batch
            let fewer = if need.batch > 1 {
                ", or fewer states in a forward (`calibration.batch` in the recipe)"
            } else {
                ""
            };
            bail!(
                "--max-vram: {text}\nhint: allow {}, or draw smaller pictures (--width, --height){fewer}, or take --dtype bf16",
                size(least.bytes + at_work)
            );
        }
        ui::warn(format!("{text}; trying all the same"));
        Ok(least)
    }

    /// The VAE, for pictures of one size: at once where they fit, otherwise in bands.
    pub(super) fn decoder(
        &self,
        files: &VaeFiles,
        size: LatentSize,
        args: DecodeArgs,
    ) -> Result<Decoder<'_>> {
        let vae = load::vae(files, &self.runtime)?;
        let element = vae.dtype().size_in_bytes() as u64;
        let bands = match args.vae_tile {
            Some(0) => None,
            Some(pixels) => {
                let rows = (pixels / vae.config().downsampling()).max(1);
                let park = self.park(vae.config(), size, rows, element);
                Some(InBands { rows, park })
            }
            None => self.bands(vae.config(), size, element),
        };
        if let Some(bands) = bands.as_ref().filter(|_| args.vae_tile.is_none()) {
            let limit = self.limit.map_or_else(String::new, |limit| {
                format!(", and {} may be used", ui::bytes(limit as f64))
            });
            ui::note(format!(
                "decoding in bands of {} rows: at once it would take {}{limit}",
                bands.rows * vae.config().downsampling(),
                ui::bytes(self.decoding(vae.config(), size, None, element).work as f64),
            ));
        }
        Ok(Decoder {
            vae,
            size,
            bands,
            runtime: &self.runtime,
        })
    }

    fn decoding(
        &self,
        config: &VaeConfig,
        size: LatentSize,
        rows: Option<usize>,
        element: u64,
    ) -> Demand {
        let size = (size.height, size.width);
        config.demand(size, rows, element, self.runtime.unfolds_convolutions())
    }

    /// Bytes for what is decoded; no bound where nobody says.
    fn room_beside(&self, config: &VaeConfig, element: u64) -> u64 {
        let weights = config.decoder_parameters() * element;
        self.limit
            .map_or(u64::MAX, |limit| limit.saturating_sub(weights))
    }

    /// Whether the device's kernels can count all that is decoded at once.
    fn counts(&self, take: Demand) -> bool {
        self.on_cpu() || take.largest < COUNTED
    }

    /// Where bands wait: on the device where they fit with what is computed.
    fn park(&self, config: &VaeConfig, size: LatentSize, rows: usize, element: u64) -> Device {
        let take = self.decoding(config, size, Some(rows), element);
        let room = self.room_beside(config, element);
        if take.work + take.parked <= room {
            self.runtime.device.clone()
        } else {
            Device::Cpu
        }
    }

    /// The widest bands that fit; `None` where the whole picture does.
    fn bands(&self, config: &VaeConfig, size: LatentSize, element: u64) -> Option<InBands> {
        let room = self.room_beside(config, element);
        let whole = self.decoding(config, size, None, element);
        if whole.work <= room && self.counts(whole) {
            return None;
        }
        let halves = std::iter::successors(Some(size.height / 2), |rows| Some(rows / 2));
        let choices: Vec<usize> = halves.take_while(|rows| *rows >= LEAST_ROWS).collect();
        let fitting = |with_parked: bool| {
            choices.iter().copied().find(|rows| {
                let take = self.decoding(config, size, Some(*rows), element);
                let parked = if with_parked { take.parked } else { 0 };
                take.work + parked <= room && self.counts(take)
            })
        };
        let least = choices.last().copied().unwrap_or(LEAST_ROWS);
        let (rows, on_device) = match (fitting(true), fitting(false)) {
            (Some(rows), _) => (rows, true),
            (None, rows) => (rows.unwrap_or(least), false),
        };
        Some(InBands {
            rows,
            park: if on_device {
                self.runtime.device.clone()
            } else {
                Device::Cpu
            },
        })
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
        load::check_kernels(&self.runtime);
        let vb = pipeline
            .transformer
            .var_builder(self.runtime.dtype, &self.runtime.device);
        Flux::stored(config, &vb, &|index| residence.stays(index))
            .with_context(|| format!("cannot load the transformer of `{}`", pipeline.name))
    }
}
