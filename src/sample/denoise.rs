//! Noise → latents: Euler steps over the transformer's velocity, as diffusers' `FlowMatchEulerDiscreteScheduler` takes them.

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};

use super::encoded::placed;
pub use super::encoded::{Encoded, References};
use super::{finite::FiniteCheck, is_finite, latents, noise, schedule::Schedule};
use crate::{
    layout::{Family, NoiseOrder},
    model::{Conditioning, Flux, Inputs, Observer},
};

/// Size of a latent image, in latent pixels (an eighth of the image's), both even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentSize {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Whose latents: says how tokens are numbered and noise is drawn.
    pub family: Family,
}

impl LatentSize {
    /// Number of image tokens: one for each 2×2 latent pixels.
    pub fn tokens(self) -> usize {
        self.height / 2 * (self.width / 2)
    }

    /// Positions of the image tokens, (tokens, axes), on the CPU.
    ///
    /// # Errors
    /// When memory is short.
    pub fn img_ids(self) -> candle::Result<Tensor> {
        let axes = self.family.position_axes;
        latents::img_ids(0, self.height, self.width, axes, &Device::Cpu)
    }

    /// Positions of `len` text tokens, (len, axes), on the CPU.
    ///
    /// # Errors
    /// When memory is short.
    pub fn txt_ids(self, len: usize) -> candle::Result<Tensor> {
        latents::txt_ids(len, self.family.position_axes, &Device::Cpu)
    }
}

/// Starting noise of one prompt's images, packed: (images, tokens, 4 · channels), f32, on the CPU.
///
/// diffusers draws (images, channels, h, w), or for FLUX.2 (images, 4 · channels, h/2, w/2), from one generator and packs;
/// so do we, and a seed means the same noise.
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
    let (height, width) = (size.height, size.width);
    match size.family.noise {
        NoiseOrder::Pixels => {
            let latent = generator.randn((images, channels, height, width), &Device::Cpu)?;
            Ok(latents::pack(&latent)?)
        }
        NoiseOrder::Patches => {
            let shape = (images, 4 * channels, height / 2, width / 2);
            let patches = generator.randn(shape, &Device::Cpu)?;
            Ok(patches.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
        }
    }
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
    /// Given to the guidance embedding, where the model has one.
    pub guidance: f64,
    /// How far the velocity is moved away from that of the negative prompt, where there is one: diffusers'
    /// [`true_cfg_scale`][cfg]. Up to 1: not at all, and nothing is computed for it.
    ///
    /// [cfg]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux/pipeline_flux.py
    pub cfg_scale: f64,
    /// Size of the images.
    pub size: LatentSize,
}

