//! The operations as compositions of candle's: they run on every device, and every kernel is compared with them.

use candle::{D, DType, Result, Tensor};

use super::types::{Branch, HEADS_EPS, Heads, NORM_EPS, Projected};
use crate::model::rope::Rope;

/// See `heads::heads`.
pub(super) fn heads(streams: &[Projected], num_heads: usize, rope: &Rope) -> Result<Heads> {
    let dtype = streams[0].qkv.dtype();
    let hidden = num_heads * rope.head_dim();
    let (mut q, mut k, mut v) = (vec![], vec![], vec![]);
    for stream in streams {
        let (batch, tokens, _) = stream.qkv.dims3()?;
        let bias = stream
            .bias
            .map(|b| b.narrow(0, 0, 3 * hidden))
            .transpose()?;
        let qkv = biased(&stream.qkv.narrow(2, 0, 3 * hidden)?, bias.as_ref())?;
        let qkv = qkv.reshape((batch, tokens, 3, num_heads, rope.head_dim()))?;
        // (batch, heads, tokens, head size)
        let part = |i| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2);
        q.push(rms_norm(&part(0)?, &stream.norms.query)?);
        k.push(rms_norm(&part(1)?, &stream.norms.key)?);
        v.push(part(2)?);
    }
    Ok(Heads {
        q: rope.rotate(&Tensor::cat(&q, 2)?)?.to_dtype(dtype)?,
        k: rope.rotate(&Tensor::cat(&k, 2)?)?.to_dtype(dtype)?,
        v: Tensor::cat(&v, 2)?.contiguous()?,
    })
}

/// `x / rms(x) · weight` over the last dimension, left in the wide format.
fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let x = wide(x)?;
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + HEADS_EPS)?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(&wide(weight)?)
}

/// See `norm::norm_modulate`.
pub(super) fn norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = wide(x)?;
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (x.sqr()?.mean_keepdim(D::Minus1)? + NORM_EPS)?.sqrt()?;
    let x = x.broadcast_div(&deviation)?;
    let scale = (wide(scale)? + 1.0)?.unsqueeze(1)?;
    let shift = wide(shift)?.unsqueeze(1)?;
    x.broadcast_mul(&scale)?
        .broadcast_add(&shift)?
        .to_dtype(dtype)
}

/// See `gelu::gelu`.
pub(super) fn gelu(x: &Tensor, bias: Option<&Tensor>, prefix: Option<&Tensor>) -> Result<Tensor> {
    let y = biased(x, bias)?.gelu()?;
    match prefix {
        Some(prefix) => Tensor::cat(&[prefix, &y], 2),
        None => Ok(y),
    }
}

/// See `swiglu::swiglu`.
pub(super) fn swiglu(x: &Tensor, prefix: Option<&Tensor>) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? / 2;
    let half = |n: usize| x.narrow(D::Minus1, n * width, width);
    let y = (half(0)?.silu()? * half(1)?)?;
    match prefix {
        Some(prefix) => Tensor::cat(&[prefix, &y], 2),
        None => Ok(y),
    }
}

/// See `residual::gated_residual`.
pub(super) fn gated_residual(branches: &[Branch]) -> Result<Tensor> {
    let sums = branches.iter().map(|branch| {
        let y = biased(branch.y, branch.bias)?;
        let y = match branch.gate {
            Some(gate) => y.broadcast_mul(&gate.to_dtype(y.dtype())?.unsqueeze(1)?)?,
            None => y,
        };
        branch.x + y
    });
    match sums.collect::<Result<Vec<_>>>()?.as_slice() {
        [one] => Ok(one.clone()),
        many => Tensor::cat(many, 1),
    }
}

/// Gradients of queries, keys and values, stacked, from that of the attended values (all (batch, heads, tokens, head
/// size)), a slice of query rows at a time so that at most `max_scores` scores exist.
pub(super) fn attention_backward(
    Heads { q, k, v }: &Heads,
    grad: &Tensor,
    max_scores: usize,
) -> Result<Tensor> {
    let (batch, heads, tokens, size) = q.dims4()?;
    let dtype = q.dtype();
    let scale = 1.0 / (size as f64).sqrt();
    let rows = (max_scores / (batch * heads * tokens).max(1)).clamp(1, tokens.max(1));
    let (q, k, v, grad) = (wide(q)?, wide(k)?, wide(v)?, wide(grad)?);
    let (k_t, v_t) = (
        k.transpose(2, 3)?.contiguous()?,
        v.transpose(2, 3)?.contiguous()?,
    );
    let mut dq = Vec::new();
    let (mut dk, mut dv) = (k.zeros_like()?, v.zeros_like()?);
    for start in (0..tokens).step_by(rows) {
        let len = rows.min(tokens - start);
        let q = q.narrow(2, start, len)?.contiguous()?;
        let grad = grad.narrow(2, start, len)?.contiguous()?;
        let scores = (q.matmul(&k_t)? * scale)?;
        let weights = if scores.dtype() == DType::F64 {
            candle_nn::ops::softmax(&scores, D::Minus1)?
        } else {
            candle_nn::ops::softmax_last_dim(&scores)?
        };
        drop(scores);
        dv = (dv + weights.transpose(2, 3)?.contiguous()?.matmul(&grad)?)?;
        // assigned, not shadowed: four tensors of scores at a time are counted (`train::memory`)
        let mut dscores = grad.matmul(&v_t)?;
        let along = (&dscores * &weights)?.sum_keepdim(D::Minus1)?;
        dscores = dscores.broadcast_sub(&along)?;
        dscores = (dscores * weights)?;
        dscores = (dscores * scale)?;
        dq.push(dscores.matmul(&k)?);
        dk = (dk + dscores.transpose(2, 3)?.contiguous()?.matmul(&q)?)?;
    }
    let dq = Tensor::cat(&dq, 2)?;
    Tensor::stack(&[dq, dk, dv], 0)?.to_dtype(dtype)
}

/// `x + bias` over the last dimension.
pub(super) fn biased(x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => x.broadcast_add(&bias.to_dtype(x.dtype())?),
        None => Ok(x.clone()),
    }
}

/// f32, or f64 if it is f64 already.
pub(super) fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => Ok(x.clone()),
        _ => x.to_dtype(DType::F32),
    }
}
