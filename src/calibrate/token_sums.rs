//! Scalar sums over the tokens of each sample: on the CPU in one pass over the activations, elsewhere with tensor
//! operations, which are also the reference of the tests.

use anyhow::Result;
use candle::{D, DType, Tensor};
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

#[cfg(test)]
mod tests {
    use candle::Device;

    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f64, 1., shape, &Device::Cpu).unwrap()
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
