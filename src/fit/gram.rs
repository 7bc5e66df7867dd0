//! The sums of a least-squares problem R ≈ Z B: ZᵀZ, ZᵀR and ‖R‖², of rows, or of samples whose tokens share features.

use std::ops::Deref;

use anyhow::{Result, bail};
use candle::{D, DType, Device, Layout, Storage, Tensor};
use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use crate::model::ops;

/// The sums of a least-squares problem R ≈ Z B over all tokens seen, in f64.
#[derive(Clone, Debug)]
pub struct Gram {
    /// ZᵀZ, (k, k).
    pub gram: Tensor,
    /// ZᵀR, (k, d).
    pub cross: Tensor,
    /// Σ ‖R‖².
    pub target_sq: f64,
}

impl Gram {
    /// The sums of one set of rows: `features` (n, k), `target` (n, d), both in the format to multiply in.
    ///
    /// # Errors
    /// When a product fails.
    pub fn from_rows(features: &Tensor, target: &Tensor) -> Result<Self> {
        let (gram, cross) = products(features, target)?;
        Ok(Self {
            gram,
            cross,
            target_sq: ops::total(&target.sqr()?)?
                .to_dtype(DType::F64)?
                .to_scalar()?,
        })
    }

    /// The sums over the rows of both.
    ///
    /// # Errors
    /// When they are of different problems.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        Ok(Self {
            gram: (&self.gram + &other.gram)?,
            cross: (&self.cross + &other.cross)?,
            target_sq: self.target_sq + other.target_sq,
        })
    }

    /// The same problem without the column of ones, which stands last: for a layer that has no bias.
    ///
    /// # Errors
    /// When there is no column.
    pub fn without_bias(self) -> Result<Self> {
        let features = self.gram.dim(0)?.saturating_sub(1);
        let gram = self.gram.narrow(0, 0, features)?.narrow(1, 0, features)?;
        Ok(Self {
            gram: gram.contiguous()?,
            cross: self.cross.narrow(0, 0, features)?,
            target_sq: self.target_sq,
        })
    }

    /// Adds to a sum that may have no share yet.
    ///
    /// # Errors
    /// When they are of different problems.
    pub fn add_to(self, sum: &mut Option<Self>) -> Result<()> {
        *sum = Some(match sum.take() {
            None => self,
            Some(sum) => sum.plus(&self)?,
        });
        Ok(())
    }
}

/// The format for products of activations: on the CPU f64 costs little more than f32 and keeps the sums exact; f64
/// units of GPUs are scarce, so products are f32 there and only sums f64.
pub fn product_dtype(device: &Device) -> DType {
    if device.is_cpu() {
        DType::F64
    } else {
        DType::F32
    }
}

/// Appends a column of ones, for the bias: (n, k) → (n, k + 1).
///
/// # Errors
/// When memory is short.
pub fn with_ones(features: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones((features.dim(0)?, 1), features.dtype(), features.device())?;
    Ok(Tensor::cat(&[features, &ones], 1)?)
}

/// ZᵀZ (k, k) and ZᵀR (k, d) in f64, of `z` (n, k) and `r` (n, d) in f64 or, off the CPU, in f32.
pub fn products(z: &Tensor, r: &Tensor) -> Result<(Tensor, Tensor)> {
    if z.device().is_cpu() && z.dtype() == DType::F64 && r.dtype() == DType::F64 {
        products_cpu(z, r)
    } else {
        products_plain(z, r)
    }
}

fn products_plain(z: &Tensor, r: &Tensor) -> Result<(Tensor, Tensor)> {
    let transposed = z.t()?;
    Ok((
        transposed.matmul(z)?.to_dtype(DType::F64)?,
        transposed.matmul(r)?.to_dtype(DType::F64)?,
    ))
}

/// Columns of one task: wide enough for the matrix product, narrow enough to skip most of the upper triangle.
const PANEL: usize = 64;

fn products_cpu(z: &Tensor, r: &Tensor) -> Result<(Tensor, Tensor)> {
    let ((n, k), (_, d)) = (z.dims2()?, r.dims2()?);
    let values = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.flatten_all()?.to_vec1()?) };
    let (z, r) = (values(z)?, values(r)?);
    let z = MatRef::from_row_major_slice(&z, n, k);
    let r = MatRef::from_row_major_slice(&r, n, d);
    // column-major panels; of ZᵀZ only the rows from the diagonal on, and as it is symmetric its columns are its rows
    let (mut gram, mut cross) = (vec![0.0; k * k], vec![0.0; k * d]);
    let grams = gram.par_chunks_mut(PANEL * k).enumerate();
    let crosses = cross.par_chunks_mut(PANEL * k).enumerate();
    let panel = |out: &mut [f64], of: MatRef<f64>, start: usize, skip: usize| {
        let columns = out.len() / k;
        let out = MatMut::from_column_major_slice_mut(out, k, columns).subrows_mut(skip, k - skip);
        let (left, right) = (z.subcols(skip, k - skip), of.subcols(start, columns));
        matmul(out, Accum::Replace, left.transpose(), right, 1.0, Par::Seq);
    };
    rayon::join(
        || grams.for_each(|(i, out)| panel(out, z, i * PANEL, i * PANEL)),
        || crosses.for_each(|(i, out)| panel(out, r, i * PANEL, 0)),
    );
    for column in 0..k {
        for row in 0..column {
            gram[column * k + row] = gram[row * k + column];
        }
    }
    let cross = Tensor::from_vec(cross, (d, k), &Device::Cpu)?;
    Ok((
        Tensor::from_vec(gram, (k, k), &Device::Cpu)?,
        cross.t()?.contiguous()?,
    ))
}

