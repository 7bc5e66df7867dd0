//! Least squares behind a gate: R ≈ g ⊙ (Z B), where every row has its own gate over the columns.
//!
//! Each column j weights the rows by gⱼ², so each has its own normal equations (Σ gⱼ² z zᵀ) bⱼ = Σ gⱼ z rⱼ. Forming
//! them is d Gram matrices of width d, beyond reach at width 3072. The gate depends on timestep, guidance and pooled
//! text only, almost all of it on the timestep: the right-hand side is summed exactly, and for the matrix the gate's
//! square is averaged over timestep buckets, so that a few Gram matrices serve all columns. All columns are solved
//! together by conjugate gradients, preconditioned by the one Cholesky factor of the mean: one product of bounded size
//! per bucket and step.

use anyhow::{Result, bail, ensure};
use candle::{DType, Tensor};
use faer::{Mat, Side, linalg::solvers::Solve};

use super::{
    fit::{Solution, to_faer},
    sums::{of_samples, pick, square, with_bias},
};

/// Timestep buckets; each holds one Gram matrix.
pub const BUCKETS: usize = 8;
/// Steps of conjugate gradients at most.
const STEPS: usize = 60;
/// Residual of the normal equations, relative to the right-hand side, at which a solution counts as found.
const TOLERANCE: f64 = 1e-9;

/// Sums of a gated problem.
#[derive(Clone, Debug, Default)]
pub struct GatedGram {
    buckets: Vec<Option<Bucket>>,
    /// Σ zᵀ(g ⊙ r), (k, d).
    cross: Option<Tensor>,
    target_sq: f64,
}

#[derive(Clone, Debug)]
struct Bucket {
    /// Σ z zᵀ, (k, k).
    gram: Tensor,
    /// Σ g² over rows, (d).
    gate_sq: Tensor,
    rows: f64,
}

impl GatedGram {
    /// Adds samples: `z` (b, n, k − 1), to which a one is added for the bias, `target` (b, n, d), their `gate` (b, d) and
    /// times in \[0, 1\].
    ///
    /// # Errors
    /// When a product fails.
    pub fn add(&mut self, z: &Tensor, target: &Tensor, gate: &Tensor, times: &[f32]) -> Result<()> {
        self.buckets.resize(BUCKETS, None);
        let ones = with_bias(None, z)?;
        let mut members = vec![Vec::new(); BUCKETS];
        for (sample, t) in (0u32..).zip(times) {
            let index = (f64::from(*t) * BUCKETS as f64) as usize;
            members[index.min(BUCKETS - 1)].push(sample);
        }
        for (slot, members) in self.buckets.iter_mut().zip(members) {
            if members.is_empty() {
                continue;
            }
            let rows = (members.len() * z.dim(1)?) as f64;
            let members = Tensor::new(members, z.device())?;
            let take = |t: &Tensor| pick(t, Some(&members), None);
            let gate = take(gate)?;
            let gated = take(target)?.broadcast_mul(&gate.unsqueeze(1)?)?;
            let sums = of_samples(&take(z)?, &take(&ones)?, &gated)?;
            let gate_sq = (gate.to_dtype(DType::F64)?.sqr()?.sum(0)? * z.dim(1)? as f64)?;
            *slot = Some(match slot.take() {
                None => Bucket {
                    gram: sums.gram,
                    gate_sq,
                    rows,
                },
                Some(b) => Bucket {
                    gram: (b.gram + sums.gram)?,
                    gate_sq: (b.gate_sq + gate_sq)?,
                    rows: b.rows + rows,
                },
            });
            self.cross = Some(match self.cross.take() {
                None => sums.cross,
                Some(sum) => (sum + sums.cross)?,
            });
        }
        self.target_sq += square(target)?;
        Ok(())
    }

