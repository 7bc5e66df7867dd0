//! Least squares behind a gate: R ≈ g ⊙ (Z B), where every sample has its own gate over the columns.
//!
//! Each column j weights the rows by gⱼ², so each has its own normal equations (Σ gⱼ² z zᵀ) bⱼ = Σ gⱼ z rⱼ. Forming
//! them is d Gram matrices of width d, beyond reach at width 3072. But applying all of them to one B is two products
//! over the rows, Zᵀ(g² ⊙ (Z B)), so all columns are solved together by conjugate gradients, exactly: a few tens of
//! passes over the stored pairs, and one matrix in memory: the Gram matrix weighted by the mean of g², whose Cholesky
//! factor preconditions.

use anyhow::{Context, Result, bail, ensure};
use candle::{DType, Device, Tensor};
use faer::{Mat, Side, linalg::solvers::Solve};

use super::{
    gram::{from_samples, square, with_bias},
    ridge::{Solution, to_faer},
};

/// Steps of conjugate gradients at most; each is one pass over the pairs.
const STEPS: usize = 100;
/// Residual of the normal equations of every column, relative to its right-hand side, at which a solution counts as
/// found: products are f64 on the CPU, and f32 on other devices.
const TOLERANCE: f64 = 1e-7;
const TOLERANCE_F32: f64 = 1e-5;

/// Sums of a gated problem.
#[derive(Clone, Debug, Default)]
pub struct GatedGram {
    /// Σ a z zᵀ with a the mean of g² over the columns, (k, k).
    mean: Option<Tensor>,
    /// Σ zᵀ(g ⊙ r), (k, d).
    cross: Option<Tensor>,
    target_sq: f64,
}

impl GatedGram {
    /// Adds samples: `z` (b, n, k − 1), to which a one is added for the bias, `target` (b, n, d), their `gate` (b, d).
    ///
    /// # Errors
    /// When a product fails.
    pub fn add(&mut self, z: &Tensor, target: &Tensor, gate: &Tensor) -> Result<()> {
        let ones = with_bias(None, z)?;
        let gated = target.broadcast_mul(&gate.unsqueeze(1)?)?;
        let root = gate.sqr()?.mean_keepdim(1)?.sqrt()?; // (b, 1)
        let weighted = z.broadcast_mul(&root.unsqueeze(2)?)?;
        let mean = from_samples(&weighted, &ones.broadcast_mul(&root)?, &gated)?.gram;
        let cross = from_samples(z, &ones, &gated)?.cross;
        let add = |sum: Option<Tensor>, share: Tensor| match sum {
            None => Ok(share),
            Some(sum) => sum + share,
        };
        self.mean = Some(add(self.mean.take(), mean)?);
        self.cross = Some(add(self.cross.take(), cross)?);
        self.target_sq += square(target)?;
        Ok(())
    }

    /// Solves with a ridge relative to the mean diagonal of the gated matrix. `normal` gives Σ zᵀ(g² ⊙ (z B)) over all
    /// samples that were added, (k, d), for B (k, d), both f64 on the CPU: the sum of [`normal_product`].
    ///
    /// # Errors
    /// When no rows were seen, the sums are NaN, infinite or singular, or `normal` fails.
    pub fn solve(
        &self,
        ridge: f64,
        device: &Device,
        normal: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
    ) -> Result<Solution> {
        let (Some(cross), Some(mean)) = (&self.cross, &self.mean) else {
            bail!("no tokens were seen")
        };
        let (cross, mut mean) = (to_faer(cross)?, to_faer(mean)?);
        let k = cross.nrows();
        let diagonal = (0..k).map(|i| mean[(i, i)]).sum::<f64>() / k as f64;
        ensure!(
            diagonal.is_finite() && diagonal > 0.0 && self.target_sq.is_finite(),
            "the gate or the statistics are zero, NaN or infinite"
        );
        // no bound on how small a column's gate is: an absolute ridge keeps such columns near zero
        let lambda = ridge.max(1e-9) * diagonal;
        for i in 0..k {
            mean[(i, i)] += lambda;
        }
        let Ok(factor) = mean.llt(Side::Lower) else {
            bail!("the least-squares problem is singular")
        };
        let mut apply = |b: &Mat<f64>| -> Result<Mat<f64>> {
            Ok(to_faer(&normal(&to_tensor(b)?)?)? + b * faer::Scale(lambda))
        };
        let tolerance = if device.is_cpu() {
            TOLERANCE
        } else {
            TOLERANCE_F32
        };
        let solution = conjugate_gradients(&cross, tolerance, &mut apply, |r| factor.solve(r))?;
        let fitted = apply(&solution)?;
        let mut explained = 0.0;
        for j in 0..cross.ncols() {
            for i in 0..k {
                explained += solution[(i, j)]
                    * (2.0 * cross[(i, j)] - fitted[(i, j)] + lambda * solution[(i, j)]);
            }
        }
        Ok(Solution {
            coefficients: solution,
            ridge,
            residual_sq: (self.target_sq - explained).max(0.0),
        })
    }
}