/// The sums of Z = \[x, c\] against `target` (b, n, d), for `x` (b, n, k) and `c` (b, m), which all tokens of a sample
/// share: c is never repeated for them, so it costs m per sample, not per token.
///
/// # Errors
/// When shapes disagree or a product fails.
pub fn from_samples(x: &Tensor, c: &Tensor, target: &Tensor) -> Result<Gram> {
    let (_, tokens, width) = x.dims3()?;
    let rows = x.reshape(((), width))?;
    let target_rows = target.reshape(((), target.dim(2)?))?;
    let (x_sum, target_sum) = (x.sum(1)?, target.sum(1)?);
    let transposed = rows.t()?;
    let own = transposed.matmul(&rows)?;
    let mixed = x_sum.t()?.matmul(c)?; // (k, m)
    let shared = (c.t()?.matmul(c)? * tokens as f64)?;
    let upper = Tensor::cat(&[&own, &mixed], 1)?;
    let lower = Tensor::cat(&[&mixed.t()?, &shared], 1)?;
    let cross = [
        transposed.matmul(&target_rows)?,
        c.t()?.matmul(&target_sum)?,
    ];
    Ok(Gram {
        gram: Tensor::cat(&[upper, lower], 0)?.to_dtype(DType::F64)?,
        cross: Tensor::cat(&cross, 0)?.to_dtype(DType::F64)?,
        target_sq: ops::total(&target.sqr()?)?
            .to_dtype(DType::F64)?
            .to_scalar()?,
    })
}

/// `c` (b, m) with a column of ones, for the bias.
///
/// # Errors
/// When memory is short.
pub fn with_bias(c: Option<&Tensor>, like: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones((like.dim(0)?, 1), like.dtype(), like.device())?;
    Ok(match c {
        None => ones,
        Some(c) => Tensor::cat(&[c, &ones], 1)?,
    })
}

/// The values of a contiguous tensor on the CPU, row after row.
pub(super) fn values<'a, T: candle::WithDType>(
    (storage, layout): &'a (impl Deref<Target = Storage>, &Layout),
) -> Result<&'a [T]> {
    let Storage::Cpu(storage) = &**storage else {
        bail!("these sums are on the CPU")
    };
    let values = storage.as_slice::<T>()?;
    Ok(&values[layout.start_offset()..][..layout.shape().elem_count()])
}

/// Squares of one task.
const SQUARES: usize = 1 << 14;

/// Σ of all squares, f64.
///
/// # Errors
/// When memory is short.
pub fn square(x: &Tensor) -> Result<f64> {
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        let x = x.contiguous()?;
        let stored = x.storage_and_layout();
        let chunks = values::<f32>(&stored)?.par_chunks(SQUARES);
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        let sums = chunks.map(|chunk| chunk.iter().map(square).sum::<f64>());
        // one after another: the same however many threads there are
        return Ok(sums.collect::<Vec<_>>().iter().sum());
    }
    // rows in the format at hand, their sum in f64
    let rows = x.sqr()?.sum(D::Minus1)?.to_dtype(DType::F64)?;
    Ok(rows.sum_all()?.to_scalar()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f64, 1., shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn features_shared_by_a_sample_count_for_each_of_its_tokens() {
        let (x, c, target) = (random(&[5, 7, 4]), random(&[5, 1, 3]), random(&[5, 7, 2]));
        let repeated = Tensor::cat(
            &[
                &x,
                &c.broadcast_as((5, 7, 3)).unwrap().contiguous().unwrap(),
            ],
            2,
        )
        .unwrap();
        let all = with_ones(&repeated.reshape(((), 7)).unwrap()).unwrap();
        let want = Gram::from_rows(&all, &target.reshape(((), 2)).unwrap()).unwrap();
        let c = with_bias(Some(&c.squeeze(1).unwrap()), &x).unwrap();
        let got = from_samples(&x, &c, &target).unwrap();
        for (got, want) in [(&got.gram, &want.gram), (&got.cross, &want.cross)] {
            let difference = (got - want).unwrap().abs().unwrap().max_all().unwrap();
            assert!(difference.to_scalar::<f64>().unwrap() < 1e-11);
        }
        assert!((got.target_sq - want.target_sq).abs() < 1e-11);
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
        let difference = (a - b).unwrap().abs().unwrap();
        difference.max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn halved_products_equal_whole_ones() {
        for (n, k, d) in [(3, 5, 2), (200, 129, 128), (70, 200, 65)] {
            let (z, r) = (random(&[n, k]), random(&[n, d]));
            let (fast, slow) = (
                products_cpu(&z, &r).unwrap(),
                products_plain(&z, &r).unwrap(),
            );
            assert!(largest_difference(&fast.0, &slow.0) < 1e-11);
            assert!(largest_difference(&fast.1, &slow.1) < 1e-11);
        }
    }
}
