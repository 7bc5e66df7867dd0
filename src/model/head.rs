//! The part of the model after its last block: modulation and projection to the velocity.

use candle::{Result, Tensor};
use candle_nn::VarBuilder;

use super::linear::Linear;
use super::modulation::Modulation;
use super::ops;
use super::stream::{Conditioning, Stream};
use crate::layout::FluxConfig;

/// BFL `LastLayer`, diffusers `norm_out` and `proj_out`: `linear((1 + scale) · norm(x) + shift)` ([BFL][forward]).
///
/// [forward]: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L249-L253
#[derive(Clone, Debug)]
pub(super) struct Head {
    modulation: Modulation<2>,
    linear: Linear,
}

impl Head {
    pub(super) fn new(config: &FluxConfig, vb: &VarBuilder) -> Result<Self> {
        let (hidden, biases) = (config.hidden_size, config.family.biases);
        Ok(Self {
            modulation: Modulation::new(hidden, biases, &vb.pp("adaLN_modulation").pp("1"))?,
            linear: Linear::load(hidden, config.out_channels, biases, &vb.pp("linear"))?,
        })
    }

    /// Velocity of the image tokens, (batch, image tokens, out_channels); tokens of reference images are left out.
    pub(super) fn forward(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Tensor> {
        self.linear.forward(&self.input(stream, conditioning)?)
    }

    /// What the projection to the velocity is applied to, (batch, image tokens, hidden), without reference images.
    pub(super) fn input(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Tensor> {
        let [shift, scale] = self.modulation.forward(conditioning)?;
        let img = stream.img_view()?;
        let drawn = stream.img_len()? - conditioning.rope.references();
        ops::norm_modulate(&ops::narrow(&img, 1, 0, drawn)?, &shift, &scale)
    }

    /// The projection to the velocity, hidden → out_channels.
    pub(super) fn linear_mut(&mut self) -> &mut Linear {
        &mut self.linear
    }
}
