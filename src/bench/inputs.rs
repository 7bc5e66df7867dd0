//! Random inputs of a step, and random weights for every kind of block.

use anyhow::Result;
use candle::{DType, Device, Tensor};

use crate::{
    checkpoint::{Checkpoint, init, safetensors_dtype},
    device::Runtime,
    layout::{BlockId, BlockSpec, FluxConfig, Form, Replacement},
    model::{Inputs, Trunk},
    sample::latents,
};

/// Random weights of a whole model; the same ones every time.
pub fn random_weights(config: &FluxConfig, dtype: DType) -> Result<Checkpoint> {
    init::random(config, 0, safetensors_dtype(dtype)?)
}

/// One block of every kind and form, in the widths of `config`, with random weights: time does not depend on values.
pub fn one_of_each_kind(config: &FluxConfig, runtime: &Runtime) -> Result<(FluxConfig, Trunk)> {
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

/// Random inputs of one step.
pub struct StepInputs {
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    timestep: Tensor,
    vec: Tensor,
    guidance: Tensor,
    /// Images in one forward.
    pub batch: usize,
    /// Image tokens of one image.
    pub image_tokens: usize,
    /// Text tokens of one image.
    pub text_tokens: usize,
}

impl StepInputs {
    /// Inputs for `batch` square images whose sides are `size` pixels.
    pub fn new(
        config: &FluxConfig,
        size: usize,
        text_tokens: usize,
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
            txt: normal(&[batch, text_tokens, config.context_in_dim])?,
            txt_ids: latents::txt_ids(text_tokens, device)?,
            timestep: Tensor::full(0.6f32, batch, device)?,
            vec: normal(&[batch, config.vec_in_dim])?,
            guidance: Tensor::full(3.5f32, batch, device)?,
            batch,
            image_tokens,
            text_tokens,
        })
    }

    /// As a model takes them.
    pub fn model_inputs(&self) -> Inputs<'_> {
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