impl Denoise<'_> {
    /// Runs all steps on packed noise (b, tokens, channels) with b prompts; gives packed latents in f32.
    ///
    /// `observer` sees every block of every step, with the prompts and not with the negative prompt; `on_step` is called
    /// after each step.
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
        for (step, pair) in sigmas.windows(2).enumerate() {
            let (img, timestep) = self.at(&drawing, pair[0])?;
            let mut velocities = Vec::new();
            for (i, text) in drawing.texts().enumerate() {
                let inputs = drawing.inputs(&img, &timestep, text);
                let observer: &mut dyn Observer = if i == 0 { &mut *observer } else { &mut () };
                velocities.push(self.flux.forward(&inputs, observer)?);
                if step == 0 && !is_finite(&velocities[i])? {
                    // once more, to see which block it is; if none is, it is the head
                    self.flux.forward(&inputs, &mut FiniteCheck)?;
                }
            }
            drawing.step(&self.guided(&velocities)?, pair)?;
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
                for text in drawing.texts() {
                    let inputs = drawing.inputs(&img, &timestep, text);
                    let (stream, conditioning) = self.flux.embed(&inputs)?;
                    streams.push(stream);
                    conditionings.push(conditioning);
                }
            }
            let borrowed: Vec<&Conditioning> = conditionings.iter().collect();
            trunk.forward_each(0..trunk.len(), &mut streams, &borrowed)?;
            let mut ends = streams.into_iter().zip(borrowed);
            for drawing in &mut drawings {
                let ends = ends.by_ref().take(drawing.texts().count());
                let heads = ends.map(|(end, conditioning)| self.flux.head(&end, conditioning));
                let velocities: Vec<Tensor> = heads.collect::<candle::Result<_>>()?;
                drawing.step(&self.guided(&velocities)?, pair)?;
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
        let place = |t: &Tensor| -> Result<Tensor> { Ok(placed(t, self.device, self.dtype)?) };
        let text = Text {
            txt: place(&prompts.txt)?,
            vec: place(&prompts.vec)?,
        };
        let negative = prompts.negative.as_ref().filter(|_| self.cfg_scale > 1.0);
        let negative = negative.map(|negative| {
            let (_, len, width) = negative.txt.dims3()?;
            let pooled = negative.vec.dim(1)?;
            let vec = negative.vec.broadcast_as((batch, pooled))?;
            anyhow::Ok(Text {
                txt: place(
                    &negative
                        .txt
                        .broadcast_as((batch, len, width))?
                        .contiguous()?,
                )?,
                vec: place(&vec.contiguous()?)?,
            })
        });
        let mut img_ids = self.size.img_ids()?;
        if let Some(references) = &prompts.references {
            img_ids = Tensor::cat(&[&img_ids, &references.ids], 0)?;
        }
        let references = prompts.references.as_ref();
        Ok(Drawing {
            x: noise.to_device(self.device)?.to_dtype(DType::F32)?,
            img_ids,
            txt_ids: self.size.txt_ids(text.txt.dim(1)?)?,
            guidance: Tensor::full(self.guidance as f32, batch, self.device)?,
            references: references
                .map(|r| place(&r.tokens_of(batch)?))
                .transpose()?,
            negative: negative.transpose()?,
            text,
        })
    }

    /// The tokens and the noise level as the model takes them.
    fn at(&self, drawing: &Drawing, sigma: f32) -> Result<(Tensor, Tensor)> {
        let batch = drawing.x.dim(0)?;
        let timestep = Tensor::full(self.schedule.timestep(sigma), batch, self.device)?;
        let img = drawing.x.to_dtype(self.dtype)?;
        let img = match &drawing.references {
            None => img,
            Some(references) => Tensor::cat(&[&img, references], 1)?,
        };
        Ok((img, timestep))
    }

    /// The velocity of a step from that with the prompts and, where there is one, that with the negative prompt.
    fn guided(&self, velocities: &[Tensor]) -> Result<Tensor> {
        let [velocity, negative] = velocities else {
            return Ok(velocities[0].clone());
        };
        let (velocity, negative) = (
            velocity.to_dtype(DType::F32)?,
            negative.to_dtype(DType::F32)?,
        );
        Ok((&negative + ((&velocity - &negative)? * self.cfg_scale)?)?)
    }
}

/// What a forward is told of the prompts of its images.
struct Text {
    /// (b, text tokens, width)
    txt: Tensor,
    /// (b, width)
    vec: Tensor,
}

/// A batch of images under way.
struct Drawing {
    /// Packed latents, (b, tokens, channels), f32.
    x: Tensor,
    /// Positions of these tokens and those of the reference images.
    img_ids: Tensor,
    text: Text,
    txt_ids: Tensor,
    guidance: Tensor,
    negative: Option<Text>,
    /// (b, tokens of reference images, channels)
    references: Option<Tensor>,
}

impl Drawing {
    /// The prompts and, where there is one, the negative prompt.
    fn texts(&self) -> impl Iterator<Item = &Text> {
        std::iter::once(&self.text).chain(&self.negative)
    }

    fn inputs<'a>(&'a self, img: &'a Tensor, timestep: &'a Tensor, text: &'a Text) -> Inputs<'a> {
        Inputs {
            img,
            img_ids: &self.img_ids,
            txt: &text.txt,
            txt_ids: &self.txt_ids,
            timestep,
            vec: &text.vec,
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
            DType::F32 => "the transformer's weights may be damaged: use another copy of its files",
            _ => {
                "try --dtype f32; if that does not help, use another copy of the transformer's files"
            }
        };
        ensure!(
            norm.is_finite(),
            "the latents became NaN or infinite\nhint: {hint}"
        );
        Ok(self.x)
    }
}
