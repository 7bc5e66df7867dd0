//! Small random models and comparisons for this module's unit tests.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use candle::{DType, Device, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

use super::{Flux, Inputs};
use crate::layout::{FluxConfig, unpruned};

/// Roughly normal numbers that depend on the name and shape alone, f32 on the CPU.
pub(super) fn random(name: &str, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let mut hasher = DefaultHasher::new();
    (name, shape.dims()).hash(&mut hasher);
    let mut state = hasher.finish() | 1;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    // the sum of four uniform numbers has variance 1/3
    let values: Vec<f32> = (0..shape.elem_count())
        .map(|_| ((0..4).map(|_| uniform()).sum::<f32>() - 2.0) * 3f32.sqrt())
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// ‖got − want‖ / ‖want‖.
pub(super) fn relative(got: &Tensor, want: &Tensor) -> Result<f64> {
    let (got, want) = (got.to_dtype(DType::F64)?, want.to_dtype(DType::F64)?);
    let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>().map(f64::sqrt);
    Ok(norm(&(&got - &want)?)? / norm(&want)?.max(f64::MIN_POSITIVE))
}

/// Fails unless shapes agree and the relative error is at most `tolerance`.
pub(super) fn close(got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    if got.dims() != want.dims() {
        candle::bail!("shape {:?} instead of {:?}", got.shape(), want.shape());
    }
    let error = relative(got, want)?;
    // written so that a NaN fails
    if error <= tolerance {
        Ok(())
    } else {
        candle::bail!("relative error {error:.3e} > {tolerance:.0e}")
    }
}

/// Hidden 32 in two heads, one double and two single blocks.
pub(super) fn small_config() -> FluxConfig {
    FluxConfig {
        in_channels: 12,
        out_channels: 8,
        hidden_size: 32,
        num_heads: 2,
        context_in_dim: 20,
        vec_in_dim: 10,
        guidance_embed: true,
        axes_dims: vec![4, 6, 6],
        theta: 10_000.0,
        family: crate::layout::Family::FLUX1,
        mlp_size: 96,
        layout: unpruned(1, 2),
    }
}

/// Serves random weights and keeps what it served.
#[derive(Clone, Default)]
struct RandomWeights {
    served: Arc<Mutex<HashMap<String, Tensor>>>,
}

impl SimpleBackend for RandomWeights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let x = random(name, shape.clone())?;
        let x = match shape.dims() {
            [_, input] => (x * (1.2 / (*input as f64).sqrt()))?,
            _ if name.contains("_norm.") => ((x * 0.2)? + 1.0)?,
            _ => (x * 0.1)?,
        };
        let x = x.to_dtype(dtype)?.to_device(device)?;
        self.served
            .lock()
            .expect("no panic while serving")
            .insert(name.to_string(), x.clone());
        Ok(x)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle::bail!("asked for `{name}` without its shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        // nothing is stored packed
        !name.contains('@')
    }
}

/// A model with random weights on the CPU.
pub(super) fn random_flux(config: &FluxConfig, dtype: DType) -> Result<Flux> {
    random_flux_on(&Device::Cpu, config, dtype)
}

/// A model with random weights, the same on every device.
pub(super) fn random_flux_on(device: &Device, config: &FluxConfig, dtype: DType) -> Result<Flux> {
    let backend: Box<dyn SimpleBackend> = Box::new(RandomWeights::default());
    Flux::new(
        config,
        VarBuilder::from_backend(backend, dtype, device.clone()),
    )
}

/// The first GPU; `None`, and the test counts as skipped, if there is none.
#[cfg(feature = "cuda")]
pub(super) fn gpu() -> Option<Device> {
    let gpu = Device::new_cuda(0).ok();
    if gpu.is_none() {
        crate::ui::skip("cuda");
    }
    gpu
}

/// The tensors that a model of this configuration reads.
pub(super) fn tensors_of(config: &FluxConfig) -> Result<HashMap<String, Tensor>> {
    let weights = RandomWeights::default();
    let backend: Box<dyn SimpleBackend> = Box::new(weights.clone());
    Flux::new(
        config,
        VarBuilder::from_backend(backend, DType::F32, Device::Cpu),
    )?;
    let served = weights
        .served
        .lock()
        .expect("no panic while serving")
        .clone();
    Ok(served)
}

/// Inputs for [`small_config`] and its like.
pub(super) struct SmallInputs {
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    timestep: Tensor,
    vec: Tensor,
    guidance: Tensor,
}

impl SmallInputs {
    /// `batch` different samples of 2 × 3 image and 4 text tokens.
    pub(super) fn new(config: &FluxConfig, batch: usize) -> Result<Self> {
        // row and column on the second and third axis
        let axes = config.axes_dims.len();
        let position = |y: usize, x: usize| {
            let mut position = vec![0f32; axes];
            (position[1], position[2]) = (y as f32, x as f32);
            position
        };
        let patches = (0..2).flat_map(|y| (0..3).map(move |x| (y, x)));
        let ids: Vec<f32> = patches.flat_map(|(y, x)| position(y, x)).collect();
        // zeros in FLUX.1; families with a fourth axis number the text tokens on it
        let txt_ids = (0..4 * axes).map(|i| match i % axes {
            3 => (i / axes) as f32,
            _ => 0.0,
        });
        let txt_ids: Vec<f32> = txt_ids.collect();
        Ok(Self {
            img: random("img", (batch, 6, config.in_channels))?,
            img_ids: Tensor::from_vec(ids, (6, axes), &Device::Cpu)?,
            txt: random("txt", (batch, 4, config.context_in_dim))?,
            txt_ids: Tensor::from_vec(txt_ids, (4, axes), &Device::Cpu)?,
            timestep: Tensor::arange(1, 1 + batch as u32, &Device::Cpu)?
                .to_dtype(DType::F32)?
                .affine(0.1, 0.0)?,
            vec: random("vec", (batch, config.vec_in_dim))?,
            guidance: Tensor::arange(1, 1 + batch as u32, &Device::Cpu)?.to_dtype(DType::F32)?,
        })
    }

    /// The same on another device.
    #[cfg(feature = "cuda")]
    pub(super) fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            img: self.img.to_device(device)?,
            img_ids: self.img_ids.to_device(device)?,
            txt: self.txt.to_device(device)?,
            txt_ids: self.txt_ids.to_device(device)?,
            timestep: self.timestep.to_device(device)?,
            vec: self.vec.to_device(device)?,
            guidance: self.guidance.to_device(device)?,
        })
    }

    pub(super) fn borrowed(&self) -> Inputs<'_> {
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
