//! What `bench` times things on: random inputs, and random weights of every kind of block. Measuring is `bench`'s business.

use anyhow::Result;
use candle::{DType, Device, Tensor};

use crate::{
    checkpoint::{Checkpoint, init, safetensors_dtype},
    device::Runtime,
    layout::{BlockId, BlockSpec, FluxConfig, Form, Replacement},
    model::{Inputs, Trunk},
    sample::latents,
};

/// A model's weights, the same ones every time.
pub(super) fn random_weights(config: &FluxConfig, dtype: DType) -> Result<Checkpoint> {
    init::random(config, 0, safetensors_dtype(dtype)?)
}

/// One block of every kind and form, in the widths of `config`, with random weights: time does not depend on values.
pub(super) fn kinds(config: &FluxConfig, runtime: &Runtime) -> Result<(FluxConfig, Trunk)> {
    let forms = [Form::Linear, Form::Conditioned, Form::Modulated].map(|form| (form, false));
    let replaced = forms.into_iter().chain([(Form::Linear, true)]).enumerate();
    let replaced = replaced.map(|(i, (form, joint))| {
        BlockSpec::Replaced(Replacement {
            replaces: vec![BlockId::single(1 + i)],
            form,
            joint,
        })
    });
    let originals = [BlockId::double(0), BlockId::single(0)].map(BlockSpec::Original);
    let mut config = config.clone();
    config.layout = originals.into_iter().chain(replaced).collect();
    let weights = random_weights(&config, runtime.dtype)?;
    let vb = weights.var_builder(runtime.dtype, &runtime.device);
    let trunk = Trunk::load(&config, &vb)?;
    Ok((config, trunk))
}

/// Random inputs of one size.
pub(super) struct Given {
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    timestep: Tensor,
    vec: Tensor,
    guidance: Tensor,
    pub(super) batch: usize,
    pub(super) image_tokens: usize,
    pub(super) text_tokens: usize,
}

impl Given {
    pub(super) fn new(
        config: &FluxConfig,
        size: usize,
        text: usize,
        batch: usize,
        runtime: &Runtime,
    ) -> Result<Self> {
        let (device, dtype) = (&runtime.device, runtime.dtype);
        let normal = |shape: &[usize]| -> Result<Tensor> {
            Ok(Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?
                .to_device(device)?
                .to_dtype(dtype)?)
        };
        let img_ids = latents::img_ids(size / 8, size / 8, device)?;
        let image_tokens = img_ids.dim(0)?;
        Ok(Self {
            img: normal(&[batch, image_tokens, config.in_channels])?,
            img_ids,
            txt: normal(&[batch, text, config.context_in_dim])?,
            txt_ids: latents::txt_ids(text, device)?,
            timestep: Tensor::full(0.6f32, batch, device)?,
            vec: normal(&[batch, config.vec_in_dim])?,
            guidance: Tensor::full(3.5f32, batch, device)?,
            batch,
            image_tokens,
            text_tokens: text,
        })
    }

    pub(super) fn inputs(&self) -> Inputs<'_> {
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
