//! CLIP's vision model. `pixels` prepares images; the parent compares embeddings.
//!
//! Source: transformers `models/clip/modeling_clip.py` (`CLIPVisionModel`).

use candle::{DType, Result, Tensor, bail};
use candle_nn::{LayerNorm, Module as _, VarBuilder};
use serde::Deserialize;

use crate::sample::text::clip::{Activation, Layer, LayerConfig};

/// `vision_config` of `config.json`; what is missing there has the value that transformers gives it.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct VisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub image_size: usize,
    pub patch_size: usize,
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

/// CLIP's vision model.
#[derive(Debug)]
pub(super) struct Vision {
    side: usize,
    patch: usize,
    /// (hidden, 3 · patch · patch)
    patches: Tensor,
    /// (1, 1, hidden)
    class: Tensor,
    /// (1 + patches, hidden)
    positions: Tensor,
    before: LayerNorm,
    layers: Vec<Layer>,
    after: LayerNorm,
}

impl Vision {
    /// Reads the weights below `vision_model`.
    pub(super) fn new(config: &VisionConfig, vb: &VarBuilder) -> Result<Self> {
        let (d, patch, side) = (config.hidden_size, config.patch_size, config.image_size);
        if patch == 0 || !side.is_multiple_of(patch) || side == 0 {
            bail!("CLIP: patches of {patch} pixels do not divide `image_size` {side}")
        }
        let embeddings = vb.pp("embeddings");
        let patches = embeddings.get((d, 3, patch, patch), "patch_embedding.weight")?;
        let count = 1 + (side / patch).pow(2);
        let layer = LayerConfig {
            hidden: d,
            intermediate: config.intermediate_size,
            heads: config.num_attention_heads,
            act: config.hidden_act,
            eps: config.layer_norm_eps,
        };
        let layers = vb.pp("encoder.layers");
        let norm = |name: &str| candle_nn::layer_norm(d, layer.eps, vb.pp(name));
        Ok(Self {
            side,
            patch,
            patches: patches.flatten_from(1)?,
            class: embeddings.get(d, "class_embedding")?.reshape((1, 1, d))?,
            positions: embeddings.get((count, d), "position_embedding.weight")?,
            before: norm("pre_layrnorm")?, // spelt so in the checkpoints
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(&layer, &layers.pp(i)))
                .collect::<Result<_>>()?,
            after: norm("post_layernorm")?,
        })
    }

    /// Pixels across and down.
    pub(super) fn side(&self) -> usize {
        self.side
    }

    /// Prepared images (b, 3, side, side) → the class token after the last layer, (b, hidden).
    pub(super) fn pooled(&self, pixels: &Tensor) -> Result<Tensor> {
        let (b, p, d) = (pixels.dim(0)?, self.patch, self.patches.dim(0)?);
        let across = self.side / p;
        let patches = pixels
            .reshape((b * 3, across, p, across, p))?
            .reshape((b, 3, across, p, across * p))?
            .transpose(1, 2)? // (b, row of patches, 3, p, side)
            .contiguous()?
            .reshape((b * across, 3 * p, across, p))?
            .transpose(1, 2)? // (…, column of patches, 3 · p, p)
            .contiguous()?
            .reshape((b * across * across, 3 * p * p))?;
        let x = patches
            .matmul(&self.patches.t()?)?
            .reshape((b, across * across, d))?;
        let class = self.class.broadcast_as((b, 1, d))?;
        let x = Tensor::cat(&[&class.contiguous()?, &x], 1)?;
        let mut x = self.before.forward(&x.broadcast_add(&self.positions)?)?;
        let unmasked = Tensor::zeros((1, 1, 1, 1), DType::F32, x.device())?;
        for layer in &self.layers {
            x = layer.forward(&x, &unmasked)?;
        }
        self.after.forward(&x.narrow(1, 0, 1)?.squeeze(1)?)
    }
}
