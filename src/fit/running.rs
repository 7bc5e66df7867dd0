//! A [`Gram`] while samples are still added. On the CPU the products of a batch are added to the sums where they lie, half
//! of ZᵀZ, as it is symmetric, and a GPU adds weighted ones ([`DeviceSums`]); elsewhere, and to test by, they are formed
//! whole and added up ([`from_samples`]).

use anyhow::{Context, Result, ensure};
use candle::{DType, Device, Tensor};
use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul, traits::RealField};
use rayon::prelude::*;

use super::{
    gram::{Gram, from_samples, square, values},
    on_gpu::DeviceSums,
};
use crate::model::ops;

/// Columns of one task: wide enough for the matrix product, narrow enough to skip most of the upper triangle.
const PANEL: usize = 64;

/// The sums of Z = \[x, c\] against a target over the samples added so far.
#[derive(Debug, Default)]
pub enum RunningGram {
    /// Of no sample.
    #[default]
    Empty,
    /// On the CPU.
    InPlace(InPlace),
    /// On a GPU, of a weighted problem.
    OnDevice(DeviceSums),
    /// On another device.
    Whole(Gram),
}

/// Sums that are added to where they lie.
#[derive(Debug)]
pub struct InPlace {
    /// Width of x and of c together, and of the target.
    shape: (usize, usize),
    /// ZᵀZ from the diagonal down, column after column, (k, k).
    gram: Vec<f64>,
    /// ZᵀR, column after column, (k, d).
    cross: Vec<f64>,
    /// Σ ‖R‖².
    target_sq: f64,
}

impl RunningGram {
    /// Adds samples: `x` (b, n, k), `c` (b, m), which all tokens of a sample share, and `target` (b, n, d), all of one
    /// format, that products are in; sums are f64. `target_sq` is what Σ ‖R‖² grows by.
    ///
    /// # Errors
    /// When shapes disagree or a product fails.
    pub fn add(&mut self, x: &Tensor, c: &Tensor, target: &Tensor, target_sq: f64) -> Result<()> {
        let in_place = x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64);
        if in_place && matches!(self, Self::Empty) {
            let shape = (x.dim(2)? + c.dim(1)?, target.dim(2)?);
            *self = Self::InPlace(InPlace::new(shape));
        }
        if let Self::InPlace(sums) = self {
            sums.target_sq += target_sq;
            return match x.dtype() {
                DType::F32 => sums.add::<f32>(x, c, target),
                _ => sums.add::<f64>(x, c, target),
            };
        }
        let share = Gram {
            target_sq,
            ..from_samples(x, c, target)?
        };
        match self {
            Self::Whole(sum) => *sum = sum.plus(&share)?,
            _ => *self = Self::Whole(share),
        }
        Ok(())
    }

    /// Adds samples of a problem whose rows count √a each: √a \[z, 1\] against `target` (b, n, d) in f32, for `z` (b, n, k) of
    /// any format and √a as `root` (b, 1).
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_weighted(
        &mut self,
        z: &Tensor,
        root: &Tensor,
        target: &Tensor,
        target_sq: f64,
    ) -> Result<()> {
        if z.device().is_cuda() && matches!(self, Self::Empty | Self::OnDevice(_)) {
            let mut sums = match std::mem::take(self) {
                Self::OnDevice(sums) => sums,
                _ => DeviceSums::new((z.dim(2)?, target.dim(2)?), z.device())?,
            };
            if sums.add(z, root, target, target_sq)? {
                *self = Self::OnDevice(sums);
                return Ok(());
            }
        }
        let z = ops::gated(&z.to_dtype(DType::F32)?, root)?;
        self.add(&z, root, target, target_sq)
    }

    /// The sums; `None` if nothing was added.
    ///
    /// # Errors
    /// When memory is short.
    pub fn finish(self) -> Result<Option<Gram>> {
        Ok(match self {
            Self::Empty => None,
            Self::InPlace(sums) => Some(sums.whole()?),
            Self::OnDevice(sums) => Some(sums.finish()?),
            Self::Whole(sums) => Some(sums),
        })
    }
}

/// The sums of one set of rows: `features` (n, k), `target` (n, d), both in the format to multiply in.
///
/// # Errors
/// When a product fails.
pub fn from_rows(features: &Tensor, target: &Tensor) -> Result<Gram> {
    let target_sq = square(target)?;
    if !features.device().is_cpu() {
        let transposed = features.t()?;
        return Ok(Gram {
            gram: transposed.matmul(features)?.to_dtype(DType::F64)?,
            cross: transposed.matmul(target)?.to_dtype(DType::F64)?,
            target_sq,
        });
    }
    let (x, target) = (features.unsqueeze(0)?, target.unsqueeze(0)?);
    let none = Tensor::zeros((1, 0), features.dtype(), &Device::Cpu)?;
    let mut sums = RunningGram::default();
    sums.add(&x, &none, &target, target_sq)?;
    sums.finish()?.context("no rows were seen")
}

