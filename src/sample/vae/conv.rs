//! Convolution as the autoencoder needs it: candle's, and a faster one for float32 on the CPU. No weights' names here.
//!
//! candle's CPU convolution gathers one number at a time, which decides how long a picture takes to decode on two cores. The fast one
//! copies whole rows into strips that stay in the cache, doubles sizes on the way, and multiplies them in place.

use candle::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Floats of unfolded input that one matrix product reads: small enough for the second-level cache.
const STRIP: usize = 1 << 18;

/// Geometry of a square convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Conv {
    pub stride: usize,
    /// Zeros before the first row and column.
    pub before: usize,
    /// Zeros after the last row and column.
    pub after: usize,
    /// Doubles rows and columns first (nearest neighbour).
    pub double: bool,
}

impl Conv {
    /// `k`×`k`, the size stays.
    pub(super) fn same(k: usize) -> Self {
        Self {
            stride: 1,
            before: k / 2,
            after: k / 2,
            double: false,
        }
    }

    /// x (b, c, h, w), weight (o, c, k, k), bias (o) → (b, o, h', w').
    pub(super) fn forward(self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        if fused(x) {
            x.contiguous()?
                .apply_op3_no_bwd(&weight.contiguous()?, &bias.contiguous()?, &self)
        } else {
            self.composed(x, weight, bias)
        }
    }

    fn composed(self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        if self.double {
            let (_, _, h, w) = x.dims4()?;
            x = x.upsample_nearest2d(2 * h, 2 * w)?;
        }
        let mut padding = self.before;
        if self.before != self.after {
            x = x
                .pad_with_zeros(2, self.before, self.after)?
                .pad_with_zeros(3, self.before, self.after)?;
            padding = 0;
        }
        x.conv2d(weight, padding, self.stride, 1, 1)?
            .broadcast_add(&bias.reshape((1, (), 1, 1))?)
    }

    fn out(self, n: usize, k: usize) -> usize {
        (n * (1 + usize::from(self.double)) + self.before + self.after - k) / self.stride + 1
    }
}

/// Whether the fused CPU operations take this tensor.
pub(super) fn fused(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32 && !x.track_op()
}

/// Sizes of one convolution.
struct Sizes {
    c: usize,
    h: usize,
    w: usize,
    k: usize,
    out_w: usize,
}

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "vae-conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        weight: &CpuStorage,
        wl: &Layout,
        bias: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (floats(x, xl)?, floats(weight, wl)?, floats(bias, bl)?);
        let (b, c, h, w) = xl.shape().dims4()?;
        let (o, ci, k, _) = wl.shape().dims4()?;
        if ci != c
            || bias.len() != o
            || h + self.before + self.after < k
            || w + self.before + self.after < k
        {
            bail!(
                "convolution {:?} does not fit a picture of {:?}",
                wl.shape(),
                xl.shape()
            )
        }
        let (out_h, out_w) = (self.out(h, k), self.out(w, k));
        let sizes = Sizes { c, h, w, k, out_w };
        let mut out = vec![0f32; b * o * out_h * out_w];
        let par = if b >= rayon::current_num_threads() {
            Par::Seq
        } else {
            Par::rayon(0)
        };
        out.par_chunks_mut((o * out_h * out_w).max(1))
            .zip(x.par_chunks((c * h * w).max(1)))
            .for_each(|(out, x)| {
                for (row, bias) in out.chunks_mut(out_h * out_w).zip(bias) {
                    row.fill(*bias);
                }
                self.picture(x, weight, out, &sizes, par);
            });
        Ok((CpuStorage::F32(out), Shape::from((b, o, out_h, out_w))))
    }
}

impl Conv {
    /// Adds the convolution of one picture (c, h, w) to `out` (o, out_h·out_w).
    fn picture(self, x: &[f32], weight: &[f32], out: &mut [f32], s: &Sizes, par: Par) {
        let depth = s.c * s.k * s.k;
        let o = weight.len() / depth;
        let pixels = out.len() / o;
        let weight = MatRef::from_row_major_slice(weight, o, depth);
        if s.k == 1 && self == Self::same(1) {
            let out = MatMut::from_row_major_slice_mut(out, o, pixels);
            let x = MatRef::from_row_major_slice(x, depth, pixels);
            faer::linalg::matmul::matmul(out, Accum::Add, weight, x, 1.0, par);
            return;
        }
        let rows = (STRIP / (depth * s.out_w).max(1)).max(1);
        let mut unfolded = vec![0f32; depth * (rows * s.out_w).min(pixels)];
        for start in (0..pixels).step_by(rows * s.out_w) {
            let n = (rows * s.out_w).min(pixels - start);
            let strip = &mut unfolded[..depth * n];
            let fill =
                |(tap, row): (usize, &mut [f32])| self.unfold(x, row, tap, start / s.out_w, s);
            if matches!(par, Par::Seq) {
                strip.chunks_mut(n).enumerate().for_each(fill);
            } else {
                strip.par_chunks_mut(n).enumerate().for_each(fill);
            }
            let end = (o - 1) * pixels + start + n;
            // faer 0.24's `from_row_major_slice_with_stride_mut` mixes up its strides and writes out of bounds
            let out =
                MatMut::from_column_major_slice_with_stride_mut(&mut out[start..end], n, o, pixels)
                    .transpose_mut();
            let strip = MatRef::from_row_major_slice(&*strip, depth, n);
            faer::linalg::matmul::matmul(out, Accum::Add, weight, strip, 1.0, par);
        }
    }

