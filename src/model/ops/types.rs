//! Operands of the operations, shared by compositions, kernels and those who call them.

use candle::Tensor;

/// Epsilon of the RMS norms of queries and keys (diffusers `FluxAttention`, BFL `layers.py`).
pub(super) const HEADS_EPS: f64 = 1e-6;

/// One stream's projection, to be split into heads.
pub struct Projected<'a> {
    /// (batch, tokens, at least 3·hidden): queries, keys, values, then anything; without bias.
    pub qkv: &'a Tensor,
    /// Bias of at least 3·hidden.
    pub bias: Option<&'a Tensor>,
    /// Weights of the RMS norms, (head size,).
    pub norms: &'a Norms,
}

/// Weights of the RMS norms of queries and keys, each (head size,).
#[derive(Clone, Debug)]
pub struct Norms {
    /// Of the queries.
    pub query: Tensor,
    /// Of the keys.
    pub key: Tensor,
}

/// One stream's projection, owned and outside of any graph.
pub(super) struct OwnedProjection {
    pub(super) qkv: Tensor,
    pub(super) bias: Option<Tensor>,
    pub(super) norms: Norms,
}

impl OwnedProjection {
    pub(super) fn new(stream: &Projected) -> Self {
        Self {
            qkv: stream.qkv.detach(),
            bias: stream.bias.map(Tensor::detach),
            norms: stream.norms.clone(),
        }
    }

    pub(super) fn borrowed(&self) -> Projected<'_> {
        Projected {
            qkv: &self.qkv,
            bias: self.bias.as_ref(),
            norms: &self.norms,
        }
    }
}

/// Queries, keys (normalised and rotated) and values of all streams, joined along the tokens in the order given.
#[derive(Debug)]
pub(super) struct Heads {
    /// (batch, heads, tokens, head size)
    pub q: Tensor,
    /// (batch, heads, tokens, head size)
    pub k: Tensor,
    /// (batch, heads, tokens, head size)
    pub v: Tensor,
}

/// LayerNorm's epsilon (diffusers `transformer_flux.py`, BFL `layers.py`).
pub(super) const NORM_EPS: f64 = 1e-6;

/// One stream's part of [`gated_residual`](super::gated_residual).
pub struct Branch<'a> {
    /// What the branch is added to, (batch, tokens, width); may be a narrowed view.
    pub x: &'a Tensor,
    /// The branch's last projection without its bias, (batch, tokens, width).
    pub y: &'a Tensor,
    /// That projection's bias, (width,).
    pub bias: Option<&'a Tensor>,
    /// (batch, width) or (1, width); `None` is a gate of one.
    pub gate: Option<&'a Tensor>,
}
