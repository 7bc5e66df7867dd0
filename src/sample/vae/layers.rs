//! The layers an autoencoder is made of: residual block, attention, one level of the pyramid. `mod.rs` puts them together.
//!
//! Source: diffusers `models/resnet.py` (`ResnetBlock2D`), `models/unets/unet_2d_blocks.py`, `models/attention_processor.py`.

use std::sync::Arc;

use candle::{Module as _, Result, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::{
    conv::Conv,
    norm::{GroupNorm, Statistics},
};

/// Epsilon of every group norm in diffusers' autoencoder.
const EPS: f64 = 1e-6;

/// Most attention scores that are kept at once: 64 MiB of float32.
const SCORES: usize = 1 << 24;

/// A convolution with bias.
#[derive(Debug)]
pub(super) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    geometry: Conv,
}

impl Conv2d {
    /// `k`×`k`, the size stays.
    pub(super) fn new(input: usize, output: usize, k: usize, vb: &VarBuilder) -> Result<Self> {
        Self::with(Conv::same(k), input, output, k, vb)
    }

    fn with(
        geometry: Conv,
        input: usize,
        output: usize,
        k: usize,
        vb: &VarBuilder,
    ) -> Result<Self> {
        Ok(Self {
            weight: vb.get((output, input, k, k), "weight")?,
            bias: vb.get(output, "bias")?,
            geometry,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.geometry.forward(x, &self.weight, &self.bias)
    }

    /// Rows of the input that an output row sees on either side of its own.
    pub(super) fn halo(&self) -> usize {
        self.geometry.before
    }

    /// Rows that come out for each that goes in, if the size does not shrink.
    pub(super) fn growth(&self) -> usize {
        1 + usize::from(self.geometry.double)
    }
}

/// A group norm, with or without SiLU behind it.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
    form: GroupNorm,
}

impl Norm {
    pub(super) fn new(channels: usize, groups: usize, silu: bool, vb: &VarBuilder) -> Result<Self> {
        let form = GroupNorm {
            groups,
            eps: EPS,
            silu,
            known: None,
        };
        Ok(Self {
            weight: vb.get(channels, "weight")?,
            bias: vb.get(channels, "bias")?,
            form,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.form.forward(x, &self.weight, &self.bias)
    }

    /// Mean and variance of the groups of `x`.
    pub(super) fn statistics(&self, x: &Tensor) -> Result<Statistics> {
        self.form.statistics(x)
    }

    /// The same norm with the mean and variance of an image of which it sees parts.
    pub(super) fn knowing(&self, known: Statistics) -> Self {
        Self {
            form: GroupNorm {
                known: Some(Arc::new(known)),
                ..self.form.clone()
            },
            ..self.clone()
        }
    }
}

/// `x + conv2(silu(norm2(conv1(silu(norm1(x))))))`, with a 1×1 convolution on `x` if the channels change.
#[derive(Debug)]
pub(super) struct Resnet {
    pub(super) norm1: Norm,
    pub(super) conv1: Conv2d,
    pub(super) norm2: Norm,
    pub(super) conv2: Conv2d,
    pub(super) shortcut: Option<Conv2d>,
}

impl Resnet {
    fn new(input: usize, output: usize, groups: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            norm1: Norm::new(input, groups, true, &vb.pp("norm1"))?,
            conv1: Conv2d::new(input, output, 3, &vb.pp("conv1"))?,
            norm2: Norm::new(output, groups, true, &vb.pp("norm2"))?,
            conv2: Conv2d::new(output, output, 3, &vb.pp("conv2"))?,
            shortcut: (input != output)
                .then(|| Conv2d::new(input, output, 1, &vb.pp("conv_shortcut")))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // assigned, not shadowed: each is as large as the image, and the former goes
        let mut y = self.conv1.forward(&self.norm1.forward(x)?)?;
        y = self.conv2.forward(&self.norm2.forward(&y)?)?;
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)? + y,
            None => x + y,
        }
    }
}

/// Attention of every pixel to every pixel, one head.
#[derive(Debug)]
struct Attention {
    norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
}

impl Attention {
    fn new(channels: usize, groups: usize, vb: &VarBuilder) -> Result<Self> {
        let linear = |name: &str| -> Result<Linear> {
            let vb = vb.pp(name);
            // the original files keep these as 1×1 convolutions
            let weight = vb.get_unchecked("weight")?;
            let weight = match weight.dims() {
                [_, _, 1, 1] => weight.flatten_from(1)?,
                _ => weight,
            };
            if weight.dims() != [channels, channels] {
                candle::bail!(
                    "tensor `{}.weight`: expected [{channels}, {channels}], found {:?}",
                    vb.prefix(),
                    weight.dims()
                )
            }
            Ok(Linear::new(weight, Some(vb.get(channels, "bias")?)))
        };
        Ok(Self {
            norm: Norm::new(channels, groups, false, &vb.pp("group_norm"))?,
            q: linear("to_q")?,
            k: linear("to_k")?,
            v: linear("to_v")?,
            out: linear("to_out.0")?,
        })
    }

