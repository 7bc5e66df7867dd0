//! Sums over rows for least squares: features that are constant within a sample summed once a sample, tokens chosen
//! evenly. Solving is `fit`'s business.

use anyhow::Result;
use candle::{D, DType, Device, Tensor};

use crate::{calibrate::stats::Gram, model::ops};

/// The sums of Z = \[x, c\] against `target` (b, n, d), for `x` (b, n, k) and `c` (b, m), which all tokens of a sample
/// share: c is never repeated for them, so it costs m per sample, not per token.
///
/// # Errors
/// When shapes disagree or a product fails.
pub(super) fn of_samples(x: &Tensor, c: &Tensor, target: &Tensor) -> Result<Gram> {
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
pub(super) fn with_bias(c: Option<&Tensor>, like: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones((like.dim(0)?, 1), like.dtype(), like.device())?;
    Ok(match c {
        None => ones,
        Some(c) => Tensor::cat(&[c, &ones], 1)?,
    })
}

/// The tokens of a forward that sums are made of: all, or about `limit`, evenly spread over each sample and shifted
/// from batch to batch. The same for the same batch, always.
///
/// # Errors
/// When memory is short.
pub(super) fn tokens(
    samples: usize,
    tokens: usize,
    limit: Option<usize>,
    batch: usize,
    device: &Device,
) -> Result<Option<Tensor>> {
    let wanted = limit.map_or(tokens, |limit| limit.div_ceil(samples.max(1)).max(1));
    if wanted >= tokens {
        return Ok(None);
    }
    let shift = batch.wrapping_mul(0x9E37_79B1) % tokens;
    let chosen: Vec<u32> = (0..wanted)
        .map(|i| ((i * tokens / wanted + shift) % tokens) as u32)
        .collect();
    Ok(Some(Tensor::new(chosen, device)?))
}

/// `x` (b, n, …) at the chosen tokens and samples; all where `None`.
///
/// # Errors
/// When an index is out of range.
pub(super) fn pick(
    x: &Tensor,
    samples: Option<&Tensor>,
    tokens: Option<&Tensor>,
) -> Result<Tensor> {
    let mut x = x.clone();
    if let Some(samples) = samples {
        x = x.contiguous()?.index_select(samples, 0)?;
    }
    if let Some(tokens) = tokens {
        x = x.contiguous()?.index_select(tokens, 1)?;
    }
    Ok(x)
}

/// Σ of all squares, f64.
///
/// # Errors
/// When memory is short.
pub(super) fn square(x: &Tensor) -> Result<f64> {
    // rows in the format at hand, their sum in f64
    let rows = x.sqr()?.sum(D::Minus1)?.to_dtype(DType::F64)?;
    Ok(rows.sum_all()?.to_scalar()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::stats::with_ones;

    #[test]
    fn features_shared_by_a_sample_count_for_each_of_its_tokens() {
        let random =
            |shape: (usize, usize, usize)| Tensor::randn(0f64, 1., shape, &Device::Cpu).unwrap();
        let (x, c, target) = (random((5, 7, 4)), random((5, 1, 3)), random((5, 7, 2)));
        let repeated = Tensor::cat(
            &[
                &x,
                &c.broadcast_as((5, 7, 3)).unwrap().contiguous().unwrap(),
            ],
            2,
        )
        .unwrap();
        let all = with_ones(&repeated.reshape(((), 7)).unwrap()).unwrap();
        let want = Gram::of(&all, &target.reshape(((), 2)).unwrap()).unwrap();
        let c = with_bias(Some(&c.squeeze(1).unwrap()), &x).unwrap();
        let got = of_samples(&x, &c, &target).unwrap();
        for (got, want) in [(&got.gram, &want.gram), (&got.cross, &want.cross)] {
            let difference = (got - want).unwrap().abs().unwrap().max_all().unwrap();
            assert!(difference.to_scalar::<f64>().unwrap() < 1e-11);
        }
        assert!((got.target_sq - want.target_sq).abs() < 1e-11);
    }

    #[test]
    fn tokens_are_spread_evenly_and_move_on() {
        let chosen = |limit, batch| {
            let chosen = tokens(2, 100, limit, batch, &Device::Cpu).unwrap();
            chosen.map(|t| t.to_vec1::<u32>().unwrap())
        };
        assert_eq!(chosen(None, 0), None);
        assert_eq!(chosen(Some(200), 0), None);
        assert_eq!(chosen(Some(8), 0), Some(vec![0, 25, 50, 75]));
        let mut later = chosen(Some(8), 1).unwrap();
        assert_ne!(later, [0, 25, 50, 75]);
        assert_eq!(chosen(Some(8), 1), Some(later.clone()));
        later.sort_unstable();
        assert!(later.windows(2).all(|w| w[1] - w[0] == 25), "{later:?}");
    }
}
