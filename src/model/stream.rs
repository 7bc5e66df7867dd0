//! What flows through the trunk: the tokens, and what all blocks share in one step.

use candle::{Result, Tensor};

use super::ops;
use super::rope::Rope;

/// The tokens between two blocks, text first. One type for all kinds of block.
#[derive(Clone, Debug)]
pub struct Stream {
    /// (batch, txt_len + image tokens, hidden)
    pub tokens: Tensor,
    /// Number of text tokens.
    pub txt_len: usize,
}

impl Stream {
    /// The text tokens, (batch, txt_len, hidden), contiguous.
    pub fn txt(&self) -> Result<Tensor> {
        self.txt_view()?.contiguous()
    }

    /// The image tokens, (batch, image tokens, hidden), contiguous.
    pub fn img(&self) -> Result<Tensor> {
        self.img_view()?.contiguous()
    }

    /// The text tokens without a copy; not contiguous in a batch.
    pub fn txt_view(&self) -> Result<Tensor> {
        ops::narrow(&self.tokens, 1, 0, self.txt_len)
    }

    /// The image tokens without a copy; not contiguous in a batch.
    pub fn img_view(&self) -> Result<Tensor> {
        ops::narrow(&self.tokens, 1, self.txt_len, self.img_len()?)
    }

    /// Number of image tokens.
    pub fn img_len(&self) -> Result<usize> {
        Ok(self.tokens.dim(1)? - self.txt_len)
    }

    /// The same stream with other tokens.
    #[must_use]
    pub fn with_tokens(&self, tokens: Tensor) -> Self {
        Self {
            tokens,
            txt_len: self.txt_len,
        }
    }
}

/// Shift, scale and gate that all blocks of a kind share in one step, each (batch, hidden).
#[derive(Clone, Debug)]
pub(super) struct SharedParts {
    /// Of the image tokens in double blocks: shift, scale, gate, shift, scale, gate.
    pub(super) img: [Tensor; 6],
    /// Of the text tokens in double blocks: shift, scale, gate, shift, scale, gate.
    pub(super) txt: [Tensor; 6],
    /// Of all tokens in single blocks: shift, scale, gate.
    pub(super) single: [Tensor; 3],
}

/// What every block of one step shares.
#[derive(Clone, Debug)]
pub struct Conditioning {
    /// Sum of the embeddings of timestep, guidance and pooled text, (batch, hidden). Set through [`Self::new`].
    pub vec: Tensor,
    /// Noise level of each sample in [0, 1], (batch,): what observers sort by; no block reads it.
    pub timestep: Tensor,
    /// Rotary table of text and image tokens.
    pub rope: Rope,
    activated: Tensor,
    shared: Option<SharedParts>,
}

impl Conditioning {
    /// From `vec` (batch, hidden) and `timestep` (batch,).
    pub fn new(vec: Tensor, timestep: Tensor, rope: Rope) -> Result<Self> {
        let activated = vec.silu()?;
        Ok(Self {
            vec,
            timestep,
            rope,
            activated,
            shared: None,
        })
    }

    /// The same with the parts of a modulation that all blocks share.
    pub(super) fn with_shared(self, shared: Option<SharedParts>) -> Self {
        Self { shared, ..self }
    }

    /// Shift, scale and gate that all blocks share.
    ///
    /// Fails in a model whose blocks have their own.
    pub(super) fn shared(&self) -> Result<&SharedParts> {
        match &self.shared {
            Some(shared) => Ok(shared),
            None => candle::bail!("this model's conditioning holds no shared modulation"),
        }
    }

    /// silu(vec), (batch, hidden): what every modulation projects; computed once per step.
    pub fn activated(&self) -> &Tensor {
        &self.activated
    }
}
