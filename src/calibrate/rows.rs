//! The arithmetic of calibration: scalar sums over tokens, and the products of a least-squares problem. On the CPU in
//! one pass over the activations and half of each symmetric product; elsewhere with tensor operations, which are also
//! the slow twins. What the sums are for is `stats`' business.

use anyhow::Result;
use candle::{D, DType, Device, Tensor};
use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

/// Σ ‖x‖², Σ ‖y − x‖² and Σ cos(x, y) over the tokens of one sample.
pub(super) type SampleSums = [f64; 3];

/// The sums of each sample of `x`, `y` (batch, tokens, d).
pub(super) fn sample_sums(x: &Tensor, y: &Tensor) -> Result<Vec<SampleSums>> {
    if x.device().is_cpu() {
        sample_sums_cpu(x, y)
    } else {
        sample_sums_plain(x, y)
    }
}

fn sample_sums_cpu(x: &Tensor, y: &Tensor) -> Result<Vec<SampleSums>> {
    let (batch, tokens, width) = x.dims3()?;
    let values =
        |t: &Tensor| -> Result<Vec<f32>> { Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?) };
    let (x, y) = (values(x)?, values(y)?);
    let of_sample = |sample: usize| {
        let rows = sample * tokens..(sample + 1) * tokens;
        rows.fold([0.0; 3], |[input, change, cosine], row| {
            let row = row * width..(row + 1) * width;
            let [xx, yy, xy, dd] = row_sums(&x[row.clone()], &y[row]);
            [input + xx, change + dd, cosine + cosine_of(xx, yy, xy)]
        })
    };
    Ok((0..batch).into_par_iter().map(of_sample).collect())
}

/// ‖x‖², ‖y‖², x·y and ‖y − x‖² of one token. Several independent accumulators, so that they fill vector registers.
fn row_sums(x: &[f32], y: &[f32]) -> [f64; 4] {
    const LANES: usize = 8;
    let mut sums = [[0.0f64; LANES]; 4];
    let mut add = |lane: usize, x: f32, y: f32| {
        let (x, y) = (f64::from(x), f64::from(y));
        sums[0][lane] += x * x;
        sums[1][lane] += y * y;
        sums[2][lane] += x * y;
        sums[3][lane] += (y - x) * (y - x);
    };
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ys.remainder());
    for (x, y) in xs.zip(ys) {
        for lane in 0..LANES {
            add(lane, x[lane], y[lane]);
        }
    }
    for (x, y) in rest {
        add(0, *x, *y);
    }
    sums.map(|lanes| lanes.iter().sum())
}

fn cosine_of(xx: f64, yy: f64, xy: f64) -> f64 {
    xy / (xx * yy).sqrt().max(f64::MIN_POSITIVE)
}

fn sample_sums_plain(x: &Tensor, y: &Tensor) -> Result<Vec<SampleSums>> {
    let (x, y) = (x.to_dtype(DType::F32)?, y.to_dtype(DType::F32)?);
    let rows = |t: Tensor| -> Result<Tensor> { Ok(t.sum(D::Minus1)?.to_dtype(DType::F64)?) };
    let (xx, yy, xy) = (rows(x.sqr()?)?, rows(y.sqr()?)?, rows((&x * &y)?)?);
    let cosine = (xy / (&xx * yy)?.sqrt()?.maximum(f64::MIN_POSITIVE)?)?;
    let change = rows((y - x)?.sqr()?)?;
    let sums = [xx, change, cosine].map(|t| t.sum(1)); // (batch) each
    let [a, b, c] = sums;
    let sums = Tensor::stack(&[a?, b?, c?], 1)?.to_vec2::<f64>()?;
    Ok(sums.into_iter().map(|s| [s[0], s[1], s[2]]).collect())
}

/// ZᵀZ (k, k) and ZᵀR (k, d) in f64, of `z` (n, k) and `r` (n, d) in f64 or, off the CPU, in f32.
pub(super) fn products(z: &Tensor, r: &Tensor) -> Result<(Tensor, Tensor)> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f64, 1., shape, &Device::Cpu).unwrap()
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

    #[test]
    fn sums_of_samples_are_those_of_tensor_operations() {
        let f32 = |t: Tensor| t.to_dtype(DType::F32).unwrap();
        let (x, y) = (f32(random(&[3, 5, 21])), f32(random(&[3, 5, 21])));
        let fast = sample_sums_cpu(&x, &y).unwrap();
        let slow = sample_sums_plain(&x, &y).unwrap();
        for (fast, slow) in fast.iter().zip(&slow) {
            for (a, b) in fast.iter().zip(slow) {
                assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{a} {b}");
            }
        }
    }
}
