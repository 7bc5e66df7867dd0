//! Products with rows of weights, cut into tiles that stay in the caches: how work is shared out and in which order the
//! inner loops of `avx512` run. If the CPU lacks those, or has them for f32 alone, weights are converted to f32 a tile at a
//! time, never as a whole.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::avx512::{Avx512, Columns, GROUP, LANES, Vector};
use super::cpu::vectorized;
use super::gelu::gelu_of;
use super::uninit::Uninit;

mod caches;

use caches::{CACHES, Caches, WIDE, in_pairs};

/// Buffers of one thread, kept from product to product.
#[derive(Default)]
struct Scratch {
    panels: Vec<f32>,
    /// Whose they are: the call and its first row.
    packed: Option<(u64, usize)>,
    sums: Vec<f32>,
    as_f32: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// At least `len` numbers of a buffer, whatever they are.
pub(super) fn room(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// What becomes of the products.
#[derive(Clone, Copy)]
pub(super) enum Then<'a, T> {
    /// They are the result.
    Put,
    /// They are added to these.
    Add(MatRef<'a, T>),
    /// GELU of them and a bias.
    Gelu(Option<&'a [T]>),
}

impl<T> Then<'_, T> {
    /// The same for a part of the result.
    fn part(&self, row: usize, column: usize, rows: usize, columns: usize) -> Self {
        match self {
            Self::Put => Self::Put,
            Self::Add(add) => Self::Add(add.submatrix(row, column, rows, columns)),
            Self::Gelu(bias) => Self::Gelu(bias.map(|bias| &bias[column..][..columns])),
        }
    }
}

/// `x·weightᵀ` to `out`: `x` (rows, inner), `weight` (columns, inner), both row after row, to `out`
/// (rows, columns). Summed in f32 and rounded once. Every number is the same however the work is cut.
pub(super) fn times_transposed<T: Vector>(
    x: &[T],
    weight: &[T],
    inner: usize,
    out: Uninit<T>,
    then: Then<T>,
) {
    by(Avx512::detect(), x, weight, inner, out, then);
}

fn by<T: Vector>(
    simd: Option<Avx512>,
    x: &[T],
    weight: &[T],
    inner: usize,
    out: Uninit<T>,
    then: Then<T>,
) {
    let (rows, columns) = (out.nrows(), out.ncols());
    assert!(x.len() >= rows * inner && weight.len() >= columns * inner);
    if rows == 0 || columns == 0 {
        return;
    }
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let threads = rayon::current_num_threads();
    let (tall, wide) = CACHES.cut(rows, inner, columns, threads);
    let tile = |row: usize, column: usize, out: Uninit<T>| {
        let (rows, columns) = (out.nrows(), out.ncols());
        let x = &x[row * inner..][..rows * inner];
        let weight = &weight[column * inner..][..columns * inner];
        let then = then.part(row, column, rows, columns);
        SCRATCH.with_borrow_mut(|scratch| match simd {
            Some(simd) => in_panels(simd, [x, weight], (call, row), inner, out, then, scratch),
            None => portable(x, weight, inner, out, then, scratch),
        });
    };
    if tall >= rows && wide >= columns {
        return tile(0, 0, out);
    }
    out.par_bands(tall).enumerate().for_each(|(i, band)| {
        let tiles = band.par_strips(wide).enumerate();
        tiles.for_each(|(j, out)| tile(i * tall, j * wide, out));
    });
}

/// One task by the inner loops of `avx512`: rows from the `first` on of this `call`.
fn in_panels<T: Vector>(
    simd: Avx512,
    [x, weight]: [&[T]; 2],
    (call, first): (u64, usize),
    inner: usize,
    out: Uninit<T>,
    then: Then<T>,
    scratch: &mut Scratch,
) {
    let pairs = if in_pairs::<T>(simd, inner) {
        T::as_bf16(x).zip(T::as_bf16(weight))
    } else {
        None
    };
    let Caches { panel, band, deep } = CACHES;
    let units = if pairs.is_some() { inner / 2 } else { inner };
    let (rows, columns) = (out.nrows(), out.ncols());
    // a panel has whole vectors of lanes
    let lanes_of = |rows: usize| rows.next_multiple_of(LANES);
    let most = lanes_of(rows).min(band);
    let panels = room(&mut scratch.panels, most * units);
    let sums = room(
        &mut scratch.sums,
        most * columns.next_multiple_of(GROUP).min(WIDE),
    );
    for (i, out) in out.bands(band).enumerate() {
        let (top, rows) = (i * band, out.nrows());
        let of_panels = || {
            (0..rows).step_by(panel).map(|row| {
                let here = (rows - row).min(panel);
                (row, here, lanes_of(here) / LANES)
            })
        };
        let packed = Some((call, first + top));
        let repack = scratch.packed.replace((call, first + top)) != packed;
        for (row, here, vectors) in of_panels().filter(|_| repack) {
            let panel = &mut panels[row * units..];
            let shape = (here, inner, inner);
            let from = (top + row) * inner;
            match pairs {
                Some((x, _)) => simd.pack_pairs(&x[from..], shape, vectors, panel),
                None => simd.pack(&x[from..], shape, vectors, panel),
            }
        }
        for (i, out) in out.strips(WIDE).enumerate() {
            let (left, columns) = (i * WIDE, out.ncols());
            let padded = columns.next_multiple_of(GROUP);
            for start in (0..units).step_by(deep) {
                let units_here = (units - start).min(deep);
                for group in (0..columns).step_by(GROUP) {
                    // the last group repeats its last column, whose sums are not written
                    let column = |n: usize| left + (group + n).min(columns - 1);
                    let group_columns = match (pairs, T::as_f32(weight)) {
                        (Some((_, weight)), _) => Columns::PairsApart(
                            weight,
                            std::array::from_fn(|n| column(n) * inner + 2 * start),
                        ),
                        (None, Some(weight)) => Columns::Apart(
                            weight,
                            std::array::from_fn(|n| column(n) * inner + start),
                        ),
                        (None, None) => {
                            let as_f32 = room(&mut scratch.as_f32, GROUP * deep);
                            for (n, as_f32) in as_f32.chunks_exact_mut(deep).enumerate() {
                                slice_to_f32(
                                    &weight[column(n) * inner + start..][..units_here],
                                    as_f32,
                                );
                            }
                            Columns::Apart(as_f32, std::array::from_fn(|n| n * deep))
                        }
                    };
                    for (row, _, vectors) in of_panels() {
                        let lanes = vectors * LANES;
                        simd.multiply(
                            &panels[row * units + start * lanes..],
                            units_here,
                            vectors,
                            group_columns,
                            &mut sums[row * padded + group * lanes..],
                            start > 0,
                        );
                    }
                }
            }
            for ((row, here, vectors), out) in of_panels().zip(out.bands(panel)) {
                let lanes = vectors * LANES;
                let sums = &mut sums[row * padded..][..columns * lanes];
                let add = match then.part(top + row, left, here, columns) {
                    Then::Put => None,
                    Then::Add(add) => Some(add),
                    Then::Gelu(bias) => {
                        vectorized(
                            #[inline(always)]
                            || gelu_of_columns(sums, lanes, bias),
                        );
                        None
                    }
                };
                simd.write(sums, vectors, out, add);
            }
        }
    }
}

/// GELU of sums (columns, lanes), and of a bias for each column.
#[inline(always)]
fn gelu_of_columns<T: Vector>(sums: &mut [f32], lanes: usize, bias: Option<&[T]>) {
    for (column, sums) in sums.chunks_exact_mut(lanes).enumerate() {
        let bias = bias.map_or(0.0, |bias| bias[column].to_f32());
        for sums in sums.as_chunks_mut::<LANES>().0 {
            for x in sums {
                *x = gelu_of(*x + bias);
            }
        }
    }
}

/// `x` as f32.
pub(super) fn slice_to_f32<T: Vector>(x: &[T], out: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (out, x) in out.iter_mut().zip(x) {
                *out = x.to_f32();
            }
        },
    );
}

