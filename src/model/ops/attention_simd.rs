//! Softmax attention in tiles on the inner loops of `avx512`: scores of some hundred keys at a time, with a running
//! maximum and sum for every query, so that nothing larger than the second cache is written.
//!
//! Queries are lanes. The scores of a panel of queries come out as (keys, lanes), which is how the product with the
//! values wants its left factor, and maximum and sum of a query need no exchange between lanes.

use std::cell::RefCell;

use rayon::prelude::*;

use super::avx512::{Avx512, Columns, GROUP, LANES, VECTORS, Vector};
use super::cpu::{Element, exp, vectorized};
use super::gemm::{room, slice_to_f32};
use super::uninit::Uninit;
use half::bf16;

/// Queries of a full panel.
const PANEL: usize = VECTORS * LANES;
/// Queries that share a pass over keys and values, whole panels.
const TALL: usize = 4 * PANEL;
/// Keys of one step: 48 KB of scores.
const KEYS: usize = 256;

#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    weights: Vec<f32>,
    attended: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Largest score so far, and the sum of exponentials of all scores less that, of the queries of one vector.
#[derive(Clone, Copy)]
struct Running {
    max: [f32; LANES],
    sum: [f32; LANES],
}

/// Whether heads of this size can be taken.
pub(super) fn fits(size: usize) -> bool {
    size > 0 && size.is_multiple_of(GROUP)
}

/// `softmax(q·kᵀ·scale)·v` for q, k, v (batch, heads, tokens, size) each, to `out` (batch · tokens, heads · size).
/// Scores, softmax and sums in f32; in bf16 with pairs the weights are rounded to it before they meet the values.
pub(super) fn attention<T: Vector>(
    simd: Avx512,
    [q, k, v]: [&[T]; 3],
    (heads, tokens, size): (usize, usize, usize),
    scale: f32,
    out: Uninit<T>,
) {
    let block = tokens * size;
    let batch = out.nrows() / tokens.max(1);
    assert!(fits(size) && out.ncols() == heads * size);
    assert!([q, k, v].iter().all(|x| x.len() == batch * heads * block));
    let panels = (batch * heads * tokens).div_ceil(PANEL * 4 * rayon::current_num_threads());
    let tall = panels.clamp(1, TALL / PANEL) * PANEL;
    let samples = out.par_bands(tokens.max(1)).enumerate();
    samples.for_each(|(b, out)| {
        let columns = out.par_strips(size).enumerate();
        columns.for_each(|(head, out)| {
            let [q, k, v] = [q, k, v].map(|x| &x[(b * heads + head) * block..][..block]);
            let strips = out.par_bands(tall).enumerate();
            strips.for_each(|(i, out)| {
                let q = &q[i * tall * size..][..out.nrows() * size];
                SCRATCH
                    .with_borrow_mut(|scratch| strip(simd, [q, k, v], size, scale, out, scratch));
            });
        });
    });
}

/// The queries of one task, [`TALL`] at most.
fn strip<T: Vector>(
    simd: Avx512,
    [q, k, v]: [&[T]; 3],
    size: usize,
    scale: f32,
    out: Uninit<T>,
    scratch: &mut Scratch,
) {
    let pairs = if simd.pairs() { T::as_bf16(q) } else { None };
    let units = if pairs.is_some() { size / 2 } else { size };
    let (rows, tokens) = (out.nrows(), k.len() / size);
    let Scratch {
        queries,
        scores,
        weights,
        attended,
        keys,
        values,
    } = scratch;
    let lanes_of = |rows: usize| rows.next_multiple_of(LANES);
    let lanes = lanes_of(rows);
    let queries = room(queries, lanes * units);
    let attended = room(attended, lanes * size);
    let scores = room(scores, PANEL * KEYS);
    let panels = || {
        (0..rows).step_by(PANEL).map(|row| {
            let here = (rows - row).min(PANEL);
            (row, here, lanes_of(here) / LANES)
        })
    };
    for (row, here, vectors) in panels() {
        let (shape, panel) = ((here, size, size), &mut queries[row * units..]);
        match pairs {
            Some(q) => simd.pack_pairs(&q[row * size..], shape, vectors, panel),
            None => simd.pack(&q[row * size..], shape, vectors, panel),
        }
    }
    let mut running = [Running {
        max: [f32::NEG_INFINITY; LANES],
        sum: [0.0; LANES],
    }; TALL / LANES];
    for start in (0..tokens).step_by(KEYS) {
        let count = (tokens - start).min(KEYS);
        let k = &k[start * size..][..count * size];
        let v = &v[start * size..][..count * size];
        let (k, v) = match (
            T::as_bf16(k).zip(T::as_bf16(v)),
            T::as_f32(k).zip(T::as_f32(v)),
        ) {
            (Some((k, v)), _) if pairs.is_some() => {
                let of_pairs = count.div_ceil(2);
                let values = room(values, of_pairs * size);
                paired_rows(v, size, values);
                (Factor::Pairs(k), &*values)
            }
            (_, Some((k, v))) => (Factor::Singles(k), v),
            _ => {
                let (keys, values) = (room(keys, count * size), room(values, count * size));
                slice_to_f32(k, keys);
                slice_to_f32(v, values);
                (Factor::Singles(keys), &*values)
            }
        };
        for (row, _, vectors) in panels() {
            let lanes = vectors * LANES;
            let queries = &queries[row * units..];
            for group in (0..count).step_by(GROUP) {
                // the last group repeats the last key, whose scores are not used
                let starts = std::array::from_fn(|n| (group + n).min(count - 1) * size);
                let columns = match k {
                    Factor::Pairs(k) => Columns::PairsApart(k, starts),
                    Factor::Singles(k) => Columns::Apart(k, starts),
                };
                let scores = &mut scores[group * lanes..];
                simd.multiply(queries, units, vectors, columns, scores, false);
            }
            let scores = &mut scores[..count * lanes];
            let attended = &mut attended[row * size..][..lanes * size];
            let running = &mut running[row / LANES..][..vectors];
            vectorized(
                #[inline(always)]
                || exponentials(scores, scale, start == 0, running, attended),
            );
            let (weights, units) = if pairs.is_some() {
                let weights = room(weights, count.div_ceil(2) * lanes);
                paired_lanes(scores, lanes, weights);
                (&*weights, count.div_ceil(2))
            } else {
                (&*scores, count)
            };
            for group in (0..size).step_by(GROUP) {
                let columns = if pairs.is_some() {
                    Columns::AdjacentPairs(&v[group..], size)
                } else {
                    Columns::Adjacent(&v[group..], size)
                };
                let attended = &mut attended[group * lanes..];
                simd.multiply(weights, units, vectors, columns, attended, start > 0);
            }
        }
    }
    for ((row, _, vectors), out) in panels().zip(out.bands(PANEL)) {
        let attended = &mut attended[row * size..][..vectors * LANES * size];
        let running = &running[row / LANES..][..vectors];
        vectorized(
            #[inline(always)]
            || {
                for (at, out) in attended.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    let sum = &running[at % running.len()].sum;
                    for (out, sum) in out.iter_mut().zip(sum) {
                        *out /= sum;
                    }
                }
            },
        );
        simd.write(attended, vectors, out, None);
    }
}

