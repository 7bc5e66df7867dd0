//! The model inputs that calibration, scoring and training look at: the model's own images, noised again.

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};

use super::NoiseLevels;
use crate::{
    model::Inputs,
    sample::{
        denoise::{Encoded, LatentSize},
        encoded::placed,
        noise,
    },
};

/// Noised latents at random times: `img = (1 − t) image + t noise`, several for each image.
///
/// Only the clean images are held; noise is drawn again from its seed when a batch is asked for.
#[derive(Clone, Debug)]
pub struct NoisedLatents {
    /// Clean packed latents, (images, image tokens, channels), f32.
    images: Tensor,
    prompts: Encoded,
    size: LatentSize,
    guidance: f64,
    levels: NoiseLevels,
    /// (image, number in (0, 1) that its noise level follows from, noise seed) of each state.
    items: Vec<(u32, f64, u64)>,
}

/// One batch of noised latents on a device, ready for the model.
#[derive(Clone, Debug)]
pub struct Batch {
    pub(crate) img: Tensor,
    pub(crate) img_ids: Tensor,
    pub(crate) txt: Tensor,
    pub(crate) txt_ids: Tensor,
    pub(crate) timestep: Tensor,
    pub(crate) vec: Tensor,
    pub(crate) guidance: Tensor,
}

impl Batch {
    /// As the model takes them.
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            img: &self.img,
            img_ids: &self.img_ids,
            txt: &self.txt,
            txt_ids: &self.txt_ids,
            timestep: &self.timestep,
            vec: &self.vec,
            guidance: Some(&self.guidance),
        }
    }
}

/// Image tokens (b, tokens, channels) and their positions, with those of the reference images behind them.
///
/// # Errors
/// When memory is short.
pub(crate) fn with_references(
    img: Tensor,
    img_ids: Tensor,
    prompts: &Encoded,
) -> Result<(Tensor, Tensor)> {
    let Some(references) = &prompts.references else {
        return Ok((img, img_ids));
    };
    let tokens = references.tokens_of(img.dim(0)?)?;
    let tokens = tokens.to_device(img.device())?;
    Ok((
        Tensor::cat(&[&img, &tokens.to_dtype(img.dtype())?], 1)?,
        Tensor::cat(&[&img_ids, &references.ids], 0)?,
    ))
}

/// Which of all images a share holds.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Index of the share's first image.
    pub first: usize,
    /// Number of all images.
    pub of: usize,
    /// Number of noised latents of all images together.
    pub num_noised: usize,
}

/// The golden ratio's fractional part: its multiples fill an interval evenly.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

impl NoisedLatents {
    /// `noise_levels_per_image` noised latents of each image, times spread evenly over (0, 1).
    ///
    /// # Errors
    /// When images and prompts differ in number.
    pub fn new(
        images: Tensor,
        prompts: Encoded,
        size: LatentSize,
        guidance: f64,
        noise_levels_per_image: usize,
        seed: u64,
    ) -> Result<Self> {
        let of = prompts.len();
        let share = Share {
            first: 0,
            of,
            num_noised: of * noise_levels_per_image,
        };
        Self::share(images, prompts, share, size, guidance, seed)
    }

    /// The noised latents of a share of the images: those that [`NoisedLatents::new`] of all would have of them.
    ///
    /// # Errors
    /// When images and prompts differ in number.
    pub fn share(
        images: Tensor,
        prompts: Encoded,
        share: Share,
        size: LatentSize,
        guidance: f64,
        seed: u64,
    ) -> Result<Self> {
        let count = images.dim(0)?;
        ensure!(
            count == prompts.len(),
            "{count} images of {} prompts",
            prompts.len()
        );
        let images_of_share = share.first..share.first + count;
        let items = (0..share.num_noised).filter_map(|i| {
            // images take turns, so that every stretch of noised latents has all times and many prompts
            let image = i % share.of;
            if !images_of_share.contains(&image) {
                return None;
            }
            let even = (i as f64 + 0.5) * GOLDEN % 1.0;
            let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            Some((
                (image - share.first) as u32,
                even,
                seed.wrapping_add(i as u64),
            ))
        });
        Ok(Self {
            levels: NoiseLevels::Even,
            items: items.collect(),
            images,
            prompts,
            size,
            guidance,
        })
    }

