//! Shift, scale and gate: one projection of silu(vec), cut into equal parts.

use candle::{Result, Tensor};
use candle_nn::VarBuilder;

use super::linear::Linear;
use super::stream::Conditioning;

/// A block's modulation projection (BFL `Modulation.lin`, diffusers `AdaLayerNormZero.linear`).
#[derive(Clone, Debug)]
pub struct Modulation<const N: usize> {
    /// hidden → N · hidden
    pub lin: Linear,
}

impl<const N: usize> Modulation<N> {
    /// Reads the projection of a model `hidden` wide.
    pub fn new(hidden: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            lin: Linear::load(hidden, N * hidden, vb)?,
        })
    }

    /// The N parts, each a view (batch, hidden), in the order they are stored: shift, scale, gate, shift, scale, gate.
    pub fn forward(&self, conditioning: &Conditioning) -> Result<[Tensor; N]> {
        let all = self.lin.forward(conditioning.activated())?;
        let parts = all.chunk(N, 1)?;
        parts.try_into().map_err(|parts: Vec<Tensor>| {
            candle::Error::Msg(format!(
                "a modulation of {} parts instead of {N}",
                parts.len()
            ))
        })
    }
}