/// One task without `avx512`: the portable reference.
fn portable<T: Vector>(
    x: &[T],
    weight: &[T],
    inner: usize,
    out: Uninit<T>,
    then: Then<T>,
    scratch: &mut Scratch,
) {
    let rows = out.nrows();
    scratch.packed = None;
    for (i, out) in out.strips(WIDE).enumerate() {
        let (left, columns) = (i * WIDE, out.ncols());
        let weight = &weight[left * inner..][..columns * inner];
        let x = match T::as_f32(x) {
            Some(x) => x,
            None => {
                let wide = room(&mut scratch.panels, rows * inner);
                if left == 0 {
                    slice_to_f32(x, wide);
                }
                wide
            }
        };
        let weight = match T::as_f32(weight) {
            Some(weight) => weight,
            None => {
                let wide = room(&mut scratch.as_f32, columns * inner);
                slice_to_f32(weight, wide);
                wide
            }
        };
        let sums = room(&mut scratch.sums, rows * columns);
        matmul(
            MatMut::from_row_major_slice_mut(sums, rows, columns),
            Accum::Replace,
            MatRef::from_row_major_slice(x, rows, inner),
            MatRef::from_row_major_slice(weight, columns, inner).transpose(),
            1.0,
            Par::Seq,
        );
        let then = then.part(0, left, rows, columns);
        out.rows(T::zero(), |row, out| {
            let sums = &sums[row * columns..][..columns];
            for (column, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
                let x = match then {
                    Then::Put => *sum,
                    Then::Add(add) => add[(row, column)].to_f32() + sum,
                    Then::Gelu(None) => gelu_of(*sum),
                    Then::Gelu(Some(bias)) => gelu_of(sum + bias[column].to_f32()),
                };
                *out = T::narrow(x);
            }
        });
    }
}

#[cfg(test)]
mod tests;