    fn forward(&self, x: &Tensor, scores: usize) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let tokens = self
            .norm
            .forward(x)?
            .flatten_from(2)?
            .transpose(1, 2)?
            .contiguous()?; // (b, h·w, c)
        // scores in float32 whatever the weights' format
        let wide = |x: Tensor| x.to_dtype(candle::DType::F32);
        let q = (wide(self.q.forward(&tokens)?)? * (c as f64).powf(-0.5))?;
        let k = wide(self.k.forward(&tokens)?)?.t()?.contiguous()?; // (b, c, h·w)
        let v = self.v.forward(&tokens)?;
        // an h·w × h·w matrix of a large image would be gigabytes, so a few rows of it at a time
        let rows = (scores / (b * h * w)).clamp(1, h * w);
        let mut parts = Vec::new();
        for start in (0..h * w).step_by(rows) {
            let q = q.narrow(1, start, rows.min(h * w - start))?.contiguous()?;
            let weights = candle_nn::ops::softmax_last_dim(&q.matmul(&k)?)?;
            parts.push(weights.to_dtype(v.dtype())?.matmul(&v)?);
        }
        let y = self.out.forward(&Tensor::cat(&parts, 1)?)?; // (b, h·w, c)
        x + y.transpose(1, 2)?.reshape((b, c, h, w))?
    }
}

/// The middle of the pyramid.
#[derive(Debug)]
pub(super) struct Mid {
    first: Resnet,
    attention: Option<Attention>,
    last: Resnet,
}

impl Mid {
    pub(super) fn new(
        channels: usize,
        groups: usize,
        attention: bool,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let resnets = vb.pp("resnets");
        Ok(Self {
            first: Resnet::new(channels, channels, groups, &resnets.pp(0))?,
            attention: attention
                .then(|| Attention::new(channels, groups, &vb.pp("attentions.0")))
                .transpose()?,
            last: Resnet::new(channels, channels, groups, &resnets.pp(1))?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x, SCORES)?;
        }
        self.last.forward(&x)
    }
}

/// How a level ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Turn {
    /// Halves the size, in the encoder.
    Down,
    /// Doubles the size, in the decoder.
    Up,
}

/// One level of the pyramid: residual blocks, then a change of size except at the end.
#[derive(Debug)]
pub(super) struct Level {
    pub(super) resnets: Vec<Resnet>,
    pub(super) turn: Option<Conv2d>,
}

impl Level {
    pub(super) fn new(
        input: usize,
        output: usize,
        layers: usize,
        groups: usize,
        turn: Option<Turn>,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let resnet = |i: usize| {
            Resnet::new(
                if i == 0 { input } else { output },
                output,
                groups,
                &vb.pp("resnets").pp(i),
            )
        };
        let turn = match turn {
            Some(Turn::Down) => Some((
                "downsamplers.0.conv",
                Conv {
                    stride: 2,
                    before: 0,
                    after: 1,
                    double: false,
                },
            )),
            Some(Turn::Up) => Some((
                "upsamplers.0.conv",
                Conv {
                    double: true,
                    ..Conv::same(3)
                },
            )),
            None => None,
        };
        Ok(Self {
            resnets: (0..layers).map(resnet).collect::<Result<_>>()?,
            turn: turn
                .map(|(name, geometry)| Conv2d::with(geometry, output, output, 3, &vb.pp(name)))
                .transpose()?,
        })
    }

    /// Takes the input, which is gone as soon as the first block has put out its own.
    pub(super) fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        self.turn
            .as_ref()
            .map_or_else(|| Ok(x.clone()), |turn| turn.forward(&x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::noise::Generator;
    use candle::Device;
    use std::collections::HashMap;

    #[test]
    fn attention_in_pieces_equals_attention_at_once() -> Result<()> {
        let mut random = Generator::new(4);
        let mut tensors = HashMap::new();
        for name in ["to_q", "to_k", "to_v", "to_out.0"] {
            // `to_k` as the original files have it
            let shape: &[usize] = if name == "to_k" {
                &[8, 8, 1, 1]
            } else {
                &[8, 8]
            };
            tensors.insert(format!("{name}.weight"), random.randn(shape, &Device::Cpu)?);
            tensors.insert(format!("{name}.bias"), random.randn(8, &Device::Cpu)?);
        }
        tensors.insert("group_norm.weight".into(), random.randn(8, &Device::Cpu)?);
        tensors.insert("group_norm.bias".into(), random.randn(8, &Device::Cpu)?);
        let vb = VarBuilder::from_tensors(tensors, candle::DType::F32, &Device::Cpu);
        let attention = Attention::new(8, 2, &vb)?;
        let x = random.randn((2, 8, 5, 3), &Device::Cpu)?;
        let whole = attention.forward(&x, SCORES)?;
        for scores in [1, 2 * 15 * 4] {
            let pieces = attention.forward(&x, scores)?;
            let far = (&whole - pieces)?
                .abs()?
                .flatten_all()?
                .max(0)?
                .to_scalar::<f32>()?;
            assert!(far <= 1e-6, "{far}");
        }
        Ok(())
    }

    #[test]
    fn an_attention_weight_of_another_size_is_named() {
        let tensors = HashMap::from([
            (
                "x.group_norm.weight".to_owned(),
                Tensor::ones(8, candle::DType::F32, &Device::Cpu).unwrap(),
            ),
            (
                "x.group_norm.bias".to_owned(),
                Tensor::ones(8, candle::DType::F32, &Device::Cpu).unwrap(),
            ),
            (
                "x.to_q.weight".to_owned(),
                Tensor::ones((8, 4), candle::DType::F32, &Device::Cpu).unwrap(),
            ),
        ]);
        let vb = VarBuilder::from_tensors(tensors, candle::DType::F32, &Device::Cpu);
        let error = Attention::new(8, 2, &vb.pp("x")).unwrap_err().to_string();
        assert!(error.contains("x.to_q.weight"), "{error}");
    }
}
