//! What the fused CPU kernels share: reading candle storage as rows, number formats, vector instructions, parallel rows.
//! Each kernel stands in the file of its operation; `plain` holds the compositions that they are compared with.
//!
//! Kernels are plain loops over slices. [`vectorized`] compiles them once per instruction set and picks at run time,
//! so a binary built for any x86-64 still uses AVX-512 if the CPU has it; functions called inside must be
//! `#[inline(always)]`, otherwise they are compiled for the baseline only.

use std::sync::LazyLock;

use candle::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

use super::uninit::{Uninit, filled};

/// Below this many elements a kernel runs on the calling thread: waking others would cost more than it saves.
const PARALLEL_FROM: usize = 1 << 14;

/// Lanes of an accumulator: one AVX-512 register of f32, two of AVX2, four of NEON or SSE.
pub(super) const LANES: usize = 16;

/// A stored number format. The kernels compute in f32.
pub(super) trait Element: WithDType {
    fn to_f32(self) -> f32;
    fn narrow(x: f32) -> Self;
    /// The slice itself if it is f32 already.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
    /// The slice itself if it is bf16.
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
    fn as_f32(x: &[Self]) -> Option<&[f32]> {
        Some(x)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Element for bf16 {
    fn as_bf16(x: &[Self]) -> Option<&[bf16]> {
        Some(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// Rounds to nearest, ties to even, in integer arithmetic that the compiler turns into vector instructions.
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        Self::from_bits(if x.is_nan() { quiet_nan } else { rounded } as u16)
    }
}

/// Whether a fused CPU kernel may run: all operands on the CPU, of one floating format that the kernels know, and none
/// in a gradient graph (the kernels have no backward pass; candle would drop the gradient without a word).
pub(super) fn fusable<'a>(operands: impl IntoIterator<Item = &'a Tensor>) -> Option<DType> {
    let mut dtype = None;
    for x in operands {
        let known = matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
        if !known || !x.device().is_cpu() || x.track_op() || dtype.is_some_and(|d| d != x.dtype()) {
            return None;
        }
        dtype = Some(x.dtype());
    }
    dtype
}

/// Calls `$kernel::<T>($args)` with the Rust type of `$dtype`, which [`fusable`] has vetted.
macro_rules! by_dtype {
    ($dtype:expr, $kernel:ident($($arg:expr),* $(,)?)) => {
        match $dtype {
            candle::DType::BF16 => $kernel::<half::bf16>($($arg),*),
            candle::DType::F16 => $kernel::<half::f16>($($arg),*),
            _ => $kernel::<f32>($($arg),*),
        }
    };
}
pub(super) use by_dtype;

/// A locked CPU tensor; keeps the storage readable while [`RowView`] borrow from it.
pub(super) struct Operand<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Operand<'a> {
    pub(super) fn new(x: &'a Tensor) -> Self {
        let (storage, layout) = x.storage_and_layout();
        Self { storage, layout }
    }

    fn cpu(&self) -> Result<&CpuStorage> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => candle::bail!("a CPU kernel was given a tensor of another device"),
        }
    }

    /// All elements of a contiguous tensor of bytes.
    pub(super) fn bytes(&self) -> Result<&[u8]> {
        let data = self.cpu()?.as_slice::<u8>()?;
        match self.layout.contiguous_offsets() {
            Some((start, end)) => Ok(&data[start..end]),
            None => candle::bail!("a CPU kernel needs a contiguous tensor"),
        }
    }

    /// All elements of a contiguous tensor.
    pub(super) fn slice<T: Element>(&self) -> Result<&[T]> {
        let data = self.cpu()?.as_slice::<T>()?;
        match self.layout.contiguous_offsets() {
            Some((start, end)) => Ok(&data[start..end]),
            None => candle::bail!("a CPU kernel needs a contiguous tensor"),
        }
    }

    /// The tensor as rows of its last dimension: (batch, tokens, width), (batch, width) read once for all tokens of a
    /// sample, or (width,) read for all.
    pub(super) fn rows<T: Element>(&self) -> Result<RowView<'_, T>> {
        let data = self.cpu()?.as_slice::<T>()?;
        let data = &data[self.layout.start_offset()..];
        let (dims, strides) = (self.layout.dims(), self.layout.stride());
        let (batch, token, width) = match (dims, strides) {
            ([_, _, w], [b, n, 1]) => (*b, *n, *w),
            ([_, w], [b, 1]) => (*b, 0, *w),
            ([w], [1]) => (0, 0, *w),
            // a dimension of size one may carry any stride
            ([_, _, 1], [b, n, _]) => (*b, *n, 1),
            ([_, 1], [b, _]) => (*b, 0, 1),
            ([1], _) => (0, 0, 1),
            _ => candle::bail!(
                "a CPU kernel needs rows that lie in one piece, found shape {dims:?}, strides {strides:?}"
            ),
        };
        Ok(RowView {
            data,
            batch,
            token,
            width,
        })
    }
}

