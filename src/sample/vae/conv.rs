//! Convolution as the autoencoder needs it: candle's, and a faster one for float32 on the CPU. No weights' names here.
//!
//! candle's CPU convolution gathers one number at a time, which decides how long an image takes to decode on two cores. The fast one
//! copies whole rows into strips that stay in the cache, doubles sizes on the way, and multiplies them in place.

use candle::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use faer::{Accum, MatMut, MatRef, Par, prelude::*};
use rayon::prelude::*;

/// Numbers of unfolded input that candle's convolution writes at once. It counts them in 32 bits, which an image of two
/// million pixels exceeds, and eight times as many would be gigabytes.
pub(super) const MAX_UNFOLDED: usize = 1 << 27;

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
            self.composed(x, weight, bias, MAX_UNFOLDED)
        }
    }

    /// A strip of rows at a time, so that at most `unfolded` numbers of unfolded input exist, or those of one row.
    fn composed(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        unfolded: usize,
    ) -> Result<Tensor> {
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
        let (b, c, h, w) = x.dims4()?;
        let (k, bias) = (weight.dim(2)?, bias.reshape((1, (), 1, 1))?);
        if h + 2 * padding < k || w + 2 * padding < k {
            bail!(
                "convolution {:?} does not fit an image of {w}×{h}",
                weight.shape()
            )
        }
        let [height, width] = [h, w].map(|n| (n + 2 * padding - k) / self.stride + 1);
        let rows = (unfolded / (b * c * k * k * width).max(1)).clamp(1, height);
        let mut strips = Vec::new();
        for start in (0..height).step_by(rows) {
            let rows = rows.min(height - start);
            // the rows that it sees; padded ones only if the stride is 1
            let (first, end) = (start * self.stride, (start + rows - 1) * self.stride + k);
            let (from, to) = (first.saturating_sub(padding), h.min(end - padding));
            let strip = x.narrow(2, from, to - from)?;
            let strip = strip.conv2d(weight, padding, self.stride, 1, 1)?;
            let strip = strip.narrow(2, (first - from) / self.stride, rows)?;
            strips.push(strip.contiguous()?.broadcast_add(&bias)?);
        }
        match strips.as_slice() {
            [one] => Ok(one.clone()),
            many => Tensor::cat(many, 2),
        }
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
            || c == 0
            || bias.len() != o
            || h + self.before + self.after < k
            || w + self.before + self.after < k
        {
            bail!(
                "convolution {:?} does not fit an image of {:?}",
                wl.shape(),
                xl.shape()
            )
        }
        let (out_h, out_w) = (self.out(h, k), self.out(w, k));
        let sizes = Sizes { c, h, w, k, out_w };
        let mut out = vec![0f32; b * o * out_h * out_w];
        out.par_chunks_mut((o * out_h * out_w).max(1))
            .zip(x.par_chunks((c * h * w).max(1)))
            .for_each(|(out, x)| self.image(x, weight, bias, out, &sizes));
        Ok((CpuStorage::F32(out), Shape::from((b, o, out_h, out_w))))
    }
}

impl Conv {
    /// The convolution of one image (c, h, w) into `out` (o, out_h·out_w), strip by strip of whole rows.
    fn image(self, x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32], s: &Sizes) {
        let (o, depth) = (bias.len(), s.c * s.k * s.k);
        let pixels = out.len() / o;
        // as many rows as the cache holds, but work for every thread
        let share = (pixels / s.out_w).div_ceil(rayon::current_num_threads());
        let strip = (STRIP / (depth * s.out_w)).clamp(1, share) * s.out_w;
        let mut strips = Vec::new();
        let mut rest = MatMut::from_row_major_slice_mut(out, o, pixels);
        while rest.ncols() > strip {
            let (first, others) = rest.split_at_col_mut(strip);
            strips.push(first);
            rest = others;
        }
        strips.push(rest);

        let pointwise = s.k == 1 && self == Self::same(1);
        let weight = MatRef::from_row_major_slice(weight, o, depth);
        let room = || vec![0f32; if pointwise { 0 } else { depth * strip }];
        strips
            .into_par_iter()
            .enumerate()
            .for_each_init(room, |unfolded, (i, mut out)| {
                for (mut row, bias) in out.rb_mut().row_iter_mut().zip(bias) {
                    row.fill(*bias);
                }
                let n = out.ncols();
                let input = if pointwise {
                    MatRef::from_row_major_slice(x, depth, pixels).subcols(i * strip, n)
                } else {
                    for (tap, row) in unfolded[..depth * n].chunks_mut(n).enumerate() {
                        self.unfold(x, row, tap, i * strip / s.out_w, s);
                    }
                    MatRef::from_row_major_slice(&unfolded[..depth * n], depth, n)
                };
                // faer's own threads spin while they wait for each other, which costs more than it gains here
                faer::linalg::matmul::matmul(out, Accum::Add, weight, input, 1.0, Par::Seq);
            });
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
pub(super) mod tests {
    use super::*;
    use crate::sample::noise::Generator;
    use candle::Device;

    /// The largest difference.
    pub(in crate::sample::vae) fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
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
                conv.composed(&x, &weight, &bias, MAX_UNFOLDED)?,
            );
            let scale = slow.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(
                far(&fast, &slow)? <= 2e-6 * scale,
                "{conv:?} {b} {c} {h} {w}"
            );
            for unfolded in [1, b * c * k * k * w * 3] {
                let strips = conv.composed(&x, &weight, &bias, unfolded)?;
                assert!(
                    far(&strips, &slow)? <= 2e-6 * scale,
                    "{conv:?} {b} {c} {h} {w} in strips"
                );
            }
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
                &Conv::same(3).composed(&x, &weight, &bias, MAX_UNFOLDED)?
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
