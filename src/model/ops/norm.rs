//! Layer norm without weights, then scale and shift, which open every branch of every block.
//! RMS norms of queries and keys are in `heads`.

use candle::{DType, Result, Tensor};
use rayon::prelude::*;

use super::cpu::{Element, Operand, by_dtype, for_rows, fusable, sum_map, sum_product, vectorized};
use super::custom_op::{by_recomputing, custom_op};
use super::types::NORM_EPS;
use super::{cuda, plain, sum_of_tokens};

/// `layer_norm(x) · (1 + scale) + shift`; statistics in f32 whatever the dtype (f64 stays f64).
///
/// `x` (batch, tokens, width), may be a view narrowed over tokens; `shift`, `scale` (batch, width), or (1, width) for
/// all. The result is contiguous.
pub fn norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (batch, _, width) = x.dims3()?;
    let whole = |t: &Tensor| match t.dims2()? {
        (rows, _) if rows == batch => Ok(t.clone()),
        _ => t.broadcast_as((batch, width)),
    };
    let (shift, scale) = (whole(shift)?, whole(scale)?);
    let data = [x.detach(), shift.detach(), scale.detach()];
    let y = match fusable(&data) {
        Some(dtype) => by_dtype!(dtype, fused(&data[0], &data[1], &data[2])),
        None => match cuda::norm_modulate(&data[0], &data[1], &data[2])? {
            Some(y) => Ok(y),
            None => plain::norm_modulate(&data[0], &data[1], &data[2]),
        },
    }?;
    custom_op(&[x, &shift, &scale], y, move |grad| {
        let [x, shift, scale] = &data;
        if fusable(&data) == Some(DType::F32) {
            fused_backward(x, scale, &grad.contiguous()?)
        } else if let Some([of_x, along]) = cuda::norm_backward(x, scale, grad)? {
            Ok(vec![
                Some(of_x),
                Some(sum_of_tokens(grad)?),
                Some(sum_of_tokens(&along)?),
            ])
        } else {
            by_recomputing(&[x, shift, scale], grad, |t| {
                plain::norm_modulate(&t[0], &t[1], &t[2])
            })
        }
    })
}

fn fused<T: Element>(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    let out = {
        let (x, shift, scale) = (Operand::new(x), Operand::new(shift), Operand::new(scale));
        let (x, shift, scale) = (x.rows::<T>()?, shift.rows::<T>()?, scale.rows::<T>()?);
        for_rows(
            batch * tokens,
            width,
            #[inline(always)]
            |i, out| {
                let (b, n) = (i / tokens, i % tokens);
                let (x, shift, scale) = (x.row(b, n), shift.row(b, 0), scale.row(b, 0));
                let mean = sum_map(x, |x| x) / width as f32;
                let variance = sum_map(x, |x| (x - mean) * (x - mean)) / width as f32;
                let factor = 1.0 / (variance + NORM_EPS as f32).sqrt();
                for (((out, x), shift), scale) in out.iter_mut().zip(x).zip(shift).zip(scale) {
                    *out = T::narrow(
                        (x.to_f32() - mean) * factor * (1.0 + scale.to_f32()) + shift.to_f32(),
                    );
                }
            },
        )
    };
    Tensor::from_vec(out, (batch, tokens, width), x.device())
}

/// Gradients of x, shift and scale from that of the result, f32 on the CPU.
///
/// With x̂ the normalised row and d = grad·(1 + scale): dx = (d − mean(d) − x̂·mean(d·x̂)) / deviation.
fn fused_backward(x: &Tensor, scale: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (batch, tokens, width) = x.dims3()?;
    let mut dx = vec![0f32; batch * tokens * width];
    let (mut dshift, mut dscale) = (vec![0f32; batch * width], vec![0f32; batch * width]);
    {
        let (x, scale, grad) = (Operand::new(x), Operand::new(scale), Operand::new(grad));
        let (x, scale, grad) = (x.rows::<f32>()?, scale.rows::<f32>()?, grad.rows::<f32>()?);
        dx.par_chunks_mut((tokens * width).max(1))
            .zip(dshift.par_chunks_mut(width.max(1)))
            .zip(dscale.par_chunks_mut(width.max(1)))
            .enumerate()
            .for_each(|(b, ((dx, dshift), dscale))| {
                vectorized(
                    #[inline(always)]
                    || {
                        let scale = scale.row(b, 0);
                        let mut hat = vec![0f32; width];
                        for (n, dx) in dx.chunks_exact_mut(width).enumerate() {
                            let (x, grad) = (x.row(b, n), grad.row(b, n));
                            let mean = sum_map(x, |x| x) / width as f32;
                            let variance = sum_map(x, |x| (x - mean) * (x - mean)) / width as f32;
                            let factor = 1.0 / (variance + NORM_EPS as f32).sqrt();
                            for (hat, x) in hat.iter_mut().zip(x) {
                                *hat = (x - mean) * factor;
                            }
                            let sums = dshift.iter_mut().zip(dscale.iter_mut());
                            for (((dshift, dscale), grad), hat) in sums.zip(grad).zip(&hat) {
                                *dshift += grad;
                                *dscale += grad * hat;
                            }
                            for ((dx, grad), scale) in dx.iter_mut().zip(grad).zip(scale) {
                                *dx = grad * (1.0 + scale);
                            }
                            let along_one = sum_map(dx, |d| d) / width as f32;
                            let along_hat = sum_product(dx, &hat) / width as f32;
                            for (dx, hat) in dx.iter_mut().zip(&hat) {
                                *dx = factor * (*dx - along_one - hat * along_hat);
                            }
                        }
                    },
                );
            });
    }
    let device = x.device();
    Ok(vec![
        Some(Tensor::from_vec(dx, (batch, tokens, width), device)?),
        Some(Tensor::from_vec(dshift, (batch, width), device)?),
        Some(Tensor::from_vec(dscale, (batch, width), device)?),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{close, random};

    #[test]
    fn fused_equals_plain_on_views_too() -> Result<()> {
        for (batch, tokens, width) in [(1, 1, 8), (1, 7, 37), (3, 5, 128), (3, 40, 513)] {
            let joint = random("x", (batch, tokens + 4, width))?;
            let modulation = random("m", (batch, 3 * width))?;
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 4e-3)] {
                let x = joint.to_dtype(dtype)?.narrow(1, 3, tokens)?;
                let modulation = modulation.to_dtype(dtype)?;
                let (shift, scale) = (
                    modulation.narrow(1, width, width)?,
                    modulation.narrow(1, 0, width)?,
                );
                assert!(fusable([&x, &shift, &scale]).is_some());
                close(
                    &norm_modulate(&x, &shift, &scale)?,
                    &plain::norm_modulate(&x, &shift, &scale)?,
                    tolerance,
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn rows_come_out_with_the_asked_mean_and_spread() -> Result<()> {
        let x = (random("x", (2, 3, 64))? * 5.0)?;
        let (shift, scale) = (
            Tensor::full(0.5f32, (2, 64), x.device())?,
            Tensor::full(1f32, (2, 64), x.device())?,
        );
        let y = norm_modulate(&x, &shift, &scale)?;
        let mean = y.mean_keepdim(2)?;
        let spread = y.broadcast_sub(&mean)?.sqr()?.mean_keepdim(2)?.sqrt()?;
        close(&mean, &Tensor::full(0.5f32, (2, 3, 1), x.device())?, 1e-5)?;
        close(&spread, &Tensor::full(2f32, (2, 3, 1), x.device())?, 1e-5)
    }
}
