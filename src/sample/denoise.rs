//! Noise → latents: Euler steps over the transformer's velocity, as diffusers' `FlowMatchEulerDiscreteScheduler` takes them.

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};

use super::{latents, noise, schedule::Schedule};
use crate::model::{Flux, Inputs, Observer};

/// Prompts as the transformer sees them.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// T5 hidden states, (prompts, text tokens, T5 width).
    pub txt: Tensor,
    /// Pooled CLIP vectors, (prompts, CLIP width).
    pub vec: Tensor,
}

impl Encoded {
    /// Number of prompts.
    pub fn len(&self) -> usize {
        self.vec.dim(0).unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The prompts of a range.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn range(&self, range: std::ops::Range<usize>) -> Result<Self> {
        Ok(Self {
            txt: self.txt.narrow(0, range.start, range.len())?.contiguous()?,
            vec: self.vec.narrow(0, range.start, range.len())?.contiguous()?,
        })
    }
}

/// Size of a latent picture, in latent pixels (an eighth of the picture's), both even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentSize {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl LatentSize {
    /// Number of image tokens: one for each 2×2 latent pixels.
    pub fn tokens(self) -> usize {
        self.height / 2 * (self.width / 2)
    }
}

/// Starting noise of one prompt's pictures, packed: (pictures, tokens, 4 · channels), f32, on the CPU.
///
/// diffusers draws (pictures, channels, h, w) from one generator and packs; so do we, and a seed means the same noise.
///
/// # Errors
/// When the size is odd.
pub fn starting_noise(
    seed: u64,
    pictures: usize,
    channels: usize,
    size: LatentSize,
) -> Result<Tensor> {
    let mut generator = noise::Generator::new(seed);
    let latent = generator.randn((pictures, channels, size.height, size.width), &Device::Cpu)?;
    Ok(latents::pack(&latent)?)
}

/// How a batch of pictures is denoised.
#[derive(Clone, Debug)]
pub struct Denoise<'a> {
    /// The transformer.
    pub flux: &'a Flux,
    /// Number format of the transformer's inputs.
    pub dtype: DType,
    /// Where the transformer is.
    pub device: &'a Device,
    /// The scheduler.
    pub schedule: &'a Schedule,
    /// Number of Euler steps.
    pub steps: usize,
    /// Given to the guidance embedding, where the model has one.
    pub guidance: f64,
    /// Size of the pictures.
    pub size: LatentSize,
}

impl Denoise<'_> {
    /// Runs all steps on packed noise (b, tokens, channels) with b prompts; gives packed latents in f32.
    ///
    /// `observer` sees every block of every step; `on_step` is called after each step.
    ///
    /// # Errors
    /// When a forward fails or the latents become NaN or infinite.
    pub fn run(
        &self,
        noise: &Tensor,
        prompts: &Encoded,
        observer: &mut dyn Observer,
        on_step: &mut dyn FnMut(),
    ) -> Result<Tensor> {
        let batch = noise.dim(0)?;
        ensure!(
            batch == prompts.len(),
            "{batch} noises of {} prompts",
            prompts.len()
        );
        let sigmas = self.schedule.sigmas(self.steps, self.size.tokens())?;
        let place =
            |t: &Tensor| -> Result<Tensor> { Ok(t.to_device(self.device)?.to_dtype(self.dtype)?) };
        let (txt, vec) = (place(&prompts.txt)?, place(&prompts.vec)?);
        let img_ids = latents::img_ids(self.size.height, self.size.width, self.device)?;
        let txt_ids = latents::txt_ids(txt.dim(1)?, self.device)?;
        let guidance = Tensor::full(self.guidance as f32, batch, self.device)?;
        let mut x = noise.to_device(self.device)?.to_dtype(DType::F32)?;
        for pair in sigmas.windows(2) {
            let timestep = Tensor::full(self.schedule.timestep(pair[0]), batch, self.device)?;
            let inputs = Inputs {
                img: &x.to_dtype(self.dtype)?,
                img_ids: &img_ids,
                txt: &txt,
                txt_ids: &txt_ids,
                timestep: &timestep,
                vec: &vec,
                guidance: Some(&guidance),
            };
            let velocity = self.flux.forward(&inputs, observer)?.to_dtype(DType::F32)?;
            x = (x + (velocity * f64::from(pair[1] - pair[0]))?)?;
            on_step();
        }
        let norm = x.sqr()?.sum_all()?.to_scalar::<f32>()?;
        ensure!(
            norm.is_finite(),
            "the latents became NaN or infinite\nhint: try --dtype f32, or check the model with `fastflux verify`"
        );
        Ok(x)
    }
}
