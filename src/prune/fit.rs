//! Least squares: the linear layer that comes nearest to a block's residual branch (FastFLUX, arXiv 2506.10035, BRLL).

use anyhow::{Context, Result, bail, ensure};
use candle::{DType, Device, Tensor};
use faer::{Mat, Side, linalg::solvers::Solve};

use crate::calibrate::stats::{Gram, StreamStats};

/// An affine map y = x Wᵀ + b with its quality on the pairs it was fitted to.
#[derive(Clone, Debug)]
pub struct Affine {
    /// (d, d) in f32, in the (out, in) order of a linear layer.
    pub weight: Tensor,
    /// (d) in f32.
    pub bias: Tensor,
    /// Σ ‖(y − x) − (W x + b)‖² over the fitted pairs, from the sums alone.
    pub residual_sq: f64,
}

/// How often the ridge is raised tenfold when the Gram matrix is not positive definite.
const ATTEMPTS: usize = 12;

/// Fits one stream's layer with ridge `ridge`, relative to the mean of the Gram matrix's diagonal.
///
/// # Errors
/// When no statistics for a fit were gathered, or the sums are not finite.
pub fn fit(stats: &StreamStats, ridge: f64) -> Result<Affine> {
    let sums = stats.gram.as_ref().context("no tokens were seen")?;
    let (weight, bias, residual_sq) = solve(sums, stats.moments.change_sq, ridge)?;
    Ok(Affine {
        weight,
        bias,
        residual_sq,
    })
}

/// Solves (G + λI) B = C for B (d + 1, d) by Cholesky and gives (Wᵀ-ordered weight, bias, residual).
fn solve(sums: &Gram, change_sq: f64, ridge: f64) -> Result<(Tensor, Tensor, f64)> {
    let gram = to_faer(&sums.gram)?;
    let cross = to_faer(&sums.cross)?;
    let (rows, width) = (gram.nrows(), cross.ncols());
    let mean = (0..rows).map(|i| gram[(i, i)]).sum::<f64>() / rows as f64;
    ensure!(mean.is_finite(), "the statistics are NaN or infinite");
    let mut lambda = ridge * mean;
    let mut solution = None;
    for _ in 0..ATTEMPTS {
        let mut damped = gram.clone();
        for i in 0..rows {
            damped[(i, i)] += lambda;
        }
        if let Ok(cholesky) = damped.llt(Side::Lower) {
            solution = Some(cholesky.solve(&cross));
            break;
        }
        // too few or degenerate tokens: the smallest ridge that makes the problem definite
        lambda = (lambda * 10.0).max(mean * 1e-12);
    }
    let Some(b) = solution else {
        bail!("the least-squares problem is singular")
    };
    // ‖R − X B‖² = ‖R‖² − 2 tr(Bᵀ C) + tr(Bᵀ G B), where G is the matrix without ridge
    let gb = &gram * &b;
    let mut fitted = 0.0;
    for j in 0..width {
        for i in 0..rows {
            fitted += b[(i, j)] * (2.0 * cross[(i, j)] - gb[(i, j)]);
        }
    }
    // faer stores columns, so B's columns in order are exactly the rows of the (out, in) weight
    let (mut weight, mut bias) = (Vec::with_capacity(width * width), Vec::with_capacity(width));
    for j in 0..width {
        weight.extend((0..rows - 1).map(|i| b[(i, j)] as f32));
        bias.push(b[(rows - 1, j)] as f32);
    }
    ensure!(
        weight.iter().chain(&bias).all(|v| v.is_finite()),
        "the least-squares solution is not finite"
    );
    Ok((
        Tensor::from_vec(weight, (width, rows - 1), &Device::Cpu)?,
        Tensor::from_vec(bias, width, &Device::Cpu)?,
        (change_sq - fitted).max(0.0),
    ))
}

fn to_faer(matrix: &Tensor) -> Result<Mat<f64>> {
    let (rows, columns) = matrix.dims2()?;
    let values = matrix
        .to_dtype(DType::F64)?
        .to_device(&Device::Cpu)?
        .flatten_all()?
        .to_vec1::<f64>()?;
    Ok(Mat::from_fn(rows, columns, |i, j| values[i * columns + j]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize) -> Tensor {
        Tensor::randn(0f64, 1., (rows, columns), &Device::Cpu).unwrap()
    }

    #[test]
    fn a_branch_that_is_linear_is_recovered() {
        let (d, n) = (12, 400);
        let x = random(n, d);
        let weight = random(d, d);
        let bias = random(1, d);
        let y = (&x
            + x.matmul(&weight.t().unwrap())
                .unwrap()
                .broadcast_add(&bias)
                .unwrap())
        .unwrap();
        let mut stats = StreamStats::default();
        stats.add(&x, &y, true).unwrap();
        let fit = fit(&stats, 0.0).unwrap();
        let difference = (fit.weight.to_dtype(DType::F64).unwrap() - weight)
            .unwrap()
            .abs()
            .unwrap();
        assert!(difference.max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-5);
        assert!(
            fit.residual_sq < 1e-9 * stats.moments.change_sq,
            "{}",
            fit.residual_sq
        );
    }

    #[test]
    fn the_residual_follows_from_the_sums() {
        let (x, y) = (random(300, 6), random(300, 6));
        let mut stats = StreamStats::default();
        for (part, other) in x.chunk(3, 0).unwrap().iter().zip(y.chunk(3, 0).unwrap()) {
            stats.add(part, &other, true).unwrap();
        }
        let fit = fit(&stats, 1e-3).unwrap();
        let weight = fit.weight.to_dtype(DType::F64).unwrap();
        let bias = fit.bias.to_dtype(DType::F64).unwrap();
        let predicted = x
            .matmul(&weight.t().unwrap())
            .unwrap()
            .broadcast_add(&bias)
            .unwrap();
        let rest = ((y - x).unwrap() - predicted).unwrap().sqr().unwrap();
        let direct = rest.sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!(
            (direct - fit.residual_sq).abs() < 1e-5 * direct,
            "{direct} {}",
            fit.residual_sq
        );
    }

    #[test]
    fn fewer_tokens_than_channels_still_give_a_finite_layer() {
        let mut stats = StreamStats::default();
        stats.add(&random(3, 16), &random(3, 16), true).unwrap();
        fit(&stats, 0.0).unwrap();
    }
}
