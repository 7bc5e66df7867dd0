//! The VAE on the device: latents → images, at once if they fit, otherwise in bands.

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};

use super::{VaeFiles, load, placement::MemoryBudget};
use crate::{
    device::Runtime,
    sample::{
        denoise::LatentSize,
        is_finite, latents,
        png::Image,
        vae::{MemoryEstimate, Vae, VaeConfig},
    },
    ui,
};

/// Numbers that candle's GPU kernels can count, half of them to be safe: a larger feature map would come out wrong.
const COUNTED: u64 = 1 << 31;
/// Rows of latents in the smallest band: less saves next to nothing.
const MIN_ROWS: usize = 4;

/// Latents (b, c, h, w) → images in about \[-1, 1\], f32 on the CPU, one at a time: decoding takes far more memory
/// than anything else per image. In `bands` if they are given.
pub fn decode(
    vae: &Vae,
    latents: &Tensor,
    bands: Option<&InBands>,
    runtime: &Runtime,
) -> Result<Tensor> {
    let latents = latents
        .to_device(&runtime.device)?
        .to_dtype(runtime.dtype)?;
    let mut images = Vec::new();
    for i in 0..latents.dim(0)? {
        let latents = latents.narrow(0, i, 1)?;
        let image = match bands {
            None => vae.decode(&latents)?,
            Some(bands) => vae.decode_in_bands(&latents, bands.rows, &bands.offload_device)?,
        };
        let image = image.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        ensure!(
            is_finite(&image)?,
            "the VAE `{}` gives pixels that are NaN or infinite, its weights are damaged\nhint: fetch the file again, or name another with --vae",
            vae.name()
        );
        images.push(image);
    }
    Ok(Tensor::cat(&images, 0)?)
}

/// How a image is decoded that does not fit into memory at once.
#[derive(Clone, Debug)]
pub struct InBands {
    /// Rows of latents.
    pub rows: usize,
    /// Where bands wait for their turn.
    pub offload_device: Device,
}

/// The same from packed latents (b, tokens, 4c).
pub fn decode_packed(
    vae: &Vae,
    packed: &Tensor,
    size: LatentSize,
    bands: Option<&InBands>,
    runtime: &Runtime,
) -> Result<Tensor> {
    let latents = latents::unpack(packed, size.height, size.width)?.contiguous()?;
    decode(vae, &latents, bands, runtime)
}

/// A VAE for images of one size, and how to decode them.
pub struct Decoder<'a> {
    vae: Vae,
    size: LatentSize,
    bands: Option<InBands>,
    runtime: &'a Runtime,
}

impl Decoder<'_> {
    /// Packed latents (b, tokens, 4c) → images.
    pub fn images(&self, packed: &Tensor) -> Result<Vec<Image>> {
        let bands = self.bands.as_ref();
        let images = decode_packed(&self.vae, packed, self.size, bands, self.runtime)?;
        (0..images.dim(0)?)
            .map(|i| Image::from_decoded(&images.get(i)?))
            .collect()
    }
}

impl MemoryBudget {
    /// The VAE, for images of one size: at once if they fit, otherwise in bands.
    pub fn decoder(
        &self,
        files: &VaeFiles,
        size: LatentSize,
        vae_tile: Option<usize>,
    ) -> Result<Decoder<'_>> {
        let vae = load::vae(files, &self.runtime)?;
        let element = vae.dtype().size_in_bytes() as u64;
        let bands = match vae_tile {
            Some(0) => None,
            Some(pixels) => {
                let rows = (pixels / vae.config().downsampling()).max(1);
                let offload_device = self.offload_device(vae.config(), size, rows, element);
                Some(InBands {
                    rows,
                    offload_device,
                })
            }
            None => self.bands(vae.config(), size, element),
        };
        if let Some(bands) = bands.as_ref().filter(|_| vae_tile.is_none()) {
            let limit = self.limit.map_or_else(String::new, |limit| {
                format!(", and {} may be used", ui::bytes(limit as f64))
            });
            self.reporter.note(format!(
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
    ) -> MemoryEstimate {
        let size = (size.height, size.width);
        config.decode_memory(size, rows, element, self.runtime.unfolds_convolutions())
    }

    /// Bytes for what is decoded; no bound if unknown.
    fn room_to_decode(&self, config: &VaeConfig, element: u64) -> u64 {
        let weights = config.decoder_parameters() * element;
        self.limit
            .map_or(u64::MAX, |limit| limit.saturating_sub(weights))
    }

    /// Whether the device's kernels can count all that is decoded at once.
    fn counts(&self, take: MemoryEstimate) -> bool {
        self.on_cpu() || take.largest < COUNTED
    }

    /// Where bands wait: on the device if they fit with what is computed.
    fn offload_device(
        &self,
        config: &VaeConfig,
        size: LatentSize,
        rows: usize,
        element: u64,
    ) -> Device {
        let take = self.decoding(config, size, Some(rows), element);
        let room = self.room_to_decode(config, element);
        if take.work + take.offloaded <= room {
            self.runtime.device.clone()
        } else {
            Device::Cpu
        }
    }

    /// The widest bands that fit; `None` if the whole image does.
    fn bands(&self, config: &VaeConfig, size: LatentSize, element: u64) -> Option<InBands> {
        let room = self.room_to_decode(config, element);
        let whole = self.decoding(config, size, None, element);
        if whole.work <= room && self.counts(whole) {
            return None;
        }
        let halves = std::iter::successors(Some(size.height / 2), |rows| Some(rows / 2));
        let choices: Vec<usize> = halves.take_while(|rows| *rows >= MIN_ROWS).collect();
        let fitting = |with_parked: bool| {
            choices.iter().copied().find(|rows| {
                let take = self.decoding(config, size, Some(*rows), element);
                let offloaded = if with_parked { take.offloaded } else { 0 };
                take.work + offloaded <= room && self.counts(take)
            })
        };
        let least = choices.last().copied().unwrap_or(MIN_ROWS);
        let (rows, on_device) = match (fitting(true), fitting(false)) {
            (Some(rows), _) => (rows, true),
            (None, rows) => (rows.unwrap_or(least), false),
        };
        Some(InBands {
            rows,
            offload_device: if on_device {
                self.runtime.device.clone()
            } else {
                Device::Cpu
            },
        })
    }
}
