//! The model inputs that calibration, scoring and training look at: the model's own images, noised again.

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};

use crate::{
    model::Inputs,
    sample::{
        denoise::{Encoded, LatentSize},
        noise,
    },
};

/// Noised latents at random times: `img = (1 − t) image + t noise`, several for each image.
///
/// Only the clean images are held; noise is drawn again from its seed when a batch is asked for.
#[derive(Clone, Debug)]
pub struct States {
    /// Clean packed latents, (images, image tokens, channels), f32.
    pictures: Tensor,
    prompts: Encoded,
    size: LatentSize,
    guidance: f64,
    /// (image, t, noise seed) of each state.
    items: Vec<(u32, f32, u64)>,
}

/// One batch of states on a device, ready for the model.
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
    /// Number of states of all images together.
    pub states: usize,
}

/// Times keep this far from 0 and 1, where the velocity is trivial.
pub(crate) const MARGIN: f64 = 0.01;
/// The golden ratio's fractional part: its multiples fill an interval evenly.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

impl States {
    /// `draws` noised states of each image, times spread evenly over (0, 1).
    ///
    /// # Errors
    /// When images and prompts differ in number.
    pub fn noised(
        pictures: Tensor,
        prompts: Encoded,
        size: LatentSize,
        guidance: f64,
        draws: usize,
        seed: u64,
    ) -> Result<Self> {
        let of = prompts.len();
        let share = Share {
            first: 0,
            of,
            states: of * draws,
        };
        Self::share(pictures, prompts, share, size, guidance, seed)
    }

    /// The states of a share of the images: those that [`States::noised`] of all would have of them.
    ///
    /// # Errors
    /// When images and prompts differ in number.
    pub fn share(
        pictures: Tensor,
        prompts: Encoded,
        share: Share,
        size: LatentSize,
        guidance: f64,
        seed: u64,
    ) -> Result<Self> {
        let count = pictures.dim(0)?;
        ensure!(
            count == prompts.len(),
            "{count} pictures of {} prompts",
            prompts.len()
        );
        let pictures_of_share = share.first..share.first + count;
        let items = (0..share.states).filter_map(|i| {
            // images take turns, so that every stretch of states has all times and many prompts
            let picture = i % share.of;
            if !pictures_of_share.contains(&picture) {
                return None;
            }
            let even = (i as f64 + 0.5) * GOLDEN % 1.0;
            let t = MARGIN + (1.0 - 2.0 * MARGIN) * even;
            let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            Some((
                (picture - share.first) as u32,
                t as f32,
                seed.wrapping_add(i as u64),
            ))
        });
        Ok(Self {
            items: items.collect(),
            pictures,
            prompts,
            size,
            guidance,
        })
    }

    /// The first `len` states, or all where there are fewer.
    #[must_use]
    pub fn first(&self, len: usize) -> Self {
        let mut out = self.clone();
        out.truncate(len);
        out
    }

    /// Keeps the first `len` states.
    pub fn truncate(&mut self, len: usize) {
        self.items.truncate(len);
    }

    /// Number of states.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The states `range` in the model's dtype on its device.
    ///
    /// # Errors
    /// When the range is out of bounds or memory is short.
    pub fn batch(
        &self,
        range: std::ops::Range<usize>,
        device: &Device,
        dtype: DType,
    ) -> Result<Batch> {
        let items = self.items.get(range).context("states out of range")?;
        let (_, tokens, channels) = self.pictures.dims3()?;
        let mut noises = Vec::with_capacity(items.len());
        for (_, _, seed) in items {
            noises.push(noise::Generator::new(*seed).randn((tokens, channels), &Device::Cpu)?);
        }
        let noise = Tensor::stack(&noises, 0)?;
        let which: Vec<u32> = items.iter().map(|(picture, _, _)| *picture).collect();
        let prompts = self.prompts.select(&which)?;
        let which = Tensor::new(which, &Device::Cpu)?;
        let times: Vec<f32> = items.iter().map(|(_, t, _)| *t).collect();
        let t = Tensor::new(times, &Device::Cpu)?.reshape((items.len(), 1, 1))?;
        let clean = self
            .pictures
            .to_device(&Device::Cpu)?
            .index_select(&which, 0)?;
        let img = (clean.broadcast_mul(&t.affine(-1.0, 1.0)?)? + noise.broadcast_mul(&t)?)?;
        let (img, img_ids) = with_references(img, self.size.img_ids()?, &prompts)?;
        let place = |t: Tensor| -> Result<Tensor> { Ok(t.to_device(device)?.to_dtype(dtype)?) };
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

    /// The times of the states `range` (fewer where there are fewer).
    pub fn times(&self, range: std::ops::Range<usize>) -> Vec<f32> {
        let items = self.items.get(range).unwrap_or_default();
        items.iter().map(|(_, t, _)| *t).collect()
    }

    /// The image that each of the states `range` is made of (fewer where there are fewer).
    pub fn pictures(&self, range: std::ops::Range<usize>) -> Vec<u32> {
        let items = self.items.get(range).unwrap_or_default();
        items.iter().map(|(picture, _, _)| *picture).collect()
    }

    /// The ranges of all batches of at most `size` states.
    pub fn batches(
        &self,
        size: usize,
    ) -> impl ExactSizeIterator<Item = std::ops::Range<usize>> + use<> {
        let (len, size) = (self.len(), size.max(1));
        (0..len.div_ceil(size)).map(move |i| i * size..((i + 1) * size).min(len))
    }
}
