//! Muon (Jordan et al. 2024): a matrix moves along the orthogonal factor of its mean gradient, so all its directions are
//! learnt alike, the weak ones as fast as the strong.
//!
//! Needs one moment where AdamW needs two. Iteration and coefficients: <https://kellerjordan.github.io/posts/muon/>.

use std::collections::BTreeMap;

use anyhow::Result;
use candle::{DType, Tensor};

use crate::model::ops;

/// Of the iteration a x + b (x xᵀ) x + c (x xᵀ)² x: steep at zero, so that five of them bring every singular value that
/// counts to between 0.7 and 1.2.
const A: f64 = 3.4445;
const B: f64 = -4.7750;
const C: f64 = 2.0315;
const ITERATIONS: usize = 5;
/// Added to a gradient's norm: what is shorter does not move its matrix in full.
const SMALLEST: f64 = 1e-20;

/// From this many rows or columns on, GPUs iterate in bfloat16, as the authors do: f32 takes ten times as long, a layer of
/// FLUX as long as its block does.
const WIDE: usize = 1024;
/// A matrix this many times as long as wide, or as wide as long, is thin.
const THIN: usize = 4;

/// The orthogonal factor of each of `gradients`, approximately, scaled to a root mean square of about 1 as AdamW's updates
/// have; 0 for a gradient of 0.
///
/// # Errors
/// When they are no matrices.
pub fn updates(gradients: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut alike: BTreeMap<(bool, [usize; 2]), Vec<usize>> = BTreeMap::new();
    for (i, gradient) in gradients.iter().enumerate() {
        let (rows, columns) = gradient.dims2()?;
        let (least, most) = (rows.min(columns), rows.max(columns));
        // on a GPU small operations cost more than large ones
        let thin = !gradient.device().is_cpu() && THIN * least <= most;
        let shape = if thin {
            [least, least]
        } else {
            [rows, columns]
        };
        alike.entry((thin, shape)).or_default().push(i);
    }
    let mut out = vec![None; gradients.len()];
    for ((thin, _), which) in alike {
        let some: Vec<&Tensor> = which.iter().map(|i| &gradients[*i]).collect();
        let some = if thin { by_gram(&some) } else { whole(&some) }?;
        for (i, update) in which.into_iter().zip(some) {
            out[i] = Some(update);
        }
    }
    Ok(out.into_iter().flatten().collect())
}

/// Of matrices of one shape.
fn whole(gradients: &[&Tensor]) -> Result<Vec<Tensor>> {
    let (rows, columns) = gradients[0].dims2()?;
    let dtype = gradients[0].dtype();
    let narrow = rows.max(columns) >= WIDE && !gradients[0].device().is_cpu();
    // the smaller side decides what an iteration costs
    let turned = |x: Tensor| {
        if rows > columns {
            x.transpose(0, 1)?.contiguous()
        } else {
            Ok(x)
        }
    };
    let unit = gradients.iter().map(|gradient| {
        let mut x = turned((*gradient).clone())?;
        let norm = (ops::total(&x.sqr()?)?.sqrt()? + SMALLEST)?;
        if narrow {
            x = x.to_dtype(DType::BF16)?;
        }
        let norm = norm.to_dtype(x.dtype())?;
        x.broadcast_div(&norm)
    });
    let unit = unit.collect::<candle::Result<Vec<_>>>()?;
    let mut x = Tensor::stack(&unit, 0)?;
    drop(unit);
    let scale = (rows.max(columns) as f64).sqrt();
    for i in 0..ITERATIONS {
        // in 16 bits scaled in passing
        let by = if narrow && i + 1 == ITERATIONS {
            scale
        } else {
            1.0
        };
        let gram = x.matmul(&x.t()?)?;
        let polynomial = ops::multiply_add(gram.copy()?, B, [&gram, &gram], C)?;
        x = ops::multiply_add(x.copy()?, A * by, [&polynomial, &x], by)?;
    }
    let each = (0..gradients.len()).map(|i| {
        let x = turned(x.get(i)?)?.to_dtype(dtype)?;
        Ok(if narrow { x } else { (x * scale)? })
    });
    each.collect()
}

/// Of thin matrices with the same smaller side, by the product of each with itself, g = x xᵀ: what an iteration multiplies
/// x with is a polynomial in g, and so is the next g. All of them together take as many operations as one.
fn by_gram(gradients: &[&Tensor]) -> Result<Vec<Tensor>> {
    let wide = |x: &Tensor| x.dim(0).and_then(|rows| Ok(rows <= x.dim(1)?));
    let grams = gradients.iter().map(|x| {
        if wide(x)? {
            x.matmul(&x.t()?)
        } else {
            x.t()?.matmul(x)
        }
    });
    let gram = Tensor::stack(&grams.collect::<candle::Result<Vec<_>>>()?, 0)?;
    let side = gram.dim(1)?;
    let eye = Tensor::eye(side, gram.dtype(), gram.device())?;
    let trace = gram.broadcast_mul(&eye)?.sum_keepdim(2)?.sum_keepdim(1)?;
    let norm = (trace.sqrt()? + SMALLEST)?;
    let mut gram = gram.broadcast_div(&norm)?.broadcast_div(&norm)?;
    let mut factor = eye.broadcast_as(gram.shape())?.contiguous()?;
    for _ in 0..ITERATIONS {
        let polynomial = ((&gram * B)? + (gram.matmul(&gram)? * C)?)?;
        let polynomial = polynomial.broadcast_add(&(&eye * A)?)?;
        factor = polynomial.matmul(&factor)?;
        gram = polynomial.matmul(&gram)?.matmul(&polynomial)?;
    }
    let factor = factor.broadcast_div(&norm)?;
    let each = gradients.iter().enumerate().map(|(i, x)| {
        let scale = (x.dim(0)?.max(x.dim(1)?) as f64).sqrt();
        let factor = (factor.get(i)? * scale)?;
        if wide(x)? {
            factor.matmul(x)
        } else {
            x.matmul(&factor)
        }
    });
    Ok(each.collect::<candle::Result<_>>()?)
}

