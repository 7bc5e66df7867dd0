//! The comparisons themselves, part by part: text encoders, transformer and VAE come and go one after another.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle::{DType, Device, Tensor};

use super::{
    reference::{Reference, distance},
    report::{Comparison, Report},
};
use crate::{
    device::Runtime,
    layout::{BlockKind, BlockSpec},
    model::{Conditioning, Flux, Inputs, Observer, Stream},
    pipeline::{Pipeline, decoder, load},
    sample::{
        denoise::{Denoise, Encoded, LatentSize, starting_noise},
        vae::Vae,
    },
};

/// Relative error allowed of encoders, blocks and velocity in f32.
const TIGHT: f64 = 1e-5;
/// Relative error allowed of VAE and final latents in f32, where rounding accumulates.
const LOOSE: f64 = 1e-4;
/// Relative error allowed in half precision.
const HALF: f64 = 2e-2;
/// Tokens in one forward of a recorded transformer call.
const TOKENS: usize = 8192;

/// What the whole pipeline made of a recorded prompt: packed latents from the recorded noise, and from a recorded seed.
struct Drawn {
    size: LatentSize,
    latents: Tensor,
    seeded: Option<Tensor>,
}

/// The comparison under way.
pub(super) struct Check<'a> {
    pub(super) reference: &'a Reference,
    pub(super) pipeline: &'a Pipeline,
    pub(super) runtime: &'a Runtime,
    pub(super) tolerance: Option<f64>,
    pub(super) done: Vec<Comparison>,
    pub(super) skipped: Vec<String>,
}

