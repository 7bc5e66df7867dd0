//! Softmax attention over all tokens, without a mask, never holding the whole score matrix.

use candle::{D, DType, Device, Result, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::attention_simd;
use super::avx512::{Avx512, Vector};
use super::cpu::{self, Element, Operand, by_dtype, fusable, vectorized};
use super::cuda;
use super::plain::wide;
use super::types::Heads;
use super::uninit::filled;

/// Scores the plain composition takes at once on devices without a fused kernel. Two tensors of them in f32 are alive at
/// a time (1 GiB): enough rows for a fast product, and `model::memory` counts on it.
pub(in crate::model) const MAX_SCORES: usize = 1 << 27;

/// Whether attention of heads of this size in `dtype` on a device holds matrices of scores: kernels on the CPU and flash
/// attention do not.
pub fn holds_scores(device: &Device, dtype: DType, head: usize) -> bool {
    !(device.is_cpu() || cuda::has_flash(device, dtype, head))
}

/// `softmax(q·kᵀ / √head_dim)·v`, heads side by side: (batch, tokens, heads · head size), contiguous.
pub(super) fn attention(heads: &Heads) -> Result<Tensor> {
    let Heads { q, k, v } = heads;
    if let Some(attended) = cuda::flash(q, k, v, scale_of(q)?)? {
        return Ok(attended);
    }
    match fusable([q, k, v]) {
        Some(dtype) => by_dtype!(dtype, fused(Avx512::detect(), q, k, v)),
        None => plain(q, k, v, MAX_SCORES),
    }
}

pub(super) fn scale_of(q: &Tensor) -> Result<f64> {
    Ok(1.0 / (q.dim(3)? as f64).sqrt())
}

/// Differentiable. Untracked inputs are taken in slices of query rows so that at most `max_scores` scores exist; in a
/// graph all of them are kept for the backward pass anyway. Scores are in f32: one of 16 in bf16 is off by up to 0.06.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, max_scores: usize) -> Result<Tensor> {
    let (batch, heads, tokens, _) = q.dims4()?;
    let tracked = [q, k, v].iter().any(|x| x.track_op());
    let rows = if tracked {
        tokens
    } else {
        (max_scores / (batch * heads * tokens).max(1)).clamp(1, tokens.max(1))
    };
    let scale = scale_of(q)?;
    // made once, and only if it is needed
    let mut wide_k = None;
    let mut out = Vec::new();
    for start in (0..tokens).step_by(rows) {
        let q = q.narrow(2, start, rows.min(tokens - start))?.contiguous()?;
        let scores = match cuda::scores(&q, k, scale)? {
            Some(scores) => scores,
            None => {
                let k = match &wide_k {
                    Some(k) => k,
                    None => wide_k.insert(wide(k)?.transpose(2, 3)?),
                };
                (wide(&q)? * scale)?.matmul(k)?
            }
        };
        let mut weights = if let Some(weights) = cuda::softmax(&scores, v.dtype())? {
            weights
        } else if tracked {
            // softmax_last_dim has no backward pass
            candle_nn::ops::softmax(&scores, D::Minus1)?
        } else {
            candle_nn::ops::softmax_last_dim(&scores)?
        };
        drop(scores);
        // assigned, not shadowed: f32 ones go
        weights = weights.to_dtype(v.dtype())?;
        let attended = weights.matmul(v)?;
        // (batch, heads, rows, head size) -> (batch, rows, heads · head size)
        out.push(attended.transpose(1, 2)?.flatten_from(2)?);
    }
    match out.as_slice() {
        [one] => Ok(one.clone()),
        many => Tensor::cat(many, 1),
    }
}

/// A slice of the heads as f32: itself, or converted into `scratch`.
#[inline(always)]
fn as_f32<'a, T: Element>(x: &'a [T], scratch: &'a mut Vec<f32>) -> &'a [f32] {
    if let Some(x) = T::as_f32(x) {
        return x;
    }
    scratch.clear();
    scratch.extend(x.iter().map(|x| x.to_f32()));
    scratch
}

