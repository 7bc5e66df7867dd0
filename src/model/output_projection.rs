//! Input, gate and residual of a block's output projection, exposed so that `prune` can refit it.

use candle::Tensor;

use super::linear::Linear;
use super::ops::Branch;

/// A block's last step for one of its streams: x + g ⊙ (W z + b), with W and b the projection `name`.
#[derive(Clone, Debug)]
pub struct OutputProjection {
    /// The projection's name below the block: `linear2`, `txt_mlp.2` or `img_mlp.2`.
    pub name: &'static str,
    /// The residual, (batch, tokens, hidden).
    pub x: Tensor,
    /// What the projection is applied to, (batch, tokens, its input width).
    pub z: Tensor,
    /// The gate, (batch, hidden).
    pub gate: Tensor,
}

impl OutputProjection {
    /// With `y`, the product of z and the projection without its bias.
    pub(super) fn branch<'a>(&'a self, y: &'a Tensor, projection: &'a Linear) -> Branch<'a> {
        Branch {
            x: &self.x,
            y,
            bias: projection.bias(),
            gate: Some(&self.gate),
        }
    }
}