/// Zᵀ(g² ⊙ (Z B)) of the samples `z` (b, n, k − 1), with a one added for the bias, and their `gate` (b, d); B (k, d) in
/// the format of `z`, the result (k, d) in f64, both where `z` is.
///
/// # Errors
/// When shapes disagree or a product fails.
pub fn normal_product(z: &Tensor, gate: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (samples, tokens, inputs) = z.dims3()?;
    let rows = z.reshape(((), inputs))?;
    let y = rows
        .matmul(&b.narrow(0, 0, inputs)?)?
        .broadcast_add(&b.narrow(0, inputs, 1)?)?
        .reshape((samples, tokens, ()))?
        .broadcast_mul(&gate.sqr()?.unsqueeze(1)?)?
        .reshape((samples * tokens, ()))?;
    let out = [rows.t()?.matmul(&y)?, y.sum_keepdim(0)?];
    Ok(Tensor::cat(&out, 0)?.to_dtype(DType::F64)?)
}

fn to_tensor(m: &Mat<f64>) -> Result<Tensor> {
    let (rows, columns) = (m.nrows(), m.ncols());
    let values: Vec<f64> = (0..rows)
        .flat_map(|i| (0..columns).map(move |j| m[(i, j)]))
        .collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).context("coefficients")
}

/// Solves A X = C for every column at once; A and its preconditioner are symmetric and positive definite by column.
fn conjugate_gradients(
    c: &Mat<f64>,
    tolerance: f64,
    mut apply: impl FnMut(&Mat<f64>) -> Result<Mat<f64>>,
    precondition: impl Fn(&Mat<f64>) -> Mat<f64>,
) -> Result<Mat<f64>> {
    let (k, d) = (c.nrows(), c.ncols());
    let dots = |a: &Mat<f64>, b: &Mat<f64>| -> Vec<f64> {
        (0..d)
            .map(|j| (0..k).map(|i| a[(i, j)] * b[(i, j)]).sum())
            .collect()
    };
    let norms = dots(c, c);
    let mut x = Mat::<f64>::zeros(k, d);
    let mut r = c.clone();
    let mut z = precondition(&r);
    let mut p = z.clone();
    let mut rz = dots(&r, &z);
    for _ in 0..STEPS {
        let ap = apply(&p)?;
        let pap = dots(&p, &ap);
        let alpha: Vec<f64> = rz
            .iter()
            .zip(&pap)
            .map(|(a, b)| if *b > 0.0 { a / b } else { 0.0 })
            .collect();
        for j in 0..d {
            for i in 0..k {
                x[(i, j)] += alpha[j] * p[(i, j)];
                r[(i, j)] -= alpha[j] * ap[(i, j)];
            }
        }
        let left = dots(&r, &r);
        if left
            .iter()
            .zip(&norms)
            .all(|(l, n)| *l <= tolerance * tolerance * n)
        {
            break;
        }
        z = precondition(&r);
        let next = dots(&r, &z);
        let beta: Vec<f64> = next
            .iter()
            .zip(&rz)
            .map(|(a, b)| if *b > 0.0 { a / b } else { 0.0 })
            .collect();
        for j in 0..d {
            for i in 0..k {
                p[(i, j)] = z[(i, j)] + beta[j] * p[(i, j)];
            }
        }
        rz = next;
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::ridge::weight;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f64, 1., shape, &Device::Cpu).unwrap()
    }

    fn solved(z: &Tensor, target: &Tensor, gate: &Tensor, ridge: f64) -> Solution {
        let mut sums = GatedGram::default();
        // in two shares, as batches come
        let half = z.dim(0).unwrap() / 2;
        for start in [0, half] {
            let part = |t: &Tensor| t.narrow(0, start, half).unwrap();
            sums.add(&part(z), &part(target), &part(gate)).unwrap();
        }
        let mut normal = |b: &Tensor| normal_product(z, gate, b);
        sums.solve(ridge, &Device::Cpu, &mut normal).unwrap()
    }

    #[test]
    fn a_gated_linear_branch_is_recovered() {
        let (d, w, b) = (6, random(&[6, 6]), random(&[6]));
        let (z, gate) = (random(&[40, 9, d]), random(&[40, d]));
        let y = z.broadcast_matmul(&w).unwrap().broadcast_add(&b).unwrap();
        let target = y.broadcast_mul(&gate.unsqueeze(1).unwrap()).unwrap();
        let solution = solved(&z, &target, &gate, 0.0);
        let got = weight(&solution.coefficients, 0..d).unwrap();
        let difference = (got.to_dtype(DType::F64).unwrap() - w.t().unwrap()).unwrap();
        assert!(square(&difference).unwrap().sqrt() < 1e-5);
        assert!(solution.residual_sq < 1e-6 * square(&target).unwrap());
    }

    #[test]
    fn every_column_is_that_of_a_dense_solve_of_its_own_rows() {
        use faer::linalg::solvers::SolveLstsq;
        let (samples, tokens, d) = (50, 4, 5);
        let (z, gate) = (random(&[samples, tokens, 7]), random(&[samples, d]));
        let target = random(&[samples, tokens, d]);
        let solution = solved(&z, &target, &gate, 0.0);
        let rows = to_faer(&z.reshape(((), 7)).unwrap()).unwrap();
        let (gates, target) = (
            to_faer(&gate).unwrap(),
            to_faer(&target.reshape(((), d)).unwrap()).unwrap(),
        );
        for j in 0..d {
            let gated = Mat::from_fn(samples * tokens, 8, |i, l| {
                gates[(i / tokens, j)] * if l < 7 { rows[(i, l)] } else { 1.0 }
            });
            let column = Mat::from_fn(samples * tokens, 1, |i, _| target[(i, j)]);
            let dense = gated.qr().solve_lstsq(&column);
            let got = solution.coefficients.subcols(j, 1);
            let difference = (got - &dense).norm_l2() / dense.norm_l2();
            assert!(difference < 1e-6, "column {j}: {difference}");
        }
    }
}
