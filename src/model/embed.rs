//! From the inputs of one step to tokens and conditioning.

use std::sync::Mutex;

use candle::{DType, Device, Result, Tensor, TensorId};
use candle_nn::VarBuilder;

use super::linear::Linear;
use super::modulation::SharedModulation;
use super::rope::Rope;
use super::stream::{Conditioning, Stream};
use crate::layout::FluxConfig;

/// Width of the sinusoidal embedding of timestep and guidance (BFL `model.py`, diffusers `Timesteps`).
pub(super) const SINUSOID: usize = 256;
/// Longest period of that embedding (BFL `timestep_embedding`).
const MAX_PERIOD: f64 = 10_000.0;
/// Timesteps in [0, 1] and guidance are embedded in thousandths (BFL `time_factor`).
const TIME_FACTOR: f64 = 1000.0;

/// The inputs of one call of the transformer. Converted to the model's dtype if they are not.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Packed latents, (batch, image tokens, in_channels).
    pub img: &'a Tensor,
    /// Positions of the image tokens, (image tokens, axes); best on the CPU, where the rotary table is made. Tokens of
    /// reference images have a first number that is not 0, stand last and get no velocity.
    pub img_ids: &'a Tensor,
    /// Hidden states of the text encoder (T5 in FLUX.1, Qwen3 in FLUX.2), (batch, text tokens, context_in_dim).
    pub txt: &'a Tensor,
    /// Positions of the text tokens, (text tokens, axes); FLUX.1 gives zeros, FLUX.2 numbers them on its last axis.
    pub txt_ids: &'a Tensor,
    /// Noise level of each sample in [0, 1], (batch,).
    pub timestep: &'a Tensor,
    /// Pooled text, (batch, vec_in_dim): of CLIP in FLUX.1; (batch, 0) for a model that takes none.
    pub vec: &'a Tensor,
    /// Guidance scale of each sample, (batch,). Required by a model with a guidance embedding, otherwise ignored.
    pub guidance: Option<&'a Tensor>,
}

/// Two projections with a SiLU between, `out_layer(silu(in_layer(x)))` ([BFL `MLPEmbedder`][bfl]).
///
/// [bfl]: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L52-L60
#[derive(Clone, Debug)]
struct MlpEmbedder {
    in_layer: Linear,
    out_layer: Linear,
}

