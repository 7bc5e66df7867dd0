//! What stands in for removed blocks: nothing, or an affine layer in the residual, in one of several forms behind one
//! type. `prune` fits the layers.

use candle::{Result, Tensor};
use candle_nn::VarBuilder;

use super::linear::Linear;
use super::modulation::{
    BlockModulation, FIRST_OF_IMG, FIRST_OF_TXT, Modulation, OF_SINGLE, SharedPart,
};
use super::ops::{self, Branch};
use super::stream::{Conditioning, Stream};
use crate::layout::{BlockKind, FluxConfig, Form, Replacement};

/// The layer of one stream: y = x + g ⊙ (W z + V silu(vec) + b).
///
/// Without modulation z = x and g = 1; with it z = LN(x)(1 + scale) + shift, as in the block it replaces. V is there in
/// the conditioned form only; it costs one matrix-vector product per step and nothing per token.
#[derive(Clone, Debug)]
pub struct AffineLayer {
    /// W and b, (hidden, hidden) and (hidden).
    pub linear: Linear,
    /// V, (hidden, hidden), without bias.
    pub vec: Option<Linear>,
    /// The replaced block's own shift, scale and gate: a projection, or the parts that all blocks share.
    pub modulation: Option<BlockModulation<3>>,
}

impl AffineLayer {
    /// The paper's layer: y = x + W x + b.
    pub fn plain(linear: Linear) -> Self {
        Self {
            linear,
            vec: None,
            modulation: None,
        }
    }

    /// Reads the layer below `vb`; `shared` chooses the parts of a modulated layer where all blocks share them.
    fn load(
        config: &FluxConfig,
        form: Form,
        shared: SharedPart<3>,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let vec = match form {
            Form::Conditioned => Some(Linear::load(hidden, hidden, false, &vb.pp("vec"))?),
            _ => None,
        };
        let modulation = match form {
            Form::Modulated if config.shares_modulation() => Some(BlockModulation::Shared(shared)),
            Form::Modulated => Some(BlockModulation::Own(Modulation::new(
                hidden,
                true,
                &vb.pp("modulation").pp("lin"),
            )?)),
            _ => None,
        };
        Ok(Self {
            linear: Linear::load(hidden, hidden, true, vb)?,
            vec,
            modulation,
        })
    }

    /// What W is applied to, (batch, tokens, hidden), and the gate (batch, hidden), `None` if it is 1.
    pub fn input(
        &self,
        x: &Tensor,
        conditioning: &Conditioning,
    ) -> Result<(Tensor, Option<Tensor>)> {
        match &self.modulation {
            None => Ok((x.clone(), None)),
            Some(modulation) => {
                let [shift, scale, gate] = modulation.forward(conditioning)?;
                Ok((ops::norm_modulate(x, &shift, &scale)?, Some(gate)))
            }
        }
    }

    /// W z + V silu(vec), and the gate; the bias is added with the residual.
    fn product(&self, x: &Tensor, conditioning: &Conditioning) -> Result<(Tensor, Option<Tensor>)> {
        let (z, gate) = self.input(x, conditioning)?;
        let y = self.linear.product(&z)?;
        let y = match &self.vec {
            None => y,
            Some(vec) => ops::plus_for_all(&y, &vec.product(conditioning.activated())?)?,
        };
        Ok((y, gate))
    }

    /// Every projection with its name below `prefix`.
    fn linears_mut(&mut self, names: [&'static str; 3]) -> Vec<(&'static str, &mut Linear)> {
        let [linear, vec, modulation] = names;
        let mut out = vec![(linear, &mut self.linear)];
        out.extend(self.vec.as_mut().map(|l| (vec, l)));
        let lin = self
            .modulation
            .as_mut()
            .and_then(BlockModulation::linear_mut);
        out.extend(lin.map(|lin| (modulation, lin)));
        out
    }
}

/// A replacement of one or several blocks.
#[derive(Clone, Debug)]
pub enum ReplacementBlock {
    /// The blocks are gone; the stream passes through.
    Remove,
    /// One layer for text and image tokens alike.
    Joint(AffineLayer),
    /// A layer for each stream.
    Streams {
        /// For the text tokens.
        txt: AffineLayer,
        /// For the image tokens.
        img: AffineLayer,
    },
}

impl ReplacementBlock {
    /// Reads the layers below `vb`: `linear.weight` if joint, else `linear.img.weight` and `linear.txt.weight`,
    /// (hidden, hidden), and their biases; `….vec.weight` and `….modulation.lin.*` if the form has them.
    pub fn new(config: &FluxConfig, replacement: &Replacement, vb: &VarBuilder) -> Result<Self> {
        let form = replacement.form;
        let single = replacement
            .replaces
            .first()
            .is_some_and(|id| id.kind == BlockKind::Single);
        let [txt, img] = if single {
            [OF_SINGLE; 2]
        } else {
            [FIRST_OF_TXT, FIRST_OF_IMG]
        };
        let vb = vb.pp("linear");
        Ok(match (form, replacement.joint) {
            (Form::Remove, _) => Self::Remove,
            (_, true) => Self::Joint(AffineLayer::load(config, form, img, &vb)?),
            (_, false) => Self::Streams {
                txt: AffineLayer::load(config, form, txt, &vb.pp("txt"))?,
                img: AffineLayer::load(config, form, img, &vb.pp("img"))?,
            },
        })
    }

    /// One step of the fold.
    pub fn forward(&self, stream: &Stream, conditioning: &Conditioning) -> Result<Stream> {
        let tokens = match self {
            Self::Remove => return Ok(stream.clone()),
            Self::Joint(layer) => {
                let (y, gate) = layer.product(&stream.tokens, conditioning)?;
                ops::gated_residual(&[Branch {
                    x: &stream.tokens,
                    y: &y,
                    bias: layer.linear.bias(),
                    gate: gate.as_ref(),
                }])?
            }
            Self::Streams { txt, img } => {
                let (txt_x, img_x) = (stream.txt_view()?, stream.img_view()?);
                let (txt_y, txt_gate) = txt.product(&txt_x, conditioning)?;
                let (img_y, img_gate) = img.product(&img_x, conditioning)?;
                ops::gated_residual(&[
                    Branch {
                        x: &txt_x,
                        y: &txt_y,
                        bias: txt.linear.bias(),
                        gate: txt_gate.as_ref(),
                    },
                    Branch {
                        x: &img_x,
                        y: &img_y,
                        bias: img.linear.bias(),
                        gate: img_gate.as_ref(),
                    },
                ])?
            }
        };
        Ok(stream.with_tokens(tokens))
    }

    /// Every projection with its name below the block.
    pub fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        match self {
            Self::Remove => vec![],
            Self::Joint(layer) => {
                layer.linears_mut(["linear", "linear.vec", "linear.modulation.lin"])
            }
            Self::Streams { txt, img } => {
                let mut out =
                    img.linears_mut(["linear.img", "linear.img.vec", "linear.img.modulation.lin"]);
                out.extend(txt.linears_mut([
                    "linear.txt",
                    "linear.txt.vec",
                    "linear.txt.modulation.lin",
                ]));
                out
            }
        }
    }
}
