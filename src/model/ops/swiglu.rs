//! SwiGLU, the gated activation of MLPs: silu of one half times the other.

use candle::{D, Result, Tensor};

use super::custom_op::{by_recomputing, custom_op};
use super::{cuda, plain};

/// `prefix ‖ silu(a) · b` along the last dimension for `x` (batch, tokens, 2·n) = [a, b], which may be a narrowed view;
/// `prefix` (batch, tokens, any); differentiable.
///
/// diffusers [`Flux2SwiGLU`](https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_flux2.py#L295-L298).
pub fn swiglu(x: &Tensor, prefix: Option<&Tensor>) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if !width.is_multiple_of(2) {
        candle::bail!("a gated activation of {width} columns, which are not two halves");
    }
    let (data, front_data) = (x.detach(), prefix.map(Tensor::detach));
    let Some(y) = cuda::swiglu(&data, front_data.as_ref())? else {
        return plain::swiglu(x, prefix);
    };
    let inputs: Vec<&Tensor> = [x].into_iter().chain(prefix).collect();
    let front = prefix.map_or(Ok(0), |t| t.dim(2))?;
    custom_op(&inputs, y, move |grad| {
        let own = grad.narrow(2, front, width / 2)?;
        let mut out = match cuda::swiglu_backward(&data, &own)? {
            Some(of_x) => vec![Some(of_x)],
            None => by_recomputing(&[&data], &own, |t| plain::swiglu(&t[0], None))?,
        };
        if front > 0 {
            out.push(Some(grad.narrow(2, 0, front)?.contiguous()?));
        }
        Ok(out)
    })
}
