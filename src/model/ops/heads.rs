//! From a fused qkv projection to normalised, rotated heads: bias, RMS norm, rotary embedding and the change of layout
//! to (batch, heads, tokens, head size) in one pass.

use candle::{Result, Tensor};
use rayon::prelude::*;

use super::cpu::{Element, LANES, Operand, by_dtype, fusable, sum_map, vectorized};
use super::types::{HEADS_EPS, Heads, Projected};
use super::uninit::{Uninit, filled};
use super::{cuda, plain};
use crate::model::rope::Rope;

/// Splits the projections into heads. Norm and rotation are computed in f32 (f64 stays f64) and rounded once.
///
/// `rope` covers the tokens of all streams together.
pub(super) fn heads(streams: &[Projected], num_heads: usize, rope: &Rope) -> Result<Heads> {
    let tokens = streams
        .iter()
        .map(|s| s.qkv.dim(1))
        .sum::<Result<usize>>()?;
    if tokens != rope.tokens() {
        candle::bail!(
            "{tokens} tokens, but the rotary table is for {}",
            rope.tokens()
        );
    }
    let operands = streams.iter().flat_map(|s| {
        [
            Some(s.qkv),
            s.bias,
            Some(&s.norms.query),
            Some(&s.norms.key),
        ]
    });
    match fusable(operands.flatten()) {
        Some(dtype) => by_dtype!(dtype, fused(streams, num_heads, rope)),
        None => match cuda::heads(streams, num_heads, rope)? {
            Some(heads) => Ok(heads),
            None => plain::heads(streams, num_heads, rope),
        },
    }
}

fn fused<T: Element>(streams: &[Projected], num_heads: usize, rope: &Rope) -> Result<Heads> {
    let batch = streams[0].qkv.dim(0)?;
    let (total, size) = (rope.tokens(), rope.head_dim());
    let hidden = num_heads * size;
    let device = streams[0].qkv.device();
    let operands: Vec<_> = streams
        .iter()
        .map(|s| {
            let norms = [Operand::new(&s.norms.query), Operand::new(&s.norms.key)];
            (Operand::new(s.qkv), s.bias.map(Operand::new), norms)
        })
        .collect();
    let mut parts = Vec::with_capacity(streams.len());
    let mut start = 0;
    for (stream, (qkv, bias, [query, key])) in streams.iter().zip(&operands) {
        let bias = bias.as_ref().map(Operand::rows::<T>).transpose()?;
        let tokens = stream.qkv.dim(1)?;
        let (query, key) = (query.rows::<T>()?, key.rows::<T>()?);
        if stream.qkv.dims3()?.2 < 3 * hidden || query.width != size || key.width != size {
            candle::bail!(
                "a projection of shape {:?} for {num_heads} heads of {size}",
                stream.qkv.shape()
            );
        }
        parts.push((
            start,
            qkv.rows::<T>()?,
            bias,
            [query.row(0, 0), key.row(0, 0)],
        ));
        start += tokens;
    }
    let (cos, sin) = (Operand::new(rope.cos()), Operand::new(rope.sin()));
    let (cos, sin) = (cos.rows::<f32>()?, sin.rows::<f32>()?);

    // queries, keys or values of all heads
    let write = |which: usize| {
        filled(batch * num_heads * total, size, |out: Uninit<T>| {
            out.par_bands(total.max(1))
                .enumerate()
                .for_each(|(i, out)| {
                    let (b, head) = (i / num_heads, i % num_heads);
                    let columns = which * hidden + head * size..which * hidden + (head + 1) * size;
                    let mut scratch = vec![0f32; size];
                    vectorized(
                        #[inline(always)]
                        || {
                            out.rows(
                                T::zero(),
                                #[inline(always)]
                                |at, out| {
                                    let part = parts.iter().rev().find(|part| part.0 <= at);
                                    let (start, qkv, bias, norms) = part.unwrap_or(&parts[0]);
                                    let x = &qkv.row(b, at - start)[columns.clone()];
                                    match bias {
                                        Some(bias) => {
                                            let bias = &bias.row(b, 0)[columns.clone()];
                                            for ((s, x), bias) in
                                                scratch.iter_mut().zip(x).zip(bias)
                                            {
                                                *s = x.to_f32() + bias.to_f32();
                                            }
                                        }
                                        None => {
                                            for (s, x) in scratch.iter_mut().zip(x) {
                                                *s = x.to_f32();
                                            }
                                        }
                                    }
                                    match norms.get(which) {
                                        // a table of shape (tokens, head size) is read by its first index
                                        Some(norm) => norm_rotate(
                                            &mut scratch,
                                            norm,
                                            (cos.row(at, 0), sin.row(at, 0)),
                                            out,
                                        ),
                                        None => {
                                            for (out, s) in out.iter_mut().zip(&scratch) {
                                                *out = T::narrow(*s);
                                            }
                                        }
                                    }
                                },
                            );
                        },
                    );
                });
        })
    };
    let [q, k, v] = [0, 1, 2].map(write);
    let shape = (batch, num_heads, total, size);
    Ok(Heads {
        q: Tensor::from_vec(q, shape, device)?,
        k: Tensor::from_vec(k, shape, device)?,
        v: Tensor::from_vec(v, shape, device)?,
    })
}

