//! The inner loops of matrix products in AVX-512 and AVX512-BF16: the one place of the crate with vector instructions
//! written by hand, behind functions that check their bounds. `gemm` decides how a product is cut into these.
//!
//! A *panel* holds up to 48 rows of the left factor, transposed: for every unit of the inner dimension one number per
//! row, so that rows are lanes of a vector. A *unit* is 32 bits: one f32, or two neighbouring bf16 for the instruction
//! that multiplies and adds pairs. The right factor is read where it lies, a unit at a time into all lanes, so weights
//! need no second copy. Sums are f32 and come out as panels.
#![expect(
    unsafe_code,
    reason = "vector instructions and raw loads; every entry checks its slices first"
)]
#![allow(
    clippy::wildcard_imports,
    reason = "the names of instructions are unmistakable"
)]
#![expect(
    clippy::unused_self,
    reason = "who has an `Avx512` may call what needs it"
)]

use std::arch::x86_64::*;
use std::mem::transmute;
use std::sync::LazyLock;

use faer::MatRef;
use half::{bf16, f16};

use super::cpu::Element;
use super::uninit::Uninit;

mod layout;

use layout::{pack_rows, pack_rows_of_pairs, packed, write_rows};

/// RowView in one vector.
pub(super) const LANES: usize = 16;
/// Most vectors side by side in a panel: with [`GROUP`] columns, 24 of 32 registers are sums.
pub(super) const VECTORS: usize = 3;
/// Columns of one call.
pub(super) const GROUP: usize = 8;

/// Proof that this CPU has AVX-512 (F, BW, DQ, VL).
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512 {
    pairs: bool,
}

/// Columns of the right factor, as they lie in memory.
#[derive(Clone, Copy)]
pub(super) enum Columns<'a> {
    /// Column n is `data[starts[n]..]`.
    Apart(&'a [f32], [usize; GROUP]),
    /// The same in bf16, two numbers to the unit.
    PairsApart(&'a [bf16], [usize; GROUP]),
    /// Column n is `data[n]`, `data[n + step]` and so on.
    Adjacent(&'a [f32], usize),
    /// The same with two bf16 in the bits of each number.
    AdjacentPairs(&'a [f32], usize),
}

/// Number formats that vectors are loaded from and stored to; computed in f32.
pub(super) trait Vector: Element {
    /// # Safety
    /// AVX-512 (F, BW, DQ, VL); the numbers that `mask` chooses, of the 16 from `from`, may be read.
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512;
    /// # Safety
    /// AVX-512 (F, BW, DQ, VL); the numbers that `mask` chooses, of the 16 from `to`, may be written.
    unsafe fn store(to: *mut Self, mask: __mmask16, x: __m512);
}

impl Vector for f32 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: as the caller promised
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn store(to: *mut Self, mask: __mmask16, x: __m512) {
        // SAFETY: as the caller promised
        unsafe { _mm512_mask_storeu_ps(to, mask, x) }
    }
}

impl Vector for bf16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: as the caller promised
        let bits = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }
    /// As [`Element::narrow`] does; the instruction of AVX512-BF16 would lose subnormal numbers.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn store(to: *mut Self, mask: __mmask16, x: __m512) {
        let bits = _mm512_castps_si512(x);
        let high = _mm512_srli_epi32::<16>(bits);
        let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
        let narrow = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
        // SAFETY: as the caller promised
        unsafe { _mm256_mask_storeu_epi16(to.cast(), mask, narrow) }
    }
}

impl Vector for f16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: as the caller promised
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn store(to: *mut Self, mask: __mmask16, x: __m512) {
        let narrow = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
        // SAFETY: as the caller promised
        unsafe { _mm256_mask_storeu_epi16(to.cast(), mask, narrow) }
    }
}