/// RowView of an [`Operand`], possibly strided (a narrowed view) or repeated.
#[derive(Clone, Copy)]
pub(super) struct RowView<'a, T> {
    data: &'a [T],
    batch: usize,
    token: usize,
    pub(super) width: usize,
}

impl<'a, T> RowView<'a, T> {
    #[inline(always)]
    pub(super) fn row(&self, batch: usize, token: usize) -> &'a [T] {
        let start = batch * self.batch + token * self.token;
        &self.data[start..start + self.width]
    }
}

/// Runs a closure compiled for the best instruction set of this CPU.
#[inline(always)]
pub(super) fn vectorized<R>(kernel: impl FnOnce() -> R) -> R {
    static ARCH: LazyLock<pulp::Arch> = LazyLock::new(pulp::Arch::new);
    ARCH.dispatch(kernel)
}

/// The rows that `kernel(row index, row)` writes, in parallel if there is enough of it.
pub(super) fn for_rows<T: Element>(
    rows: usize,
    width: usize,
    kernel: impl Fn(usize, &mut [T]) + Sync + Send,
) -> Vec<T> {
    let rows_per_task = PARALLEL_FROM.div_ceil(width.max(1));
    let task = |(i, band): (usize, Uninit<T>)| {
        vectorized(
            #[inline(always)]
            || {
                band.rows(
                    T::zero(),
                    #[inline(always)]
                    |row, out| kernel(i * rows_per_task + row, out),
                );
            },
        );
    };
    filled(rows, width, |out| {
        if rows * width < 2 * PARALLEL_FROM {
            out.bands(rows_per_task).enumerate().for_each(task);
        } else {
            out.par_bands(rows_per_task).enumerate().for_each(task);
        }
    })
}

/// Sum over a row of `f(x)`, in [`LANES`] independent accumulators.
#[inline(always)]
pub(super) fn sum_map<T: Element>(row: &[T], f: impl Fn(f32) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (a, x) in acc.iter_mut().zip(chunk) {
            *a += f(x.to_f32());
        }
    }
    for (a, x) in acc.iter_mut().zip(rest) {
        *a += f(x.to_f32());
    }
    // in halves: additions one after the other would wait for each other
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            acc[i] += acc[i + half];
        }
        half /= 2;
    }
    acc[0]
}

/// Sum over two rows of x·y, in [`LANES`] independent accumulators.
#[inline(always)]
pub(super) fn sum_product(x: &[f32], y: &[f32]) -> f32 {
    let mut acc = [0f32; LANES];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x.iter().zip(y) {
        for ((a, x), y) in acc.iter_mut().zip(x).zip(y) {
            *a += x * y;
        }
    }
    for ((a, x), y) in acc.iter_mut().zip(x_rest).zip(y_rest) {
        *a += x * y;
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            acc[i] += acc[i + half];
        }
        half /= 2;
    }
    acc[0]
}

/// Largest value of a row.
#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (a, x) in acc.iter_mut().zip(chunk) {
            *a = if *x > *a { *x } else { *a };
        }
    }
    for (a, x) in acc.iter_mut().zip(rest) {
        *a = if *x > *a { *x } else { *a };
    }
    acc.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// eˣ to about one unit in the last place, free of branches (arguments are clamped to the range of normal f32).
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by its Taylor polynomial, 2ⁿ by the exponent bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding and taking it off rounds to a whole number
    const LN2_HIGH: f32 = 0.693_359_4; // few bits, so that n·LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5] {
        p = p * r + c;
    }
    let e = (p * r) * r + r + 1.0;
    // the low bits of `shifted` hold n, a whole number in [-126, 127]; a cast from f32 would not be vectorised
    let power = f32::from_bits(
        shifted
            .to_bits()
            .wrapping_sub(ROUND.to_bits())
            .wrapping_add(127)
            << 23,
    );
    e * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (exp(x), f64::from(x).exp());
            let error = (f64::from(got) - want).abs() / want;
            assert!(error < 2e-7, "exp({x}): {got} instead of {want}");
        }
        assert!(exp(-1e9) < 1e-37);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for i in 0..100_000u32 {
            let x = f32::from_bits(i.wrapping_mul(0x9E37_79B9));
            let (got, want) = (<bf16 as Element>::narrow(x), bf16::from_f32(x));
            assert!(
                got == want || (got.is_nan() && want.is_nan()),
                "{x}: {got} instead of {want}"
            );
        }
    }

    #[test]
    fn lane_sums_cover_the_rest() {
        let row: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert!((sum_map(&row, |x| x) - 666.0).abs() < 1e-3);
        assert!((max(&row) - 36.0).abs() < 1e-6);
    }
}