/// RMS norm and rotation of neighbouring pairs (2i, 2i+1) of one head of one token.
#[inline(always)]
fn norm_rotate<T: Element>(
    x: &mut [f32],
    weight: &[T],
    (cos, sin): (&[f32], &[f32]),
    out: &mut [T],
) {
    let mean = sum_map(x, |x| x * x) / x.len() as f32;
    let factor = 1.0 / (mean + HEADS_EPS as f32).sqrt();
    for (x, w) in x.iter_mut().zip(weight) {
        *x *= factor * w.to_f32();
    }
    // whole vectors first; the exchange of neighbours is then one shuffle
    let whole = x.len() - x.len() % LANES;
    let chunks = x[..whole]
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(out[..whole].as_chunks_mut::<LANES>().0);
    let tables = cos[..whole]
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(sin[..whole].as_chunks::<LANES>().0);
    for ((x, out), (cos, sin)) in chunks.zip(tables) {
        for i in 0..LANES {
            out[i] = T::narrow(x[i] * cos[i] + x[i ^ 1] * sin[i]);
        }
    }
    for i in whole..x.len() {
        out[i] = T::narrow(x[i] * cos[i] + x[i ^ 1] * sin[i]);
    }
}

#[cfg(test)]
mod tests {
    use candle::DType;

    use super::*;
    use crate::model::ops::types::Norms;
    use crate::model::testing::{close, random};

    #[test]
    fn fused_equals_plain_for_one_stream_and_two() -> Result<()> {
        for (batch, txt, img, num_heads, axes) in [
            (1, 3, 5, 2, vec![4, 6, 6]),
            (3, 1, 9, 4, vec![2, 4, 2]),
            (1, 8, 30, 3, vec![16, 56, 56]),
        ] {
            let size: usize = axes.iter().sum();
            let width = 3 * num_heads * size;
            let ids = (random("ids", (txt + img, 3))? * 20.0)?;
            let rope = Rope::new(&ids, &axes, 10_000.0, ids.device())?;
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 6e-3)] {
                let make = |name: &str, tokens: usize, width: usize| {
                    random(name, (batch, tokens, width))?.to_dtype(dtype)
                };
                let norms = |name: &str| -> Result<_> {
                    Ok(Norms {
                        query: random(name, size)?.to_dtype(dtype)?,
                        key: random("k", size)?.to_dtype(dtype)?,
                    })
                };
                let (a, b) = (norms("a")?, norms("b")?);
                let bias = random("bias", width + 7)?.to_dtype(dtype)?;
                let (t, i, j) = (
                    make("t", txt, width)?,
                    make("i", img, width)?,
                    make("j", txt + img, width + 7)?,
                );
                let two = [
                    Projected {
                        qkv: &t,
                        bias: Some(&bias),
                        norms: &a,
                    },
                    Projected {
                        qkv: &i,
                        bias: None,
                        norms: &b,
                    },
                ];
                let one = [Projected {
                    qkv: &j,
                    bias: Some(&bias),
                    norms: &b,
                }];
                for streams in [&two[..], &one[..]] {
                    let (got, want) = (
                        heads(streams, num_heads, &rope)?,
                        plain::heads(streams, num_heads, &rope)?,
                    );
                    assert_eq!(got.q.dims(), [batch, num_heads, txt + img, size]);
                    close(&got.q, &want.q, tolerance)?;
                    close(&got.k, &want.k, tolerance)?;
                    close(&got.v, &want.v, tolerance)?;
                }
            }
        }
        Ok(())
    }
}