impl Check<'_> {
    /// Compares everything that the reference holds and the model has.
    pub(super) fn run(mut self) -> Result<Report> {
        self.text()?;
        let prompts = self.prompts()?;
        let drawn = self.transformer(prompts)?;
        self.vae(drawn)?;
        Ok(Report::new(self.done, self.skipped))
    }

    fn compare(&mut self, name: &str, got: &Tensor, loose: bool) -> Result<()> {
        let half = self.runtime.dtype != DType::F32;
        let limit = self.tolerance.unwrap_or(if half {
            HALF
        } else if loose {
            LOOSE
        } else {
            TIGHT
        });
        let want = self.reference.get(name)?;
        let (max_abs, relative) = distance(name, got, &want).with_context(|| self.file())?;
        self.done.push(Comparison {
            name: name.to_owned(),
            max_abs,
            relative,
            ok: relative <= limit,
        });
        Ok(())
    }

    fn file(&self) -> String {
        format!("`{}`", self.reference.tensors.name)
    }

    /// Token ids are equal or not.
    fn compare_ids(&mut self, name: &str, got: &[u32]) -> Result<()> {
        let want = self
            .reference
            .get(name)?
            .flatten_all()?
            .to_dtype(DType::U32)?
            .to_vec1::<u32>()?;
        let off =
            want.iter().zip(got).filter(|(a, b)| a != b).count() + want.len().abs_diff(got.len());
        let relative = off as f64 / want.len().max(1) as f64;
        let worst = want
            .iter()
            .zip(got)
            .map(|(a, b)| f64::from(a.abs_diff(*b)))
            .fold(0.0, f64::max);
        self.done.push(Comparison {
            name: name.to_owned(),
            max_abs: worst,
            relative,
            ok: off == 0,
        });
        Ok(())
    }

    /// A finished image in \[0, 1\]: no 8-bit channel may differ by more than 1.
    fn compare_image(&mut self, name: &str, got: &Tensor) -> Result<()> {
        if self.tolerance.is_some() || self.runtime.dtype != DType::F32 {
            return self.compare(name, got, true);
        }
        let want = self.reference.get(name)?;
        let (max_abs, relative) = distance(name, got, &want).with_context(|| self.file())?;
        let eight = |t: &Tensor| -> Result<Tensor> {
            Ok(t.to_device(&Device::Cpu)?
                .to_dtype(DType::F32)?
                .affine(255.0, 0.0)?
                .round()?)
        };
        let steps = (eight(got)? - eight(&want)?)?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        self.done.push(Comparison {
            name: name.to_owned(),
            max_abs,
            relative,
            ok: steps <= 1.0,
        });
        Ok(())
    }

    fn skip(&mut self, what: &str, error: &anyhow::Error) {
        self.skipped.push(format!(
            "{what}: {}",
            format!("{error:#}").replace('\n', "; ")
        ));
    }

    fn text(&mut self) -> Result<()> {
        let reference = self.reference;
        if !["clip.input_ids", "clip.pooled", "t5.input_ids", "t5.hidden"]
            .iter()
            .any(|n| reference.has(n))
        {
            return Ok(());
        }
        let files = match self.pipeline.text_files() {
            Ok(files) => files,
            Err(error) => {
                self.skip("text encoders", &error);
                return Ok(());
            }
        };
        let length = reference.text_length()?;
        let encoders = load::text_encoders(self.pipeline, &files, Some(length), self.runtime)?;
        let prompt = reference.text("prompt")?.to_owned();
        let (clip, t5) = encoders.tokenize(&prompt)?;
        let encoded = load::encode(&encoders, &[prompt], &self.pipeline.reporter)?;
        for (name, ids) in [("clip.input_ids", clip), ("t5.input_ids", t5)] {
            if reference.has(name) {
                self.compare_ids(name, &ids)?;
            }
        }
        for (name, got) in [("clip.pooled", &encoded.vec), ("t5.hidden", &encoded.txt)] {
            if reference.has(name) {
                self.compare(name, got, false)?;
            }
        }
        Ok(())
    }

    /// The prompt that the whole pipeline draws, if it is recorded and everything for it is there.
    fn prompts(&mut self) -> Result<Option<Encoded>> {
        let reference = self.reference;
        if !reference.has("pipeline.latents") {
            return Ok(None);
        }
        if reference.has("pipeline.sigmas") {
            let schedule = load::schedule(self.pipeline)?;
            let tokens = reference.size()?.tokens();
            let sigmas = schedule.sigmas(reference.steps()?, tokens)?;
            let sigmas = Tensor::new(sigmas, &Device::Cpu)?;
            self.compare("pipeline.sigmas", &sigmas, false)?;
        }
        let files = match (self.pipeline.text_files(), self.pipeline.vae_files()) {
            (Ok(text), Ok(_)) => text,
            (Err(error), _) | (_, Err(error)) => {
                self.skip("pipeline", &error);
                return Ok(None);
            }
        };
        let length = Some(reference.text_length()?);
        let encoders = load::text_encoders(self.pipeline, &files, length, self.runtime)?;
        let prompt = [reference.text("prompt")?.to_owned()];
        load::encode(&encoders, &prompt, &self.pipeline.reporter).map(Some)
    }

    /// Compares one recorded call and draws `prompts`.
    fn transformer(&mut self, prompts: Option<Encoded>) -> Result<Option<Drawn>> {
        let recorded = self.reference.has("transformer.img");
        if !recorded && prompts.is_none() {
            return Ok(None);
        }
        let flux = load::flux(self.pipeline, self.runtime)?;
        if recorded {
            self.call(&flux)?;
        }
        let drawn = prompts.map(|prompts| self.draw(&flux, &prompts));
        drawn.transpose()
    }

    /// Compares one recorded call, block by block.
    fn call(&mut self, flux: &Flux) -> Result<()> {
        let reference = self.reference;
        let get = |name: &str, shape: &[Option<usize>]| {
            reference.shaped(&format!("transformer.{name}"), shape)
        };
        let device = &self.runtime.device;
        let place = |t: Tensor| -> Result<Tensor> {
            Ok(t.to_device(device)?.to_dtype(self.runtime.dtype)?)
        };
        let config = &self.pipeline.config;
        let img = get("img", &[None, None, Some(config.in_channels)])?;
        let (batch, tokens, _) = img.dims3()?;
        let txt = get("txt", &[Some(batch), None, Some(config.context_in_dim)])?;
        let vec = get("vec", &[Some(batch), Some(config.vec_in_dim)])?;
        let timestep = get("timestep", &[Some(batch)])?;
        let guidance = config
            .guidance_embed
            .then(|| get("guidance", &[Some(batch)]))
            .transpose()?;
        let axes = Some(config.axes_dims.len());
        let img_ids = get("img_ids", &[Some(tokens), axes])?;
        let txt_ids = get("txt_ids", &[Some(txt.dim(1)?), axes])?;
        let chunk = (TOKENS / (tokens + txt.dim(1)?)).clamp(1, batch.max(1));
        let mut seen = Seen {
            wanted: reference,
            parts: BTreeMap::new(),
            order: Vec::new(),
        };
        let mut velocity = Vec::new();
        for start in (0..batch).step_by(chunk) {
            let n = chunk.min(batch - start);
            let cut = |t: &Tensor| -> Result<Tensor> { Ok(t.narrow(0, start, n)?) };
            let guidance = guidance
                .as_ref()
                .map(|g| anyhow::Ok(cut(g)?.to_device(device)?))
                .transpose()?;
            let inputs = Inputs {
                img: &place(cut(&img)?)?,
                img_ids: &img_ids,
                txt: &place(cut(&txt)?)?,
                txt_ids: &txt_ids,
                timestep: &cut(&timestep)?.to_device(device)?,
                vec: &place(cut(&vec)?)?,
                guidance: guidance.as_ref(),
            };
            velocity.push(
                flux.forward(&inputs, &mut seen)?
                    .to_dtype(DType::F32)?
                    .to_device(&Device::Cpu)?,
            );
        }
        for name in seen.order {
            if let Some(parts) = seen.parts.get(&name) {
                self.compare(&name, &Tensor::cat(parts, 0)?, false)?;
            }
        }
        if reference.has("transformer.velocity") {
            self.compare("transformer.velocity", &Tensor::cat(&velocity, 0)?, false)?;
        }
        Ok(())
    }

    /// The pipeline's steps, from the recorded noise and from that of the recorded seed.
    fn draw(&self, flux: &Flux, prompts: &Encoded) -> Result<Drawn> {
        let reference = self.reference;
        let size = reference.size()?;
        let denoise = Denoise {
            flux,
            dtype: self.runtime.dtype,
            device: &self.runtime.device,
            schedule: &load::schedule(self.pipeline)?,
            steps: reference.steps()?,
            guidance: reference.guidance()?,
            size,
        };
        let draw = |noise: &Tensor| denoise.run(noise, prompts, &mut (), &mut || ());
        let seeded = || {
            let channels = self.pipeline.config.out_channels / 4;
            let noise = starting_noise(reference.number("image_seed")?, 1, channels, size)?;
            draw(&noise)
        };
        let wanted = reference.has("pipeline.seeded_image");
        let shape = [1, size.tokens(), self.pipeline.config.in_channels].map(Some);
        let latents = reference.shaped("pipeline.latents", &shape)?;
        Ok(Drawn {
            size,
            latents: draw(&latents)?,
            seeded: wanted.then(seeded).transpose()?,
        })
    }

    fn vae(&mut self, drawn: Option<Drawn>) -> Result<()> {
        let reference = self.reference;
        let recorded = reference.has("vae.latents") && reference.has("vae.image");
        if !recorded && drawn.is_none() {
            return Ok(());
        }
        let files = match self.pipeline.vae_files() {
            Ok(files) => files,
            Err(error) => {
                self.skip("VAE", &error);
                return Ok(());
            }
        };
        let vae = load::vae(&files, self.runtime)?;
        if recorded {
            let channels = Some(vae.config().latent_channels);
            let latents = reference.shaped("vae.latents", &[None, channels, None, None])?;
            let image = decoder::decode(&vae, &latents, None, self.runtime)?;
            self.compare("vae.image", &image, true)?;
        }
        drawn.map_or(Ok(()), |drawn| self.images(&vae, &drawn))
    }

    /// The whole pipeline, from prompt and noise to the image.
    fn images(&mut self, vae: &Vae, drawn: &Drawn) -> Result<()> {
        let reference = self.reference;
        if reference.has("pipeline.final_latents") {
            self.compare("pipeline.final_latents", &drawn.latents, true)?;
        }
        let wanted = reference.has("pipeline.image").then_some(&drawn.latents);
        for (name, latents) in [
            ("pipeline.image", wanted),
            ("pipeline.seeded_image", drawn.seeded.as_ref()),
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

/// Keeps the block outputs that the reference has, under the names it gives them.
struct Seen<'a> {
    wanted: &'a Reference,
    parts: BTreeMap<String, Vec<Tensor>>,
    order: Vec<String>,
}

impl Observer for Seen<'_> {
    fn block(
        &mut self,
        _: usize,
        spec: &BlockSpec,
        _: &Conditioning,
        _: &Stream,
        output: &Stream,
    ) -> candle::Result<()> {
        // a run of blocks that collapsed into one gives the output of its last
        let id = match spec {
            BlockSpec::Original(id) => *id,
            BlockSpec::Replaced(r) => r.replaces.last().copied().unwrap_or(spec.id()),
        };
        let name = |tail: &str| format!("blocks.{}.{}.{tail}", id.kind.prefix(), id.index);
        let outputs = match id.kind {
            BlockKind::Double => vec![(name("txt"), output.txt()?), (name("img"), output.img()?)],
            BlockKind::Single => vec![(name("x"), output.tokens.clone())],
        };
        for (name, tensor) in outputs
            .into_iter()
            .filter(|(name, _)| self.wanted.has(name))
        {
            if !self.parts.contains_key(&name) {
                self.order.push(name.clone());
            }
            let tensor = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            self.parts.entry(name).or_default().push(tensor);
        }
        Ok(())
    }
}
