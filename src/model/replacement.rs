//! What stands in for removed blocks: nothing, or a linear layer in the residual, y = x + Wx + b.
//! Fitting W and b is `prune`'s business.

use candle::Result;
use candle_nn::VarBuilder;

use super::linear::Linear;
use super::ops::{self, Branch};
use super::stream::Stream;
use crate::layout::{FluxConfig, Form, Replacement};

/// A replacement of one or several blocks.
#[derive(Clone, Debug)]
pub enum ReplacementBlock {
    /// The blocks are gone; the stream passes through.
    Remove,
    /// One layer for text and image tokens alike.
    Joint(Linear),
    /// A layer for each stream.
    Streams {
        /// For the text tokens.
        txt: Linear,
        /// For the image tokens.
        img: Linear,
    },
}

impl ReplacementBlock {
    /// Reads the layers below `vb`: `linear.weight` where joint, else `linear.img.weight` and `linear.txt.weight`,
    /// (hidden, hidden), and their biases.
    pub fn new(config: &FluxConfig, replacement: &Replacement, vb: &VarBuilder) -> Result<Self> {
        let hidden = config.hidden_size;
        let vb = vb.pp("linear");
        Ok(match (replacement.form, replacement.joint) {
            (Form::Remove, _) => Self::Remove,
            (Form::Linear, true) => Self::Joint(Linear::load(hidden, hidden, &vb)?),
            (Form::Linear, false) => Self::Streams {
                txt: Linear::load(hidden, hidden, &vb.pp("txt"))?,
                img: Linear::load(hidden, hidden, &vb.pp("img"))?,
            },
        })
    }

    /// One step of the fold.
    pub fn forward(&self, stream: &Stream) -> Result<Stream> {
        let tokens = match self {
            Self::Remove => return Ok(stream.clone()),
            Self::Joint(linear) => {
                let y = linear.product(&stream.tokens)?;
                ops::gated_residual(&[Branch {
                    x: &stream.tokens,
                    y: &y,
                    bias: linear.bias(),
                    gate: None,
                }])?
            }
            Self::Streams { txt, img } => {
                let (txt_x, img_x) = (stream.txt_view()?, stream.img_view()?);
                let (txt_y, img_y) = (txt.product(&txt_x)?, img.product(&img_x)?);
                ops::gated_residual(&[
                    Branch {
                        x: &txt_x,
                        y: &txt_y,
                        bias: txt.bias(),
                        gate: None,
                    },
                    Branch {
                        x: &img_x,
                        y: &img_y,
                        bias: img.bias(),
                        gate: None,
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
            Self::Joint(linear) => vec![("linear", linear)],
            Self::Streams { txt, img } => vec![("linear.img", img), ("linear.txt", txt)],
        }
    }
}
