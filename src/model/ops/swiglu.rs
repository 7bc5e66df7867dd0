//! SwiGLU, the gated activation of MLPs: silu of one half times the other.

use candle::{D, Result, Tensor};

/// `silu(a) · b` for `x` (…, 2·n) = [a, b]: (…, n); differentiable.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if !width.is_multiple_of(2) {
        candle::bail!("a gated activation of {width} columns, which are not two halves");
    }
    let half = |n: usize| x.narrow(D::Minus1, n * width / 2, width / 2);
    half(0)?.silu()? * half(1)?
}
