//! Ridge least squares from sums alone: the affine layer nearest to a block's residual branch (FastFLUX, arXiv
//! 2506.10035, BRLL). `calibrate` and `prune::sequential` accumulate the sums.

use anyhow::{Result, bail, ensure};
use candle::{DType, Device, Tensor};
use faer::{
    Mat, Side,
    linalg::solvers::{Llt, Solve},
};

use super::gram::{Gram, values};

/// Ridges that are tried when none is given, relative to the mean diagonal.
pub const RIDGES: [f64; 6] = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2];

/// The ridge if none is given and none can be chosen.
pub const DEFAULT_RIDGE: f64 = 1e-4;

/// A least-squares solution.
#[derive(Clone, Debug)]
pub struct Solution {
    /// B, (k, d).
    pub coefficients: Mat<f64>,
    /// The ridge used, relative to the mean diagonal.
    pub ridge: f64,
    /// Σ ‖R − Z B‖² over the rows it was fitted to.
    pub residual_sq: f64,
}

/// How often the ridge is raised when the Gram matrix is not positive definite.
const ATTEMPTS: usize = 14;

/// Minimises ‖R − Z B‖² + λ‖B‖² with λ = `ridge` × mean diagonal of ZᵀZ; the smallest larger λ if that is singular.
///
/// # Errors
/// When the sums are NaN or infinite, or singular whatever the ridge.
pub fn solve(sums: &Gram, ridge: f64) -> Result<Solution> {
    Problem::new(sums)?.solve(ridge)
}

/// Solves with that of `ridges` whose solution leaves the smallest residual on `held_out`, on both sums together. Of a
/// matrix as wide as the inputs there are three at a time: the sums are gone when both problems stand.
///
/// # Errors
/// As [`solve`].
pub fn solve_with_best_ridge(sums: Gram, held_out: Gram, ridges: &[f64]) -> Result<Solution> {
    let mut problem = Problem::new(&sums)?;
    drop(sums);
    let unseen = Problem::new(&held_out)?;
    drop(held_out);
    let mut best = (f64::INFINITY, DEFAULT_RIDGE);
    for &ridge in ridges {
        let residual = unseen.residual(&problem.solve(ridge)?.coefficients);
        if residual < best.0 {
            best = (residual, ridge);
        }
    }
    problem.add(&unseen)?;
    drop(unseen);
    problem.solve(best.1)
}

/// Solves with `ridge` on all sums, or with the best of `ridges` if none is given and rows were left out to tell.
///
/// # Errors
/// As [`solve`]; when there are no sums.
pub fn solve_split(
    fitted: Option<Gram>,
    left_out: Option<Gram>,
    ridge: Option<f64>,
    ridges: &[f64],
) -> Result<Solution> {
    match (fitted, left_out, ridge) {
        (Some(fitted), Some(left_out), None) => solve_with_best_ridge(fitted, left_out, ridges),
        (Some(fitted), Some(left_out), Some(ridge)) => {
            let mut problem = Problem::new(&fitted)?;
            drop(fitted);
            problem.add(&Problem::new(&left_out)?)?;
            problem.solve(ridge)
        }
        (Some(sums), None, ridge) | (None, Some(sums), ridge) => {
            let middle = ridges.get(ridges.len() / 2).copied();
            let mut problem = Problem::new(&sums)?;
            drop(sums);
            problem.solve(ridge.or(middle).unwrap_or(DEFAULT_RIDGE))
        }
        (None, None, _) => bail!("no tokens were seen"),
    }
}

/// The sums as matrices of the solver.
struct Problem {
    gram: Mat<f64>,
    cross: Mat<f64>,
    target_sq: f64,
    /// The matrix's own, which a ridge is added to while it is factored.
    diagonal: Vec<f64>,
    mean: f64,
}

impl Problem {
    fn new(sums: &Gram) -> Result<Self> {
        let mut problem = Self {
            gram: to_faer(&sums.gram)?,
            cross: to_faer(&sums.cross)?,
            target_sq: sums.target_sq,
            diagonal: Vec::new(),
            mean: 0.0,
        };
        problem.look_at_diagonal()?;
        Ok(problem)
    }

