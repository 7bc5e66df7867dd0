//! What is trained on: the model's own images noised again, drawn from a seed and a number alone, so that a resumed run
//! sees what an uninterrupted one would have seen.

use anyhow::{Result, ensure};
use candle::{Device, Tensor};

use crate::{
    calibrate::{
        NoiseLevels,
        noised::{Batch, with_references},
    },
    device::Runtime,
    sample::{
        denoise::{Encoded, LatentSize},
        encoded::placed,
        noise,
    },
};

/// Clean images of the unpruned model and their prompts, and the ids that all batches share.
#[derive(Clone, Debug)]
pub struct Images {
    /// Packed latents, (images, image tokens, channels), f32 on the CPU.
    latents: Tensor,
    /// (images, text tokens, T5 width) and (images, CLIP width), on the CPU.
    prompts: Encoded,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: f64,
    levels: NoiseLevels,
    runtime: Runtime,
}

impl Images {
    /// Images of `prompts`, of the given size.
    ///
    /// # Errors
    /// When they differ in number.
    pub fn new(
        latents: Tensor,
        prompts: Encoded,
        size: LatentSize,
        guidance: f64,
        runtime: &Runtime,
    ) -> Result<Self> {
        let count = latents.dim(0)?;
        ensure!(
            count == prompts.len() && count > 0,
            "{count} images of {} prompts",
            prompts.len()
        );
        let cpu = |t: &Tensor| t.to_device(&Device::Cpu);
        let text_len = prompts.txt.dim(1)?;
        Ok(Self {
            latents: cpu(&latents)?,
            prompts: prompts.to_device(&Device::Cpu)?,
            img_ids: size.img_ids()?,
            txt_ids: size.txt_ids(text_len)?,
            guidance,
            levels: NoiseLevels::Even,
            runtime: runtime.clone(),
        })
    }

    /// The same with other noise levels than those spread evenly.
    #[must_use]
    pub fn with_levels(self, levels: NoiseLevels) -> Self {
        Self { levels, ..self }
    }

    /// Splits off the last `count` images.
    ///
    /// # Errors
    /// When none would be left on either side.
    pub fn split(&self, count: usize) -> Result<(Self, Self)> {
        let all = self.prompts.len();
        ensure!(
            count > 0 && count < all,
            "{count} of {all} images cannot be held out"
        );
        let part = |range: std::ops::Range<usize>| -> Result<Self> {
            Ok(Self {
                latents: self
                    .latents
                    .narrow(0, range.start, range.len())?
                    .contiguous()?,
                prompts: self.prompts.range(range)?,
                ..self.clone()
            })
        };
        Ok((part(0..all - count)?, part(all - count..all)?))
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.prompts.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// Where batches are made for.
    pub fn device(&self) -> &Device {
        &self.runtime.device
    }

    /// Tokens of one state: text, image.
    ///
    /// # Errors
    /// Never with images in it.
    pub fn tokens(&self) -> Result<(usize, usize)> {
        Ok((self.prompts.txt.dim(1)?, self.latents.dim(1)?))
    }

    /// `count` noised latents drawn by `key` alone: random images and noise, times spread evenly over (0, 1).
    ///
    /// # Errors
    /// When memory is short.
    pub fn draw(&self, key: Key, count: usize) -> Result<Batch> {
        let (_, tokens, channels) = self.latents.dims3()?;
        let mut random = key.stream();
        let (mut which, mut times, mut noises) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..count {
            which.push((random.bits() % self.len() as u64) as u32);
            let even = (i as f64 + random.uniform()) / count as f64;
            times.push(self.levels.at(even));
            let mut generator = noise::Generator::new(random.bits());
            noises.push(generator.randn((tokens, channels), &Device::Cpu)?);
        }
        let prompts = self.prompts.select(&which)?;
        let which = Tensor::new(which, &Device::Cpu)?;
        let t = Tensor::new(times, &Device::Cpu)?;
        let column = t.reshape((count, 1, 1))?;
        let clean = self.latents.index_select(&which, 0)?;
        let noise = Tensor::stack(&noises, 0)?;
        let img =
            (clean.broadcast_mul(&column.affine(-1.0, 1.0)?)? + noise.broadcast_mul(&column)?)?;
        let (img, img_ids) = with_references(img, self.img_ids.clone(), &prompts)?;
        let Runtime { device, dtype } = &self.runtime;
        let place = |t: Tensor| -> Result<Tensor> { Ok(placed(&t, device, *dtype)?) };
        Ok(Batch {
            img: place(img)?,
            img_ids,
            txt: place(prompts.txt)?,
            txt_ids: self.txt_ids.clone(),
            timestep: t.to_device(device)?,
            vec: place(prompts.vec)?,
            guidance: Tensor::full(self.guidance as f32, count, device)?,
        })
    }
}

/// Names a draw: the same key gives the same numbers, another one unrelated ones.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The run's seed.
    pub seed: u64,
    /// What the numbers are for: held-out noised latents, factors, or the number of a phase.
    pub purpose: u64,
    /// The number of the draw.
    pub index: u64,
}

impl Key {
    /// Held-out noised latents.
    pub const HELD_OUT: u64 = 1 << 32;
    /// LoRA factors.
    pub const FACTORS: u64 = 1 << 33;
    /// Directions that the velocity's sensitivity is measured along.
    pub const DIRECTIONS: u64 = 1 << 34;

    /// The random numbers of this key.
    pub fn stream(self) -> Stream {
        let mut stream = Stream(self.seed);
        for part in [self.purpose, self.index] {
            stream.0 = stream.bits() ^ part;
        }
        stream
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Stream(u64);

impl Stream {
    /// The next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}
