//! What the whole pipeline draws, from a recorded prompt and noise to the image.

use anyhow::Result;
use candle::Tensor;

use super::{
    check::Check,
    drawn::{Drawn, Prompts, tokens},
};
use crate::{
    layout::NoiseOrder,
    model::Flux,
    pipeline::{decoder, load},
    sample::{
        denoise::{Denoise, Encoded, starting_noise},
        latents,
        vae::Vae,
    },
};

impl Check<'_> {
    /// The pipeline's steps, from the recorded noise and from that of the recorded seed.
    pub(super) fn draw(&self, flux: &Flux, prompts: &Prompts) -> Result<Drawn> {
        let reference = self.reference;
        let config = &self.pipeline.config;
        let size = reference.size(config.family)?;
        // without embedding the recorded scale of the negative prompt is the guidance
        let guidance = self
            .pipeline
            .guidance_or_default(Some(reference.guidance()?));
        let denoise = Denoise {
            flux,
            dtype: self.runtime.dtype,
            device: &self.runtime.device,
            schedule: &load::schedule(self.pipeline)?,
            steps: reference.steps()?,
            guidance,
            cfg_scale: self.pipeline.cfg_scale(guidance),
            size,
        };
        let draw =
            |noise: &Tensor, prompts: &Encoded| denoise.run(noise, prompts, &mut (), &mut || ());
        let seeded = |prompts: &Encoded| {
            let channels = config.out_channels / 4;
            let noise = starting_noise(reference.number("image_seed")?, 1, channels, size)?;
            draw(&noise, prompts)
        };
        let wanted = reference.has("pipeline.seeded_image");
        let channels = config.in_channels;
        let shape = match config.family.noise {
            NoiseOrder::Pixels => vec![1, size.tokens(), channels],
            NoiseOrder::Patches => vec![1, channels, size.height / 2, size.width / 2],
        };
        let shape: Vec<Option<usize>> = shape.into_iter().map(Some).collect();
        let latents = reference.shaped("pipeline.latents", &shape)?;
        Ok(Drawn {
            size,
            latents: draw(&tokens(&latents)?, &prompts.plain)?,
            seeded: wanted.then(|| seeded(&prompts.plain)).transpose()?,
            edited: prompts.edited.as_ref().map(seeded).transpose()?,
        })
    }

    pub(super) fn vae(&mut self, drawn: Option<Drawn>) -> Result<()> {
        let reference = self.reference;
        let recorded = reference.has("vae.latents") && reference.has("vae.image");
        if !recorded && drawn.is_none() {
            return Ok(());
        }
        let files = match self.pipeline.vae_files() {
            Ok(files) => files,
            Err(error) => {
                self.skip("VAE", &["vae.", "pipeline."], &error);
                return Ok(());
            }
        };
        let vae = load::vae(&files, self.runtime)?;
        if recorded {
            let patches = self.pipeline.config.family.noise == NoiseOrder::Patches;
            let channels = vae.config().latent_channels * if patches { 4 } else { 1 };
            let shape = [None, Some(channels), None, None];
            let mut latents = reference.shaped("vae.latents", &shape)?;
            if patches {
                let (_, _, h, w) = latents.dims4()?;
                latents = latents::unpack(&tokens(&latents)?, 2 * h, 2 * w)?.contiguous()?;
            }
            let image = decoder::decode(&vae, &latents, None, self.runtime)?;
            self.compare("vae.image", &image, true)?;
        }
        drawn.map_or(Ok(()), |drawn| self.images(&vae, &drawn))
    }

    /// The whole pipeline, from prompt and noise to the image.
    fn images(&mut self, vae: &Vae, drawn: &Drawn) -> Result<()> {
        let reference = self.reference;
        if reference.has("pipeline.final_latents") {
            let final_latents = match drawn.size.family.noise {
                NoiseOrder::Pixels => drawn.latents.clone(),
                // recorded as the VAE takes them
                NoiseOrder::Patches => {
                    let (height, width) = (drawn.size.height, drawn.size.width);
                    vae.unscaled(&latents::unpack(&drawn.latents, height, width)?)?
                }
            };
            self.compare("pipeline.final_latents", &final_latents, true)?;
        }
        let wanted = reference.has("pipeline.image").then_some(&drawn.latents);
        for (name, latents) in [
            ("pipeline.image", wanted),
            ("pipeline.seeded_image", drawn.seeded.as_ref()),
            ("pipeline.edited_image", drawn.edited.as_ref()),
        ] {
            if let Some(latents) = latents {
                let image = decoder::decode_packed(vae, latents, drawn.size, None, self.runtime)?;
                let image = (image.clamp(-1.0, 1.0)? * 0.5)?.affine(1.0, 0.5)?;
                self.compare_image(name, &image)?;
            }
        }
        Ok(())
    }
}
