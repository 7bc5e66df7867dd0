//! Random inputs of a step, and random weights for every kind of block.

use anyhow::{Result, ensure};
use candle::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

use crate::{
    checkpoint::{init, safetensors_dtype},
    device::Runtime,
    layout::{BlockId, BlockKind, BlockSpec, FluxConfig, Form, Replacement},
    model::{Block, Flux, Inputs, Trunk},
    sample::{encoded::placed, latents},
};

/// A model's random weights. Those of `init` on the CPU; a GPU makes its own, some hundred times as fast.
pub fn random_weights(config: &FluxConfig, runtime: &Runtime) -> Result<VarBuilder<'static>> {
    if runtime.device.is_cpu() {
        let weights = init::random(config, 0, safetensors_dtype(runtime.dtype)?)?;
        return Ok(weights.var_builder(runtime.dtype, &runtime.device));
    }
    Ok(VarBuilder::from_backend(
        Box::new(MadeOnDevice),
        runtime.dtype,
        runtime.device.clone(),
    ))
}

/// Any tensor that is asked for, of normal numbers.
struct MadeOnDevice;

impl SimpleBackend for MadeOnDevice {
    fn get(
        &self,
        shape: Shape,
        _: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle::Result<Tensor> {
        let inputs = shape.dims().last().copied().unwrap_or(1).max(1);
        let deviation = 0.3 / (inputs as f32).sqrt();
        Tensor::randn(0f32, deviation, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle::Result<Tensor> {
        candle::bail!("no shape for `{name}`")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        // no packed ones
        !name.contains('@')
    }
}

/// One block of every kind and form, in the widths of `config`, with random weights: time does not depend on values.
pub fn one_of_each_kind(config: &FluxConfig, runtime: &Runtime) -> Result<(FluxConfig, Trunk)> {
    let forms = [Form::Linear, Form::Conditioned, Form::Modulated].map(|form| (form, false));
    let replaced = forms.into_iter().chain([(Form::Linear, true)]).enumerate();
    let replaced =
        replaced.map(|(i, (form, joint))| replacement(BlockId::single(1 + i), form, joint));
    let originals = [BlockId::double(0), BlockId::single(0)].map(BlockSpec::Original);
    let mut config = config.clone();
    config.layout = originals.into_iter().chain(replaced).collect();
    let vb = random_weights(&config, runtime)?;
    let trunk = Trunk::load(&config, &vb)?;
    Ok((config, trunk))
}

fn replacement(id: BlockId, form: Form, joint: bool) -> BlockSpec {
    BlockSpec::Replaced(Replacement {
        replaces: vec![id],
        form,
        joint,
    })
}

/// `config` with `count` of its single blocks, spread over them, replaced as `prune` does by default.
///
/// # Errors
/// When there are fewer.
pub fn replaced(config: &FluxConfig, count: usize) -> Result<FluxConfig> {
    let mut config = config.clone();
    let single = |spec: &&mut BlockSpec| matches!(spec, BlockSpec::Original(id) if id.kind == BlockKind::Single);
    let mut singles: Vec<&mut BlockSpec> = config.layout.iter_mut().filter(single).collect();
    let of = singles.len();
    ensure!(
        count <= of,
        "--replaced {count}: there are {of} single blocks"
    );
    for i in 0..count {
        let spec = &mut *singles[i * of / count];
        if let BlockSpec::Original(id) = *spec {
            *spec = replacement(id, Form::Linear, false);
        }
    }
    Ok(config)
}

/// `flux` with the blocks that `config` replaces replaced by random layers; all else is shared.
pub fn with_layers(flux: &Flux, config: &FluxConfig, runtime: &Runtime) -> Result<Flux> {
    let vb = random_weights(config, runtime)?;
    let mut flux = flux.clone();
    let slots = config.slots().into_iter();
    for (entry, (spec, prefix)) in flux.trunk.entries_mut().iter_mut().zip(slots) {
        if let (BlockSpec::Replaced(_), Some(prefix)) = (spec, prefix) {
            *entry = (spec.clone(), Block::new(config, spec, &vb.pp(prefix))?);
        }
    }
    Ok(flux)
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
            let normal = Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?;
            Ok(placed(&normal, device, dtype)?)
        };
        let axes = config.family.position_axes;
        let img_ids = latents::img_ids(0, size / 8, size / 8, axes, device)?;
        let image_tokens = img_ids.dim(0)?;
        Ok(Self {
            img: normal(&[batch, image_tokens, config.in_channels])?,
            img_ids,
            txt: normal(&[batch, text_tokens, config.context_in_dim])?,
            txt_ids: latents::txt_ids(text_tokens, axes, device)?,
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