impl Avx512 {
    /// What this CPU has, if it has enough.
    pub(super) fn detect() -> Option<Self> {
        static FOUND: LazyLock<Option<Avx512>> = LazyLock::new(|| {
            let all = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let pairs = is_x86_feature_detected!("avx512bf16");
            all.then_some(Avx512 { pairs })
        });
        *FOUND
    }

    /// Whether pairs of bf16 can be multiplied.
    pub(super) fn pairs(self) -> bool {
        self.pairs
    }

    /// All that this CPU can be taken for; without AVX-512 the test counts as skipped.
    #[cfg(test)]
    pub(super) fn ways() -> Vec<Self> {
        use crate::ui::skip;
        let Some(simd) = Self::detect() else {
            skip("avx512");
            return Vec::new();
        };
        if !simd.pairs {
            skip("avx512bf16");
        }
        vec![simd, Self { pairs: false }]
    }

    /// RowView of `inner` numbers, `stride` apart, into a panel of `vectors` vectors, a unit for each number; lanes
    /// without a row are zero.
    pub(super) fn pack<T: Vector>(
        self,
        x: &[T],
        (rows, inner, stride): (usize, usize, usize),
        vectors: usize,
        panel: &mut [f32],
    ) {
        packed(x.len(), (rows, inner, stride), inner, vectors, panel);
        // SAFETY: `self` proves the instructions, `packed` the lengths
        unsafe { pack_rows(x.as_ptr(), (rows, inner, stride), vectors, panel) }
    }

    /// The same in units of two neighbouring bf16; an odd last one is paired with zero.
    pub(super) fn pack_pairs(
        self,
        x: &[bf16],
        (rows, inner, stride): (usize, usize, usize),
        vectors: usize,
        panel: &mut [f32],
    ) {
        let units = inner.div_ceil(2);
        packed(x.len(), (rows, inner, stride), units, vectors, panel);
        // SAFETY: `self` proves the instructions, `packed` the lengths
        unsafe { pack_rows_of_pairs(x.as_ptr(), (rows, inner, stride), vectors, panel) }
    }

    /// The products of a panel (`units`, `vectors` · 16) with [`GROUP`] columns: (8, `vectors` · 16), put into `out` or
    /// added to it. Each number's sum runs over the units in order, wherever it stands in the panel.
    pub(super) fn multiply(
        self,
        panel: &[f32],
        units: usize,
        vectors: usize,
        columns: Columns,
        out: &mut [f32],
        add: bool,
    ) {
        assert!(panel.len() >= units * vectors * LANES && out.len() >= GROUP * vectors * LANES);
        let (panel, out) = (panel.as_ptr(), out.as_mut_ptr());
        macro_rules! call {
            ($kernel:ident, $adjacent:literal, $start:expr, $step:expr) => {
                // SAFETY: `self` proves the instructions; panel, columns and out were measured above
                unsafe {
                    match vectors {
                        1 => $kernel::<1, $adjacent>(units, panel, $start, $step, out, add),
                        2 => $kernel::<2, $adjacent>(units, panel, $start, $step, out, add),
                        3 => $kernel::<VECTORS, $adjacent>(units, panel, $start, $step, out, add),
                        _ => panic!("a panel of {vectors} vectors"),
                    }
                }
            };
        }
        match columns {
            Columns::Apart(data, starts) => {
                assert!(starts.iter().all(|start| start + units <= data.len()));
                // SAFETY: within `data` or at its end
                let starts = starts.map(|start| unsafe { data.as_ptr().add(start) });
                call!(multiply_f32, false, &starts, 1);
            }
            Columns::PairsApart(data, starts) => {
                assert!(self.pairs && starts.iter().all(|start| start + 2 * units <= data.len()));
                // SAFETY: within `data` or at its end
                let starts = starts.map(|start| unsafe { data.as_ptr().add(start).cast() });
                call!(multiply_bf16, false, &starts, 1);
            }
            Columns::Adjacent(data, step) => {
                assert!(units == 0 || (units - 1) * step + GROUP <= data.len());
                call!(multiply_f32, true, &[data.as_ptr(); GROUP], step);
            }
            Columns::AdjacentPairs(data, step) => {
                assert!(self.pairs && (units == 0 || (units - 1) * step + GROUP <= data.len()));
                call!(multiply_bf16, true, &[data.as_ptr(); GROUP], step);
            }
        }
    }

