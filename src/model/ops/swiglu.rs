//! SwiGLU, the gated activation of MLPs: silu of one half times the other.

use candle::{D, Result, Tensor};

/// `silu(a) · b` for `x` (…, 2·n) = [a, b]: (…, n); differentiable.
///
/// diffusers [`Flux2SwiGLU`](https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_flux2.py#L295-L298).
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if !width.is_multiple_of(2) {
        candle::bail!("a gated activation of {width} columns, which are not two halves");
    }
    let half = |n: usize| x.narrow(D::Minus1, n * width / 2, width / 2);
    half(0)?.silu()? * half(1)?
}
