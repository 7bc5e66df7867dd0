//! The comparisons themselves, part by part: text encoders, transformer and VAE come and go one after another.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle::{DType, Device, Tensor};

use super::{
    coverage::Coverage,
    drawn::{Drawn, Prompts},
    reference::{Reference, distance},
    report::{Comparison, Report},
};
use crate::{
    device::Runtime,
    layout::{BlockKind, BlockSpec, TextModel},
    model::{Conditioning, Flux, Inputs, Observer, Stream},
    pipeline::{Pipeline, load},
    sample::{
        encoded::{Encoded, placed},
        image, reference,
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

/// The file with the reference image of an edited one, next to the recording.
const REFERENCE_IMAGE: &str = "reference.png";

/// The comparison under way.
pub(super) struct Check<'a> {
    pub(super) reference: &'a Reference,
    pub(super) pipeline: &'a Pipeline,
    pub(super) runtime: &'a Runtime,
    pub(super) tolerance: Option<f64>,
    pub(super) done: Vec<Comparison>,
    pub(super) skipped: Vec<String>,
    /// Beginnings of the names of what was skipped.
    pub(super) without: Vec<&'static str>,
}

impl Check<'_> {
    /// Compares everything that the reference holds and the model has.
    pub(super) fn run(mut self) -> Result<Report> {
        self.text()?;
        let prompts = self.prompts()?;
        let drawn = self.transformer(prompts)?;
        self.vae(drawn)?;
        let coverage = Coverage::new(self.reference, self.pipeline, &self.without);
        Ok(Report::new(self.done, self.skipped, coverage))
    }

    pub(super) fn compare(&mut self, name: &str, got: &Tensor, loose: bool) -> Result<()> {
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
    pub(super) fn compare_image(&mut self, name: &str, got: &Tensor) -> Result<()> {
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

    /// Notes that `what`, recorded under names that begin like `parts`, is not there to be compared.
    pub(super) fn skip(&mut self, what: &str, parts: &[&'static str], error: &anyhow::Error) {
        self.without.extend(parts);
        self.skipped.push(format!(
            "{what}: {}",
            format!("{error:#}").replace('\n', "; ")
        ));
    }

    fn text(&mut self) -> Result<()> {
        let reference = self.reference;
        let (txt, vec) = match self.pipeline.config.family.text {
            TextModel::ClipAndT5 => ("t5.hidden", "clip.pooled"),
            TextModel::Qwen3 => ("qwen.hidden", ""),
        };
        let ids = ["clip.input_ids", "t5.input_ids", "qwen.input_ids"];
        if ![txt, vec].iter().chain(&ids).any(|n| reference.has(n)) {
            return Ok(());
        }
        let files = match self.pipeline.text_files() {
            Ok(files) => files,
            Err(error) => {
                self.skip("text encoders", &["clip.", "t5.", "qwen."], &error);
                return Ok(());
            }
        };
        let length = reference.text_length()?;
        let encoders = load::text_encoders(self.pipeline, &files, Some(length), self.runtime)?;
        let prompt = reference.text("prompt")?.to_owned();
        let ids = encoders.tokenize(&prompt)?;
        let encoded = load::encode(self.pipeline, &encoders, &[prompt])?;
        for (name, ids) in ids {
            if reference.has(name) {
                self.compare_ids(name, &ids)?;
            }
        }
        for (name, got) in [(vec, &encoded.vec), (txt, &encoded.txt)] {
            if reference.has(name) {
                self.compare(name, got, false)?;
            }
        }
        Ok(())
    }

    /// The prompt that the whole pipeline draws, where it is recorded and everything for it is there.
    fn prompts(&mut self) -> Result<Option<Prompts>> {
        let reference = self.reference;
        if !reference.has("pipeline.latents") {
            return Ok(None);
        }
        if reference.has("pipeline.sigmas") {
            let schedule = load::schedule(self.pipeline)?;
            let tokens = reference.size(self.pipeline.config.family)?.tokens();
            let sigmas = schedule.sigmas(reference.steps()?, tokens)?;
            let sigmas = Tensor::new(sigmas, &Device::Cpu)?;
            self.compare("pipeline.sigmas", &sigmas, false)?;
        }
        let files = match (self.pipeline.text_files(), self.pipeline.vae_files()) {
            (Ok(text), Ok(_)) => text,
            (Err(error), _) | (_, Err(error)) => {
                self.skip("pipeline", &["pipeline."], &error);
                return Ok(None);
            }
        };
        let length = Some(reference.text_length()?);
        let encoders = load::text_encoders(self.pipeline, &files, length, self.runtime)?;
        let prompt = [reference.text("prompt")?.to_owned()];
        let plain = load::encode(self.pipeline, &encoders, &prompt)?;
        let edited = reference.has("pipeline.edited_image");
        let edited = edited.then(|| self.edited(&plain)).transpose()?;
        Ok(Some(Prompts { plain, edited }))
    }

    /// The prompt with the reference image that lies next to the recording.
    fn edited(&self, prompt: &Encoded) -> Result<Encoded> {
        let path = self.reference.next_to(REFERENCE_IMAGE);
        let image = reference::prepared(&image::read(&path)?, &self.pipeline.config.family)?;
        Ok(Encoded {
            references: Some(load::references(self.pipeline, &[image], self.runtime)?),
            ..prompt.clone()
        })
    }

    /// Compares one recorded call and draws `prompts`.
    fn transformer(&mut self, prompts: Option<Prompts>) -> Result<Option<Drawn>> {
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
        let place = |t: Tensor| -> Result<Tensor> { Ok(placed(&t, device, self.runtime.dtype)?) };
        let config = &self.pipeline.config;
        let img = get("img", &[None, None, Some(config.in_channels)])?;
        let (batch, tokens, _) = img.dims3()?;
        let txt = get("txt", &[Some(batch), None, Some(config.context_in_dim)])?;
        let vec = match config.vec_in_dim {
            0 => Tensor::zeros((batch, 0), DType::F32, &Device::Cpu)?,
            width => get("vec", &[Some(batch), Some(width)])?,
        };
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
