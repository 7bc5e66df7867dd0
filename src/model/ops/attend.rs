//! From fused projections to what attention puts out, as one node of the gradient graph: the backward pass computes
//! queries, keys, values and scores again instead of keeping them. The forward is that of `heads` and `attention`.

use candle::{DType, Device, Result, Tensor};

use super::attend_fused;
use super::attention::attention;
use super::cpu::fusable;
use super::custom_op::{by_recomputing, custom_op_of_result};
use super::gelu::gelu;
use super::heads::heads;
use super::types::{Heads, OwnedProjection, Projected};
use super::{cuda, plain};
use crate::model::rope::Rope;

/// Scores that the composed backward pass holds at once, in elements; some four tensors of this size in f32 (1 GiB).
const MAX_SCORES: usize = 1 << 26;

/// Whether the backward pass of attention with heads of this size in `dtype` on a device holds matrices of scores: kernels
/// do not.
pub fn holds_scores_backward(device: &Device, dtype: DType, head: usize) -> bool {
    !(device.is_cpu() || cuda::has_attention_backward(device, dtype, head))
}

/// Softmax attention over the tokens of all streams together, from their projections; heads side by side:
/// (batch, tokens, hidden). Biases and norms get no gradient.
pub fn attend(streams: &[Projected], num_heads: usize, rope: &Rope) -> Result<Tensor> {
    let stored: Vec<OwnedProjection> = streams.iter().map(OwnedProjection::new).collect();
    let y = forward(&stored, num_heads, rope)?;
    let inputs: Vec<&Tensor> = streams.iter().map(|s| s.qkv).collect();
    let rope = rope.clone();
    custom_op_of_result(&inputs, y, move |attended, grad| {
        let grads = if fused(&stored) {
            attend_fused::backward(&stored, num_heads, &rope, &grad.contiguous()?, None)?
        } else {
            backward(&stored, num_heads, &rope, [attended, grad])?
        };
        Ok(grads.into_iter().map(Some).collect())
    })
}

/// What a single block puts between its two projections: `attend` of the first 3·hidden columns of `projected`
/// (batch, tokens, 3·hidden + mlp) and the GELU of the rest; (batch, tokens, hidden + mlp).
pub fn attend_with_gelu(projected: &Projected, num_heads: usize, rope: &Rope) -> Result<Tensor> {
    let hidden = num_heads * rope.head_dim();
    let stored = [OwnedProjection::new(projected)];
    let mlp = stored[0].qkv.dim(2)?.saturating_sub(3 * hidden);
    let mlp_bias = stored[0].bias.as_ref();
    let mlp_bias = mlp_bias.map(|b| b.narrow(0, 3 * hidden, mlp)).transpose()?;
    let y = gelu(
        &stored[0].qkv.narrow(2, 3 * hidden, mlp)?,
        mlp_bias.as_ref(),
        Some(&forward(&stored, num_heads, rope)?),
    )?;
    let rope = rope.clone();
    custom_op_of_result(&[projected.qkv], y, move |result, grad| {
        if fused(&stored) {
            let grad = grad.contiguous()?;
            let all = attend_fused::backward(&stored, num_heads, &rope, &grad, mlp_bias.as_ref())?;
            return Ok(all.into_iter().map(Some).collect());
        }
        let own = grad.narrow(2, hidden, mlp)?;
        let front = |t: &Tensor| t.narrow(2, 0, hidden);
        let of_heads = of_heads(&stored, num_heads, &rope, [&front(result)?, &front(grad)?])?;
        let rest = Some((mlp_bias.as_ref(), &own));
        let all = cuda::projection_backward(&stored[0].borrowed(), &of_heads, 0, &rope, rest)?;
        if all.is_some() {
            return Ok(vec![all]);
        }
        let [of_qkv] = composed(&stored, num_heads, &rope, &of_heads)?
            .try_into()
            .map_err(|_| candle::Error::Msg("one stream, one gradient".to_owned()))?;
        let x = stored[0].qkv.narrow(2, 3 * hidden, mlp)?.contiguous()?;
        let of_mlp = by_recomputing(&[&x], &own, |t| gelu(&t[0], mlp_bias.as_ref(), None))?;
        match of_mlp.into_iter().next().flatten() {
            Some(of_mlp) => Ok(vec![Some(Tensor::cat(
                &[of_qkv.narrow(2, 0, 3 * hidden)?, of_mlp],
                2,
            )?)]),
            None => candle::bail!("no gradient of GELU"),
        }
    })
}