impl MlpEmbedder {
    fn new(input: usize, config: &FluxConfig, vb: &VarBuilder) -> Result<Self> {
        let (hidden, biases) = (config.hidden_size, config.family.biases);
        Ok(Self {
            in_layer: Linear::load(input, hidden, biases, &vb.pp("in_layer"))?,
            out_layer: Linear::load(hidden, hidden, biases, &vb.pp("out_layer"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.out_layer.forward(&self.in_layer.forward(x)?.silu()?)
    }
}

/// The part of the model before its first block.
#[derive(Debug)]
pub(super) struct Embedder {
    img_in: Linear,
    txt_in: Linear,
    time_in: MlpEmbedder,
    vector_in: Option<MlpEmbedder>,
    guidance_in: Option<MlpEmbedder>,
    modulation: Option<SharedModulation>,
    axes_dims: Vec<usize>,
    theta: f64,
    dtype: DType,
    /// The last table, and what it was made of.
    rope: Mutex<Option<Made>>,
}

/// A rotary table. A sampler gives the same tensors of ids at every step; images of one size have other tensors with
/// the same values, and share it.
#[derive(Debug)]
struct Made {
    of: [TensorId; 2],
    values: Vec<f64>,
    rope: Rope,
}

impl Embedder {
    pub(super) fn new(config: &FluxConfig, vb: &VarBuilder) -> Result<Self> {
        let (hidden, biases) = (config.hidden_size, config.family.biases);
        let embedder = |present: bool, input: usize, name: &str| {
            let load = || MlpEmbedder::new(input, config, &vb.pp(name));
            present.then(load).transpose()
        };
        Ok(Self {
            img_in: Linear::load(config.in_channels, hidden, biases, &vb.pp("img_in"))?,
            txt_in: Linear::load(config.context_in_dim, hidden, biases, &vb.pp("txt_in"))?,
            time_in: MlpEmbedder::new(SINUSOID, config, &vb.pp("time_in"))?,
            vector_in: embedder(config.vec_in_dim > 0, config.vec_in_dim, "vector_in")?,
            guidance_in: embedder(config.guidance_embed, SINUSOID, "guidance_in")?,
            modulation: SharedModulation::load(config, vb)?,
            axes_dims: config.axes_dims.clone(),
            theta: config.theta,
            dtype: vb.dtype(),
            rope: Mutex::new(None),
        })
    }

    pub(super) fn forward(&self, inputs: &Inputs) -> Result<(Stream, Conditioning)> {
        let (txt_len, img_len) = check(inputs)?;
        let img = self.img_in.forward(&inputs.img.to_dtype(self.dtype)?)?;
        let txt = self.txt_in.forward(&inputs.txt.to_dtype(self.dtype)?)?;
        let mut vec = self.time_in.forward(&self.sinusoid(inputs.timestep)?)?;
        if let Some(guidance_in) = &self.guidance_in {
            let Some(guidance) = inputs.guidance else {
                candle::bail!(
                    "this model has a guidance embedding: give a guidance scale (FLUX.1-dev: 3.5)"
                )
            };
            vec = (vec + guidance_in.forward(&self.sinusoid(guidance)?)?)?;
        }
        if let Some(vector_in) = &self.vector_in {
            vec = (vec + vector_in.forward(&inputs.vec.to_dtype(self.dtype)?)?)?;
        }
        let stream = Stream {
            tokens: Tensor::cat(&[txt, img], 1)?,
            txt_len,
        };
        let rope = self.rope(inputs)?;
        if rope.tokens() != txt_len + img_len {
            candle::bail!(
                "{txt_len} text and {img_len} image tokens, but position ids for {}",
                rope.tokens()
            );
        }
        let timestep = inputs.timestep.clone();
        let conditioning = Conditioning::new(vec, timestep, rope)?;
        let shared = self.modulation.as_ref();
        let shared = shared.map(|m| m.parts(conditioning.activated()));
        Ok((stream, conditioning.with_shared(shared.transpose()?)))
    }

    fn sinusoid(&self, x: &Tensor) -> Result<Tensor> {
        sinusoid(x)?.to_dtype(self.dtype)
    }

    fn rope(&self, inputs: &Inputs) -> Result<Rope> {
        let key = [inputs.txt_ids.id(), inputs.img_ids.id()];
        // a poisoned lock still holds a whole table or none
        let mut cache = self
            .rope
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(made) = &*cache
            && made.of == key
        {
            return Ok(made.rope.clone());
        }
        let wide = |ids: &Tensor| ids.to_device(&Device::Cpu)?.to_dtype(DType::F64);
        let ids = Tensor::cat(&[wide(inputs.txt_ids)?, wide(inputs.img_ids)?], 0)?;
        let values = ids.flatten_all()?.to_vec1()?;
        if let Some(made) = &mut *cache
            && made.values == values
        {
            made.of = key;
            return Ok(made.rope.clone());
        }
        let rope = Rope::new(&ids, &self.axes_dims, self.theta, inputs.img.device())?;
        *cache = Some(Made {
            of: key,
            values,
            rope: rope.clone(),
        });
        Ok(rope)
    }
}

/// Checks what the operations below would report less clearly; returns the numbers of text and image tokens.
fn check(inputs: &Inputs) -> Result<(usize, usize)> {
    let (batch, img_len, _) = inputs.img.dims3()?;
    let (txt_batch, txt_len, _) = inputs.txt.dims3()?;
    let sizes = [
        ("txt", txt_batch),
        ("vec", inputs.vec.dims2()?.0),
        ("timestep", inputs.timestep.dims1()?),
        (
            "guidance",
            inputs.guidance.map_or(Ok(batch), Tensor::dims1)?,
        ),
    ];
    for (name, size) in sizes {
        if size != batch {
            candle::bail!("`img` is a batch of {batch}, `{name}` of {size}");
        }
    }
    Ok((txt_len, img_len))
}

/// Sinusoidal embedding of `x` (batch,) times [`TIME_FACTOR`]: cosines, then sines, of 128 frequencies from 1 to
/// 1/[`MAX_PERIOD`]; (batch, 256), f32 whatever the model's dtype (bf16 has no 999). [BFL `timestep_embedding`][bfl].
///
/// [bfl]: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L28-L49
fn sinusoid(x: &Tensor) -> Result<Tensor> {
    let half = SINUSOID / 2;
    let frequencies = Tensor::from_vec(frequencies(), (1, half), x.device())?;
    let x = (x.to_dtype(DType::F32)? * TIME_FACTOR)?.unsqueeze(1)?;
    let angles = x.broadcast_mul(&frequencies)?;
    Tensor::cat(&[angles.cos()?, angles.sin()?], 1)
}

/// The 128 frequencies exp(−ln(10⁴)·i/128), bit for bit those of PyTorch in f32.
///
/// At a guidance of 5 the angle reaches 5000, where one unit in the last place of a frequency moves the embedding by
/// 2e-4: the exponent is rounded to f32 before the exponential, as torch does, and the two values that torch's
/// exponential (0.52 units of error) rounds up instead of down are taken as it has them.
fn frequencies() -> Vec<f32> {
    const ROUNDED_UP: [usize; 2] = [12, 106];
    let half = SINUSOID / 2;
    let step = -MAX_PERIOD.ln() as f32;
    let frequency = |i| {
        let nearest = f64::from(step * i as f32 / half as f32).exp() as f32;
        if ROUNDED_UP.contains(&i) {
            nearest.next_up()
        } else {
            nearest
        }
    };
    (0..half).map(frequency).collect()
}

#[cfg(test)]
mod tests {
    use candle::Device;

    use super::*;

    /// Hash of `torch.exp(-math.log(10000) * torch.arange(128.) / 128)`, summed up from its bits.
    #[test]
    fn frequencies_are_those_of_torch() {
        let bits = |x: &f32| u64::from(x.to_bits());
        let sum = frequencies()
            .iter()
            .map(bits)
            .fold(0u64, |sum, x| sum.wrapping_mul(31).wrapping_add(x));
        assert_eq!(sum, 0x2358_2ffa_7260_30cf);
    }

    #[test]
    fn sinusoid_is_cosines_then_sines_of_falling_frequencies() -> Result<()> {
        let x = Tensor::new(&[0f32, 0.25, 1.0], &Device::Cpu)?;
        let y = sinusoid(&x)?.to_vec2::<f32>()?;
        for (x, row) in [0f64, 250.0, 1000.0].into_iter().zip(&y) {
            assert_eq!(row.len(), 256);
            for i in 0..128 {
                let angle = x * 10_000f64.powf(-(i as f64) / 128.0);
                // an f32 of about 1000 is known to 3e-5
                assert!((f64::from(row[i]) - angle.cos()).abs() < 2e-4);
                assert!((f64::from(row[128 + i]) - angle.sin()).abs() < 2e-4);
            }
        }
        Ok(())
    }
}