    /// A panel of sums (columns, `vectors` · 16) as rows of `out` (rows, columns), plus those of `add`.
    pub(super) fn write<T: Vector>(
        self,
        panel: &[f32],
        vectors: usize,
        mut out: Uninit<T>,
        add: Option<MatRef<T>>,
    ) {
        let (rows, columns) = (out.nrows(), out.ncols());
        let lanes = vectors * LANES;
        assert!(rows <= lanes && panel.len() >= columns * lanes);
        let add = add.map(|add| {
            assert!(add.nrows() == rows && add.ncols() == columns);
            assert!(columns <= 1 || add.col_stride() == 1);
            (add.as_ptr(), add.row_stride())
        });
        // SAFETY: `self` proves the instructions; `out` and `add` are matrices of so many rows and columns, columns side
        // by side, and every number of `out` is written
        unsafe {
            write_rows(panel, lanes, out.raw(), (rows, columns), add);
            out.all_written();
        }
    }
}

macro_rules! kernel {
    ($name:ident, $features:literal, |$sum:ident, $a:ident, $b:ident| $multiply_add:expr) => {
        /// [`Avx512::multiply`] for one width of panel and one layout of columns.
        ///
        /// # Safety
        /// The CPU has the features; `panel` holds `units` · `V` · 16 numbers and `out` 8 · `V` · 16. `ADJACENT`:
        /// `columns[0]` points to `units` times 8 units, `step` units apart; otherwise each column to `units` units.
        #[target_feature(enable = $features)]
        unsafe fn $name<const V: usize, const ADJACENT: bool>(
            units: usize,
            panel: *const f32,
            columns: &[*const f32; GROUP],
            step: usize,
            out: *mut f32,
            add: bool,
        ) {
            let columns = *columns;
            let mut sums = [[_mm512_setzero_ps(); V]; GROUP];
            for u in 0..units {
                let mut rows = [_mm512_setzero_ps(); V];
                for (v, row) in rows.iter_mut().enumerate() {
                    // SAFETY: vector v of unit u
                    *row = unsafe { _mm512_loadu_ps(panel.add((u * V + v) * LANES)) };
                }
                for n in 0..GROUP {
                    // SAFETY: unit u of column n; read as 32 bits wherever it starts
                    let $b = _mm512_set1_ps(unsafe {
                        if ADJACENT {
                            columns[0].add(u * step + n).read_unaligned()
                        } else {
                            columns[n].add(u).read_unaligned()
                        }
                    });
                    for v in 0..V {
                        let ($sum, $a) = (sums[n][v], rows[v]);
                        sums[n][v] = $multiply_add;
                    }
                }
            }
            for (n, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    // SAFETY: vector v of column n
                    unsafe {
                        let to = out.add((n * V + v) * LANES);
                        let sum = if add {
                            _mm512_add_ps(_mm512_loadu_ps(to), *sum)
                        } else {
                            *sum
                        };
                        _mm512_storeu_ps(to, sum);
                    }
                }
            }
        }
    };
}

kernel!(multiply_f32, "avx512f", |sum, a, b| _mm512_fmadd_ps(
    a, b, sum
));
kernel!(multiply_bf16, "avx512f,avx512bf16", |sum, a, b| {
    // SAFETY: vectors of one size, any bits
    let (a, b) = unsafe {
        (
            transmute::<__m512, __m512bh>(a),
            transmute::<__m512, __m512bh>(b),
        )
    };
    _mm512_dpbf16_ps(sum, a, b)
});
