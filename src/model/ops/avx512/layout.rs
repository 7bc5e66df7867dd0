//! How rows become panels and panels rows: transpositions of 16 vectors of 16 numbers.

use std::arch::x86_64::*;

use half::bf16;

use super::{LANES, Vector};

/// The first `n` lanes, all if there are more.
fn first(n: usize) -> __mmask16 {
    if n >= LANES { !0 } else { (1 << n) - 1 }
}

/// Panics unless rows so long and so far apart lie within `len` numbers and `units` of them fit into `panel`.
pub(super) fn packed(
    len: usize,
    (rows, inner, stride): (usize, usize, usize),
    units: usize,
    vectors: usize,
    panel: &[f32],
) {
    assert!(rows <= vectors * LANES && panel.len() >= units * vectors * LANES);
    assert!(rows == 0 || (rows - 1) * stride + inner <= len);
}

/// # Safety
/// AVX-512 (F, BW, DQ, VL); what [`packed`] makes sure of.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_rows<T: Vector>(
    x: *const T,
    (rows, inner, stride): (usize, usize, usize),
    vectors: usize,
    panel: &mut [f32],
) {
    let load = |row: usize, from: usize| {
        // SAFETY: the numbers from `from` of a row, those chosen within the row
        unsafe { T::load(x.add(row * stride + from), first(inner - from)) }
    };
    // SAFETY: the caller's
    unsafe { transposed_into(rows, inner, vectors, panel, 1, load) }
}

/// # Safety
/// AVX-512 (F, BW, DQ, VL); what [`packed`] makes sure of.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_rows_of_pairs(
    x: *const bf16,
    (rows, inner, stride): (usize, usize, usize),
    vectors: usize,
    panel: &mut [f32],
) {
    let load = |row: usize, from: usize| {
        let left = inner - from;
        let mask = if left >= 32 { !0 } else { (1u32 << left) - 1 };
        // SAFETY: the numbers from `from` of a row, those chosen within the row
        let bits = unsafe { _mm512_maskz_loadu_epi16(mask, x.add(row * stride + from).cast()) };
        _mm512_castsi512_ps(bits)
    };
    // SAFETY: the caller's
    unsafe { transposed_into(rows, inner.div_ceil(2), vectors, panel, 2, load) }
}

/// Fills a panel from `load(row, number)`, which reads a vector of units along a row, `per_unit` numbers in each.
///
/// # Safety
/// AVX-512 (F, BW, DQ, VL); `panel` holds `units` · `vectors` · 16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
unsafe fn transposed_into(
    rows: usize,
    units: usize,
    vectors: usize,
    panel: &mut [f32],
    per_unit: usize,
    load: impl Fn(usize, usize) -> __m512,
) {
    for vector in 0..vectors {
        let above = vector * LANES;
        let here = rows.saturating_sub(above).min(LANES);
        for start in (0..units).step_by(LANES) {
            let mut tile = [_mm512_setzero_ps(); LANES];
            for (row, tile) in tile[..here].iter_mut().enumerate() {
                *tile = load(above + row, start * per_unit);
            }
            let tile = transposed(&tile);
            for (unit, tile) in tile[..LANES.min(units - start)].iter().enumerate() {
                let at = (start + unit) * vectors * LANES + above;
                // SAFETY: before the end of the last unit's lanes
                unsafe { _mm512_storeu_ps(panel.as_mut_ptr().add(at), *tile) }
            }
        }
    }
}

/// # Safety
/// AVX-512 (F, BW, DQ, VL); `panel` holds (columns, `lanes`), `out` and `add` point to `rows` ≤ `lanes` rows of `columns`
/// numbers, as far apart as they say.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn write_rows<T: Vector>(
    panel: &[f32],
    lanes: usize,
    (out, stride): (*mut T, isize),
    (rows, columns): (usize, usize),
    add: Option<(*const T, isize)>,
) {
    for above in (0..rows).step_by(LANES) {
        for start in (0..columns).step_by(LANES) {
            let here = LANES.min(columns - start);
            let mut tile = [_mm512_setzero_ps(); LANES];
            for (column, tile) in tile[..here].iter_mut().enumerate() {
                // SAFETY: a vector of column `start + column`
                *tile = unsafe {
                    _mm512_loadu_ps(panel.as_ptr().add((start + column) * lanes + above))
                };
            }
            let tile = transposed(&tile);
            for (row, x) in tile[..LANES.min(rows - above)].iter().enumerate() {
                // SAFETY: the numbers from `start` of row `above + row`, those chosen within the row
                unsafe {
                    let row = (above + row) as isize;
                    let sum = match add {
                        Some((add, stride)) => {
                            let from = add.offset(row * stride).add(start);
                            _mm512_add_ps(T::load(from, first(here)), *x)
                        }
                        None => *x,
                    };
                    T::store(out.offset(row * stride).add(start), first(here), sum);
                }
            }
        }
    }
}

/// Rows and columns of 16 vectors exchanged: within pairs, within fours, then the four quarters of a vector.
#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(rows: &[__m512; LANES]) -> [__m512; LANES] {
    let wide = |x: __m512| _mm512_castps_pd(x);
    let (mut pairs, mut fours, mut out) = (*rows, *rows, *rows);
    for i in (0..LANES).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for i in (0..LANES).step_by(4) {
        for half in 0..2 {
            let (a, b) = (wide(pairs[i + half]), wide(pairs[i + 2 + half]));
            fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // quarter q of fours[4 i + j] is column 4 q + j of rows 4 i to 4 i + 3
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let (ab_low, cd_low) = (
            _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
            _mm512_shuffle_f32x4::<0b01_00_01_00>(c, d),
        );
        let (ab_high, cd_high) = (
            _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
            _mm512_shuffle_f32x4::<0b11_10_11_10>(c, d),
        );
        out[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_low, cd_low);
        out[4 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_low, cd_low);
        out[8 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_high, cd_high);
        out[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_high, cd_high);
    }
    out
}
