//! The CPU kernels behind the backward pass of `attend`: attention, rotation and RMS norm, f32.

use candle::{Result, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::attention::exp_in_place;
use super::cpu::{Operand, RowView, sum_map, sum_product, vectorized};
use super::gelu::gelu_backward_row;
use super::heads::heads;
use super::types::{HEADS_EPS, Heads, OwnedProjection, Projected};
use crate::model::rope::Rope;

/// Query rows whose scores are held at once by one task.
const ROWS: usize = 128;

/// Gradients of the projections, each of its projection's shape, from that of the result.
///
/// `grad` (batch, tokens, at least hidden). If a projection is wider than 3·hidden, what is left of `grad` is the
/// gradient of the GELU of its remaining columns, whose bias is `mlp_bias`.
pub(super) fn backward(
    streams: &[OwnedProjection],
    num_heads: usize,
    rope: &Rope,
    grad: &Tensor,
    mlp_bias: Option<&Tensor>,
) -> Result<Vec<Tensor>> {
    let (total, size) = (rope.tokens(), rope.head_dim());
    let hidden = num_heads * size;
    let batch = grad.dim(0)?;
    let borrowed: Vec<Projected> = streams.iter().map(OwnedProjection::borrowed).collect();
    let heads = heads(&borrowed, num_heads, rope)?;
    let grad = Operand::new(grad);
    let grad = grad.rows::<f32>()?;
    let of_heads = attention_backward(&heads, grad)?;
    drop(heads);

    let (cos, sin) = (Operand::new(rope.cos()), Operand::new(rope.sin()));
    let (cos, sin) = (cos.rows::<f32>()?, sin.rows::<f32>()?);
    let mlp_bias = mlp_bias.map(Operand::new);
    let mlp_bias = mlp_bias.as_ref().map(Operand::rows::<f32>).transpose()?;
    let mut out = Vec::with_capacity(streams.len());
    let mut start = 0;
    for stream in streams {
        let (_, tokens, width) = stream.qkv.dims3()?;
        let mut dqkv = vec![0f32; batch * tokens * width];
        {
            let (qkv, bias) = (
                Operand::new(&stream.qkv),
                stream.bias.as_ref().map(Operand::new),
            );
            let qkv = qkv.rows::<f32>()?;
            let bias = bias.as_ref().map(Operand::rows::<f32>).transpose()?;
            let norms = [
                Operand::new(&stream.norms.query),
                Operand::new(&stream.norms.key),
            ];
            let norms = [norms[0].rows::<f32>()?, norms[1].rows::<f32>()?];
            let zeros = vec![0f32; width];
            let tasks = dqkv.par_chunks_mut((tokens * width).max(1)).enumerate();
            tasks.for_each(|(b, dqkv)| {
                vectorized(
                    #[inline(always)]
                    || {
                        let mut hat = vec![0f32; size];
                        let bias = bias.map_or(zeros.as_slice(), |rows| rows.row(0, 0));
                        for (n, out) in dqkv.chunks_exact_mut(width).enumerate() {
                            let (row, at) = (qkv.row(b, n), start + n);
                            let (attended, rest) = out.split_at_mut(3 * hidden);
                            for head in 0..num_heads {
                                let from = ((b * num_heads + head) * total + at) * size;
                                for (which, norm) in norms.iter().enumerate() {
                                    let columns = which * hidden + head * size;
                                    let columns = columns..columns + size;
                                    for ((hat, x), bias) in hat
                                        .iter_mut()
                                        .zip(&row[columns.clone()])
                                        .zip(&bias[columns.clone()])
                                    {
                                        *hat = x + bias;
                                    }
                                    unrotate_unnorm(
                                        &mut hat,
                                        norm.row(0, 0),
                                        (cos.row(at, 0), sin.row(at, 0)),
                                        &of_heads[which][from..from + size],
                                        &mut attended[columns],
                                    );
                                }
                                let columns = 2 * hidden + head * size;
                                attended[columns..columns + size]
                                    .copy_from_slice(&of_heads[2][from..from + size]);
                            }
                            if !rest.is_empty() {
                                gelu_backward_row(
                                    &row[3 * hidden..],
                                    mlp_bias.map(|rows| rows.row(0, 0)),
                                    &grad.row(b, at)[hidden..],
                                    rest,
                                );
                            }
                        }
                    },
                );
            });
        }
        start += tokens;
        out.push(Tensor::from_vec(
            dqkv,
            (batch, tokens, width),
            stream.qkv.device(),
        )?);
    }
    Ok(out)
}

/// Backwards through the rotation and the RMS norm of one head of one token. `x` comes as the projection and leaves
/// normalised; with d the gradient rotated back, times the norm's weight: dx = (d − x̂·mean(d·x̂)) / rms.
#[inline(always)]
fn unrotate_unnorm(
    x: &mut [f32],
    weight: &[f32],
    (cos, sin): (&[f32], &[f32]),
    grad: &[f32],
    out: &mut [f32],
) {
    let size = x.len() as f32;
    let factor = 1.0 / (sum_map(x, |x| x * x) / size + HEADS_EPS as f32).sqrt();
    for x in x.iter_mut() {
        *x *= factor;
    }
    let pairs = out.as_chunks_mut::<2>().0.iter_mut();
    let tables = cos.as_chunks::<2>().0.iter().zip(sin.as_chunks::<2>().0);
    let grads = grad
        .as_chunks::<2>()
        .0
        .iter()
        .zip(weight.as_chunks::<2>().0);
    for ((out, (cos, sin)), (grad, weight)) in pairs.zip(tables).zip(grads) {
        out[0] = weight[0] * (grad[0] * cos[0] + grad[1] * sin[1]);
        out[1] = weight[1] * (grad[1] * cos[1] + grad[0] * sin[0]);
    }
    let along = sum_product(out, x) / size;
    for (out, x) in out.iter_mut().zip(x.iter()) {
        *out = factor * (*out - x * along);
    }
}

/// Gradients of queries, keys and values, each (batch, heads, tokens, head size).
fn attention_backward(Heads { q, k, v }: &Heads, grad: RowView<f32>) -> Result<[Vec<f32>; 3]> {
    let (batch, heads, tokens, size) = q.dims4()?;
    let scale = 1.0 / (size as f32).sqrt();
    let block = tokens * size;
    let mut out = [const { Vec::new() }; 3];
    for out in &mut out {
        *out = vec![0f32; batch * heads * block];
    }
    let (q, k, v) = (Operand::new(q), Operand::new(k), Operand::new(v));
    let (q, k, v) = (q.slice::<f32>()?, k.slice::<f32>()?, v.slice::<f32>()?);
    let [dq, dk, dv] = &mut out;
    let outputs = dq
        .par_chunks_mut(block.max(1))
        .zip(dk.par_chunks_mut(block.max(1)))
        .zip(dv.par_chunks_mut(block.max(1)));
    outputs.enumerate().for_each(|(i, ((dq, dk), dv))| {
        let (b, head) = (i / heads, i % heads);
        let matrix = |x| MatRef::from_row_major_slice(x, tokens, size);
        let (q, k, v) = (
            &q[i * block..][..block],
            matrix(&k[i * block..][..block]),
            matrix(&v[i * block..][..block]),
        );
        let rows = ROWS.min(tokens);
        let mut weights = vec![0f32; rows * tokens];
        let mut dweights = vec![0f32; rows * tokens];
        let mut attended = vec![0f32; rows * size];
        for start in (0..tokens).step_by(rows) {
            let len = rows.min(tokens - start);
            let (weights, dweights) = (&mut weights[..len * tokens], &mut dweights[..len * tokens]);
            let attended = &mut attended[..len * size];
            for (n, out) in attended.chunks_exact_mut(size).enumerate() {
                out.copy_from_slice(&grad.row(b, start + n)[head * size..][..size]);
            }
            let q = MatRef::from_row_major_slice(&q[start * size..][..len * size], len, size);
            let product = |out: &mut [f32], columns, how, a, b, factor| {
                let rows = out.len() / columns;
                let out = MatMut::from_row_major_slice_mut(out, rows, columns);
                matmul(out, how, a, b, factor, Par::Seq);
            };
            product(weights, tokens, Accum::Replace, q, k.transpose(), scale);
            let dout = MatRef::from_row_major_slice(attended, len, size);
            product(dweights, tokens, Accum::Replace, dout, v.transpose(), 1.0);
            vectorized(
                #[inline(always)]
                || {
                    for (w, dw) in weights
                        .chunks_exact_mut(tokens)
                        .zip(dweights.chunks_exact_mut(tokens))
                    {
                        let factor = 1.0 / exp_in_place(w);
                        for w in w.iter_mut() {
                            *w *= factor;
                        }
                        let along = sum_product(w, dw);
                        for (dw, w) in dw.iter_mut().zip(w.iter()) {
                            *dw = (*dw - along) * w;
                        }
                    }
                },
            );
            let w = MatRef::from_row_major_slice(weights, len, tokens);
            let dw = MatRef::from_row_major_slice(dweights, len, tokens);
            product(dv, size, Accum::Add, w.transpose(), dout, 1.0);
            let dq = &mut dq[start * size..][..len * size];
            product(dq, size, Accum::Replace, dw, k, scale);
            product(dk, size, Accum::Add, dw.transpose(), q, scale);
        }
    });
    Ok(out)
}