    fn look_at_diagonal(&mut self) -> Result<()> {
        self.diagonal = (0..self.gram.nrows()).map(|i| self.gram[(i, i)]).collect();
        self.mean = self.diagonal.iter().sum::<f64>() / self.diagonal.len().max(1) as f64;
        ensure!(
            self.mean.is_finite() && self.target_sq.is_finite(),
            "the statistics are NaN or infinite"
        );
        Ok(())
    }

    /// Of the rows of both.
    fn add(&mut self, other: &Self) -> Result<()> {
        ensure!(
            self.gram.nrows() == other.gram.nrows() && self.cross.ncols() == other.cross.ncols(),
            "sums of different problems"
        );
        self.gram += &other.gram;
        self.cross += &other.cross;
        self.target_sq += other.target_sq;
        self.look_at_diagonal()
    }

    fn factor(&mut self, lambda: f64) -> Option<Llt<f64>> {
        for (i, value) in self.diagonal.iter().enumerate() {
            self.gram[(i, i)] = value + lambda;
        }
        let factor = self.gram.llt(Side::Lower).ok();
        for (i, value) in self.diagonal.iter().enumerate() {
            self.gram[(i, i)] = *value;
        }
        factor
    }

    fn solve(&mut self, ridge: f64) -> Result<Solution> {
        let mut relative = ridge;
        for _ in 0..ATTEMPTS {
            if let Some(cholesky) = self.factor(relative * self.mean) {
                let coefficients = cholesky.solve(&self.cross);
                // with λ: GB = C − λB, so ‖R − Z B‖² needs no product with G
                let lambda = relative * self.mean;
                let explained = inner(&coefficients, &self.cross);
                let squares = inner(&coefficients, &coefficients);
                let residual_sq = (self.target_sq - explained - lambda * squares).max(0.0);
                if explained.is_finite() && squares.is_finite() {
                    return Ok(Solution {
                        coefficients,
                        ridge: relative,
                        residual_sq,
                    });
                }
            }
            // too few or degenerate rows
            relative = (relative * 10.0).max(1e-13);
        }
        bail!("the least-squares problem is singular")
    }

    /// Of any B: ‖R − Z B‖² = ‖R‖² − 2 tr(BᵀC) + tr(BᵀGB), with the matrix without ridge.
    fn residual(&self, b: &Mat<f64>) -> f64 {
        let product = &self.gram * b;
        let mut fitted = 0.0;
        for j in 0..b.ncols() {
            for i in 0..b.nrows() {
                fitted += b[(i, j)] * (2.0 * self.cross[(i, j)] - product[(i, j)]);
            }
        }
        (self.target_sq - fitted).max(0.0)
    }
}

/// Σ aᵢⱼ bᵢⱼ
fn inner(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let columns =
        (0..a.ncols()).map(|j| (0..a.nrows()).map(|i| a[(i, j)] * b[(i, j)]).sum::<f64>());
    columns.sum()
}

/// Rows `rows` of coefficients as a linear layer's weight: (out, in), f32.
///
/// # Errors
/// When a value is not finite.
pub fn weight(coefficients: &Mat<f64>, rows: std::ops::Range<usize>) -> Result<Tensor> {
    let (width, inputs) = (coefficients.ncols(), rows.len());
    let values: Vec<f32> = (0..width)
        .flat_map(|j| rows.clone().map(move |i| coefficients[(i, j)] as f32))
        .collect();
    ensure!(
        values.iter().all(|v| v.is_finite()),
        "the least-squares solution is not finite"
    );
    Ok(Tensor::from_vec(values, (width, inputs), &Device::Cpu)?)
}

/// The last row of coefficients, the bias, f32.
///
/// # Errors
/// When there is no row.
pub fn bias(coefficients: &Mat<f64>) -> Result<Tensor> {
    ensure!(coefficients.nrows() > 0, "there is nothing to fit");
    let row = coefficients.nrows() - 1;
    let values: Vec<f32> = (0..coefficients.ncols())
        .map(|j| coefficients[(row, j)] as f32)
        .collect();
    Ok(Tensor::from_vec(
        values,
        coefficients.ncols(),
        &Device::Cpu,
    )?)
}