    /// The same with other noise levels than those spread evenly.
    #[must_use]
    pub fn with_levels(self, levels: NoiseLevels) -> Self {
        Self { levels, ..self }
    }

    /// The first `len` noised latents, or all if there are fewer.
    #[must_use]
    pub fn first(&self, len: usize) -> Self {
        let mut out = self.clone();
        out.truncate(len);
        out
    }

    /// Keeps the first `len` noised latents.
    pub fn truncate(&mut self, len: usize) {
        self.items.truncate(len);
    }

    /// Number of noised latents.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The noised latents `range` in the model's dtype on its device.
    ///
    /// # Errors
    /// When the range is out of bounds or memory is short.
    pub fn batch(
        &self,
        range: std::ops::Range<usize>,
        device: &Device,
        dtype: DType,
    ) -> Result<Batch> {
        let items = self
            .items
            .get(range)
            .context("noised latents out of range")?;
        let (_, tokens, channels) = self.images.dims3()?;
        let mut noises = Vec::with_capacity(items.len());
        for (_, _, seed) in items {
            noises.push(noise::Generator::new(*seed).randn((tokens, channels), &Device::Cpu)?);
        }
        let noise = Tensor::stack(&noises, 0)?;
        let which: Vec<u32> = items.iter().map(|(image, _, _)| *image).collect();
        let prompts = self.prompts.select(&which)?;
        let which = Tensor::new(which, &Device::Cpu)?;
        let times = items.iter().map(|(_, even, _)| self.levels.at(*even));
        let times: Vec<f32> = times.collect();
        let t = Tensor::new(times, &Device::Cpu)?.reshape((items.len(), 1, 1))?;
        let clean = self
            .images
            .to_device(&Device::Cpu)?
            .index_select(&which, 0)?;
        let img = (clean.broadcast_mul(&t.affine(-1.0, 1.0)?)? + noise.broadcast_mul(&t)?)?;
        let (img, img_ids) = with_references(img, self.size.img_ids()?, &prompts)?;
        let place = |t: Tensor| -> Result<Tensor> { Ok(placed(&t, device, dtype)?) };
        Ok(Batch {
            img: place(img)?,
            img_ids,
            txt: place(prompts.txt)?,
            txt_ids: self.size.txt_ids(self.prompts.txt.dim(1)?)?,
            timestep: t.flatten_all()?.to_device(device)?,
            vec: place(prompts.vec)?,
            guidance: Tensor::full(self.guidance as f32, items.len(), device)?,
        })
    }

    /// The times of the noised latents `range` (fewer if there are fewer).
    pub fn times(&self, range: std::ops::Range<usize>) -> Vec<f32> {
        let items = self.items.get(range).unwrap_or_default();
        let times = items.iter().map(|(_, even, _)| self.levels.at(*even));
        times.collect()
    }

    /// The image that each of the noised latents `range` is made of (fewer if there are fewer).
    pub fn images(&self, range: std::ops::Range<usize>) -> Vec<u32> {
        let items = self.items.get(range).unwrap_or_default();
        items.iter().map(|(image, _, _)| *image).collect()
    }

    /// The ranges of all batches of at most `size` noised latents.
    pub fn batches(
        &self,
        size: usize,
    ) -> impl ExactSizeIterator<Item = std::ops::Range<usize>> + use<> {
        let (len, size) = (self.len(), size.max(1));
        (0..len.div_ceil(size)).map(move |i| i * size..((i + 1) * size).min(len))
    }
}
