//! Fitted layers as data: what `ridge` found, ready to become a block of the model or tensors of a checkpoint.

use std::collections::BTreeMap;

use anyhow::Result;
use candle::{DType, Device, Tensor};

use crate::{
    layout::BlockId,
    model::{AffineLayer, Block, BlockModulation, Linear, Modulation, ReplacementBlock},
};

/// The fitted layer of one stream, f32 on the CPU.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// (d, d), (out, in).
    pub weight: Tensor,
    /// (d).
    pub bias: Tensor,
    /// V of a conditioned layer, (d, d).
    pub vec: Option<Tensor>,
    /// The kept modulation of a modulated layer: weight (3d, d) and bias (3d), in the model's format on the CPU, or which
    /// parts of that which all blocks share.
    pub modulation: Option<BlockModulation<3>>,
    /// Share of ‖y − x‖² over the fitted pairs that the layer leaves: 1 − R².
    pub error: f64,
    /// The ridge it was fitted with, relative to the mean diagonal.
    pub ridge: f64,
}

/// What stands for one replacement.
#[derive(Clone, Debug)]
pub enum Layers {
    /// Nothing.
    Remove,
    /// One layer for both streams.
    Joint(Box<Fitted>),
    /// A layer for each stream.
    Streams {
        /// For the text tokens.
        txt: Box<Fitted>,
        /// For the image tokens.
        img: Box<Fitted>,
    },
}

/// Fitted layers by the first block that each replaces.
pub type LayerMap = BTreeMap<BlockId, Layers>;

impl Fitted {
    fn layer(&self, device: &Device, dtype: DType) -> Result<AffineLayer> {
        let place = |t: &Tensor| -> Result<Tensor> { Ok(t.to_dtype(dtype)?.to_device(device)?) };
        let linear = Linear::new(place(&self.weight)?, Some(place(&self.bias)?))?;
        let vec = self
            .vec
            .as_ref()
            .map(|v| anyhow::Ok(Linear::new(place(v)?, None)?))
            .transpose()?;
        let modulation = self.modulation.as_ref().map(|kept| {
            anyhow::Ok(match kept {
                BlockModulation::Shared(part) => BlockModulation::Shared(*part),
                BlockModulation::Own(Modulation { lin }) => BlockModulation::Own(Modulation {
                    lin: Linear::new(place(&lin.weight()?)?, lin.bias().map(place).transpose()?)?,
                }),
            })
        });
        Ok(AffineLayer {
            linear,
            vec,
            modulation: modulation.transpose()?,
        })
    }

    /// Name below the layer's prefix and tensor, as a checkpoint stores them.
    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let mut out = vec![("weight", self.weight.clone()), ("bias", self.bias.clone())];
        out.extend(self.vec.as_ref().map(|v| ("vec.weight", v.clone())));
        if let Some(lin) = self.modulation.as_ref().and_then(BlockModulation::linear) {
            out.push(("modulation.lin.weight", lin.weight()?));
            out.extend(lin.bias().map(|b| ("modulation.lin.bias", b.clone())));
        }
        Ok(out)
    }

    /// This layer and then `next`, as one, exactly: (I + W₂)((I + W₁) x + b₁) + b₂ = x + W x + b.
    ///
    /// # Errors
    /// When either layer is not plain (linear form) or widths differ.
    pub fn then(&self, next: &Self) -> Result<Self> {
        anyhow::ensure!(
            self.vec.is_none()
                && next.vec.is_none()
                && self.modulation.is_none()
                && next.modulation.is_none(),
            "only plain linear layers collapse into one"
        );
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let (w1, w2) = (wide(&self.weight)?, wide(&next.weight)?);
        let weight = ((&w1 + &w2)? + w2.matmul(&w1)?)?;
        let b1 = wide(&self.bias)?;
        let carried = w2.matmul(&b1.unsqueeze(1)?)?.squeeze(1)?;
        let bias = ((b1 + carried)? + wide(&next.bias)?)?;
        Ok(Self {
            weight: weight.to_dtype(DType::F32)?,
            bias: bias.to_dtype(DType::F32)?,
            vec: None,
            modulation: None,
            error: f64::NAN,
            ridge: next.ridge,
        })
    }
}

impl Layers {
    /// As a block of the model.
    ///
    /// # Errors
    /// When they do not fit on the device.
    pub fn block(&self, device: &Device, dtype: DType) -> Result<Block> {
        Ok(Block::from(match self {
            Self::Remove => ReplacementBlock::Remove,
            Self::Joint(layer) => ReplacementBlock::Joint(layer.layer(device, dtype)?),
            Self::Streams { txt, img } => ReplacementBlock::Streams {
                txt: txt.layer(device, dtype)?,
                img: img.layer(device, dtype)?,
            },
        }))
    }

    /// Names below the block's prefix, and tensors.
    ///
    /// # Errors
    /// When a kept modulation cannot be read.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let under = |prefix: &str, layer: &Fitted| {
            let tensors = layer.tensors()?.into_iter();
            let named = tensors.map(|(name, t)| (format!("{prefix}.{name}"), t));
            anyhow::Ok(named.collect::<Vec<_>>())
        };
        Ok(match self {
            Self::Remove => Vec::new(),
            Self::Joint(layer) => under("linear", layer)?,
            Self::Streams { txt, img } => {
                let mut out = under("linear.img", img)?;
                out.extend(under("linear.txt", txt)?);
                out
            }
        })
    }

    /// The fits of text and image tokens (the same one twice if they share it).
    pub fn fits(&self) -> Option<[&Fitted; 2]> {
        match self {
            Self::Remove => None,
            Self::Joint(layer) => Some([layer, layer]),
            Self::Streams { txt, img } => Some([txt, img]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_layers_collapse_into_one_exactly() {
        let random = |shape: &[usize]| Tensor::randn(0f32, 0.3, shape, &Device::Cpu).unwrap();
        let layer = || Fitted {
            weight: random(&[8, 8]),
            bias: random(&[8]),
            vec: None,
            modulation: None,
            error: 0.0,
            ridge: 0.0,
        };
        let (first, second) = (layer(), layer());
        let one = first.then(&second).unwrap();
        let x = random(&[5, 8]);
        let apply = |l: &Fitted, x: &Tensor| {
            let y = x
                .matmul(&l.weight.t().unwrap())
                .unwrap()
                .broadcast_add(&l.bias)
                .unwrap();
            (x + y).unwrap()
        };
        let difference = (apply(&second, &apply(&first, &x)) - apply(&one, &x))
            .unwrap()
            .abs()
            .unwrap();
        assert!(difference.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
    }
}