pub(crate) fn to_faer(matrix: &Tensor) -> Result<Mat<f64>> {
    let (rows, columns) = matrix.dims2()?;
    let matrix = matrix.to_dtype(DType::F64)?.to_device(&Device::Cpu)?;
    let matrix = matrix.contiguous()?;
    let storage = matrix.storage_and_layout();
    let values = values::<f64>(&storage)?;
    Ok(Mat::from_fn(rows, columns, |i, j| values[i * columns + j]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::{gram::with_ones, running::from_rows};

    fn random(rows: usize, columns: usize) -> Tensor {
        Tensor::randn(0f64, 1., (rows, columns), &Device::Cpu).unwrap()
    }

    fn gram(x: &Tensor, target: &Tensor) -> Gram {
        from_rows(&with_ones(x).unwrap(), target).unwrap()
    }

    #[test]
    fn a_branch_that_is_linear_is_recovered() {
        let (d, n) = (12, 400);
        let (x, w, b) = (random(n, d), random(d, d), random(1, d));
        let target = x
            .matmul(&w.t().unwrap())
            .unwrap()
            .broadcast_add(&b)
            .unwrap();
        let sums = gram(&x, &target);
        let solution = solve(&sums, 0.0).unwrap();
        let difference = (weight(&solution.coefficients, 0..d)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            - w)
            .unwrap();
        assert!(
            difference
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
                < 1e-5
        );
        assert!(
            solution.residual_sq < 1e-9 * sums.target_sq,
            "{}",
            solution.residual_sq
        );
    }

    #[test]
    fn the_solution_is_that_of_a_dense_solve_of_the_same_pairs() {
        let (x, target) = (random(500, 8), random(500, 5));
        // in three shares, as calibration adds them
        let mut sums = None;
        for (x, t) in x
            .chunk(3, 0)
            .unwrap()
            .iter()
            .zip(target.chunk(3, 0).unwrap())
        {
            gram(x, &t).add_to(&mut sums).unwrap();
        }
        let sums = sums.unwrap();
        let solution = solve(&sums, 0.0).unwrap();
        let dense = {
            use faer::linalg::solvers::SolveLstsq;
            let z = to_faer(&with_ones(&x).unwrap()).unwrap();
            z.qr().solve_lstsq(to_faer(&target).unwrap())
        };
        let difference = (&solution.coefficients - &dense).norm_l2() / dense.norm_l2();
        assert!(difference < 1e-6, "{difference}");
        let rest = {
            let z = to_faer(&with_ones(&x).unwrap()).unwrap();
            (to_faer(&target).unwrap() - z * &solution.coefficients).squared_norm_l2()
        };
        assert!(
            (rest - solution.residual_sq).abs() < 1e-8 * rest,
            "{rest} {}",
            solution.residual_sq
        );
    }

    #[test]
    fn fewer_rows_than_columns_still_give_a_finite_layer() {
        let solution = solve(&gram(&random(3, 16), &random(3, 16)), 0.0).unwrap();
        weight(&solution.coefficients, 0..16).unwrap();
        assert!(solution.ridge > 0.0);
    }

    #[test]
    fn the_best_ridge_is_strong_where_rows_are_few_and_noisy() {
        let noisy = |n| {
            let x = random(n, 20);
            (
                gram(&x, &random(n, 3)),
                gram(&random(200, 20), &random(200, 3)),
            )
        };
        let (few, unseen) = noisy(24);
        let free = Problem::new(&few).unwrap().solve(1e-7).unwrap();
        let chosen = {
            let mut problem = Problem::new(&few).unwrap();
            let unseen = Problem::new(&unseen).unwrap();
            RIDGES.map(|r| unseen.residual(&problem.solve(r).unwrap().coefficients))
        };
        assert!(chosen[5] < chosen[0], "{chosen:?}");
        assert!(solve_with_best_ridge(few, unseen, &RIDGES).unwrap().ridge > free.ridge);
    }
}