#[cfg(test)]
mod tests {
    use candle::Device;

    use super::*;
    use crate::sample::noise::Generator;

    fn update(gradient: &Tensor) -> Result<Tensor> {
        Ok(updates(std::slice::from_ref(gradient))?.remove(0))
    }

    #[test]
    fn many_at_once_are_what_each_is() {
        let all = [uneven(40, 12), (uneven(40, 12) * -3.0).unwrap()];
        for (gradient, together) in all.iter().zip(updates(&all).unwrap()) {
            let difference = (update(gradient).unwrap() - together).unwrap();
            let most = difference.abs().unwrap().max_all().unwrap();
            assert!(most.to_scalar::<f32>().unwrap() < 1e-6);
        }
    }

    /// A matrix whose singular values fall from 1 to 0.02.
    fn uneven(rows: usize, columns: usize) -> Tensor {
        let falling: Vec<f32> = (0..columns)
            .map(|i| 0.02f32.powf(i as f32 / columns as f32))
            .collect();
        let scale = Tensor::new(falling, &Device::Cpu).unwrap();
        Generator::new(7)
            .randn((rows, columns), &Device::Cpu)
            .unwrap()
            .broadcast_mul(&scale)
            .unwrap()
    }

    #[test]
    fn thin_ones_by_their_grams_are_what_each_is() {
        let all = [
            uneven(160, 12),
            uneven(12, 48),
            (uneven(60, 12) * -3.0).unwrap(),
        ];
        let thin = by_gram(&all.iter().collect::<Vec<_>>()).unwrap();
        for (gradient, thin) in all.iter().zip(thin) {
            let difference = (update(gradient).unwrap() - thin).unwrap();
            let most = difference.abs().unwrap().max_all().unwrap();
            assert!(most.to_scalar::<f32>().unwrap() < 1e-4);
        }
        let zero = Tensor::zeros((40, 4), DType::F32, &Device::Cpu).unwrap();
        let none = by_gram(&[&zero]).unwrap()[0].abs().unwrap();
        assert_eq!(
            none.max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
                .to_bits(),
            0
        );
    }

    /// A GPU takes thin matrices by their Gram matrices, and wide ones in bfloat16.
    #[test]
    fn a_gpu_moves_along_what_a_cpu_does() {
        let Ok(gpu) = Device::new_cuda(0) else {
            return crate::ui::skip("cuda");
        };
        for (shape, tolerance) in [((160, 12), 1e-4), ((24, 40), 1e-4), ((1100, 320), 0.05)] {
            let gradient = uneven(shape.0.max(shape.1), shape.0.min(shape.1));
            let gradient = if shape.0 < shape.1 {
                gradient.t().unwrap()
            } else {
                gradient
            };
            let gradient = gradient.contiguous().unwrap();
            let got = update(&gradient.to_device(&gpu).unwrap()).unwrap();
            let want = update(&gradient).unwrap();
            let got = got.to_device(&Device::Cpu).unwrap();
            let norm = |x: &Tensor| {
                let square = x.sqr().unwrap().sum_all().unwrap();
                square.to_scalar::<f32>().unwrap().sqrt()
            };
            let error = norm(&(got - &want).unwrap()) / norm(&want);
            assert!(error < tolerance, "{shape:?}: {error}");
        }
    }

    #[test]
    fn every_direction_moves_alike() {
        for (rows, columns) in [(96, 24), (24, 96)] {
            let tall = uneven(rows.max(columns), rows.min(columns));
            let gradient = if rows > columns {
                tall
            } else {
                tall.t().unwrap().contiguous().unwrap()
            };
            let moved = update(&gradient).unwrap();
            assert_eq!(moved.dims(), [rows, columns]);
            let side = (moved / (96f64).sqrt()).unwrap();
            let side = if rows > columns {
                side
            } else {
                side.t().unwrap()
            };
            // lengths of the columns, before 50 times apart, and how far they are from orthogonal
            let gram = side
                .t()
                .unwrap()
                .matmul(&side)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap();
            for (i, row) in gram.iter().enumerate() {
                for (j, value) in row.iter().enumerate() {
                    let expected = if i == j { 0.4..1.6 } else { -0.5..0.5 };
                    assert!(expected.contains(value), "{i}, {j}: {value}");
                }
            }
        }
    }

    #[test]
    fn it_follows_the_gradient() {
        let gradient = uneven(40, 12);
        let along = (update(&gradient).unwrap() * &gradient).unwrap();
        let along = along.sum_all().unwrap().to_scalar::<f32>().unwrap();
        let length = gradient
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(along > 0.0 && length > 0.0);
        let zero = Tensor::zeros((40, 12), DType::F32, &Device::Cpu).unwrap();
        let none = update(&zero).unwrap().abs().unwrap().max_all().unwrap();
        assert_eq!(none.to_scalar::<f32>().unwrap().to_bits(), 0);
    }
}