    /// What tap `tap` = (channel, ky, kx) of the kernel sees at the output rows from `first` on.
    fn unfold(self, x: &[f32], row: &mut [f32], tap: usize, first: usize, s: &Sizes) {
        let (channel, ky, kx) = (tap / (s.k * s.k), tap / s.k % s.k, tap % s.k);
        let plane = &x[channel * s.h * s.w..][..s.h * s.w];
        let shift = usize::from(self.double);
        for (y, row) in row.chunks_mut(s.out_w).enumerate() {
            let Some(y) = ((first + y) * self.stride + ky)
                .checked_sub(self.before)
                .filter(|y| y >> shift < s.h)
            else {
                row.fill(0.0);
                continue;
            };
            let line = &plane[(y >> shift) * s.w..][..s.w];
            if self.stride == 1 && !self.double {
                // columns from `left` on see the line from `skip` on
                let left = self.before.saturating_sub(kx).min(s.out_w);
                let skip = kx.saturating_sub(self.before).min(s.w);
                let n = (s.out_w - left).min(s.w - skip);
                row[..left].fill(0.0);
                row[left..left + n].copy_from_slice(&line[skip..skip + n]);
                row[left + n..].fill(0.0);
            } else {
                for (x, value) in row.iter_mut().enumerate() {
                    let x = (x * self.stride + kx)
                        .checked_sub(self.before)
                        .map(|x| x >> shift);
                    *value = x.and_then(|x| line.get(x)).copied().unwrap_or(0.0);
                }
            }
        }
    }
}

/// The values of a contiguous float32 tensor.
pub(super) fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a fused operation got a strided tensor"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::noise::Generator;
    use candle::Device;

    fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
        assert_eq!(a.dims(), b.dims());
        (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
    }

    #[test]
    fn fused_convolutions_equal_candles() -> Result<()> {
        let mut random = Generator::new(1);
        let shapes = [
            (Conv::same(3), 1, 5, 7, 9, 6, 3),
            (Conv::same(3), 3, 2, 6, 4, 20, 3),
            (Conv::same(1), 2, 8, 5, 5, 3, 1),
            (
                Conv {
                    stride: 2,
                    before: 0,
                    after: 1,
                    double: false,
                },
                2,
                4,
                8,
                6,
                4,
                3,
            ),
            (
                Conv {
                    stride: 2,
                    before: 0,
                    after: 1,
                    double: false,
                },
                1,
                4,
                7,
                5,
                4,
                3,
            ),
            (
                Conv {
                    double: true,
                    ..Conv::same(3)
                },
                2,
                4,
                5,
                3,
                4,
                3,
            ),
            // one column or row only, and more rows than one strip holds
            (Conv::same(3), 1, 3, 1, 1, 2, 3),
            (Conv::same(3), 1, 64, 40, 40, 8, 3),
        ];
        for (conv, b, c, h, w, o, k) in shapes {
            let x = random.randn((b, c, h, w), &Device::Cpu)?;
            let weight = random.randn((o, c, k, k), &Device::Cpu)?;
            let bias = random.randn(o, &Device::Cpu)?;
            let (fast, slow) = (
                conv.forward(&x, &weight, &bias)?,
                conv.composed(&x, &weight, &bias)?,
            );
            let scale = slow.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(
                far(&fast, &slow)? <= 2e-6 * scale,
                "{conv:?} {b} {c} {h} {w}"
            );
        }
        Ok(())
    }

    #[test]
    fn a_transposed_input_is_no_problem() -> Result<()> {
        let mut random = Generator::new(3);
        let x = random.randn((1, 4, 6, 5), &Device::Cpu)?.transpose(2, 3)?;
        let (weight, bias) = (
            random.randn((2, 4, 3, 3), &Device::Cpu)?,
            random.randn(2, &Device::Cpu)?,
        );
        assert!(
            far(
                &Conv::same(3).forward(&x, &weight, &bias)?,
                &Conv::same(3).composed(&x, &weight, &bias)?
            )? <= 1e-5
        );
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let (weight, bias) = (zeros(&[2, 3, 3, 3])?, zeros(&[2])?);
        assert!(
            Conv::same(3)
                .forward(&zeros(&[1, 4, 5, 5])?, &weight, &bias)
                .is_err()
        );
        Ok(())
    }
}