fn forward(streams: &[OwnedProjection], num_heads: usize, rope: &Rope) -> Result<Tensor> {
    let borrowed: Vec<Projected> = streams.iter().map(OwnedProjection::borrowed).collect();
    attention(&heads(&borrowed, num_heads, rope)?)
}

fn fused(streams: &[OwnedProjection]) -> bool {
    let operands = streams.iter().flat_map(|s| {
        [
            Some(&s.qkv),
            s.bias.as_ref(),
            Some(&s.norms.query),
            Some(&s.norms.key),
        ]
    });
    fusable(operands.flatten()) == Some(DType::F32)
}

/// Gradients of the projections from the result and its gradient, both (batch, tokens, hidden), on any device.
fn backward(
    streams: &[OwnedProjection],
    num_heads: usize,
    rope: &Rope,
    attended: [&Tensor; 2],
) -> Result<Vec<Tensor>> {
    let of_heads = of_heads(streams, num_heads, rope, attended)?;
    let (mut out, mut first) = (Vec::with_capacity(streams.len()), 0);
    for stream in streams {
        let stream = stream.borrowed();
        match cuda::projection_backward(&stream, &of_heads, first, rope, None)? {
            Some(grad) => out.push(grad),
            None => return composed(streams, num_heads, rope, &of_heads),
        }
        first += stream.qkv.dim(1)?;
    }
    Ok(out)
}

/// Gradients of the heads, stacked as in [`attention_backward`], from what attention made of them and its gradient.
fn of_heads(
    streams: &[OwnedProjection],
    num_heads: usize,
    rope: &Rope,
    attended: [&Tensor; 2],
) -> Result<Tensor> {
    let borrowed: Vec<Projected> = streams.iter().map(OwnedProjection::borrowed).collect();
    attention_backward(&heads(&borrowed, num_heads, rope)?, attended)
}

/// Gradients of the projections from those of the heads, (3, batch, heads, tokens, head size), on any device.
fn composed(
    streams: &[OwnedProjection],
    num_heads: usize,
    rope: &Rope,
    of_heads: &Tensor,
) -> Result<Vec<Tensor>> {
    let inputs: Vec<&Tensor> = streams.iter().map(|s| &s.qkv).collect();
    let out = by_recomputing(&inputs, of_heads, |qkv| {
        let projected: Vec<Projected> = streams
            .iter()
            .zip(qkv)
            .map(|(s, qkv)| Projected {
                qkv,
                ..s.borrowed()
            })
            .collect();
        let Heads { q, k, v } = plain::heads(&projected, num_heads, rope)?;
        Tensor::stack(&[q, k, v], 0)
    })?;
    out.into_iter()
        .map(|grad| grad.ok_or_else(|| candle::Error::Msg("no gradient of heads".to_owned())))
        .collect()
}

/// Gradients of queries, keys and values, stacked ((3, batch, heads, tokens, head size)), from the attended values and their
/// gradient, (batch, tokens, heads · head size).
fn attention_backward(heads: &Heads, [attended, grad]: [&Tensor; 2]) -> Result<Tensor> {
    if let Some(grads) = cuda::attention_backward(heads, attended, grad)? {
        return Ok(grads);
    }
    let (batch, num_heads, tokens, size) = heads.q.dims4()?;
    let grad = grad
        .reshape((batch, tokens, num_heads, size))?
        .transpose(1, 2)?
        .contiguous()?;
    plain::attention_backward(heads, &grad, MAX_SCORES)
}