fn fused<T: Vector>(simd: Option<Avx512>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (batch, heads, tokens, size) = q.dims4()?;
    let scale = scale_of(q)? as f32;
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    if k.dims() != q.dims() || v.dims() != q.dims() {
        candle::bail!(
            "queries {:?}, keys {:?} and values {:?} differ",
            q.shape(),
            k.shape(),
            v.shape()
        );
    }
    let width = heads * size;
    let (q, k, v) = (Operand::new(&q), Operand::new(&k), Operand::new(&v));
    let (q, k, v) = (q.slice::<T>()?, k.slice::<T>()?, v.slice::<T>()?);
    if let Some(simd) = simd.filter(|_| attention_simd::fits(size)) {
        let shape = (heads, tokens, size);
        let out = filled(batch * tokens, width, |out| {
            attention_simd::attention(simd, [q, k, v], shape, scale, out);
        });
        return Tensor::from_vec(out, (batch, tokens, width), &candle::Device::Cpu);
    }
    let mut out = vec![T::zero(); batch * tokens * width];
    if !out.is_empty() {
        // enough tiles to keep every core busy, large enough for an efficient product
        let tile = (batch * tokens)
            .div_ceil(4 * rayon::current_num_threads())
            .clamp(16, 128)
            .min(tokens);
        out.par_chunks_mut(tokens * width)
            .enumerate()
            .for_each(|(b, out)| {
                out.par_chunks_mut(tile * width)
                    .enumerate()
                    .for_each(|(t, out)| {
                        let rows = out.len() / width;
                        let mut scores = vec![0f32; rows * tokens];
                        let mut sums = vec![0f32; rows];
                        let mut product = vec![0f32; rows * size];
                        let mut scratch = [const { Vec::new() }; 3];
                        for head in 0..heads {
                            let block = (b * heads + head) * tokens * size;
                            let [sq, sk, sv] = &mut scratch;
                            let q = &q[block + t * tile * size..][..rows * size];
                            let (q, k, v) = (
                                as_f32(q, sq),
                                as_f32(&k[block..][..tokens * size], sk),
                                as_f32(&v[block..][..tokens * size], sv),
                            );
                            matmul(
                                MatMut::from_row_major_slice_mut(&mut scores, rows, tokens),
                                Accum::Replace,
                                MatRef::from_row_major_slice(q, rows, size),
                                MatRef::from_row_major_slice(k, tokens, size).transpose(),
                                scale,
                                Par::Seq,
                            );
                            vectorized(
                                #[inline(always)]
                                || {
                                    for (row, sum) in scores.chunks_exact_mut(tokens).zip(&mut sums)
                                    {
                                        *sum = exp_in_place(row);
                                    }
                                },
                            );
                            matmul(
                                MatMut::from_row_major_slice_mut(&mut product, rows, size),
                                Accum::Replace,
                                MatRef::from_row_major_slice(&scores, rows, tokens),
                                MatRef::from_row_major_slice(v, tokens, size),
                                1.0,
                                Par::Seq,
                            );
                            vectorized(
                                #[inline(always)]
                                || {
                                    let rows = out
                                        .chunks_exact_mut(width)
                                        .zip(product.chunks_exact(size))
                                        .zip(&sums);
                                    for ((out, product), sum) in rows {
                                        let factor = 1.0 / sum;
                                        for (out, x) in
                                            out[head * size..][..size].iter_mut().zip(product)
                                        {
                                            *out = T::narrow(x * factor);
                                        }
                                    }
                                },
                            );
                        }
                    });
            });
    }
    Tensor::from_vec(out, (batch, tokens, width), &candle::Device::Cpu)
}

/// Replaces a row by exp(x − max) and returns the sum.
#[inline(always)]
pub(super) fn exp_in_place(row: &mut [f32]) -> f32 {
    let max = cpu::max(row);
    for x in row.iter_mut() {
        *x = cpu::exp(*x - max);
    }
    cpu::sum_map(row, |x| x)
}

#[cfg(test)]
mod tests {
    use candle::DType;

    use super::*;
    use crate::model::testing::{close, random};

    /// The plain composition in f64 on the same numbers.
    fn exact(Heads { q, k, v }: &Heads) -> Result<Tensor> {
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        plain(&wide(q)?, &wide(k)?, &wide(v)?, usize::MAX)
    }

    #[test]
    fn fused_equals_plain_and_slices_equal_the_whole() -> Result<()> {
        for (batch, heads, tokens, size) in [
            (1, 1, 1, 8),
            (1, 2, 28, 32),
            (3, 4, 33, 16),
            (3, 2, 150, 128),
            (1, 1, 601, 24),
            (1, 2, 301, 64),
            (1, 2, 19, 6),
        ] {
            // a score of 16, common here, is known to 1e-6 in f32
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 5e-3), (DType::F16, 2e-3)]
            {
                let make = |name: &str| {
                    (random(name, (batch, heads, tokens, size))? * 2.0)?.to_dtype(dtype)
                };
                let heads = Heads {
                    q: make("q")?,
                    k: make("k")?,
                    v: make("v")?,
                };
                let exact = exact(&heads)?;
                close(&attention(&heads)?, &exact, tolerance)?;
                for simd in Avx512::ways().into_iter().map(Some).chain([None]) {
                    let Heads { q, k, v } = &heads;
                    let got = by_dtype!(dtype, fused(simd, q, k, v))?;
                    close(&got, &exact, tolerance)?;
                }
                for rows in [usize::MAX, 100] {
                    close(
                        &plain(&heads.q, &heads.k, &heads.v, rows)?,
                        &exact,
                        tolerance,
                    )?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn large_scores_do_not_overflow() -> Result<()> {
        let make = |name: &str| random(name, (1, 1, 20, 16))? * 100.0;
        let heads = Heads {
            q: make("q")?,
            k: make("k")?,
            v: make("v")?,
        };
        let whole = plain(&heads.q, &heads.k, &heads.v, usize::MAX)?;
        close(&attention(&heads)?, &whole, 1e-4)
    }
}
