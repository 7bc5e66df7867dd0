//! Muon (Jordan et al. 2024): a matrix moves along the orthogonal factor of its mean gradient, so all its directions are
//! learnt alike, the weak ones as fast as the strong.
//!
//! Needs one moment where AdamW needs two. Iteration and coefficients: <https://kellerjordan.github.io/posts/muon/>.

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
/// FLUX as long as its block does. On an H200 the factors of a LoRA took 5 of 50 ms of a step in f32.
const WIDE: usize = 1024;

/// The orthogonal factor of each of `gradients`, all (rows, columns), approximately, scaled to a root mean square of about
/// 1 as AdamW's updates have; 0 for a gradient of 0.
///
/// # Errors
/// When they are no matrices or differ in shape.
pub fn updates(gradients: &[Tensor]) -> Result<Vec<Tensor>> {
    let Some(first) = gradients.first() else {
        return Ok(Vec::new());
    };
    let (rows, columns) = first.dims2()?;
    // the smaller side decides what an iteration costs
    let turned = |x: Tensor| {
        if rows > columns {
            x.transpose(0, 1)?.contiguous()
        } else {
            Ok(x)
        }
    };
    let unit = gradients.iter().map(|gradient| {
        let x = turned(gradient.clone())?;
        let norm = (ops::total(&x.sqr()?)?.sqrt()? + SMALLEST)?;
        x.broadcast_div(&norm)
    });
    let unit = unit.collect::<candle::Result<Vec<_>>>()?;
    let mut x = Tensor::stack(&unit, 0)?;
    if rows.max(columns) >= WIDE && !x.device().is_cpu() {
        x = x.to_dtype(DType::BF16)?;
    }
    for _ in 0..ITERATIONS {
        let gram = x.matmul(&x.t()?)?;
        let polynomial = ((&gram * B)? + (gram.matmul(&gram)? * C)?)?;
        x = ((&x * A)? + polynomial.matmul(&x)?)?;
    }
    let scale = (rows.max(columns) as f64).sqrt();
    let each = (0..gradients.len()).map(|i| {
        let x = turned(x.get(i)?)?.to_dtype(first.dtype())?;
        Ok((x * scale)?)
    });
    each.collect()
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
