//! The single block: all tokens with the same weights, attention and MLP side by side.

use candle::{Result, Tensor};
use candle_nn::VarBuilder;

use super::double::load_norms;
use super::linear::Linear;
use super::modulation::BlockModulation;
use super::ops::{self, Norms, Projected};
use super::output_projection::OutputProjection;
use super::rope::Rope;
use super::stream::{Conditioning, Stream};
use crate::layout::{Activation, FluxConfig};

/// BFL `SingleStreamBlock`, diffusers `FluxSingleTransformerBlock`:
/// `x + gate · linear2([attention, activation(mlp)])`, both from `linear1((1 + scale) · norm(x) + shift)` ([BFL][forward]).
///
/// [forward]: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L227-L239
#[derive(Clone, Debug)]
pub struct SingleBlock {
    modulation: BlockModulation<3>,
    /// hidden → queries, keys, values, MLP
    linear1: Linear,
    norms: Norms,
    activation: Activation,
    /// attention, MLP → hidden
    linear2: Linear,
    num_heads: usize,
}

impl SingleBlock {
    /// Reads the block whose tensors are below `vb` (`linear1.weight` and so on).
    pub fn new(config: &FluxConfig, vb: &VarBuilder) -> Result<Self> {
        let (hidden, biases) = (config.hidden_size, config.family.biases);
        let (mlp_in, mlp_out) = (config.mlp_in_size(), config.mlp_size);
        Ok(Self {
            modulation: BlockModulation::load(
                config,
                |shared| &shared.single,
                &vb.pp("modulation").pp("lin"),
            )?,
            linear1: Linear::load(hidden, 3 * hidden + mlp_in, biases, &vb.pp("linear1"))?,
            norms: load_norms(config, &vb.pp("norm"))?,
            activation: config.family.activation,
            linear2: Linear::load(hidden + mlp_out, hidden, biases, &vb.pp("linear2"))?,
            num_heads: config.num_heads,
        })
    }

    /// The modulation projection, for text and image tokens alike; `None` if all blocks share theirs.
    pub(super) fn modulations(&self) -> Option<[&Linear; 2]> {
        let linear = self.modulation.linear()?;
        Some([linear, linear])
    }

    /// One step of the fold.
    pub fn forward(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Stream> {
        let last = self.output_projection(stream, conditioning)?;
        Ok(stream.with_tokens(self.project(&last)?))
    }

    /// The rest of [`Self::forward`] behind [`Self::output_projection`].
    pub(super) fn project(&self, last: &OutputProjection) -> Result<Tensor> {
        let y = self.linear2.product(&last.z)?;
        ops::gated_residual(&[last.branch(&y, &self.linear2)])
    }

    /// What the output projection `linear2` is applied to, for text and image tokens together.
    pub(super) fn output_projection(
        &self,
        stream: &Stream,
        conditioning: &Conditioning,
    ) -> Result<OutputProjection> {
        let x = &stream.tokens;
        let [shift, scale, gate] = self.modulation.forward(conditioning)?;
        let normed = ops::norm_modulate(x, &shift, &scale)?;
        Ok(OutputProjection {
            name: "linear2",
            x: x.clone(),
            z: self.inside(&normed, conditioning)?,
            gate,
        })
    }

    /// From what `linear1` is applied to, to what `linear2` is: (batch, tokens, hidden + mlp).
    fn inside(&self, x: &Tensor, conditioning: &Conditioning) -> Result<Tensor> {
        match self.activation {
            Activation::Gelu => self.with_gelu(x, &conditioning.rope),
            Activation::SwiGlu => self.with_swiglu(x, &conditioning.rope),
        }
    }

    fn with_gelu(&self, x: &Tensor, rope: &Rope) -> Result<Tensor> {
        let Self {
            linear1,
            norms,
            num_heads,
            ..
        } = self;
        let bias = linear1.bias();
        if linear1.lora().is_none()
            && x.device().is_cpu()
            && !x.track_op()
            && let Some(y) = ops::attend_with_gelu_of_product(
                x,
                &linear1.weight()?,
                bias,
                norms,
                *num_heads,
                rope,
            )?
        {
            return Ok(y);
        }
        // (batch, tokens, 3·hidden + mlp)
        let qkv = &linear1.product(x)?;
        ops::attend_with_gelu(&Projected { qkv, bias, norms }, *num_heads, rope)
    }

    fn with_swiglu(&self, x: &Tensor, rope: &Rope) -> Result<Tensor> {
        // (batch, tokens, 3·hidden + 2·mlp)
        let projected = self.linear1.forward(x)?;
        let of_qkv = 3 * self.num_heads * rope.head_dim();
        let mlp = projected.dim(2)? - of_qkv;
        let attended = ops::attend(
            &[Projected {
                qkv: &projected.narrow(2, 0, of_qkv)?,
                bias: None,
                norms: &self.norms,
            }],
            self.num_heads,
            rope,
        )?;
        ops::swiglu(&projected.narrow(2, of_qkv, mlp)?, Some(&attended))
    }

    /// Every projection with its name below the block.
    pub fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let mut out = Vec::with_capacity(3);
        out.extend(self.modulation.linear_mut().map(|l| ("modulation.lin", l)));
        out.extend([
            ("linear1", &mut self.linear1),
            ("linear2", &mut self.linear2),
        ]);
        out
    }
}