    /// Solves with a ridge relative to the mean diagonal of the gated matrix.
    ///
    /// # Errors
    /// When no rows were seen, or the sums are NaN, infinite or singular.
    pub fn solve(&self, ridge: f64) -> Result<Solution> {
        let Some(cross) = &self.cross else {
            bail!("no tokens were seen")
        };
        let cross = to_faer(cross)?;
        let (k, d) = (cross.nrows(), cross.ncols());
        let mut grams = Vec::new();
        let mut mean = Mat::<f64>::zeros(k, k);
        for bucket in self.buckets.iter().flatten() {
            let gram = to_faer(&bucket.gram)?;
            let gate: Vec<f64> = (bucket.gate_sq.to_vec1::<f64>()?)
                .iter()
                .map(|g| g / bucket.rows)
                .collect();
            let average = gate.iter().sum::<f64>() / d as f64;
            mean += &gram * faer::Scale(average);
            grams.push((gram, gate));
        }
        let diagonal = (0..k).map(|i| mean[(i, i)]).sum::<f64>() / k as f64;
        ensure!(
            diagonal.is_finite() && diagonal > 0.0,
            "the gate or the statistics are zero, NaN or infinite"
        );
        // no bound on how small a column's gate is: an absolute ridge keeps such columns near zero
        let lambda = ridge.max(1e-9) * diagonal;
        let mut preconditioner = mean;
        for i in 0..k {
            preconditioner[(i, i)] += lambda;
        }
        let Ok(factor) = preconditioner.llt(Side::Lower) else {
            bail!("the least-squares problem is singular")
        };
        let apply = |x: &Mat<f64>| -> Mat<f64> {
            let mut out = x * faer::Scale(lambda);
            for (gram, gate) in &grams {
                let weighted = Mat::from_fn(k, d, |i, j| x[(i, j)] * gate[j]);
                out += gram * &weighted;
            }
            out
        };
        let solution = conjugate_gradients(&cross, apply, |r| factor.solve(r));
        let fitted = apply(&solution);
        let mut explained = 0.0;
        for j in 0..d {
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

/// Solves A X = C for every column at once; A and its preconditioner are symmetric and positive definite by column.
fn conjugate_gradients(
    c: &Mat<f64>,
    apply: impl Fn(&Mat<f64>) -> Mat<f64>,
    precondition: impl Fn(&Mat<f64>) -> Mat<f64>,
) -> Mat<f64> {
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
        let ap = apply(&p);
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
            .all(|(l, n)| *l <= TOLERANCE * TOLERANCE * n)
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
    x
}

#[cfg(test)]
mod tests {
    use candle::Device;

    use super::*;
    use crate::calibrate::stats::with_ones;

    #[test]
    fn a_gated_linear_branch_is_recovered() {
        let random = |shape: (usize, usize)| Tensor::randn(0f64, 1., shape, &Device::Cpu).unwrap();
        let (d, b) = (6, random((7, 6)));
        let mut sums = GatedGram::default();
        // one gate for each bucket, so that averaging loses nothing
        let gates: Vec<Tensor> = (0..BUCKETS)
            .map(|_| random((1, d)).squeeze(0).unwrap())
            .collect();
        for sample in 0..4 * BUCKETS {
            let gate = &gates[sample % BUCKETS];
            let z = random((20, d));
            let target = with_ones(&z).unwrap().matmul(&b).unwrap();
            let target = target.broadcast_mul(gate).unwrap();
            let t = ((sample % BUCKETS) as f32 + 0.5) / BUCKETS as f32;
            let one = |t: &Tensor| t.unsqueeze(0).unwrap();
            sums.add(&one(&z), &one(&target), &one(gate), &[t]).unwrap();
        }
        let solution = sums.solve(0.0).unwrap();
        let difference = (&solution.coefficients - to_faer(&b).unwrap()).norm_l2();
        assert!(difference < 1e-4, "{difference}");
        assert!(solution.residual_sq < 1e-6 * sums.target_sq);
    }
}
