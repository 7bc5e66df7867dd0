//! Noise → latents: Euler steps over the transformer's velocity, as diffusers' `FlowMatchEulerDiscreteScheduler` takes them.

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};

use super::{latents, noise, schedule::Schedule};
use crate::model::{Conditioning, Flux, Inputs, Observer};

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

/// Size of a latent image, in latent pixels (an eighth of the image's), both even.
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

/// Starting noise of one prompt's images, packed: (images, tokens, 4 · channels), f32, on the CPU.
///
/// diffusers draws (images, channels, h, w) from one generator and packs; so do we, and a seed means the same noise.
///
/// # Errors
/// When the size is odd.
pub fn starting_noise(
    seed: u64,
    images: usize,
    channels: usize,
    size: LatentSize,
) -> Result<Tensor> {
    let mut generator = noise::Generator::new(seed);
    let latent = generator.randn((images, channels, size.height, size.width), &Device::Cpu)?;
    Ok(latents::pack(&latent)?)
}

/// How a batch of images is denoised.
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
    /// Given to the guidance embedding, if the model has one.
    pub guidance: f64,
    /// Size of the images.
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
        let sigmas = self.schedule.sigmas(self.steps, self.size.tokens())?;
        let mut drawing = self.start(noise, prompts)?;
        for pair in sigmas.windows(2) {
            let (img, timestep) = self.at(&drawing, pair[0])?;
            let velocity = self
                .flux
                .forward(&drawing.inputs(&img, &timestep), observer)?;
            drawing.step(&velocity, pair)?;
            on_step();
        }
        drawing.finished(self.dtype)
    }

    /// The same of several batches of noise and prompts, each step of all of them together through one block after
    /// another, so that a block that is not on the device is read once for all. The same numbers.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_each(
        &self,
        batches: &[(Tensor, Encoded)],
        on_step: &mut dyn FnMut(),
    ) -> Result<Vec<Tensor>> {
        let sigmas = self.schedule.sigmas(self.steps, self.size.tokens())?;
        let mut drawings = Vec::new();
        for (noise, prompts) in batches {
            drawings.push(self.start(noise, prompts)?);
        }
        let trunk = &self.flux.trunk;
        for pair in sigmas.windows(2) {
            let (mut streams, mut conditionings) = (Vec::new(), Vec::new());
            for drawing in &drawings {
                let (img, timestep) = self.at(drawing, pair[0])?;
                let (stream, conditioning) = self.flux.embed(&drawing.inputs(&img, &timestep))?;
                streams.push(stream);
                conditionings.push(conditioning);
            }
            let borrowed: Vec<&Conditioning> = conditionings.iter().collect();
            trunk.forward_each(0..trunk.len(), &mut streams, &borrowed)?;
            for ((drawing, end), conditioning) in drawings.iter_mut().zip(streams).zip(borrowed) {
                drawing.step(&self.flux.head(&end, conditioning)?, pair)?;
                on_step();
            }
        }
        drawings
            .into_iter()
            .map(|drawing| drawing.finished(self.dtype))
            .collect()
    }

    fn start(&self, noise: &Tensor, prompts: &Encoded) -> Result<Drawing> {
        let batch = noise.dim(0)?;
        ensure!(
            batch == prompts.len(),
            "{batch} noises of {} prompts",
            prompts.len()
        );
        let place =
            |t: &Tensor| -> Result<Tensor> { Ok(t.to_device(self.device)?.to_dtype(self.dtype)?) };
        let (txt, vec) = (place(&prompts.txt)?, place(&prompts.vec)?);
        Ok(Drawing {
            x: noise.to_device(self.device)?.to_dtype(DType::F32)?,
            img_ids: latents::img_ids(self.size.height, self.size.width, &Device::Cpu)?,
            txt_ids: latents::txt_ids(txt.dim(1)?, &Device::Cpu)?,
            guidance: Tensor::full(self.guidance as f32, batch, self.device)?,
            txt,
            vec,
        })
    }

    /// The latents and the noise level as the model takes them.
    fn at(&self, drawing: &Drawing, sigma: f32) -> Result<(Tensor, Tensor)> {
        let batch = drawing.x.dim(0)?;
        let timestep = Tensor::full(self.schedule.timestep(sigma), batch, self.device)?;
        Ok((drawing.x.to_dtype(self.dtype)?, timestep))
    }
}

/// A batch of images under way.
struct Drawing {
    /// Packed latents, (b, tokens, channels), f32.
    x: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    guidance: Tensor,
}

impl Drawing {
    fn inputs<'a>(&'a self, img: &'a Tensor, timestep: &'a Tensor) -> Inputs<'a> {
        Inputs {
            img,
            img_ids: &self.img_ids,
            txt: &self.txt,
            txt_ids: &self.txt_ids,
            timestep,
            vec: &self.vec,
            guidance: Some(&self.guidance),
        }
    }

    fn step(&mut self, velocity: &Tensor, pair: &[f32]) -> Result<()> {
        let velocity = velocity.to_dtype(DType::F32)?;
        self.x = (&self.x + (velocity * f64::from(pair[1] - pair[0]))?)?;
        Ok(())
    }

    fn finished(self, dtype: DType) -> Result<Tensor> {
        let norm = self.x.sqr()?.sum_all()?.to_scalar::<f32>()?;
        let hint = match dtype {
            DType::F32 => "the transformer's weights may be damaged: fetch its files again",
            _ => "try --dtype f32; if that does not help, fetch the transformer's files again",
        };
        ensure!(
            norm.is_finite(),
            "the latents became NaN or infinite\nhint: {hint}"
        );
        Ok(self.x)
    }
}
