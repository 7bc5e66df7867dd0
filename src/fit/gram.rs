//! The sums of a least-squares problem R ≈ Z B: ZᵀZ, ZᵀR and ‖R‖², of rows, or of samples whose tokens share features.

use std::ops::Deref;

use anyhow::{Result, bail};
use candle::{D, DType, Device, Layout, Storage, Tensor};
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
        let rows = target.reshape(((), 2)).unwrap();
        let transposed = all.t().unwrap();
        let want = Gram {
            gram: transposed.matmul(&all).unwrap(),
            cross: transposed.matmul(&rows).unwrap(),
            target_sq: square(&rows).unwrap(),
        };
        let c = with_bias(Some(&c.squeeze(1).unwrap()), &x).unwrap();
        let got = from_samples(&x, &c, &target).unwrap();
        for (got, want) in [(&got.gram, &want.gram), (&got.cross, &want.cross)] {
            let difference = (got - want).unwrap().abs().unwrap().max_all().unwrap();
            assert!(difference.to_scalar::<f64>().unwrap() < 1e-11);
        }
        assert!((got.target_sq - want.target_sq).abs() < 1e-11);
    }
}