impl InPlace {
    fn new((k, d): (usize, usize)) -> Self {
        Self {
            shape: (k, d),
            gram: vec![0.0; k * k],
            cross: vec![0.0; k * d],
            target_sq: 0.0,
        }
    }

    fn add<T>(&mut self, x: &Tensor, c: &Tensor, target: &Tensor) -> Result<()>
    where
        T: RealField + candle::WithDType + Into<f64>,
    {
        let ((samples, tokens, own), (_, m)) = (x.dims3()?, c.dims2()?);
        let (rows, (k, d)) = (samples * tokens, self.shape);
        let (found, wanted) = (
            [x.dims(), c.dims(), target.dims()],
            [
                &[samples, tokens, own][..],
                &[samples, k - own.min(k)],
                &[samples, tokens, d],
            ],
        );
        ensure!(
            own <= k && found == wanted,
            "samples of {found:?} are added to sums of {k} by {d}"
        );
        if rows == 0 {
            return Ok(());
        }
        let (x, c, target) = (x.contiguous()?, c.contiguous()?, target.contiguous()?);
        let (x, c, target) = (
            x.storage_and_layout(),
            c.storage_and_layout(),
            target.storage_and_layout(),
        );
        let (x, c, target): (&[T], &[T], &[T]) = (values(&x)?, values(&c)?, values(&target)?);
        // of c, a product with a sample's tokens is one with their sum
        let (x_sums, target_sums) = (
            sums_of_samples(x, samples, own),
            sums_of_samples(target, samples, d),
        );
        let of = |values, rows, columns| MatRef::from_row_major_slice(values, rows, columns);
        let (x, target) = (of(x, rows, own), of(target, rows, d));
        let (x_sums, target_sums) = (of(&x_sums, samples, own), of(&target_sums, samples, d));
        let c = of(c, samples, m);
        // columns from `start` on of ZᵀZ below its diagonal
        let gram = |start: usize, columns: usize, out: &mut [f64]| {
            let x_columns = columns.min(own.saturating_sub(start));
            let (out_x, out_c) = out.split_at_mut(x_columns * k);
            if x_columns > 0 {
                let right = x.subcols(start, x_columns);
                add_product(out_x, (k, start), x.subcols(start, own - start), right, 1.0);
                add_product(out_x, (k, own), c, x_sums.subcols(start, x_columns), 1.0);
            }
            if columns > x_columns {
                let first = start + x_columns - own;
                let right = c.subcols(first, columns - x_columns);
                add_product(out_c, (k, own), c, right, tokens as f64);
            }
        };
        let cross = |start: usize, columns: usize, out: &mut [f64]| {
            add_product(out, (k, 0), x, target.subcols(start, columns), 1.0);
            let right = target_sums.subcols(start, columns);
            add_product(out, (k, own), c, right, 1.0);
        };
        let grams = self.gram.par_chunks_mut(PANEL * k).enumerate();
        let crosses = self.cross.par_chunks_mut(PANEL * k).enumerate();
        rayon::join(
            || grams.for_each(|(i, out)| gram(i * PANEL, out.len() / k, out)),
            || crosses.for_each(|(i, out)| cross(i * PANEL, out.len() / k, out)),
        );
        Ok(())
    }

    fn whole(self) -> Result<Gram> {
        let Self {
            shape: (k, d),
            mut gram,
            cross,
            target_sq,
        } = self;
        for column in 0..k {
            for row in 0..column {
                gram[column * k + row] = gram[row * k + column];
            }
        }
        let cross = Tensor::from_vec(cross, (d, k), &Device::Cpu)?;
        Ok(Gram {
            gram: Tensor::from_vec(gram, (k, k), &Device::Cpu)?,
            cross: cross.t()?.contiguous()?,
            target_sq,
        })
    }
}

/// Σ over the tokens of each of `samples`: of (samples, tokens, width) to (samples, width).
fn sums_of_samples<T>(values: &[T], samples: usize, width: usize) -> Vec<T>
where
    T: RealField + candle::WithDType,
{
    let mut out = vec![T::zero(); samples * width];
    let tokens = values.chunks_exact(values.len() / samples);
    for (sum, sample) in out.chunks_exact_mut(width).zip(tokens) {
        for token in sample.chunks_exact(width) {
            sum.iter_mut().zip(token).for_each(|(sum, x)| *sum += *x);
        }
    }
    out
}