/// The keys of a step, as they are multiplied.
#[derive(Clone, Copy)]
enum Factor<'a> {
    Singles(&'a [f32]),
    Pairs(&'a [bf16]),
}

/// Replaces scores (keys, lanes) by exp(scale · (score − max)), with the maximum over these and all before; brings sum
/// and what was attended to so far (size, lanes) to that maximum, and adds to the sum. At the `first` keys nothing was
/// attended to, and there may be anything in its place.
#[inline(always)]
fn exponentials(
    scores: &mut [f32],
    scale: f32,
    first: bool,
    running: &mut [Running],
    attended: &mut [f32],
) {
    let vectors = running.len();
    let scores = scores.as_chunks_mut::<LANES>().0;
    let attended = attended.as_chunks_mut::<LANES>().0;
    for (v, running) in running.iter_mut().enumerate() {
        let mut max = running.max;
        for score in scores[v..].iter().step_by(vectors) {
            for (max, x) in max.iter_mut().zip(score) {
                *max = if *x > *max { *x } else { *max };
            }
        }
        if max.iter().zip(&running.max).any(|(new, old)| new > old) {
            let mut factor = [0f32; LANES];
            for ((factor, old), new) in factor.iter_mut().zip(&running.max).zip(&max) {
                *factor = exp((old - new) * scale);
            }
            if !first {
                for out in attended[v..].iter_mut().step_by(vectors) {
                    for (out, factor) in out.iter_mut().zip(&factor) {
                        *out *= factor;
                    }
                }
            }
            for (sum, factor) in running.sum.iter_mut().zip(&factor) {
                *sum *= factor;
            }
            running.max = max;
        }
        let mut sum = [0f32; LANES];
        for score in scores[v..].iter_mut().step_by(vectors) {
            for ((x, max), sum) in score.iter_mut().zip(&max).zip(&mut sum) {
                *x = exp((*x - max) * scale);
                *sum += *x;
            }
        }
        for (total, sum) in running.sum.iter_mut().zip(&sum) {
            *total += sum;
        }
    }
}

/// Two bf16 in the bits of one number, the first in the lower half.
#[inline(always)]
fn pair(low: bf16, high: bf16) -> f32 {
    f32::from_bits(u32::from(low.to_bits()) | (u32::from(high.to_bits()) << 16))
}

/// Neighbouring rows (keys) of `width` numbers joined to pairs; an odd last one is paired with zero.
fn paired_rows(x: &[bf16], width: usize, out: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (x, out) in x.chunks(2 * width).zip(out.chunks_exact_mut(width)) {
                let (low, high) = x.split_at(width);
                if high.is_empty() {
                    for (out, low) in out.iter_mut().zip(low) {
                        *out = pair(*low, bf16::ZERO);
                    }
                }
                for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
                    *out = pair(*low, *high);
                }
            }
        },
    );
}

/// The same of f32, rounded.
fn paired_lanes(x: &[f32], width: usize, out: &mut [f32]) {
    let round = |x: f32| <bf16 as Element>::narrow(x);
    vectorized(
        #[inline(always)]
        || {
            for (x, out) in x.chunks(2 * width).zip(out.chunks_exact_mut(width)) {
                let (low, high) = x.split_at(width);
                if high.is_empty() {
                    for (out, low) in out.iter_mut().zip(low) {
                        *out = pair(round(*low), bf16::ZERO);
                    }
                }
                for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
                    *out = pair(round(*low), round(*high));
                }
            }
        },
    );
}