/// Adds `scale`·leftᵀ·right to columns of `k` sums each, from row `first` on.
fn add_product<T>(
    out: &mut [f64],
    (k, first): (usize, usize),
    left: MatRef<T>,
    right: MatRef<T>,
    scale: f64,
) where
    T: RealField + Into<f64> + Copy,
{
    let (height, columns) = (left.ncols(), right.ncols());
    if height == 0 {
        return;
    }
    let mut product = vec![T::zero(); height * columns];
    let view = MatMut::from_column_major_slice_mut(&mut product, height, columns);
    matmul(
        view,
        Accum::Replace,
        left.transpose(),
        right,
        T::one(),
        Par::Seq,
    );
    let products = product.chunks_exact(height);
    for (sums, products) in out.chunks_exact_mut(k).zip(products) {
        let sums = &mut sums[first..][..height];
        for (sum, product) in sums.iter_mut().zip(products) {
            *sum += scale * (*product).into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[usize], dtype: DType) -> Tensor {
        let values = Tensor::randn(0f64, 1., shape, &Device::Cpu).unwrap();
        values.to_dtype(dtype).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        let difference = (a - b).unwrap().abs().unwrap();
        difference.max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn sums_in_place_are_those_of_whole_products() {
        // x narrower than a panel, ending with one, and c beginning in the middle of one
        for (k, m, d) in [(5, 1, 2), (128, 1, 128), (100, 70, 65)] {
            for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 2e-3)] {
                let (mut fast, mut slow) = (RunningGram::default(), None);
                for samples in [3, 0, 1] {
                    let x = random(&[samples, 7, k], dtype);
                    let (c, target) = (
                        random(&[samples, m], dtype),
                        random(&[samples, 7, d], dtype),
                    );
                    fast.add(&x, &c, &target, samples as f64).unwrap();
                    if samples > 0 {
                        let share = from_samples(&x, &c, &target).unwrap();
                        share.add_to(&mut slow).unwrap();
                    }
                }
                let (fast, slow) = (fast.finish().unwrap().unwrap(), slow.unwrap());
                assert!(
                    difference(&fast.gram, &slow.gram) < tolerance,
                    "{k} {dtype:?}"
                );
                assert!(
                    difference(&fast.cross, &slow.cross) < tolerance,
                    "{k} {dtype:?}"
                );
                assert!((fast.target_sq - 4.0).abs() < 1e-12);
            }
        }
        assert!(RunningGram::default().finish().unwrap().is_none());
    }

    #[test]
    fn sums_of_rows_are_their_products() {
        for (n, k, d) in [(3, 5, 2), (200, 129, 128), (70, 200, 65)] {
            let (z, r) = (random(&[n, k], DType::F64), random(&[n, d], DType::F64));
            let (got, transposed) = (from_rows(&z, &r).unwrap(), z.t().unwrap());
            let want = [
                transposed.matmul(&z).unwrap(),
                transposed.matmul(&r).unwrap(),
            ];
            assert!(difference(&got.gram, &want[0]) < 1e-11);
            assert!(difference(&got.cross, &want[1]) < 1e-11);
            let squares = r.sqr().unwrap().sum_all().unwrap();
            assert!((got.target_sq / squares.to_scalar::<f64>().unwrap() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn samples_of_another_problem_are_refused() {
        let mut sums = RunningGram::default();
        let of = |k| {
            let dtype = DType::F64;
            (random(&[2, 3, k], dtype), random(&[2, 1], dtype))
        };
        let ((x, c), (wide, _)) = (of(4), of(5));
        sums.add(&x, &c, &x, 0.0).unwrap();
        let three = random(&[3, 1], DType::F64);
        for (x, c, target) in [(&wide, &c, &x), (&x, &three, &x), (&x, &c, &wide)] {
            let error = sums.add(x, c, target, 0.0).unwrap_err().to_string();
            assert!(error.contains("sums of 5 by 4"), "{error}");
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn sums_of_a_gpu_are_those_of_the_cpu() -> Result<()> {
        let Ok(gpu) = Device::new_cuda(0) else {
            crate::ui::skip("cuda");
            return Ok(());
        };
        let root = Tensor::new(&[[2f32], [0.5], [1.0]], &Device::Cpu)?;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let mut sums = [RunningGram::default(), RunningGram::default()];
            for _ in 0..2 {
                // numbers that both formats have
                let exact =
                    |shape| Tensor::randn(0f32, 1., shape, &Device::Cpu)?.to_dtype(DType::BF16);
                let (z, t) = (exact((3, 7, 24))?, exact((3, 7, 5))?);
                for (sums, device) in sums.iter_mut().zip([&Device::Cpu, &gpu]) {
                    let place = |t: &Tensor, dtype| t.to_dtype(dtype)?.to_device(device);
                    let z = place(&z, dtype)?;
                    let (t, root) = (place(&t, DType::F32)?, place(&root, DType::F32)?);
                    sums.add_weighted(&z, &root, &t, 1.5)?;
                }
            }
            let [cpu, on_gpu] = sums;
            assert!(matches!(on_gpu, RunningGram::OnDevice(_)), "{on_gpu:?}");
            let (Some(want), Some(got)) = (cpu.finish()?, on_gpu.finish()?) else {
                anyhow::bail!("nothing was added");
            };
            assert!(difference(&got.gram, &want.gram) < 1e-4);
            assert!(difference(&got.cross, &want.cross) < 1e-4);
            assert!((got.target_sq - 3.0).abs() + (want.target_sq - 3.0).abs() < 1e-12);
        }
        Ok(())
    }
}
